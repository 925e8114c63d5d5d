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


def rooms(path: Path) -> set[str]:
    """The rooms of nflab that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "nflab":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nflab."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "nflab" and len(name) > 1}
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
    allowed = {"torch", "PIL", "numpy", "safetensors", "nfnet"} | sys.stdlib_module_names
    allowed |= {"huggingface_hub", "onnxruntime", "onnxscript"}  # extras, imported where needed
    for path in files(PACKAGES["nfnet"]):
        assert imports(path) <= allowed, path


@pytest.mark.slow
def test_importing_nfnet_imports_no_ray_and_no_mlflow() -> None:
    code = "import nfnet, sys; print([m for m in ('ray', 'mlflow', 'nflab') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


ROOMS = (
    "settings",
    "storage",
    "data",
    "learning",
    "analysis",
    "terminal",
    "cluster",
    "running",
    "recording",
    "searching",
    "studies",
    "reporting",
    "auditing",
)
"""The packages of nflab: each imports only those before it."""

HOMES = {
    "ray": {"cluster", "running"},
    "mlflow": {"recording"},
    "optuna": {"searching"},
    "tyro": {"settings", "terminal"},
    "matplotlib": {"analysis"},
}
"""Library -> the rooms that may import it."""

LONGEST = 350
"""Lines of a module."""


def test_nflab_is_made_of_rooms() -> None:
    base = PACKAGES["nflab"]
    assert {path.name for path in base.glob("*.py")} == {"__init__.py"}
    assert {path.name for path in base.iterdir() if (path / "__init__.py").is_file()} == set(ROOMS)


def test_each_room_imports_only_rooms_below_it() -> None:
    base = PACKAGES["nflab"]
    for path in files(base):
        parts = path.relative_to(base).parts
        if len(parts) == 1:  # the face of all of it
            continue
        below = ROOMS[: ROOMS.index(parts[0]) + 1]
        assert rooms(path) <= set(below), path


def test_each_library_stands_behind_its_rooms() -> None:
    base = PACKAGES["nflab"]
    used: dict[str, set[str]] = {library: set() for library in HOMES}
    for path in files(base):
        for library in imports(path) & set(HOMES):
            used[library].add(path.relative_to(base).parts[0])
    assert used == HOMES


def test_no_module_is_long() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in (*PACKAGES.values(), ROOT / "experiments", ROOT / "cluster")
        for path in files(folder)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert long == {}


def test_experiments_know_nflab_alone() -> None:
    for path in files(PACKAGES["nflab"]):
        assert "experiments" not in imports(path), path
    for path in files(ROOT / "experiments"):
        assert not imports(path) & {"ray", "mlflow", "optuna", "matplotlib"}, path


@pytest.mark.slow
def test_the_face_of_nflab_is_loaded_when_it_is_used() -> None:
    code = (
        "import sys, nflab; before = set(sys.modules); "
        "print(*(n for n in ('torch', 'ray', 'mlflow', 'optuna') if n in before)); "
        "print(*(getattr(nflab, name).__class__.__name__ for name in nflab.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, kinds = done.stdout.split("\n")[:2]
    assert loaded == ""
    assert len(kinds.split()) == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["nflab.running.trial_process", "nflab.running.mailbox", "nflab.cluster.autoscaler"]
)
def test_what_ray_starts_for_a_run_imports_nothing_that_only_the_driver_needs(module: str) -> None:
    ask = f"import sys, {module}; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert module in told.stdout.split()
    spared = {"mlflow", "optuna", "sklearn", "matplotlib"}
    spared |= set() if module == "nflab.running.trial_process" else {"torch"}
    assert not set(told.stdout.split()) & spared


def test_constraints_are_plain_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line), line
