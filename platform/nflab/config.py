"""The one configuration object that flows, unchanged, from the command line to the training loop.

Frozen dataclasses nested by concern. Leaf names are unique over all parts, so a configuration also
has a flat face: command-line flags (`--batch-size`), MLflow parameters (`batch_size`).
"""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro


def _or(word: str, kind: type[float] | type[int]) -> Any:
    """Command-line form of `kind | None` in which `word` stands for None."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{kind.__name__.upper()}|{word}",
        instance_from_str=lambda args: None if args[0] == word else kind(args[0]),
        is_instance=lambda value: value is None or isinstance(value, float | int),
        str_from_instance=lambda value: [word if value is None else f"{value:g}"],
    )


def _float_or(word: str) -> Any:
    return _or(word, float)


def _int_or(word: str) -> Any:
    return _or(word, int)


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence for the user."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained."""

    model: str = "dm_nf_resnet_digits"
    """Model name, as listed by `nfnet.list_models()`."""
    drop_rate: float = 0.0
    """Dropout rate before the classifier, in [0, 1)."""
    stochdepth_rate: float = 0.0
    """Stochastic depth: drop rate of the last block, growing linearly with depth, in [0, 1)."""
    pretrained: str | None = None
    """Weights to start from, under a new classifier: a safetensors or PyTorch file, the authors'
    Haiku pickle, or `hub` for timm's copy on the Hugging Face hub."""
    frozen: tuple[str, ...] = ()
    """Parts that are not trained: stem, stage1, stage2, ..., final_conv."""


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on."""

    dataset: str = "digits"
    """`digits` (embedded: scikit-learn's 1797 real handwritten digits; `digits:0-4` are those of
    some classes), a folder of images in
    ImageNet's layout (train/CLASS/..., val/CLASS/...), or one with torchvision's CIFAR files."""
    image_size: Annotated[int | None, _int_or("auto")] = None
    """Pixels along each side of images from such a layout, in training and evaluation; auto takes
    the model's own two sizes."""


@dataclass(frozen=True)
class AugmentationConfig:
    """How training images are varied, beyond the dataset's own random crop."""

    augmentation_level: int = 0
    """Strength of the authors' RandAugment: 0 is off, 10 the strongest that its operations were
    made for, above which they extrapolate."""
    augmentation_layers: int = 4
    """Random operations that RandAugment applies to each image."""
    mixup: bool = False
    """Blend pairs of images (half of each batch if CutMix is on too)."""
    cutmix: bool = False
    """Paste a box of one image into another (half of each batch if MixUp is on too)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD with Nesterov momentum and adaptive gradient clipping (AGC)."""

    batch_size: int = 32
    """Images that one optimizer step averages, over all workers."""
    clipping: Annotated[float | None, _float_or("none")] = 0.16
    """AGC's threshold: the largest ratio of gradient norm to weight norm a unit may have, > 0."""
    unclipped: tuple[str, ...] = ("head",)
    """Parts that AGC leaves alone: stem, stage1, stage2, ..., final_conv, head (the classifier)."""
    base_learning_rate: float = 0.1
    """Peak learning rate for 256 images; the peak is this x batch_size / 256."""
    momentum: float = 0.9
    """Nesterov momentum, in [0, 1)."""
    weight_decay: float = 2e-5
    """Weight decay of everything but gains and biases."""
    label_smoothing: float = 0.1
    """Probability mass spread evenly over all classes, in [0, 1)."""
    ema_decay: Annotated[float | None, _float_or("none")] = 0.99999
    """Decay per step of the averaged weights that are evaluated, in [0, 1); none evaluates the
    trained weights themselves."""
    sam_rho: Annotated[float | None, _float_or("none")] = None
    """Sharpness-aware minimisation: how far to look for a higher loss, > 0; none trains without."""
    sam_fraction: float = 0.2
    """Part of each batch that decides where to look, in (0, 1]."""


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, and how the learning rate moves: linear warm-up from 0, then cosine to 0."""

    epochs: int = 40
    """Passes over the training split."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""


@dataclass(frozen=True)
class PrecisionConfig:
    """With which arithmetic."""

    precision: str = "float32"
    """Type of activations, float32 or bfloat16; parameters, gradients and the loss are float32."""
    channels_last: bool = False
    """Keep images and kernels with their channels last in memory, which some devices prefer."""
    compile: bool = False
    """Let torch.compile write the network's kernels: minutes at the start, then faster steps."""


