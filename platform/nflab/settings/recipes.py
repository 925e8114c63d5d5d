"""Recipes: what an experiment starts from, where each number comes from, and what is searched."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nfnet
from nflab.settings import recipe_files
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError, known, require
from nflab.settings.leaves import flat, replace
from nflab.settings.search_space import Scale, SearchSpace, scales
from nflab.settings.studies import SweepConfig


@dataclass(frozen=True)
class Recipe:
    """Defaults of a configuration, each with its source, and what a sweep searches around them."""

    settings: Mapping[str, tuple[Any, str]]
    """Leaf name -> (value, where it comes from)."""
    space: SearchSpace

    @property
    def config(self) -> Config:
        """The configuration; settings that the recipe does not name keep their defaults."""
        return replace(Config(), **{name: value for name, (value, _) in self.settings.items()})

    def source(self, name: str) -> str:
        """Where the value of a setting comes from."""
        return self.settings[name][1] if name in self.settings else "nflab's default"


_PAPER = "arXiv 2102.06171"

_CODE = "the authors' released code"

_PAPER_SPACE = SearchSpace(
    scales(
        ("clipping=0.01..0.16:log,none", "batch_size=256..4096:pow2", "augmentation_level=0..20")
    ),
    clippings=(0.01, 0.02, 0.04, 0.08, 0.16),
    lookahead=16,
)

# ImageNet, as both the paper's models and its ablations are trained.
_COMMON: dict[str, tuple[Any, str]] = {
    "dataset": ("imagenet", "give its folder with --dataset"),
    "base_learning_rate": (0.1, f"{_PAPER}, section 4.1: 0.1 for a batch of 256, scaled linearly"),
    "momentum": (0.9, f"{_PAPER}, section 4.1: Nesterov"),
    "label_smoothing": (0.1, f"{_PAPER}, section 5"),
    "warmup_epochs": (5.0, f"{_PAPER}, section 4.1"),
}

_F_LEVELS = (5, 10, 10, 15, 15, 15, 15)

_F_DROP_RATES = (0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5)


def _nfnet(size: int) -> Recipe:
    """The paper's training of an F model on ImageNet."""
    pixels = nfnet.preprocessing(f"dm_nfnet_f{size}")
    trains, tests = pixels.train_size, pixels.test_size
    settings = {
        **_COMMON,
        "recipe": (f"nfnet_f{size}", "its name"),
        "image_size": (None, f"{_PAPER}, table 1: trains at {trains} px, evaluates at {tests} px"),
        "model": (f"dm_nfnet_f{size}", f"{_PAPER}, table 1, with its pixels and depths"),
        "drop_rate": (_F_DROP_RATES[size], f"{_PAPER}, table 1"),
        "stochdepth_rate": (0.25, f"{_PAPER}, appendix A, and {_CODE}"),
        "augmentation_level": (_F_LEVELS[size], f"{_PAPER}, table 1 and {_CODE}"),
        "augmentation_layers": (4, f"{_PAPER}, section 5"),
        "mixup": (True, f"{_PAPER}, section 5; on half of each batch in {_CODE}"),
        "cutmix": (True, f"{_PAPER}, section 5; on the other half in {_CODE}"),
        "partners": ("fresh", f"{_CODE}: two images are read for each that is trained on"),
        "batch_size": (4096, f"{_PAPER}, section 5"),
        "clipping": (0.01, f"{_PAPER}, section 5"),
        "weight_decay": (2e-5, f"{_PAPER}, section 5"),
        "ema_decay": (0.99999, f"{_PAPER}, section 5; its warm-up is of {_CODE}"),
        "epochs": (360, f"{_PAPER}, section 5"),
        "precision": ("bfloat16", f"{_PAPER}, section 5, over float32 parameters"),
    }
    if size >= 5:
        settings["sam_rho"] = (0.05, f"{_PAPER}, section 5, after arXiv 2010.01412")
        settings["sam_fraction"] = (0.2, f"{_PAPER}, section 5: a part of the batch, to save time")
    return Recipe(settings, _PAPER_SPACE)


def _ablation(name: str, model: str) -> Recipe:
    """The paper's ablations of clipping, and their batch-normalised baseline."""
    baseline = model.startswith("preact")
    clipping = (None, "the baseline has none") if baseline else (0.01, f"{_PAPER}, figure 2")
    settings = {
        **_COMMON,
        "recipe": (name, "its name"),
        "image_size": (None, f"{_CODE}: 224 px, in training and evaluation"),
        "model": (model, f"{_PAPER}, section 4.1"),
        "batch_size": (1024, f"{_PAPER}, figure 2: one of 256 to 4096"),
        "clipping": clipping,
        "weight_decay": (1e-4, f"{_CODE}, the ResNets' configuration"),
        "ema_decay": (None, f"{_CODE}, the ResNets' configuration"),
        "epochs": (90, f"{_PAPER}, section 4.1"),
    }
    return Recipe(settings, _PAPER_SPACE)


