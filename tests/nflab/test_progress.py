"""What a person is told while a search goes on."""

import io

import pytest
from rich.console import Console

from nflab.terminal import progress
from nflab.terminal.progress import SweepProgress


def test_a_line_says_why_a_trial_was_cut_and_the_best_so_far(
    capsys: pytest.CaptureFixture[str],
) -> None:
    search = SweepProgress(3, 0, 8)
    for number, top1, outcome, cut in (
        (1, 90.0, "finished", None),
        (2, 11.0, "pruned", "rung 1: 11.0 % against 90.0 %"),
        (3, 70.0, "finished", None),
    ):
        search.started(number, {"clipping": None})
        search.reported(number, 2, top1, None, cut)
        search.ended(number, outcome, None)
    first, second, third = capsys.readouterr().out.splitlines()
    assert "trial 1 finished after 2 epochs, validation top-1 90.0 %  (clipping none)" in first
    assert "validation top-1 11.0 % (rung 1: 11.0 % against 90.0 %)  (clipping none)" in second
    assert all("best 90.0 %, about" in line for line in (first, second, third))


def test_the_best_is_that_of_the_whole_search_and_a_grid_has_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for told in (SweepProgress(9, 5, 8, best=95.0), SweepProgress(9, 0, 8, "cell")):
        told.started(6, {"clipping": None})
        told.reported(6, 8, 90.0)
        told.ended(6, "finished", None)
    resumed, grid = capsys.readouterr().out.splitlines()
    assert "best 95.0 %" in resumed
    assert "best" not in grid


def test_before_any_result_there_is_no_best_on_a_terminal_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=200)
    monkeypatch.setattr(progress, "console", lambda: terminal)
    with SweepProgress(2, 0, 8) as told:
        told.started(1, {"clipping": 0.1})
        terminal.print(told._table())
        told.ended(1, "failed", "ValueError: no")
    assert "1 failed" in shown.getvalue()
    assert "best" not in shown.getvalue()
