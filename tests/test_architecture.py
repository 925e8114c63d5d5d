"""What the design promises of the tree as a whole."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = {"nfnet": ROOT / "nfnet", "nflab": ROOT / "platform" / "nflab"}


def imports(path: Path) -> set[str]:
    """Top-level names of all that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found
    return found


def test_platform_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == sys.platform.capitalize()


def test_nfnet_knows_torch_and_nothing_of_the_platform() -> None:
    allowed = {"torch", "torchvision", "numpy", "safetensors", "nfnet"} | sys.stdlib_module_names
    allowed |= {"huggingface_hub", "onnxruntime", "onnxscript"}  # extras, imported where needed
    for path in files(PACKAGES["nfnet"]):
        assert imports(path) <= allowed, path


def test_importing_nfnet_imports_no_ray_and_no_mlflow() -> None:
    code = "import nfnet, sys; print([m for m in ('ray', 'mlflow', 'nflab') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_imports_run_from_experiments_to_nflab_to_nfnet() -> None:
    for path in files(PACKAGES["nflab"]):
        assert "experiments" not in imports(path), path
    for path in files(ROOT / "experiments"):
        assert not imports(path) & {"ray", "mlflow", "optuna"}, path


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        (
            "ray",
            {
                "aws.py",
                "waiting.py",
                "cluster.py",
                "worker_setup.py",
                "mail.py",
                "train.py",
                "training.py",
                "trial.py",
                "tune.py",
                "sweep.py",
                "grid.py",
            },
        ),
        ("mlflow", {"tracking.py", "archive.py", "serving.py", "registry.py"}),
        ("optuna", {"recipes.py", "ledger.py", "study.py", "importances.py"}),
        ("tyro", {"config.py", "cli.py"}),
    ],
)
def test_each_library_stands_behind_its_modules(library: str, homes: set[str]) -> None:
    users = {path.name for path in files(PACKAGES["nflab"]) if library in imports(path)}
    assert users == homes


@pytest.mark.parametrize("module", ["nflab.trial", "nflab.mail"])
def test_what_ray_starts_for_a_run_imports_nothing_that_only_the_driver_needs(module: str) -> None:
    ask = f"import sys, {module}; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert module in told.stdout.split()
    assert not set(told.stdout.split()) & {"mlflow", "optuna", "sklearn", "matplotlib"}


def test_constraints_are_plain_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line), line
