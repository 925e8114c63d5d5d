"""Configurations of studies: a search or a grid around one training."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from nflab.settings.config import Config
from nflab.settings.flags import float_or, int_or
from nflab.settings.leaves import flat
from nflab.settings.objectives import DEFAULT


@dataclass(frozen=True)
class SearchConfig:
    """How far to search."""

    trials: int = 20
    """Configurations to try."""
    lookahead: Annotated[int | None, int_or("auto")] = None
    """So many trials run at once at most. Each begins when all but the last of them before it have
    ended, and what is proposed for it, and where it is cut, rests on these alone: so a search is
    the same on any cluster. auto takes the recipe's."""
    search: tuple[str, ...] = ()
    """What to search, as base_learning_rate=0.05..1.6:log clipping=0.01..0.64:log,none
    model=ONE,OTHER mixup; default: the recipe's clipping, batch size and augmentation level."""
    fix: tuple[str, ...] = ()
    """Settings of the search to leave as they are."""
    tries: Annotated[tuple[str, ...], tyro.conf.arg(name="try")] = ()
    """Settings of the first trials, as clipping=0.16,batch_size=32; what one leaves out is proposed
    as ever."""
    earlier: Annotated[tuple[str, ...], tyro.conf.arg(name="from")] = ()
    """Names of sweeps and grids, of the same network, dataset and epochs, whose results what
    proposes knows from the beginning; they are no trials of this search."""
    sampler: str = "tpe"
    """What proposes: Optuna's tpe, its gp (a Gaussian process: slower, for few trials), random, or
    qmc (a Sobol sequence: spread evenly, whatever was found)."""
    pruner: str = "asha"
    """What cuts poor trials early: asha, or none."""
    objectives: tuple[str, ...] = DEFAULT
    """What is aimed at: val_top1 alone, or also val_loss, images_per_second of the last epoch,
    seconds or cost_usd of a training; of several the answer is a front, and no trial is cut
    (--pruner none)."""
    dry_run: bool = False
    """Say what the search would take in time, and in money where machines have a price; run
    nothing."""
    max_cost: Annotated[float | None, float_or("none")] = None
    """USD at which to stop, by the prices of nflab/cluster/prices.csv: running trials end with
    their next epoch, and --resume NAME --max-cost MORE goes on. Of a cluster on AWS all is
    counted, elsewhere training alone."""
    retry_failed: bool = False
    """With --resume: train again the trials that failed."""
    searched: Annotated[tuple[str, ...], tyro.conf.Suppress] = (
        "clipping",
        "batch_size",
        "augmentation_level",
    )
    """Leaf names of what is searched; the rest is fixed."""


@dataclass(frozen=True)
class FinalsConfig:
    """How the winners are told from the lucky."""

    finalists: int = 0
    """How many of the best settings to repeat over fresh seeds, with the configuration itself as
    their baseline; 0 for none."""
    final_seeds: int = 5
    """How many seeds to repeat them with, at least 2."""

    @property
    def trainings(self) -> int:
        """How many finals train, at most."""
        return (self.finalists + 1) * self.final_seeds if self.finalists else 0


@dataclass(frozen=True)
class SweepConfig(Config):
    """A search around one configuration."""

    search: SearchConfig = field(default_factory=SearchConfig)
    finals: FinalsConfig = field(default_factory=FinalsConfig)


@dataclass(frozen=True)
class GridConfig:
    """How often, and whether again."""

    seeds: int = 2
    """How many seeds to repeat everything with, from --seed on."""
    dry_run: bool = False
    """List what would run and what it would take in time, and in money where machines have a price;
    run nothing."""
    max_cost: Annotated[float | None, float_or("none")] = None
    """USD at which to stop, by the prices of nflab/cluster/prices.csv: running cells end with
    their next epoch, and --resume NAME --max-cost MORE goes on. Of a cluster on AWS all is
    counted, elsewhere training alone."""
    force: bool = False
    """Run again what has a result; the new one takes the old one's place."""


@dataclass(frozen=True)
class GridOfConfigs(Config):
    """A grid around one configuration."""

    grid: GridConfig = field(default_factory=GridConfig)

    def seeds(self) -> range:
        """What everything is repeated with."""
        return range(self.run.seed, self.run.seed + self.grid.seeds)


@dataclass(frozen=True)
class ClippingCells:
    """Which batch sizes and clippings are compared, and whether to insist."""

    batch_sizes: tuple[int, ...] = ()
    """Batch sizes; none given takes the recipe's."""
    clippings: tuple[float, ...] = ()
    """AGC thresholds beside no clipping; none given takes the recipe's."""
    check: bool = False
    """End with exit code 1 unless the paper's three findings hold."""


@dataclass(frozen=True)
class ClippingConfig(GridOfConfigs):
    """Clipping against batch size."""

    cells: ClippingCells = field(default_factory=ClippingCells)
    finals: FinalsConfig = field(default_factory=FinalsConfig)


@dataclass(frozen=True)
class LearningRateCells:
    """Which learning rates are compared, and where."""

    batch_sizes: tuple[int, ...] = ()
    """Batch sizes; none given takes the recipe's smallest and largest."""
    clippings: tuple[float, ...] = ()
    """AGC threshold at each of them; none given takes those that did best on validation in
    clipping_vs_batch_size.py."""
    base_learning_rates: tuple[float, ...] = ()
    """Peak learning rates for 256 images; none given takes the configuration's, from a sixteenth
    of it to twice as much."""


@dataclass(frozen=True)
class LearningRateConfig(GridOfConfigs):
    """The learning rate, with and without clipping."""

    cells: LearningRateCells = field(default_factory=LearningRateCells)


@dataclass(frozen=True)
class LayersCells:
    """Which layers are clipped."""

    subsets: tuple[str, ...] = ()
    """Sets of clipped parts to compare, as `stem+stage1+stage2` or `none`; none given takes every
    subset of the stem, the stages and the head."""


@dataclass(frozen=True)
class LayersConfig(GridOfConfigs):
    """Which layers to clip."""

    cells: LayersCells = field(default_factory=LayersCells)
    finals: FinalsConfig = field(default_factory=FinalsConfig)


@dataclass(frozen=True)
class AugmentationCells:
    """Which augmentations are compared."""

    levels: tuple[int, ...] = (0, 2, 4, 6, 8, 10)
    """Levels of RandAugment on the curve of strength."""
    ladder_level: int = 4
    """RandAugment's level on the ladder, at least 1."""


@dataclass(frozen=True)
class AugmentationConfigs(GridOfConfigs):
    """Augmentation, step by step and by strength."""

    cells: AugmentationCells = field(default_factory=AugmentationCells)
    finals: FinalsConfig = field(default_factory=FinalsConfig)


@dataclass(frozen=True)
class PretrainingConfig:
    """What networks are pre-trained on before they are fine-tuned on the dataset."""

    source: str = "digits:0-4"
    """Dataset to pre-train on, given as --dataset is."""
    source_epochs: int = 40
    """Passes over it."""
    source_learning_rate: float = 1.6
    """Peak learning rate for 256 images in pre-training, and in training from scratch."""


@dataclass(frozen=True)
class TransferConfig(GridOfConfigs):
    """A comparison of networks that are pre-trained and fine-tuned alike."""

    grid: GridConfig = field(default_factory=lambda: GridConfig(seeds=5))
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)


def needs_prices(config: Config) -> bool:
    """Whether a study can be run only where each machine has a price."""
    told = flat(config)
    return told.get("max_cost") is not None or "cost_usd" in told.get("objectives", ())
