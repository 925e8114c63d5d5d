"""What do all recorded runs say?

Reads MLflow alone, at any time, and writes tables (Markdown and Parquet), figures and one HTML
page that needs nothing beside it: the ablations beside the paper's own findings, and every sweep.
All cells of the ablations stand in one table, cells.parquet; --from FOLDER draws them again from
the table there, or from those of several folders.

Example:
  python experiments/report.py --output report
  python experiments/report.py --from results report --output results
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import _start  # noqa: F401
import tyro

from nflab.settings import locations
from nflab.settings.config import RunConfig
from nflab.terminal import command_line
from nflab.terminal.wording import console


@dataclass(frozen=True)
class Report:
    """What to read and where to write."""

    output: Path = Path("report")
    """Folder of the report."""
    sources: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Folders of earlier reports, to draw again from their cells.parquet in place of MLflow; of a
    cell that several have the last one's counts."""
    tracking_uri: str | None = None
    """MLflow store or server; default: $MLFLOW_TRACKING_URI, else mlflow.db in the checkout."""


def main(asked: Report) -> None:
    """Writes the report."""
    # Takes seconds: a wrong flag is answered sooner.
    from nflab.reporting.report import write_report, write_report_from

    output = asked.output.expanduser()
    if asked.sources:
        written = write_report_from([source.expanduser() for source in asked.sources], output)
    else:
        uri = locations.tracking_uri(RunConfig(tracking_uri=asked.tracking_uri))
        written = write_report(uri, output)
    console().print("Report:", *written, markup=False)


if __name__ == "__main__":
    command_line.command(Report, main, __doc__)
