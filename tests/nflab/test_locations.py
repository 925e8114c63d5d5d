"""Addresses of stores and storages, which every run records."""

from pathlib import Path

import pytest

from nflab.learning.validation import validate
from nflab.settings import locations
from nflab.settings.config import Config, RunConfig
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.terminal import command_line
from tests.conftest import ROOT

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "uri",
    [
        f"http://user:{SECRET}@mlflow.example:5000",
        f"https://:{SECRET}@mlflow.example",
        f"postgresql+psycopg://user:{SECRET}@database.example/mlflow",
        f"postgresql://database.example/mlflow?user=me&password={SECRET}",
        f"postgresql://database.example/mlflow?sslpassword={SECRET}",
        f"postgresql://user:{SECRET}/x@database.example/mlflow",
        f"https://{SECRET}@mlflow.example",
        f"HTTP://{SECRET}@mlflow.example:5000/x",
        f"https://mlflow.example?api-key={SECRET}",
        f"https://store.example/x?se=2027&sig={SECRET}",
    ],
)
def test_a_store_whose_address_holds_a_password_is_refused(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for run in (RunConfig(), RunConfig(tracking_uri=uri)):
        with pytest.raises(
            ConfigError, match=r"holds a password, or a token.*MLFLOW_TRACK"
        ) as caught:
            locations.tracking_uri(run)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "uri", [f"s3://AKIA:{SECRET}/x@bucket/x", f"s3://bucket?secret_key={SECRET}"]
)
def test_a_storage_whose_address_holds_a_key_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"holds a password.*AWS_ACCESS_KEY_ID") as caught:
        locations.storage(RunConfig(storage=uri))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "http://[::1]:5000/mlflow",
        "postgresql://user@database.example:5432/mlflow?sslmode=require&sslkey=/etc/key.pem",
        "sqlite:////data/a:b@c/mlflow.db",
        "databricks://profile",
    ],
)
def test_other_stores_are_taken_as_they_are(uri: str) -> None:
    assert locations.tracking_uri(RunConfig(tracking_uri=uri)) == uri


@pytest.mark.parametrize("flag", ["--dataset", "--pretrained", "--tracking-uri", "--storage"])
def test_no_flag_takes_an_address_with_a_token_and_none_shows_it(
    flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"https://{SECRET}@example.org/x"
    for argv in ([flag, address], [f"{flag}x", address], ["--print-config", flag, address]):
        monkeypatch.setattr("sys.argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as ended:
            command_line.main(Config, lambda config, resume: None, "")
        assert ended.value.code == 2
        told = capsys.readouterr()
        assert SECRET not in told.out + told.err
        assert told.err.startswith("error: ")


def test_a_configuration_with_a_token_is_refused_whoever_gives_it() -> None:
    with pytest.raises(ConfigError, match="the address of dataset holds a password") as caught:
        validate(replace(Config(), dataset=f"https://{SECRET}@example.org"))
    assert SECRET not in str(caught.value)


def test_a_path_means_the_same_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "images").mkdir(parents=True)
    (home / "epoch-000001").mkdir()
    (home / "epoch-000001" / "weights.pt").touch()
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    ways = [("~", "~/mlflow.db"), (str(tmp_path / "link"), "mlflow.db"), (".", "./mlflow.db")]
    found = {
        locations.located(
            replace(
                Config(),
                dataset=f"{folder}/images",
                pretrained=f"{folder}/epoch-000001",
                storage=f"{folder}/runs",
                tracking_uri=store,
            )
        )
        for folder, store in ways
    }
    (config,) = found
    assert config.data.dataset == str(home / "images")
    assert config.model.pretrained == str(home / "epoch-000001" / "weights.pt")
    assert config.run.storage == str(home / "runs")
    assert config.run.tracking_uri == f"sqlite:///{home}/mlflow.db"


@pytest.mark.parametrize("file", ["artifacts/weights.pt", "model.safetensors", "state.pt"])
def test_a_folder_of_weights_is_known_by_the_file_in_it(file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no weights"):
        locations.located(replace(Config(), pretrained=str(tmp_path)))
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    config = locations.located(replace(Config(), pretrained=str(tmp_path)))
    assert config.model.pretrained == str(tmp_path / file)


def test_a_model_in_mlflow_is_to_be_fetched_first() -> None:
    with pytest.raises(ConfigError, match=r"fetch models:/a@best first, .* mlflow artifacts downl"):
        locations.located(replace(Config(), pretrained="models:/a@best"))


def test_embedded_data_and_the_hub_are_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits:0-4", "hub"):
        (tmp_path / name).mkdir()
        assert locations.absolute(name) == name
        assert locations.absolute(f"./{name}") == str(tmp_path / name)


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_variable_is_as_good_as_none(
    empty: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "NFLAB_STORAGE"):
        monkeypatch.delenv(name, raising=False)
        if empty is not None:
            monkeypatch.setenv(name, empty)
    assert locations.tracking_uri(RunConfig()) == f"sqlite:///{ROOT}/mlflow.db"
    assert locations.storage(RunConfig()) == str(ROOT / "runs")


def test_a_folder_is_no_tracking_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path))
    with pytest.raises(ConfigError, match="is a folder: give a file"):
        locations.tracking_uri(RunConfig())


@pytest.mark.parametrize("name", ["\u4e2d" * 90, "x" * 101, "a\udcff", "-a", "a/b", ".."])
def test_a_name_that_no_folder_can_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must name a folder"):
        locations.check_name(name)
    locations.check_name("a" + "\u4e2d" * 60)


def test_other_storages_are_taken_as_they_are() -> None:
    for uri in ("s3://bucket/runs?endpoint_override=127.0.0.1:9000", "/data/a:b@c"):
        assert locations.storage(RunConfig(storage=uri)) == uri
