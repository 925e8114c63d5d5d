"""How a search is written, what is refused, and what a sweep of it is."""

from pathlib import Path

import pytest

from nflab.learning.validation import validate
from nflab.settings.canonical import is_read
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.settings.recipes import batch_sizes_of, scales_of
from nflab.settings.search_space import scales
from nflab.settings.serialization import from_json, to_json
from nflab.settings.studies import SweepConfig
from nflab.terminal.command_line import parse

KNOWN = ("clipping", "batch_size", "augmentation_level")


def sweep(*flags: str) -> SweepConfig:
    config, _ = parse(SweepConfig, flags)
    return config


def searched(*flags: str) -> tuple[str, ...]:
    return tuple(scales_of(sweep(*flags)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clipping=0.1..0.1", "clipping=0.1..0.1 is one point"),
        ("clipping=0.2..0.1", "clipping=0.2..0.1 is upside down"),
        ("clipping=0..0.1:log", "by logarithm a range begins above 0"),
        ("clipping=0.1..0.2:log:0.1", "by logarithm a range begins above 0 and has no step"),
        ("clipping=0.1..0.2:0.5", "a step must be above 0 and within the range"),
        ("clipping=0.1..0.2:-1", "a step must be above 0 and within the range"),
        ("clipping=0.1..x", "clipping x must be a number, or none"),
        ("clipping=0.1..inf", "clipping inf must be finite"),
        ("clipping=", "clipping  must be a number, or none"),
        ("clipping=0.1", "clipping=0.1 is one value, not a search"),
        ("clipping=0.1,0.1", "clipping=0.1,0.1 has a value twice"),
        ("clipping", "clipping has no values to search"),
        ("clipping=0.1..0.2,0.5", "only none may stand beside a range"),
        ("clipping=0.1..0.2,0.3..0.4", "only none may stand beside a range"),
        ("weight_decay=0..0.1,none", "only none may stand beside a range"),
        ("batch_size=16..128.5", "batch_size 128.5 must be a whole number"),
        ("batch_size=16..100:pow2", "pow2 is for whole numbers between two powers of two"),
        ("weight_decay=1..2:pow2", "pow2 is for whole numbers between two powers of two"),
        ("model=a..b", "model is no number, so it has no range"),
        ("mixup=0..1", "mixup is no number, so it has no range"),
        ("mixup=yes,no", "mixup yes must be True or False"),
        ("clippping=0.1..0.2", "unknown setting 'clippping' to search; did you mean 'clipping'?"),
        ("x=1..2", "unknown setting 'x' to search"),
        ("num_workers=1..2", "num_workers cannot be searched: no result depends on it"),
        ("seed=1..2", "seed cannot be searched: no result depends on it"),
        ("epochs=1..2", "epochs cannot be searched: trials are compared by it"),
        ("dataset=a,b", "dataset cannot be searched: trials are compared by it"),
        ("pretrained=none,../w.pt", "pretrained cannot be searched: trials are compared by it"),
        ("unclipped=a,b", "unclipped is a list, which cannot be searched"),
    ],
)
def test_what_is_no_search_is_refused_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        scales((text,))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ("base_learning_rate=-1..1", "base_learning_rate -1 must be a finite number"),
        ("drop_rate=0..1", "drop_rate 1 must be at least 0 and below 1"),
        ("clipping=-0.1..0.1,none", "clipping -0.1 must be a finite number above 0"),
        ("batch_size=512..2048:pow2", "batch_size 2048 exceeds the 1071 training images"),
        ("model=dm_nf_resnet_digits,nf_resnet51", "unknown model 'nf_resnet51'"),
        ("warmup_epochs=1..50", "warmup_epochs 50 must not exceed epochs 40"),
        (
            "augmentation_layers=1..4",
            "augmentation_layers changes nothing here: augmentation_level is 0",
        ),
        ("image_size=8,16", "image_size is for folders of images: digits has its own"),
        ("sam_fraction=0.1..1", "sam_fraction changes nothing here: sam_rho is none"),
    ],
)
def test_values_that_cannot_be_used_are_refused(search: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(sweep("--search", search, "--augmentation-level", "0"))
    assert said in str(refused.value)


def test_a_setting_that_counts_beside_another_may_be_searched_with_it() -> None:
    both = ("augmentation_layers=1..4", "augmentation_level=0..10")
    validate(sweep("--search", *both))
    validate(sweep("--search", "augmentation_layers=1..4", "--augmentation-level", "3"))
    config = sweep("--search", *both).base()
    assert not is_read(replace(config, augmentation_level=0), "augmentation_layers")
    assert is_read(replace(config, augmentation_level=1), "augmentation_layers")


def test_flags_say_what_is_searched(tmp_path: Path) -> None:
    assert searched() == KNOWN
    given = ("--search", "base_learning_rate=0.4..6.4:log", "clipping=0.02..0.64:log,none")
    named = sweep(*given)
    assert tuple(scales_of(named)) == ("base_learning_rate", "clipping")
    assert [str(scale) for scale in scales_of(named).values()] == [
        "0.4 to 6.4",
        "0.02 to 0.64, or none",
    ]
    assert searched(*given, "--fix", "clipping") == ("base_learning_rate",)
    assert searched("--fix", "clipping") == KNOWN[1:]
    assert searched("--fix", "clipping", "--clipping", "0.1") == KNOWN[1:]
    assert batch_sizes_of(sweep()) == [16, 32, 64, 128]
    assert batch_sizes_of(sweep(*given, "--batch-size", "48")) == [48]
    assert batch_sizes_of(sweep("--search", "batch_size=16,48")) == [16, 48]
    with pytest.raises(ConfigError, match="unknown searched setting 'mixup'"):
        sweep(*given, "--fix", "mixup")
    with pytest.raises(ConfigError, match="--search searches what --clipping fixes"):
        sweep(*given, "--clipping", "0.1")
    with pytest.raises(ConfigError, match="--search searches what --mixup fixes"):
        sweep("--search", "mixup", "--no-mixup")
    with pytest.raises(ConfigError, match="--search is given twice"):
        sweep("--search", "mixup", "--search", "cutmix")
    with pytest.raises(ConfigError, match="--search names nothing"):
        sweep("--search")
    with pytest.raises(ConfigError, match="clipping is searched twice"):
        sweep("--search", "clipping=0.1..0.2", "clipping=0.1,0.2")

    file = tmp_path / "config.json"
    file.write_text(to_json(replace(named, name="x")))
    stored = ("--config", str(file))
    assert searched(*stored) == ("base_learning_rate", "clipping")
    assert searched(*stored, "--clipping", "0.1") == ("base_learning_rate",)
    assert searched(*stored, "--clipping", "0.1", "--base-learning-rate", "1") == ()
    file.write_text(to_json(replace(named, name="x", fix=("clipping",))))
    assert searched(*stored) == ("base_learning_rate",)
    assert searched(*stored, "--search", "clipping=0.1..0.2", "mixup") == ("clipping", "mixup")
    in_a_script = replace(sweep(), search=("mixup",))
    assert tuple(scales_of(in_a_script)) == ("mixup",)
    assert from_json(SweepConfig, to_json(named)) == named


@pytest.mark.parametrize(
    ("tries", "said"),
    [
        (("clipping",), "--try clipping: write SETTING=VALUE,OTHER=VALUE"),
        (("clipping=0.1,clipping=0.2",), "each once"),
        (("mixup=True",), "--try mixup=True: mixup is not searched: give it as a flag"),
        (("clipping=2",), "--try clipping=2: clipping is searched in 0.01 to 0.64, or none"),
        (("batch_size=48",), "--try batch_size=48: batch_size is searched in 16, 32, 64, 128"),
        (("batch_size=x",), "batch_size x must be a whole number"),
        (("clipping=0.1",) * 3, "trials 2 are fewer than those that --try names"),
    ],
)
def test_what_cannot_be_tried_is_refused(tries: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(sweep("--trials", "2", "--try", *tries))
    assert said in str(refused.value)


def test_a_scale_holds_what_it_draws() -> None:
    found = scales(
        ("clipping=0.01..0.64:log,none", "batch_size=16..128:pow2", "drop_rate=0..0.5:0.1", "mixup")
    )
    assert None in found["clipping"] and 0.02 in found["clipping"] and 1.0 not in found["clipping"]
    assert 64 in found["batch_size"] and 48 not in found["batch_size"]
    assert 0.3 in found["drop_rate"] and 0.25 not in found["drop_rate"]
    assert None not in found["drop_rate"] and True in found["mixup"]


@pytest.mark.parametrize("flag", ["--sampler", "--pruner"])
def test_samplers_and_pruners_that_are_none_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown {flag[2:]} 'cmaes'"):
        validate(sweep(flag, "cmaes"))
