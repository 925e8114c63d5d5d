"""How ratios are taken, kept and compared; nothing is timed here."""

import json
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.compare import in_turns, of_rounds, table
from benchmarks.growth import RECORDED, Book, Counting
from tests.conftest import ROOT

KEPT = json.loads((ROOT / "benchmarks/kept.json").read_text())


def test_a_row_is_the_median_of_the_rounds_ratios() -> None:
    ours, theirs = [1.0, 2.0, 4.0, 1.0, 1.0], [2.0, 6.0, 4.0, 5.0, 4.0]
    found = of_rounds("x", "y", ours, theirs, 3.5, "least")  # seconds: how many times faster
    assert (found.low, found.ratio, found.high) == (2.0, 3.0, 4.0)  # of 1, 2, 3, 4, 5
    assert (found.ours, found.theirs, found.met) == (1.0, 4.0, False)
    assert of_rounds("x", "y", ours, theirs, None, "least").met is None
    assert of_rounds("x", "y", [2.0], [3.0], 1.5, "least").met is True
    longer = of_rounds("x", "y", [3.0], [2.0], 1.4, "most")
    assert (longer.low, longer.ratio, longer.high, longer.met) == (1.5, 1.5, 1.5, False)
    assert of_rounds("x", "y", [3.0], [2.0], 1.4, "least", "images/s").ratio == 1.5


def test_ways_take_turns_and_the_first_of_each_are_left_out() -> None:
    seen: list[str] = []
    works = {name: lambda name=name: seen.append(name) for name in "ab"}
    times = in_turns(works, rounds=3, warm_up=1)
    assert seen == list("abababab")
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("bound", "ratio", "said"),
    [("least", 1.8, 0), ("least", 1.7, 1), ("most", 2.2, 0), ("most", 2.4, 1)],
)
def test_what_is_15_percent_worse_is_told(bound: str, ratio: float, said: int) -> None:
    row = {"name": "x", "peer": "timm, loop", "ratio": 2.0, "bound": bound}
    now = {**row, "peer": "timm, fused", "ratio": ratio}  # the fastest may be another
    assert len(run.worse([now], [row])) == said
    assert run.worse([{**now, "name": "new"}], [row]) == []


def test_the_page_shows_what_is_kept() -> None:
    page = run.PAGE.read_text()
    assert table(KEPT) in page
    assert run.with_table(page, KEPT) == page
    assert {row["name"] for row in KEPT if row["target"] is not None}
    for row in KEPT:
        assert {"name", "ratio", "target", "met", "machine"} <= row.keys()


def test_every_benchmark_is_a_script_of_its_own() -> None:
    for script, *_ in run.RUNS.values():
        assert (ROOT / f"benchmarks/{script}.py").is_file()


def test_recording_a_cell_takes_as_many_requests_whatever_is_recorded(tmp_path: Path) -> None:
    book = Book(tmp_path, cells=31, epochs=3)
    counting = Counting(book.tracker._client)
    book.tracker._client = counting  # type: ignore[assignment]
    ledger = book.ledger()
    calls = []
    for _ in range(RECORDED):
        before = counting.calls
        book.record(ledger)
        calls.append(counting.calls - before)
    book.copy(30)
    ledger = book.ledger()
    assert ledger.missing == 1
    before = counting.calls
    book.record(ledger)
    book.outbox.close()
    assert {*calls, counting.calls - before} == {calls[0]}
    assert calls[0] <= 3 + 10
