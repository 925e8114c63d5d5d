"""The package as a whole."""

import doctest
from pathlib import Path

import pytest

import nfnet
from tests.conftest import ROOT
from tests.docstrings import names, undocumented

FILES = sorted((ROOT / "nfnet").rglob("*.py"))


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(nfnet)
    assert result.attempted > 0
    assert result.failed == 0


def test_everything_exported_is_defined_in_its_files() -> None:
    assert set(nfnet.__all__) <= set.union(*map(names, FILES))
    assert all(hasattr(nfnet, name) for name in nfnet.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_everything_public_has_a_docstring_in_its_file(path: Path) -> None:
    assert [name for name in undocumented(path) if name != "__all__"] == []


def test_what_has_no_docstring_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        '''
A = (1, 2)
"""Said."""
B = (1, 2)
C: int = 3
_D = 4
def said(): "Said."
def unsaid(): pass
def empty(): ""
class Said:
    """Said.

    Args:
        told: said.
    """
    told: int = 1
    untold: int
    shown: int
    """Said."""
    def method(self): pass
    def _hidden(self): pass
class Unsaid(tuple): pass
'''
    )
    assert undocumented(path) == [
        *["B", "C", "unsaid", "empty", "Said.untold", "Said.method", "Unsaid"]
    ]
    assert names(path) == {"A", "B", "C", "_D", "said", "unsaid", "empty", "Said", "Unsaid"}
