"""What a search's lookahead costs: machines that wait, and trials that know less.

Searches three settings of a made-up training whose best is known, with the search's own sampler,
pruner and window: a trial knows those before its window alone. Draws the mean regret (how far the
best finished trial is below the best there is) over trials, and the share of time that workers are
busy, for several windows. Trainings are simulated, their length differs, nothing is trained.

Example:
  python benchmarks/lookahead.py --seeds 20
"""

import argparse
import heapq
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import matplotlib as mpl  # noqa: E402
import numpy as np  # noqa: E402
import optuna  # noqa: E402
from optuna.trial import FrozenTrial, TrialState  # noqa: E402

from nflab.searching.distributions import distributions, settings_of  # noqa: E402
from nflab.searching.foresight import REDUCTION_FACTOR, Foresight  # noqa: E402
from nflab.settings.search_space import scales  # noqa: E402

SCALES = scales(
    (
        "base_learning_rate=0.05..6.4:log",
        "clipping=0.01..0.64:log,none",
        "augmentation_level=0..10",
    )
)

EPOCHS, FIRST_RUNG = 40, 10

BEST = 99.0


def top1(settings: dict[str, Any], epoch: int, noise: np.ndarray) -> float:
    """Validation top-1 of the made-up training."""
    rate = np.log2(settings["base_learning_rate"] / 1.6)
    clipping = 6.0 if settings["clipping"] is None else np.log2(settings["clipping"] / 0.08)
    # The larger the rate, the smaller the clipping it needs.
    loss = 1.2 * rate**2 + 0.8 * (clipping + 0.7 * rate) ** 2
    loss += 0.1 * (settings["augmentation_level"] - 4) ** 2
    learnt = 1 - np.exp(-epoch / 8)
    return float(max(10.0, BEST - loss) * learnt + 0.3 * noise[epoch])


def search(trials: int, window: int, seed: int) -> tuple[list[float], list[int]]:
    """One search.

    Returns:
        regret after each trial, in points, and epochs of each trial.
    """
    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=FIRST_RUNG, reduction_factor=REDUCTION_FACTOR
    )
    scale = distributions(SCALES)
    rng = np.random.default_rng(seed)
    known: list[FrozenTrial] = []
    regrets, lengths = [], []
    best = 0.0
    for n in range(trials):
        past = known[: max(0, n + 1 - window)]
        foresight = Foresight(past, int(rng.integers(2**32)), pruner)
        drawn = foresight.propose(scale)
        noise = rng.normal(size=EPOCHS + 1)
        values, cut = {}, False
        for epoch in range(1, EPOCHS + 1):
            values[epoch] = top1(settings_of(SCALES, drawn), epoch, noise)
            cut = foresight.report(values[epoch], epoch) is not None and epoch < EPOCHS
            if cut:
                break
        known.append(
            optuna.trial.create_trial(
                state=TrialState.PRUNED if cut else TrialState.COMPLETE,
                value=values[epoch],
                params=drawn,
                distributions=scale,
                intermediate_values=values,
                system_attrs=foresight.rungs,
            )
        )
        if not cut:
            best = max(best, top1(settings_of(SCALES, drawn), EPOCHS, np.zeros(EPOCHS + 1)))
        regrets.append(BEST * (1 - np.exp(-EPOCHS / 8)) - best)
        lengths.append(epoch)
    return regrets, lengths


def busy(lengths: list[int], window: int, workers: int, seed: int) -> float:
    """Share of time in which workers train, where trials begin as the window allows."""
    rng = np.random.default_rng(seed)
    seconds = [length * rng.lognormal(sigma=0.3) for length in lengths]
    free = [0.0] * workers
    ends: list[float] = []
    for n, taken in enumerate(seconds):
        before = max(ends[: max(0, n + 1 - window)], default=0.0)
        begun = max(heapq.heappop(free), before)
        ends.append(begun + taken)
        heapq.heappush(free, begun + taken)
    return sum(seconds) / (workers * max(ends))


def main() -> None:
    """Searches, prints and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--output", type=Path, default=ROOT / "docs/figures/lookahead.png")
    asked = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    shares: dict[int, list[float]] = {workers: [] for workers in asked.workers}
    for window in asked.windows:
        runs = [search(asked.trials, window, seed) for seed in range(asked.seeds)]
        regrets = np.array([regret for regret, _ in runs])
        mean, error = regrets.mean(0), regrets.std(0, ddof=1) / asked.seeds**0.5
        trial = np.arange(1, asked.trials + 1)
        (line,) = left.plot(trial, mean, label=f"lookahead {window}")
        left.fill_between(trial, mean - error, mean + error, color=line.get_color(), alpha=0.2)
        half, end = mean[asked.trials // 2 - 1], mean[-1]
        told = f"lookahead {window}: regret {half:.2f} after {asked.trials // 2} trials, {end:.2f} "
        for workers in asked.workers:
            share = np.mean([busy(run[1], window, workers, n) for n, run in enumerate(runs)])
            shares[workers].append(float(share))
            told += f"; {workers} workers {share:.0%} busy"
        print(told)
    left.set_yscale("log")
    left.set_xlabel("trials")
    left.set_ylabel(f"regret (points; mean of {asked.seeds} seeds)")
    left.legend(frameon=False)
    for workers, share in shares.items():
        right.plot(
            range(len(share)), [100 * one for one in share], "o-", label=f"{workers} workers"
        )
    right.set_xticks(range(len(asked.windows)), [str(window) for window in asked.windows])
    right.set_ylim(0, 102)
    right.set_xlabel("lookahead")
    right.set_ylabel("time in which workers train (%)")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(asked.output, dpi=150)


if __name__ == "__main__":
    main()
