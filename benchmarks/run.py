"""All benchmarks of this machine, one table: `make bench`.

Each runs in a process of its own and prints its rows when it is through. Writes all rows to
benchmarks/latest.json. With --check it compares them with benchmarks/kept.json, and fails where a
ratio is more than 15 % worse; with --keep they are what is kept, in docs/benchmarks.md too.

Example:
  python benchmarks/run.py --only optimizer_pass step
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.compare import table  # noqa: E402

LATEST, KEPT = ROOT / "benchmarks/latest.json", ROOT / "benchmarks/kept.json"
PAGE, FIGURE = ROOT / "docs/benchmarks.md", ROOT / "docs/figures/benchmarks.png"

WORSE = 0.15
"""Part of a ratio by which it may be worse than the one that is kept."""

RUNS = {
    "optimizer_pass": ["optimizer_pass"],
    "step": ["step", "--target", "1.25"],
    "step of nf_resnet50": [
        "step",
        *("--model", "nf_resnet50", "--batch-size", "8", "--image-size", "128"),
        *("--target", "1.15"),
    ],
    "efficientnet": ["efficientnet", "--rounds", "3"],
    "micro_batches": ["micro_batches", "--rounds", "7"],
    "diagnostics": ["diagnostics"],
    "loading": ["loading", "--rounds", "5"],
    "training": ["training", "--rounds", "2"],
    "trials": ["trials", "--rounds", "1"],
}


def measure(name: str) -> list[dict[str, Any]] | None:
    """Rows of one benchmark; None if it failed."""
    script, *flags = RUNS[name]
    command = [sys.executable, str(ROOT / f"benchmarks/{script}.py"), *flags, "--json"]
    begun = time.monotonic()
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
    if done.returncode != 0:
        print(f"{name} failed: {' '.join(command)}", file=sys.stderr)
        return None
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def worse(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> list[str]:
    """What became more than 15 % worse, in words."""
    before = {(row["name"], row["peer"].partition(",")[0]): row["ratio"] for row in kept}
    told = []
    for row in rows:
        past = before.get((row["name"], row["peer"].partition(",")[0]))
        if past is None:
            continue
        change = row["ratio"] / past if row["bound"] == "most" else past / row["ratio"]
        if change > 1 + WORSE:
            told.append(f"{row['name']} ({row['peer']}): {row['ratio']:.2f}, was {past:.2f}")
    return told


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """A page whose first table is of these rows."""
    lines = page.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("|"))
    after = next(n for n, line in enumerate(lines) if n > first and not line.startswith("|"))
    return "\n".join([*lines[:first], table(rows), *lines[after:]]) + "\n"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Each ratio with its quartiles, beside its target."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        color = {None: "tab:gray", True: "tab:blue", False: "tab:red"}[row["met"]]
        spread = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
        axes.errorbar(row["ratio"], place, xerr=spread, fmt="o", color=color, capsize=3)
        if row["target"] is not None:
            axes.plot([row["target"]] * 2, [place - 0.35, place + 0.35], color="black")
    names = [f"{row['name']}\nto {row['peer']}" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_xscale("log")
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="tab:gray", linewidth=0.5)
    axes.set_xlabel("ratio with its quartiles; the line is the target (blue met, red not)")
    figure.savefig(file, dpi=150)


def main() -> int:
    """Runs, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    found = [measure(name) for name in asked.only]
    rows = [row for some in found for row in some or ()]
    LATEST.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    if asked.keep:
        names = {row["name"] for row in rows}
        kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else []
        rows = [row for row in kept if row["name"] not in names] + rows
        KEPT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
        draw(rows, FIGURE)
    failed = worse(rows, json.loads(KEPT.read_text())) if asked.check else []
    for told in failed:
        print(f"worse: {told}", file=sys.stderr)
    return 1 if failed or None in found else 0


if __name__ == "__main__":
    sys.exit(main())
