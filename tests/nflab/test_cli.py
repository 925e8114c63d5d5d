import sys
from pathlib import Path

import pytest

from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import flat, replace
from nflab.settings.recipes import RECIPES
from nflab.settings.serialization import to_json
from nflab.settings.studies import SweepConfig
from nflab.terminal import command_line


def refuse(argv: list[str], kind: type[Config], monkeypatch: pytest.MonkeyPatch) -> int:
    def run(config: Config, resume: bool) -> None:
        raise AssertionError(f"{argv} was accepted as {config}")

    monkeypatch.setattr(sys, "argv", ["experiment.py", *argv])
    with pytest.raises(SystemExit) as caught:
        command_line.main(kind, run, "")
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("kind", [Config, SweepConfig])
@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--model dm_nf_resnet5", "dm_nf_resnet50"),
        ("--dataset digit", "digits"),
        ("--recipe digit", "digits"),
        ("--recipe nfnet_f0", "'imagenet' is neither"),
        ("--recipe digits --config missing.json", "leave --recipe out"),
        ("--image-size 32", "image_size 32"),
        ("--precision float16", "bfloat16"),
        ("--sam-rho 0", "sam_rho 0"),
        ("--sam-fraction 0", "sam_fraction 0"),
        ("--micro-batch-size 0", "micro_batch_size 0"),
        ("--micro-batch-size 8 --model preact_resnet_digits", "batch norm"),
        ("--loaders -1", "loaders -1"),
        ("--augmentation-layers 0", "augmentation_layers 0"),
        ("--modle x", "--modle"),
        ("--clipping 0", "clipping 0"),
        ("--clipping -0.1", "clipping -0.1"),
        ("--clipping nan", "clipping nan"),
        ("--clipping often", "often"),
        ("--batch-size 0", "batch_size 0"),
        ("--batch-size -4", "batch_size -4"),
        ("--batch-size 1e3", "1e3"),
        ("--batch-size 100000", "1071 training images"),
        ("--batch-size 2 --num-workers 3", "num_workers 3"),
        ("--num-workers 0", "num_workers 0"),
        ("--augment-on gpu", "unknown augment_on 'gpu'"),
        ("--num-workers 4:1", "num_workers 4:1 must be at least 1, or the least and the most"),
        ("--num-workers 0:2", "num_workers 0:2"),
        ("--num-workers 2:", "num-workers"),
        ("--augmentation-level -1", "augmentation_level -1"),
        ("--epochs 0", "epochs 0"),
        ("--warmup-epochs 50", "warmup_epochs 50"),
        ("--drop-rate 1", "drop_rate 1"),
        ("--stochdepth-rate -1", "stochdepth_rate -1"),
        ("--ema-decay 1", "ema_decay 1"),
        ("--gpus-per-worker -1", "gpus_per_worker -1"),
        ("--gpus-per-worker 2", "a worker trains on one GPU"),
        ("--gpus-per-worker 0.5 --num-workers 2", "workers of one run cannot share a GPU"),
        ("--gpus-per-worker 0.5 --num-workers 1:2", "workers of one run cannot share a GPU"),
        ("--placement strict-pack", "unknown placement 'strict-pack'"),
        ("--placement strict_pack --num-workers 1:2", "placement strict_pack needs a number"),
        ("--base-learning-rate inf", "base_learning_rate inf"),
        ("--seed -1", "seed -1"),
        ("--name a/b", "'a/b'"),
        ("--name ..", "'..'"),
        ("--resume missing", "'missing'"),
        ("--config missing.json", "missing.json"),
        ("--config", "--config"),
        ("--resume missing --config missing.json", "leave --config out"),
        ("--resume x --storage foo://x", "foo://x"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence_before_ray_starts(
    argv: str,
    named: str,
    kind: type[Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refuse(argv.split(), kind, monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


def test_a_sweep_refuses_no_trials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refuse(["--trials", "0"], SweepConfig, monkeypatch) == 2
    assert "trials 0" in capsys.readouterr().err


def test_defaults_are_the_recipes() -> None:
    assert command_line.parse(Config, [])[0] == RECIPES["digits"].config
    assert command_line.parse(Config, ["--recipe", "nfnet_f3"])[0] == RECIPES["nfnet_f3"].config
    assert command_line.parse(SweepConfig, [])[0].base() == RECIPES["digits"].config


def test_a_recipe_is_printed_whole_and_each_number_has_its_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = "--recipe nfnet_f1 --print-config --batch-size 512".split()
    monkeypatch.setattr(sys, "argv", ["experiment.py", *argv])
    command_line.main(Config, lambda config, resume: pytest.fail("it ran"), "")
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0] != "["]
    said = {line.split(" = ")[0]: line for line in lines}
    assert said.keys() == flat(Config()).keys()
    assert all("# " in line for line in lines)
    assert "'dm_nfnet_f1'" in said["model"]
    assert "224 px, evaluates at 320 px" in said["image_size"]
    assert said["batch_size"].endswith("# given")


# paper.md's table and recipe, written down once more.
@pytest.mark.parametrize(
    ("size", "drop_rate", "level"),
    [(0, 0.2, 5), (1, 0.3, 10), (2, 0.4, 10), (3, 0.4, 15), (4, 0.5, 15), (5, 0.5, 15)],
)
def test_recipes_of_the_f_models_are_the_papers(size: int, drop_rate: float, level: int) -> None:
    c = flat(RECIPES[f"nfnet_f{size}"].config)
    expected = {
        "model": f"dm_nfnet_f{size}",
        "drop_rate": drop_rate,
        "stochdepth_rate": 0.25,
        "augmentation_level": level,
        "augmentation_layers": 4,
        "mixup": True,
        "cutmix": True,
        "partners": "fresh",
        "batch_size": 4096,
        "clipping": 0.01,
        "base_learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 2e-5,
        "label_smoothing": 0.1,
        "ema_decay": 0.99999,
        "sam_rho": 0.05 if size >= 5 else None,
        "epochs": 360,
        "warmup_epochs": 5,
        "precision": "bfloat16",
    }
    assert {name: c[name] for name in expected} == expected


@pytest.mark.parametrize("family", ["nf_resnet", "preact_resnet"])
@pytest.mark.parametrize("depth", [50, 200])
def test_recipes_of_the_ablations_are_the_papers(family: str, depth: int) -> None:
    c = flat(RECIPES[f"{family}{depth}_ablation"].config)
    twin = family == "preact_resnet"
    expected = {
        "model": f"{family}{depth}" if twin else f"dm_{family}{depth}",
        "clipping": None if twin else 0.01,
        "base_learning_rate": 0.1,
        "weight_decay": 1e-4,
        "label_smoothing": 0.1,
        "ema_decay": None,
        "augmentation_level": 0,
        "mixup": False,
        "cutmix": False,
        "stochdepth_rate": 0.0,
        "drop_rate": 0.0,
        "epochs": 90,
        "warmup_epochs": 5,
    }
    assert {name: c[name] for name in expected} == expected


def test_flags_change_what_they_name_and_nothing_else() -> None:
    argv = "--clipping none --batch-size 64 --mixup --ema-decay 0.9 --gpus-per-worker auto --name x"
    expected = replace(
        RECIPES["digits"].config,
        clipping=None,
        batch_size=64,
        mixup=True,
        ema_decay=0.9,
        name="x",
    )
    assert command_line.parse(Config, argv.split()) == (expected, False)


def test_a_configuration_file_is_repeated_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(to_json(replace(Config(), seed=7, clipping=0.02)))
    config, _ = command_line.parse(Config, ["--config", str(path), "--clipping", "0.04"])
    assert config == replace(Config(), seed=7, clipping=0.04)


def test_a_flag_for_a_searched_setting_fixes_it(tmp_path: Path) -> None:
    config, _ = command_line.parse(SweepConfig, ["--batch-size=64"])
    assert config.search.searched == ("clipping", "augmentation_level")
    assert flat(config)["batch_size"] == 64
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    again, _ = command_line.parse(SweepConfig, ["--config", str(path), "--clipping", "none"])
    assert again.search.searched == ("augmentation_level",)
    assert flat(again)["batch_size"] == 64


def test_a_flags_value_is_no_flag() -> None:
    config, _ = command_line.parse(SweepConfig, ["--name", "clipping"])
    assert "clipping" in config.search.searched


def test_a_resumed_run_has_its_own_configuration_and_no_other(tmp_path: Path) -> None:
    started = replace(Config(), name="x", storage=str(tmp_path), seed=9, clipping=0.02)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(to_json(started))
    flags = ["--resume", "x", "--storage", str(tmp_path)]
    assert command_line.parse(Config, flags) == (started, True)
    assert command_line.parse(Config, [*flags, "--seed", "9"]) == (started, True)
    with pytest.raises(ConfigError, match=r"seed 9 -> 1; .*|clipping 0.02 -> 0.1") as caught:
        command_line.parse(Config, [*flags, "--seed", "1", "--clipping", "0.1"])
    assert "seed 9 -> 1" in str(caught.value)
    assert "clipping 0.02 -> 0.1" in str(caught.value)


def test_a_path_given_again_to_a_resumed_run_may_be_written_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    stored = replace(
        Config(),
        name="x",
        dataset=str(tmp_path / "images"),
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        storage=str(tmp_path),
    )
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(to_json(stored))
    monkeypatch.chdir(tmp_path)
    flags = "--resume x --storage . --dataset images --tracking-uri mlflow.db".split()
    assert command_line.parse(Config, flags) == (stored, True)
    with pytest.raises(ConfigError, match="cannot be resumed with another configuration"):
        command_line.parse(Config, [*flags, "--dataset", "digits"])


def test_failed_trials_are_those_of_a_sweep_that_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --resume NAME"):
        command_line.parse(SweepConfig, ["--retry-failed"])
    (tmp_path / "x").mkdir()
    stored = replace(SweepConfig(), name="x", storage=str(tmp_path))
    (tmp_path / "x" / "config.json").write_text(to_json(stored))
    flags = ["--resume", "x", "--storage", str(tmp_path), "--retry-failed"]
    assert command_line.parse(SweepConfig, flags) == (replace(stored, retry_failed=True), True)


def test_a_sweep_is_no_training_to_resume(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    flags = ["--resume", "x", "--storage", str(tmp_path)]
    for stored, asked in ((SweepConfig(), Config), (Config(), SweepConfig)):
        (tmp_path / "x" / "config.json").write_text(to_json(stored))
        with pytest.raises(ConfigError, match="with the script that started it"):
            command_line.parse(asked, flags)


def test_help_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.parse(SweepConfig, ["--help"], "What it does.\n\nExample:\n  python x.py")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in ["config", "resume", *flat(SweepConfig())]:
        flag = {"tries": "try", "earlier": "from"}.get(name, name.replace("_", "-"))
        assert name == "searched" or f"--{flag}" in text, name
    assert "Example:\n  python x.py" in text