@dataclass(frozen=True)
class ScaleConfig:
    """On how much hardware; never changes what is computed."""

    num_workers: int = 1
    """Worker processes that each take a slice of every batch."""
    micro_batch_size: Annotated[int | None, _int_or("none")] = None
    """Images that a worker's memory holds at once: its slice of a batch is cut into such pieces,
    whose gradients add up; none takes the slice whole."""
    loaders: Annotated[int | None, _int_or("auto")] = None
    """Processes that read images for each worker; auto is none for a dataset in memory, else
    what there are of CPU cores."""
    gpus_per_worker: Annotated[float | None, _float_or("auto")] = None
    """GPUs each worker takes; auto takes 1 where the cluster has or can launch GPU nodes, else
    trains on CPUs."""


@dataclass(frozen=True)
class RunConfig:
    """Identity of the run, and where its results go."""

    recipe: str = "digits"
    """Where settings come from that no flag gives, and what a sweep searches."""
    seed: int = 0
    """Seed of everything random: initial weights, order, augmentation, search."""
    diagnostics: bool = False
    """Record which layers AGC clips, step by step, with a heat map and a verdict."""
    name: str | None = None
    """Name in MLflow and of the folder in the storage; default: the command's name and the time."""
    tracking_uri: str | None = None
    """MLflow store or server; default: $MLFLOW_TRACKING_URI, else mlflow.db in the checkout."""
    storage: str | None = None
    """Folder or s3:// URI for checkpoints and results; default: $NFLAB_STORAGE, else runs/ in the
    checkout."""


@dataclass(frozen=True)
class Config:
    """Everything that defines one training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def base(self) -> "Config":
        """What a single run has of this configuration."""
        return Config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Config)})


@dataclass(frozen=True)
class SearchConfig:
    """How far to search."""

    trials: int = 20
    """Configurations to try."""
    dry_run: bool = False
    """Say what the search would take in time, and in money where machines have a price; run
    nothing."""
    max_cost: Annotated[float | None, _float_or("none")] = None
    """USD at which to stop, by the prices of nflab/prices.csv: running trials end with their next
    epoch, and --resume NAME --max-cost MORE goes on. Training alone is counted."""
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
    max_cost: Annotated[float | None, _float_or("none")] = None
    """USD at which to stop, by the prices of nflab/prices.csv: running cells end with their next
    epoch, and --resume NAME --max-cost MORE goes on. Training alone is counted."""
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


C = TypeVar("C", bound=Config)


def flat(config: Config) -> dict[str, Any]:
    """Leaf name -> value over all parts of `config`."""
    return {
        leaf.name: getattr(getattr(config, part.name), leaf.name)
        for part in dataclasses.fields(config)
        for leaf in dataclasses.fields(getattr(config, part.name))
    }


def replace(config: C, **leaves: Any) -> C:
    """`config` with the named leaves changed, wherever they are nested.

    Raises:
        ConfigError: a name is no leaf of `config`.
    """
    unknown = sorted(set(leaves) - set(flat(config)))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}: choose from {', '.join(flat(config))}")
    parts = {}
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        changed = {f.name: leaves[f.name] for f in dataclasses.fields(value) if f.name in leaves}
        parts[part.name] = dataclasses.replace(value, **changed)
    return type(config)(**parts)


def to_json(config: Config) -> str:
    """`config` as JSON, nested as the dataclasses are; `from_json` reads it back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(kind: type[C], text: str) -> C:
    """Reads what `to_json` wrote; a part or leaf left out keeps its default.

    Raises:
        ConfigError: not JSON, or an unknown or mistyped key.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the configuration is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError("the configuration must be a JSON object of sections")
    return kind(**_read(kind, tree, "", _read_part))


def load(kind: type[C], path: str) -> C:
    """Reads a configuration file for another run: all but the old run's name and locations.

    Raises:
        ConfigError: the file cannot be read, or is no configuration.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"cannot read the configuration {path!r}: {reason}") from None
    try:
        config = from_json(kind, text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return replace(config, name=None, tracking_uri=None, storage=None)


def _read(
    kind: type, tree: Mapping[str, Any], where: str, read: Callable[[Any, Any, str], Any]
) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(tree) - set(hints))
    if unknown:
        raise ConfigError(f"unknown key {where + unknown[0]!r}: expected one of {', '.join(hints)}")
    return {key: read(hints[key], value, where + key) for key, value in tree.items()}


def _read_part(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{where!r} must be a section of settings, not {value!r}")
    return kind(**_read(kind, value, f"{where}.", _read_leaf))


def _read_leaf(hint: Any, value: Any, where: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        if isinstance(value, list):
            return tuple(_read_leaf(kind, item, where) for item in value)
    elif float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif type(value) in kinds:
        return value
    expected = " or ".join("null" if k is type(None) else getattr(k, "__name__", "") for k in kinds)
    raise ConfigError(f"{where!r} must be {expected}, not {value!r}")


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless `condition`."""
    if not condition:
        raise ConfigError(message)
