"""Refuses a configuration that cannot be run, before anything is started."""

import math
from typing import Any

import nfnet
from nflab.data import DatasetError, load_dataset
from nflab.learning.models import check_model
from nflab.learning.profile import PROFILED
from nflab.settings import locations
from nflab.settings.canonical import UNREAD, is_read
from nflab.settings.config import Config, ScaleConfig
from nflab.settings.errors import ConfigError, known, require
from nflab.settings.leaves import as_text, flat, replace
from nflab.settings.objectives import DEFAULT, OBJECTIVES
from nflab.settings.recipe_files import is_file
from nflab.settings.recipes import batch_sizes_of, recipe_of, scales_of
from nflab.settings.search_space import tried
from nflab.settings.studies import ClippingConfig, GridOfConfigs, SearchConfig, SweepConfig


def validate(config: Config, trains: bool = True) -> None:
    """Checks every value of `config` that can be checked without a cluster.

    Args:
        trains: whether the dataset's training split is needed.

    Raises:
        ConfigError: one sentence that names the value, what was expected and what to do.
    """
    locations.refuse_passwords(config)
    c = flat(config)
    if type(config) is not Config or not is_file(c["recipe"]):
        recipe_of(c["recipe"])  # of a single training all is in its configuration
    _check_values(c)
    if c["name"] is not None:
        locations.check_name(c["name"])
    _, most_workers = config.scale.worker_range
    _check_scale(config.scale)
    limit = c.get("max_cost")
    require(
        limit is None or (limit > 0 and math.isfinite(limit)),
        f"max_cost {limit} must be a finite number of USD above 0, or none",
    )
    if isinstance(config, GridOfConfigs):
        require(config.grid.seeds >= 1, f"seeds {config.grid.seeds} must be at least 1")
    finals = getattr(config, "finals", None)
    if finals is not None:
        require(finals.finalists >= 0, f"finalists {finals.finalists} must be at least 0")
        require(finals.final_seeds >= 2, f"final_seeds {finals.final_seeds} must be at least 2")
    batch_sizes = [c["batch_size"]]
    if isinstance(config, ClippingConfig) and not config.finals.finalists:
        batch_sizes = []  # its cells have their own
    if isinstance(config, SweepConfig):
        require(config.search.trials >= 1, f"trials {config.search.trials} must be at least 1")
        known("sampler", config.search.sampler, ["tpe", "gp", "random", "qmc"])
        known("pruner", config.search.pruner, ["asha", "none"])
        _check_objectives(config.search)
        ahead = config.search.lookahead
        require(ahead is None or ahead >= 1, f"lookahead {ahead} must be at least 1, or auto")
        of_baseline = batch_sizes if config.finals.finalists else []
        batch_sizes = [*batch_sizes_of(config), *of_baseline]
        _check_search(config, trains)
    try:
        dataset = load_dataset(config)
    except DatasetError as error:
        raise ConfigError(str(error)) from None
    asked = "" if c["image_size"] is None else f" {c['image_size']}"
    require(
        not dataset.in_memory or not (asked or _searches(config, "image_size")),
        f"image_size{asked} is for folders of images: {c['dataset']} has its own",
    )
    if not trains:
        return
    check_model(config, new_head=True)
    train_size = dataset.sizes["train"]
    require(train_size > 0, f"{c['dataset']} has no training images: add its folder train")
    require(
        len(dataset.class_names) > 1,
        f"{c['dataset']} has one class, so there is nothing to learn: give it two or more",
    )
    part = "" if c["subset"] == 1 else f"subset {c['subset']:g} of "
    for batch_size in batch_sizes:
        require(batch_size >= 1, f"batch_size {batch_size} must be at least 1")
        require(
            batch_size <= train_size,
            f"batch_size {batch_size} exceeds the {train_size} training images of "
            f"{part}{c['dataset']}",
        )
        require(
            batch_size >= most_workers,
            f"batch_size {batch_size} is below num_workers {c['num_workers']}: "
            "every worker needs at least one image of each batch",
        )


def _check_scale(scale: ScaleConfig) -> None:
    """How workers take GPUs and machines."""
    known("placement", scale.placement, ["pack", "strict_pack", "spread"])
    (least, most), gpus = scale.worker_range, scale.gpus_per_worker
    require(
        gpus is None or 0 <= gpus <= 1,
        f"gpus_per_worker {gpus} must be at least 0 and at most 1, for a worker trains on one GPU: "
        "use several by num_workers",
    )
    # NCCL refuses two ranks on one GPU.
    require(
        gpus in (None, 0, 1) or most == 1,
        f"gpus_per_worker {gpus} cannot be had by num_workers {scale.num_workers}: workers of one "
        "run cannot share a GPU; a part of one is for runs of one worker",
    )
    require(
        scale.placement != "strict_pack" or least == most,
        f"placement strict_pack needs a number of workers, and num_workers is {scale.num_workers}: "
        "say how many, or use pack",
    )


