"""What a person is told while a search goes on."""

import pytest

from nflab.terminal.progress import SweepProgress


def test_a_line_says_why_a_trial_was_cut_and_the_best_so_far(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = SweepProgress(3, 0, 8)
    for number, top1, outcome, cut in (
        (1, 90.0, "finished", None),
        (2, 11.0, "pruned", "rung 1: 11.0 % against 90.0 %"),
        (3, 70.0, "finished", None),
    ):
        progress.started(number, {"clipping": None})
        progress.reported(number, 2, top1, None, cut)
        progress.ended(number, outcome, None)
    first, second, third = capsys.readouterr().out.splitlines()
    assert "trial 1 finished after 2 epochs, validation top-1 90.0 %  (clipping none)" in first
    assert "validation top-1 11.0 % (rung 1: 11.0 % against 90.0 %)  (clipping none)" in second
    assert all("best 90.0 %, about" in line for line in (first, second, third))


def test_the_best_is_that_of_the_whole_search_and_a_grid_has_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for progress in (SweepProgress(9, 5, 8, best=95.0), SweepProgress(9, 0, 8, "cell")):
        progress.started(6, {"clipping": None})
        progress.reported(6, 8, 90.0)
        progress.ended(6, "finished", None)
    resumed, grid = capsys.readouterr().out.splitlines()
    assert "best 95.0 %" in resumed
    assert "best" not in grid