_ABLATIONS = {
    f"{family}{depth}_ablation": f"{model}{depth}"
    for family, model in (("nf_resnet", "dm_nf_resnet"), ("preact_resnet", "preact_resnet"))
    for depth in (50, 200)
}

_DIGITS_SPACE = SearchSpace(
    scales(
        (
            "clipping=0.01..0.64:log,none",
            "batch_size=16..128:pow2",
            "augmentation_level=0..10",
        )
    ),
    clippings=(0.04, 0.08, 0.16, 0.32),
)

_DIGITS: dict[str, tuple[Any, str]] = {
    "base_learning_rate": (1.6, "gives the smallest batch, 16, the paper's 0.1"),
    "augmentation_layers": (2, "4 would leave little of 8x8 pixels"),
}

_FASHION_MNIST: dict[str, tuple[Any, str]] = {
    "recipe": ("fashion_mnist", "its name"),
    "dataset": ("fashion-mnist", "60,000 real images: apt-get install dataset-fashion-mnist"),
    "model": ("dm_nf_resnet_small", "the ResNets' blocks, for 28 pixels"),
    "batch_size": (1024, f"{_PAPER}, figure 2: one of 256 to 4096"),
    "clipping": (0.04, f"{_PAPER}, figure 2: one of 0.01 to 0.16"),
    "base_learning_rate": _COMMON["base_learning_rate"],
    "momentum": _COMMON["momentum"],
    "label_smoothing": _COMMON["label_smoothing"],
    "weight_decay": (1e-4, f"{_CODE}, the ResNets' configuration"),
    "ema_decay": (None, f"{_CODE}, the ResNets' configuration"),
    "epochs": (20, "batch norm at 4096 is then within 3 points of its own at 256"),
    "warmup_epochs": (3.0, "36 steps at a batch of 4096; the paper's 5 of 90 are too few steps"),
    "augmentation_layers": (2, "4 would leave little of 28x28 pixels"),
    "channels_last": (True, "twice as fast on a CPU"),
}

_RESNET = "arXiv 1512.03385, section 4.2"


def _cifar(classes: int) -> Recipe:
    """CIFAR-10 or CIFAR-100, trained as the paper's ablations are."""
    settings: dict[str, tuple[Any, str]] = {
        **_COMMON,
        "recipe": (f"cifar{classes}", "its name"),
        "dataset": (f"cifar{classes}", "give the folder of torchvision's files with --dataset"),
        "model": ("dm_nf_resnet_small", "the ResNets' blocks, for small images"),
        "batch_size": (128, _RESNET),
        "clipping": (0.04, f"{_PAPER}, figure 2: one of 0.01 to 0.16"),
        "weight_decay": (1e-4, f"{_RESNET}, and {_CODE}, the ResNets' configuration"),
        "ema_decay": (None, f"{_CODE}, the ResNets' configuration"),
        "epochs": (90, f"{_PAPER}, section 4.1; {_RESNET} has 182"),
        "augmentation_layers": (2, "nflab's choice: 4 would leave little of 32x32 pixels"),
        "channels_last": (True, "twice as fast on a CPU"),
    }
    return Recipe(settings, _small_space("batch_size=128..4096:pow2"))


_IMAGENETTE: dict[str, tuple[Any, str]] = {
    **_COMMON,
    "recipe": ("imagenette", "its name"),
    "dataset": ("imagenette", "give its folder, of the 160 px version, with --dataset"),
    "image_size": (160, "the version's shorter side, github.com/fastai/imagenette"),
    "model": ("dm_nf_resnet50", f"{_PAPER}, section 4.1"),
    "batch_size": (128, "nflab's choice: 66 steps an epoch"),
    "clipping": (0.04, f"{_PAPER}, figure 2: one of 0.01 to 0.16"),
    "weight_decay": (1e-4, f"{_CODE}, the ResNets' configuration"),
    "ema_decay": (None, f"{_CODE}, the ResNets' configuration"),
    "epochs": (80, "one of the lengths of the leaderboard at github.com/fastai/imagenette"),
}


def _small_space(batch_sizes: str) -> SearchSpace:
    """What is searched where there are fewer images than in ImageNet."""
    own = scales((batch_sizes, "augmentation_level=0..10"))
    return dataclasses.replace(_PAPER_SPACE, scales={**_PAPER_SPACE.scales, **own})


