"""What does pre-training give a network without normalisation, and its batch-normalised twin?

Pre-trains both on one dataset, fine-tunes both on another under a new classifier, and trains both
on that from scratch for as many epochs, over several seeds. Run again, it trains only what is
missing.

Example:
  python experiments/transfer.py --source digits:0-4 --dataset digits:5-9 --seeds 5
"""

from typing import TYPE_CHECKING

import _start  # noqa: F401
from rich.table import Table

from nflab.learning.validation import validate
from nflab.settings import locations
from nflab.settings.errors import require
from nflab.settings.leaves import replace
from nflab.settings.studies import TransferConfig
from nflab.terminal import command_line
from nflab.terminal.wording import console

if TYPE_CHECKING:
    import pandas as pd

    from nflab.studies.grid import Grid

STARTS = ("pre-trained", "from scratch")


def main(config: TransferConfig, resume: bool) -> None:
    """Trains all networks, then compares them."""
    from nflab.analysis.findings import twins
    from nflab.studies.grid import open_grid  # takes seconds: a wrong flag is answered sooner

    given = config.pretraining
    require(config.model.pretrained is None, "--pretrained is what this experiment makes itself")
    networks = twins(config.base())
    target = config.base()
    source = replace(
        target,
        dataset=locations.absolute(given.source),
        epochs=given.source_epochs,
        base_learning_rate=given.source_learning_rate,
    )
    for settings in networks.values():
        validate(replace(source, **settings))
        validate(replace(target, **settings, base_learning_rate=given.source_learning_rate))
    runs = [(name, seed) for seed in config.seeds() for name in networks]
    with open_grid(config, "transfer") as grid:
        first = [{**networks[name], "seed": seed} for name, seed in runs]
        if config.grid.dry_run:
            console().print(
                f"Trainings on {given.source}, after which {2 * len(runs)} follow on "
                f"{config.data.dataset}, from their weights and from scratch:",
                markup=False,
            )
        outcomes = grid.run(source, first, keep_weights=True).outcome
        labels, second = [], []
        for (name, _), settings, outcome in zip(runs, first, outcomes, strict=True):
            if outcome == "finished":
                weights = grid.weights(replace(source, **settings))
                labels.append((name, STARTS[0]))
                second.append({**settings, "pretrained": weights})
            labels.append((name, STARTS[1]))
            second.append({**settings, "base_learning_rate": given.source_learning_rate})
        rows = grid.run(target, second)
        rows[["network", "start"]] = labels
        show(rows, config, grid)


def show(rows: "pd.DataFrame", config: TransferConfig, grid: "Grid") -> None:
    """Prints and records what pre-training gave each network, with its figure.

    Args:
        rows: one for each network, start and seed (see `Tracker.cells`).
    """
    from nflab.analysis.figures import draw_transfer
    from nflab.analysis.findings import software
    from nflab.analysis.statistics import estimate, verdict
    from nflab.recording.provenance import software_tags

    finished = rows[rows.outcome == "finished"]
    results = {
        (network, start): finished[(finished.network == network) & (finished.start == start)]
        for network in rows.network.unique()
        for start in STARTS
    }
    top1 = {key: runs.set_index("seed").test_top1 for key, runs in results.items()}
    table = Table(box=None, pad_edge=False)
    for column in ("network", "start", "test top-1 (%), mean ± sd (seeds)", "diverged or failed"):
        table.add_column(column)
    for (network, start), values in top1.items():
        mean = str(estimate(values.tolist())) if len(values) else "none finished"
        table.add_row(network, start, mean, str(config.grid.seeds - len(values)))

    def compared(what: str, one: tuple[str, str], other: tuple[str, str]) -> str:
        # Paired: both have the same seeds.
        pairs = (top1[one] - top1[other]).dropna().tolist()
        if not pairs:
            return f"{what}: no seed has both results"
        return f"{what}: {verdict(estimate(pairs))}"

    one, other = rows.network.unique()
    lines = [
        *(
            compared(f"pre-training gives {n}", (n, STARTS[0]), (n, STARTS[1]))
            for n in (one, other)
        ),
        compared(f"{one} above {other}, pre-trained", (one, STARTS[0]), (other, STARTS[0])),
        compared(f"{one} above {other}, from scratch", (one, STARTS[1]), (other, STARTS[1])),
        *software(rows, software_tags()),
    ]
    out = console()
    out.print(table)
    out.print("\n".join(lines))
    curves = {
        key: [grid.tracker.history(run_id, "val_top1") for run_id in runs.run_id]
        for key, runs in results.items()
        if len(runs)
    }
    datasets = f"{config.pretraining.source}, then {config.data.dataset}"
    title = f"{config.model.model} and its twin: {datasets}"
    drawn = {key: values.tolist() for key, values in top1.items()}
    drawings = {"transfer": lambda path: draw_transfer(curves, drawn, path, title)}
    (figure,) = grid.record(rows, lines, drawings)
    out.print(f"Figure: {figure}")
    out.print(f"Browse: {locations.browse(config.run)}")


if __name__ == "__main__":
    command_line.main(TransferConfig, main, __doc__, recipe="digits_finetune")
