"""Recipes of one's own: what a file may say, and that one that was written is read again."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nflab.learning.computation import digest
from nflab.learning.validation import validate
from nflab.recording.notes import recipe_note
from nflab.settings import recipe_files
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import flat, replace
from nflab.settings.recipes import RECIPES, as_yaml, recipe_of, scales_of, space_of
from nflab.settings.serialization import to_json
from nflab.settings.studies import SweepConfig
from nflab.terminal import command_line

OWN = """
settings:
  batch_size: {value: 64, source: "as many as fit"}
  weight_decay: {value: 2e-5, source: arXiv 2102.06171}
  clipping: {value: null, source: "none, to see"}
  frozen: {value: [stem], source: "it is small"}
search: ["clipping=0.02..0.64:log,none", "batch_size=32..128:pow2"]
clippings: [0.04, 1]
lookahead: 2
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return path


def test_a_file_is_a_recipe_and_flags_win(own: Path) -> None:
    config, _ = command_line.parse(Config, ["--recipe", str(own), "--clipping", "0.5"])
    expected = replace(
        Config(),
        batch_size=64,
        weight_decay=2e-5,
        clipping=0.5,
        frozen=("stem",),
        recipe=recipe_files.located(str(own)),
    )
    assert config == expected
    space = space_of(config)
    assert space.batch_sizes() == [32, 64, 128]
    assert (space.clippings, space.lookahead) == ((0.04, 1.0), 2)
    told = command_line.sources(config)
    assert "weight_decay = 2e-05" in told
    assert "# arXiv 2102.06171" in told
    assert next(line for line in told.splitlines() if "clipping" in line).endswith("# given")
    # Whose settings are the same is the same cell, whatever it is called.
    assert digest(config) == digest(replace(config, recipe="digits"))
    assert "- weight decay 2e-05: arXiv 2102.06171" in recipe_note(config)[0]
    assert recipe_note(replace(config, recipe="digits")) == []


@pytest.mark.parametrize(
    ("written", "setting", "value"),
    [
        ("1:4", "num_workers", "1:4"),
        ("no", "dataset", "no"),
        ("2026-12-01", "dataset", "2026-12-01"),
        ("1_0", "dataset", "1_0"),
        ("2e-5", "weight_decay", 2e-5),
        ("1.", "weight_decay", 1.0),
        (".5", "drop_rate", 0.5),
        ("3", "momentum", 3.0),
        ("-3", "augmentation_level", -3),
        ("null", "clipping", None),
        ("~", "clipping", None),
        ("", "clipping", None),
        ("true", "mixup", True),
        ("'5'", "dataset", "5"),
    ],
)
def test_words_are_those_of_yaml_1_2(
    written: str, setting: str, value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"settings:\n  {setting}:\n    value: {written}\n    source: x\n")
    told = recipe_of(recipe_files.located(str(path)))
    assert told.settings[setting] == (value, "x")
    # What is written of it is read as the same.
    path.write_text(recipe_files.write(told.settings, told.space))
    again = recipe_of(recipe_files.located(str(path)))
    assert again.settings[setting] == (value, "x")


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    config = RECIPES[name].config
    path = tmp_path / "again.yaml"
    path.write_text(as_yaml(config))
    again = recipe_of(recipe_files.located(str(path)))
    assert replace(again.config, recipe=name) == config
    assert again.space == RECIPES[name].space
    for setting in flat(config):
        if setting not in ("recipe", "name", "tracking_uri", "storage"):
            assert again.source(setting) == RECIPES[name].source(setting)
    path = tmp_path / "again.json"
    path.write_text(json.dumps(yaml.load(as_yaml(config), recipe_files._Loader)))
    assert recipe_of(recipe_files.located(str(path))).config.optimizer == config.optimizer