def _check_values(c: dict[str, Any]) -> None:
    """Each setting by itself."""
    known("model", c["model"], nfnet.list_models())
    known("precision", c["precision"], ["float32", "tf32", "bfloat16"])
    known("bad_images", c["bad_images"], ["fail", "skip"])
    known("partners", c["partners"], ["batch", "fresh"])
    known("augment_on", c["augment_on"], ["auto", "cpu", "device"])
    for name in ("drop_rate", "stochdepth_rate", "momentum", "label_smoothing"):
        require(0 <= c[name] < 1, f"{name} {c[name]:g} must be at least 0 and below 1")
    require(
        c["ema_decay"] is None or 0 <= c["ema_decay"] < 1,
        f"ema_decay {c['ema_decay']} must be at least 0 and below 1, or none",
    )
    require(
        c["clipping"] is None or (c["clipping"] > 0 and math.isfinite(c["clipping"])),
        f"clipping {c['clipping']} must be a finite number above 0; to train without, say none",
    )
    require(
        c["augmentation_level"] >= 0,
        f"augmentation_level {c['augmentation_level']} must be at least 0, which is off",
    )
    require(
        c["augmentation_layers"] >= 1,
        f"augmentation_layers {c['augmentation_layers']} must be at least 1",
    )
    require(
        c["sam_rho"] is None or (c["sam_rho"] > 0 and math.isfinite(c["sam_rho"])),
        f"sam_rho {c['sam_rho']} must be a finite number above 0; to train without, say none",
    )
    require(
        0 < c["sam_fraction"] <= 1, f"sam_fraction {c['sam_fraction']:g} must be above 0, at most 1"
    )
    require(
        0 < c["subset"] <= 1,
        f"subset {c['subset']:g} must be above 0, and at most 1, which is the whole training split",
    )
    for name in ("image_size", "micro_batch_size"):
        require(c[name] is None or c[name] >= 1, f"{name} {c[name]} must be at least 1")
    require(c["loaders"] is None or c["loaders"] >= 0, f"loaders {c['loaders']} must be at least 0")
    minutes = c["checkpoint_minutes"]
    require(
        minutes is None or (minutes >= 0 and math.isfinite(minutes)),
        f"checkpoint_minutes {minutes} must be a finite number of at least 0, or none",
    )
    require(
        c["micro_batch_size"] is None or not c["model"].startswith("preact_"),
        f"micro_batch_size {c['micro_batch_size']} would cut batch norm's batch: leave it out",
    )
    for name in ("base_learning_rate", "weight_decay", "warmup_epochs"):
        require(
            c[name] >= 0 and math.isfinite(c[name]),
            f"{name} {c[name]:g} must be a finite number of at least 0",
        )
    require(
        0 <= c["profile"] <= PROFILED,
        f"profile {c['profile']} must be from 0, which is off, to {PROFILED} steps",
    )
    require(c["epochs"] >= 1, f"epochs {c['epochs']} must be at least 1")
    require(
        c["warmup_epochs"] <= c["epochs"],
        f"warmup_epochs {c['warmup_epochs']:g} must not exceed epochs {c['epochs']}",
    )
    require(0 <= c["seed"] < 2**31, f"seed {c['seed']} must be from 0 to {2**31 - 1}")


def _check_search(config: SweepConfig, trains: bool) -> None:
    """That each searched value may be used, and that each searched setting changes something."""
    scales = scales_of(config)
    require(
        len(tried(config.search.tries, scales)) <= config.search.trials,
        f"trials {config.search.trials} are fewer than those that --try names",
    )
    base = config.base()
    extremes = {
        name: [replace(base, **{name: end}) for end in s.ends] for name, s in scales.items()
    }
    for name, configs in extremes.items():
        for one in configs:
            _check_values(flat(one))
            if name == "model" and trains:
                check_model(one, new_head=True)
    # What one setting does may depend on another's value.
    settings = [base, *(one for configs in extremes.values() for one in configs)]
    for name in scales:
        require(
            any(is_read(one, name) for one in settings),
            f"{name} changes nothing here: "
            + " and ".join(f"{other} is {as_text(v)}" for other, v in UNREAD.get(name, {}).items()),
        )


def _check_objectives(search: SearchConfig) -> None:
    """That trials can be compared by what the search aims at."""
    named = search.objectives
    for name in named:
        known("objective", name, [*OBJECTIVES])
    told = f"objectives {' '.join(named) or 'are none'}"
    require(
        named[:1] == DEFAULT and len(set(named)) == len(named),
        f"{told}: name val_top1 first, and then others, each once",
    )
    if len(named) == 1:
        return
    require(
        search.pruner == "none",
        f"{told} cannot be had with pruning, for an early result tells little of several aims: "
        "give --pruner none",
    )
    require(
        search.sampler != "gp",
        f"{told}: sampler gp would learn from what trials that diverged measured: take tpe, random "
        "or qmc",
    )
    require(
        not search.earlier,
        f"{told} cannot begin --from earlier runs, of which validation top-1 alone is comparable",
    )


def _searches(config: Config, name: str) -> bool:
    return isinstance(config, SweepConfig) and name in scales_of(config)
