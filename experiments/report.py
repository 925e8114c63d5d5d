"""What do all recorded runs say?

Reads MLflow alone, at any time, and writes tables (Markdown and Parquet), figures and one HTML
page that needs nothing beside it: the ablations beside the paper's own findings, and every sweep.

Example:
  python experiments/report.py --output report
"""

from dataclasses import dataclass
from pathlib import Path

import _start  # noqa: F401

from nflab.settings import locations
from nflab.settings.config import RunConfig
from nflab.terminal import command_line
from nflab.terminal.wording import console


@dataclass(frozen=True)
class Report:
    """What to read and where to write."""

    output: Path = Path("report")
    """Folder of the report."""
    tracking_uri: str | None = None
    """MLflow store or server; default: $MLFLOW_TRACKING_URI, else mlflow.db in the checkout."""


def main(asked: Report) -> None:
    """Writes the report."""
    from nflab.reporting.report import (
        write_report,  # takes seconds: a wrong flag is answered sooner
    )

    uri = locations.tracking_uri(RunConfig(tracking_uri=asked.tracking_uri))
    console().print("Report:", *write_report(uri, asked.output.expanduser()), markup=False)


if __name__ == "__main__":
    command_line.command(Report, main, __doc__)
