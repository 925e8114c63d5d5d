"""What the README and the docs say can be done: every command, link, picture and program.

Fenced blocks are told apart by what follows the backticks: of `sh` and `sh aws` each command is
parsed, `sh run` and `python run` are run as they stand.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import nflab
from nflab.settings.config import Config
from nflab.settings.serialization import to_json
from nflab.terminal import command_line
from tests.conftest import ROOT
from tests.test_architecture import HOMES, ROOMS

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

KINDS = {"sh", "sh run", "sh aws", "sh kubernetes", "python run", "mermaid", "text", "yaml"}
"""What may follow the backticks of a block."""

SCRIPT = re.compile(r"(experiments|benchmarks|cluster)/\w+\.py")

OF_MAKE = {"ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"}
"""Variables by which the make that runs these tests would change another."""

ENDS = {"|", "||", "&&", ";", ">", "<", "&"}
"""Words that end a command."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    kind: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(str(page.relative_to(ROOT)), kind, text) for kind, text in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell text, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in words:
            if word in ENDS:
                yield command
                command = []
            else:
                command.append(word)
        yield command


def told() -> list[tuple[str, list[str]]]:
    """Every command of every page: of its shell blocks, and those in the text."""
    found = [
        (block.page, command)
        for block in BLOCKS
        if block.kind.startswith("sh")
        for command in commands(block.text)
    ]
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        inline = re.findall(r"`((?:python experiments/|make |ray job submit |sbatch )[^`]+)`", text)
        found += [(str(page.relative_to(ROOT)), c) for line in inline for c in commands(line)]
    return found


def started_by(command: list[str]) -> Iterator[list[str]]:
    """The scripts with their arguments that a command starts, through make too.

    Raises:
        CalledProcessError: make has no such target.
    """
    if command[:1] == ["make"]:
        printed = subprocess.run(
            ["make", "--dry-run", "--no-print-directory", *command[1:]],
            cwd=ROOT,
            env={name: os.environ[name] for name in os.environ if name not in OF_MAKE},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for line in printed.splitlines():
            if SCRIPT.search(line):
                yield from (found for one in commands(line) for found in started_by(one))
    for place, word in enumerate(command):
        before = Path(command[place - 1]).name
        if SCRIPT.fullmatch(word) and before in ("python", "slurm.sbatch"):
            yield command[place:]


SCRIPTS = sorted(
    {
        (page, *started)
        for page, command in told()
        if command[:1] != ["make"]
        for started in started_by(command)
    }
)

TARGETS = sorted({tuple(command) for _, command in told() if command[:1] == ["make"]})


class _Parsed(Exception):
    """The script has taken its flags, and would begin."""


def parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Starts a script, up to where it has understood its flags.

    A run to be resumed, and a file that is named, exist in `folder`.

    Raises:
        SystemExit: it refused them.
    """
    script, *flags = arguments
    path = ROOT / script
    assert path.is_file(), script

    def stop(*_: Any) -> None:
        raise _Parsed

    real = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        real(self, *given, **named)
        raise _Parsed

    real_main = command_line.main

    def main(kind: type[Config], run: Any, description: str, **named: Any) -> None:
        recipe = named.get("recipe", "digits")
        config, _ = command_line.parse(kind, [], recipe=recipe)
        (folder / "config.json").write_text(to_json(config))
        # The recipe that the page shows.
        (block,) = (b for b in BLOCKS if b.kind == "yaml")
        (folder / "own.yaml").write_text(block.text)
        if "--resume" in flags:
            name = flags[flags.index("--resume") + 1]
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "config.json").write_text(to_json(nflab.replace(config, name=name)))
        real_main(kind, stop, description, **named)

    real_command = command_line.command
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("NFLAB_STORAGE", str(folder))
        patch.setattr(sys, "argv", [str(path), *flags])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        patch.setitem(sys.modules, "_start", types.ModuleType("_start"))
        patch.setattr(command_line, "raise_on_interrupt", lambda: None)
        patch.setattr(command_line, "validate", lambda config, trains: None)  # data is elsewhere
        patch.setattr(command_line, "main", main)
        patch.setattr(command_line, "command", lambda kind, run, doc: real_command(kind, stop, doc))
        code = compile(path.read_text(), str(path), "exec")
        if "argparse" in code.co_names or script.startswith("benchmarks/"):
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        try:
            exec(code, {"__name__": "__main__", "__file__": str(path), "__doc__": None})
        except _Parsed:
            return
        assert "--print-config" in flags, f"{script} has not begun"


@pytest.mark.parametrize("said", SCRIPTS, ids=" ".join)
def test_a_command_of_the_docs_is_understood(
    said: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        parse(list(said[1:]), monkeypatch, tmp_path)
    except SystemExit as ended:
        if ended.code == 0:  # --help
            return
        pytest.fail(f"{said[0]}: {shlex.join(said[1:])}: {capsys.readouterr().err}")


@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
def test_a_target_of_the_docs_exists_and_its_script_takes_its_flags(
    target: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for started in started_by(list(target)):
        if started[0].startswith("experiments/"):
            parse(started, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        "experiments/agc_sweep.py --trails 4",
        "experiments/agc_sweep.py --recipe digitz",
        "experiments/audit.py --mend",
        "experiments/export.py a",
        "experiments/train.py --trials 3",
    ],
)
def test_a_wrong_flag_would_be_found(
    wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(wrong.split(), monkeypatch, tmp_path)
    assert refused.value.code == 2


def test_commands_are_found_wherever_they_stand() -> None:
    text = 'make up A="b c" && ray job submit -- python experiments/train.py \\\n  --seed 1 # why\n'
    assert list(commands(text)) == [
        ["make", "up", "A=b c"],
        "ray job submit -- python experiments/train.py --seed 1".split(),
    ]
    assert [s[1:] for s in SCRIPTS if s[0] == "README.md"]
    (started,) = started_by(["make", "sweep", "ARGS=--trials 3"])
    assert started == ["experiments/agc_sweep.py", "--trials", "3"]


def test_blocks_say_what_they_are() -> None:
    assert {block.kind for block in BLOCKS} <= KINDS
    for block in BLOCKS:
        if block.kind.startswith("sh"):
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


def headings(page: Path) -> set[str]:
    """What a page's headings are called in addresses, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for address in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in address:
            continue
        file, _, heading = unquote(address).partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), address
        assert not heading or heading in headings(target), address