_FINETUNE: dict[str, tuple[Any, str]] = {
    "epochs": (20, "nflab's choice"),
    "warmup_epochs": (1.0, "nflab's choice"),
    "ema_decay": (None, "nflab's choice: few steps to average over"),
}

RECIPES = {
    "digits": Recipe(_DIGITS, _DIGITS_SPACE),
    "digits_large_batch": Recipe(
        {
            **_DIGITS,
            "recipe": ("digits_large_batch", "its name"),
            "batch_size": (128, "where training fails without clipping, as in the paper at 4096"),
            "clipping": (0.08, "works at this batch size in clipping_vs_batch_size.py"),
        },
        _DIGITS_SPACE,
    ),
    "fashion_mnist": Recipe(
        _FASHION_MNIST,
        _small_space("batch_size=256..4096:pow2"),
    ),
    "cifar10": _cifar(10),
    "cifar100": _cifar(100),
    "imagenette": Recipe(_IMAGENETTE, _small_space("batch_size=64..1024:pow2")),
    "digits_finetune": Recipe(
        {
            **_FINETUNE,
            "recipe": ("digits_finetune", "its name"),
            "dataset": ("digits:5-9", "classes that are not in digits:0-4"),
            "base_learning_rate": (0.4, "a quarter of what training from scratch takes"),
            "augmentation_layers": (2, "4 would leave little of 8x8 pixels"),
        },
        _DIGITS_SPACE,
    ),
    "finetune": Recipe(
        {
            **_FINETUNE,
            "recipe": ("finetune", "its name"),
            "model": ("dm_nfnet_f0", "give yours with --model"),
            "dataset": ("imagenet", "give yours with --dataset"),
            "batch_size": (256, "nflab's choice"),
            "clipping": (0.01, f"{_PAPER}, section 5"),
            "base_learning_rate": (0.01, "a tenth of what training from scratch takes"),
        },
        _PAPER_SPACE,
    ),
    **{f"nfnet_f{size}": _nfnet(size) for size in range(7)},
    **{name: _ablation(name, model) for name, model in _ABLATIONS.items()},
}
"""Every number that an experiment starts from, by the recipe's name."""


def recipe_of(name: str) -> Recipe:
    """The recipe of a name, or of a file (see `recipe_files`).

    Raises:
        ConfigError: there is none.
    """
    if not recipe_files.is_file(name):
        known("recipe", name, list(RECIPES))
        return RECIPES[name]
    found = recipe_files.read(name)
    settings = {**found.settings, "recipe": (name, "a file of one's own")}
    return Recipe(settings, dataclasses.replace(_PAPER_SPACE, **found.space))


def space_of(config: Config) -> SearchSpace:
    """What a sweep around this configuration searches."""
    return recipe_of(config.run.recipe).space


def sourced(config: Config) -> dict[str, tuple[Any, str]]:
    """Every setting of a configuration with its value and where that comes from."""
    recipe = recipe_of(config.run.recipe)
    expected = flat(recipe.config)
    return {
        name: (value, recipe.source(name) if expected.get(name, value) == value else "given")
        for name, value in flat(config).items()
    }


def as_yaml(config: Config) -> str:
    """A configuration as a recipe's file.

    Raises:
        ConfigError: it is a sweep that does not search the batch size, which ablations vary.
    """
    own, space = flat(Config()), space_of(config)
    if isinstance(config, SweepConfig):
        found = scales_of(config)
        require(
            "batch_size" in found,
            "a recipe's search has batch_size in it, for ablations vary that: search it too, or "
            "write the recipe of a training (train.py --print-config --yaml)",
        )
        space = dataclasses.replace(space, scales=found, lookahead=lookahead(config))
    told = {name: one for name, one in sourced(config).items() if name in own}
    return recipe_files.write(told, space)


def scales_of(config: SweepConfig) -> dict[str, Scale]:
    """What a sweep searches: its own scales, else the recipe's.

    Raises:
        ConfigError: a scale is none, or is of no setting.
    """
    search = config.search
    every = scales(search.search) or space_of(config).scales
    names = tuple(every) if search.search else search.searched
    unknown = [name for name in names if name not in every]
    if unknown:
        raise ConfigError(
            f"unknown searched setting {unknown[0]!r}: choose from {', '.join(every)}"
        )
    return {name: every[name] for name in names if name not in search.fix}


def batch_sizes_of(config: SweepConfig) -> list[int]:
    """Every batch size that a trial of a sweep may have."""
    scale = scales_of(config).get("batch_size")
    return [config.optimizer.batch_size] if scale is None else scale.values()


def lookahead(config: SweepConfig) -> int:
    """How many trials a sweep runs at once, at most (see `SearchConfig`)."""
    given = config.search.lookahead
    return space_of(config).lookahead if given is None else given