def test_a_search_is_written_as_it_would_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    search = ["batch_size=32..64:pow2", "mixup", "drop_rate=0.0..0.5:0.1", "ema_decay=none,0.9"]
    argv = ["x.py", "--print-config", "--yaml", "--seed", "3", "--search", *search]
    monkeypatch.setattr(sys, "argv", argv)
    command_line.main(SweepConfig, lambda config, resume: pytest.fail("it ran"), "")
    path = tmp_path / "own.yaml"
    path.write_text(capsys.readouterr().out)
    again, _ = command_line.parse(SweepConfig, ["--recipe", str(path)])
    assert again.run.seed == 3
    asked, _ = command_line.parse(SweepConfig, ["--search", *search])
    assert again.search.searched == ("batch_size", "mixup", "drop_rate", "ema_decay")
    assert scales_of(again) == scales_of(asked)


def test_a_changed_file_is_another_recipe(own: Path) -> None:
    config, _ = command_line.parse(SweepConfig, ["--recipe", str(own)])
    own.write_text(OWN.replace("64,", "32,"))
    recipe_files.read.cache_clear()
    with pytest.raises(ConfigError, match="has changed since the run was recorded"):
        validate(config)
    stored = own.parent / "config.json"
    stored.write_text(to_json(config.base()))
    # A single training needs it no more: all of it is in its configuration.
    again, _ = command_line.parse(Config, ["--config", str(stored)])
    validate(again)
    assert again == config.base()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("settings: {batch_size: {value: 64}}", "batch_size has no source: say in words where 64"),
        ("settings: {batch_size: {value: 64, source: ' '}}", "batch_size has no source"),
        ("settings: {batch_size: 64}", "batch_size must be written as {value: ..., source: ...}"),
        ("settings: {batchsize: {value: 64, source: x}}", "unknown setting 'batchsize': did you "),
        ("settings: {name: {value: a, source: x}}", "unknown setting 'name'"),
        ("settings: {batch_size: {value: many, source: x}}", "'batch_size' must be int, not 'many"),
        ("settings: {mixup: {value: 1, source: x}}", "'mixup' must be bool, not 1"),
        ("settings: {batch_size: {value: 010, source: x}}", "'batch_size' must be int, not 10.0"),
        ("settings: {batch_size: {value: 1_0, source: x}}", "'batch_size' must be int, not '1_0'"),
        ("settings: {mixup: {value: yes, source: x}}", "'mixup' must be bool, not 'yes'"),
        ("setings: {}", "unknown part of a recipe 'setings': did you mean settings?"),
        ("search: []", "a recipe needs settings"),
        ("[1]", "a recipe has the parts settings, search"),
        ("settings: {", "the recipe is neither YAML nor JSON"),
        (
            "settings: {seed: {value: 1, source: a}, seed: {value: 2}}",
            "seed is given tw",
        ),
        ("settings: {seed: {value: 1, source: a}}\nlookahead: 0", "lookahead 0 must be at least 1"),
        ("settings: {seed: {value: 1, source: a}}\nsearch: [mixup]", "search must have batch_size"),
        ("settings: {seed: {value: 1, source: a}}\nsearch: mixup", "'search' must be"),
        ("settings: {seed: {value: 1, source: a}}\nclippings: [0]", "clippings 0.0 must be finite"),
    ],
)
def test_what_is_no_recipe_is_refused_in_a_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        command_line.parse(Config, ["--recipe", str(path)])
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--recipe", "nowhere.yaml"], "cannot read the recipe"),
        (["--recipe", "digitz"], "unknown recipe 'digitz': did you mean digits"),
        (["--yaml"], "--yaml is for --print-config: give both"),
    ],
)
def test_flags_that_ask_for_none_are_refused(
    argv: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", *argv])
    with pytest.raises(SystemExit) as caught:
        command_line.main(Config, lambda config, resume: pytest.fail("it ran"), "")
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_value_that_no_run_may_have_is_refused_as_ours_are(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    told: dict[str, Any] = {"settings": {"momentum": {"value": 1.5, "source": "a slip"}}}
    path.write_text(json.dumps(told))
    config, _ = command_line.parse(Config, ["--recipe", str(path)])
    with pytest.raises(ConfigError, match=r"momentum 1\.5 must be at least 0 and below 1"):
        validate(config)