def test_pictures_are_few_small_and_all_shown() -> None:
    shown = {
        (page.parent / address).resolve()
        for page in PAGES
        for address in re.findall(r"\]\(([^)\s]+\.png)\)", page.read_text())
    }
    kept = [*(ROOT / "docs" / "figures").iterdir(), *(ROOT / "results" / "figures").iterdir()]
    assert shown == set(kept)
    assert max(path.stat().st_size for path in shown) < 300_000
    assert not list((ROOT / "experiments").glob("*.png"))


def test_the_readme_is_read_in_three_minutes_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, page


def test_the_page_of_the_architecture_names_every_room_and_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    order = re.search(r"The order, from the lowest: (.+?)\.\n", text, re.DOTALL)
    assert order
    assert re.findall(r"`(\w+)`", order[1]) == list(ROOMS)
    (picture,) = (b.text for b in BLOCKS if b.kind == "mermaid")
    for room in ROOMS:
        assert re.search(rf'^ +{room}\["{room}', picture, re.MULTILINE), room
    for library, rooms in HOMES.items():
        for room in rooms:
            assert re.search(rf"^ +{room}\[.*{library}", picture, re.MULTILINE | re.IGNORECASE)
    _, _, table = text.partition("| --- | --- |\n")
    for name in re.findall(r"`([\w/]+(?:\.\w+|/))`", table.partition("\n\n")[0]):
        homes = (ROOT / name, ROOT / "platform" / "nflab" / name)
        assert any(home.exists() for home in homes), name


def python_block(page: str) -> str:
    (code,) = (b.text for b in BLOCKS if b.page == page and b.kind == "python run")
    return code


def run_python(code: str, folder: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},  # few cores, many processes
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_librarys_example_trains_saves_reloads_and_fine_tunes(tmp_path: Path) -> None:
    check = "\nimport sys\nassert 'ray' not in sys.modules and 'nflab' not in sys.modules\n"
    printed = run_python(python_block("docs/pretrained.md") + check, tmp_path)
    top1 = re.search(r"unseen images of 5 to 9: ([\d.]+) %", printed)
    assert top1
    assert float(top1[1]) > 80
    assert (tmp_path / "digits.onnx").exists()


@pytest.fixture(scope="module")
def own(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    """A store in which the script of one's own, made shorter, has run; and what it printed."""
    folder = tmp_path_factory.mktemp("own")
    env = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "NFLAB_STORAGE": str(folder / "runs"),
        "RAY_ADDRESS": ray_address,
    }
    return env, run_python(own_script(), folder, **env)


def own_script() -> str:
    """The docs' script, with fewer epochs and seeds."""
    code = python_block("docs/own_script.md")
    assert len(code.splitlines()) <= 20
    short = code.replace("epochs=20, seeds=2", "epochs=2, seeds=1")
    assert short != code
    return short


def test_the_script_of_ones_own_trains_each_cell_once(
    own: tuple[dict[str, str], str], tmp_path: Path
) -> None:
    env, first = own
    again = run_python(own_script(), tmp_path, **env)
    assert "4 cells (0 done)" in first
    assert "4 cells (4 done)" in again
    answer = first[first.index("test top-1 (%)") :]
    assert re.findall(r"^(0\.08|none) +[\d.]+ +[\d.]+$", answer, re.MULTILINE) == ["0.08", "none"]
    assert len(re.findall(r"smoothing gives [+-][\d.]+ points", answer)) == 2
    assert again.endswith(answer)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.kind == "sh run"], ids=lambda block: block.page
)
def test_what_runs_here_runs(block: Block, own: tuple[dict[str, str], str], tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-euc", block.text],
        cwd=tmp_path,
        env={**os.environ, **own[0], "PATH": path},
        check=True,
    )


def test_the_tests_that_are_said_to_show_a_promise_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/promises.md").read_text())
    assert len(named) > 20
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
