"""The face of nflab."""

import nflab
from nflab.recording.metrics import METRICS
from nflab.settings.leaves import flat
from nflab.settings.studies import SweepConfig
from tests.conftest import ROOT
from tests.docstrings import names, undocumented


def test_everything_exported_exists_and_has_a_docstring_in_its_file() -> None:
    files = sorted((ROOT / "platform" / "nflab").rglob("*.py"))
    documented = set.union(*(names(path) - set(undocumented(path)) for path in files))
    assert set(nflab.__all__) <= documented
    assert all(getattr(nflab, name) is not None for name in nflab.__all__)


def test_no_metric_has_the_name_of_a_setting() -> None:
    """In tables of runs both are columns."""
    assert not set(METRICS) & set(flat(SweepConfig()))
