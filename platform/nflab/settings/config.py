"""The one configuration object that flows, unchanged, from the command line to the training loop.

Frozen dataclasses nested by concern. Leaf names are unique over all parts, so a configuration also
has a flat face: command-line flags (`--batch-size`), MLflow parameters (`batch_size`).
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

from nflab.settings.errors import ConfigError
from nflab.settings.flags import float_or, int_or, int_or_range


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
    some classes), `fashion-mnist` (70,000 real images, from Debian's package or torchvision's
    download), a folder of images in ImageNet's layout (train/CLASS/..., val/CLASS/...), one with
    torchvision's CIFAR files or with MNIST's (IDX), a store that prepare_data.py made (a path or
    s3://...), or package.module:factory, a function of your own."""
    image_size: Annotated[int | None, int_or("auto")] = None
    """Pixels along each side of images from such a layout, in training and evaluation; auto takes
    the model's own two sizes."""
    bad_images: str = "fail"
    """What an image does that cannot be read: `fail` ends the run; with `skip` the next one of the
    epoch's order takes its place, and an evaluation leaves it out; the log names them."""
    subset: float = 1.0
    """Part of the training images that is trained on, in (0, 1], the same of each class; which they
    are depends on the dataset alone, so all seeds share them, and 0.1 lies within 0.2."""


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
    partners: str = "batch"
    """What an image is mixed with: `batch`, its neighbour in the batch, so that none is read twice;
    or `fresh`, as by the authors, another image of the split, read for that alone."""


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD with Nesterov momentum and adaptive gradient clipping (AGC)."""

    batch_size: int = 32
    """Images that one optimizer step averages, over all workers."""
    clipping: Annotated[float | None, float_or("none")] = 0.16
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
    ema_decay: Annotated[float | None, float_or("none")] = 0.99999
    """Decay per step of the averaged weights that are evaluated, in [0, 1); none evaluates the
    trained weights themselves."""
    sam_rho: Annotated[float | None, float_or("none")] = None
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
    """Type of activations: float32; bfloat16; or tf32, which is float32 with factors that a GPU
    rounds to 10 bits. Parameters, gradients and the loss are float32."""
    channels_last: bool = False
    """Keep images and kernels with their channels last in memory, which some devices prefer."""
    compile: bool = False
    """Let torch.compile write the network's kernels: minutes at the start, then faster steps."""


@dataclass(frozen=True)
class ScaleConfig:
    """On how much hardware; never changes what is computed."""

    num_workers: Annotated[int | str, int_or_range] = 1
    """Worker processes that each take a slice of every batch; 1:4 trains on as many as there are
    machines for, at least 1 and at most 4, while machines come and go."""
    micro_batch_size: Annotated[int | None, int_or("auto")] = None
    """Images that a worker's memory holds at once: its slice of a batch is cut into such pieces,
    whose gradients add up; auto takes the slice whole, or in halves, quarters, ..., if a GPU's
    memory is too small for it."""
    loaders: Annotated[int | None, int_or("auto")] = None
    """Processes that read images for each worker; auto is none for a dataset in memory, else its
    share of the machine's CPU cores, as Ray counts them."""
    augment_on: str = "auto"
    """Where images are mixed and go through RandAugment: `cpu`, by the loaders; or `device`, where
    the network is; auto takes a GPU if it trains there."""
    checkpoint_minutes: Annotated[float | None, float_or("none")] = 10.0
    """Minutes after which a checkpoint is made within an epoch; none: after each epoch only."""
    deterministic: bool = False
    """Use only PyTorch's deterministic algorithms, so that a GPU repeats a result bit for bit, as a
    CPU does anyway; some are slower."""
    gpus_per_worker: Annotated[float | None, float_or("auto")] = None
    """GPU that each worker takes, 1 or a part of one; auto takes 1 where the cluster has or can
    launch GPU nodes, else trains on CPUs."""
    placement: str = "pack"
    """Where a run's workers are: `pack`, on one machine where one holds them all, else on few;
    `strict_pack`, on one machine or not at all; `spread`, on as many as there are."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the most workers.

        Raises:
            ConfigError: that is not what `num_workers` says.
        """
        least, colon, most = str(self.num_workers).partition(":")
        try:
            found = int(least), int(most if colon else least)
        except ValueError:
            found = 0, 0
        if not 1 <= found[0] <= found[1]:
            raise ConfigError(
                f"num_workers {self.num_workers} must be at least 1, or the least and the most of "
                "them, as in 1:4"
            )
        return found


@dataclass(frozen=True)
class RunConfig:
    """Identity of the run, and where its results go."""

    recipe: str = "digits"
    """Where settings come from that no flag gives, and what a sweep searches."""
    seed: int = 0
    """Seed of everything random: initial weights, order, augmentation, search."""
    diagnostics: bool = False
    """Record which layers AGC clips, step by step, with a heat map and a verdict."""
    profile: int = 0
    """Steps of each process, from its fourth on, of which PyTorch's profiler writes a trace."""
    name: str | None = None
    """Name in MLflow and of the folder in the storage; default: the command's name and the time."""
    tracking_uri: str | None = None
    """MLflow store or server; default: $MLFLOW_TRACKING_URI, else mlflow.db in the checkout."""
    storage: str | None = None
    """Folder, or s3:// or gs:// URI, for checkpoints and results; default: $NFLAB_STORAGE, else
    runs/ in the checkout."""


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
