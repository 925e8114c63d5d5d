"""The face of nflab."""

import nflab
from tests.conftest import ROOT
from tests.docstrings import names, undocumented


def test_everything_exported_exists_and_has_a_docstring_in_its_file() -> None:
    files = sorted((ROOT / "platform" / "nflab").rglob("*.py"))
    documented = set.union(*(names(path) - set(undocumented(path)) for path in files))
    assert set(nflab.__all__) <= documented
    assert all(getattr(nflab, name) is not None for name in nflab.__all__)
