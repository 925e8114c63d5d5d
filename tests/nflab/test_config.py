import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import flat, replace
from nflab.settings.serialization import from_json, load, to_json
from nflab.settings.studies import SweepConfig

configs = st.builds(
    lambda seed, clipping, name, mixup: replace(
        SweepConfig(), seed=seed, clipping=clipping, name=name, mixup=mixup
    ),
    st.integers(0, 2**31 - 1),
    st.none() | st.floats(1e-6, 1e6),
    st.none() | st.text(),
    st.booleans(),
)


@given(configs)
def test_json_reads_back_what_was_written(config: SweepConfig) -> None:
    assert from_json(SweepConfig, to_json(config)) == config


def test_leaf_names_are_unique() -> None:
    leaves = [
        leaf.name
        for part in dataclasses.fields(SweepConfig)
        for leaf in dataclasses.fields(getattr(SweepConfig(), part.name))
    ]
    assert len(leaves) == len(set(leaves)) == len(flat(SweepConfig()))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("[]", "object"),
        ('{"optimiser": {}}', "'optimiser'"),
        ('{"optimizer": {"cliping": 0.1}}', "'optimizer.cliping'"),
        ('{"optimizer": {"clipping": "0.1"}}', "'optimizer.clipping'"),
        ('{"optimizer": {"batch_size": 16.5}}', "'optimizer.batch_size'"),
        ('{"optimizer": {"batch_size": true}}', "'optimizer.batch_size'"),
        ('{"augmentation": {"mixup": 1}}', "'augmentation.mixup'"),
        ('{"optimizer": 3}', "'optimizer'"),
        ('{"search": {"trials": 3}}', "'search'"),
    ],
)
def test_wrong_json_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        from_json(Config, text)
    assert "\n" not in str(caught.value)


def test_loading_a_file_keeps_all_but_the_old_runs_identity(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    recorded = replace(Config(), name="old", storage="/old", tracking_uri="/old.db", seed=3)
    path.write_text(to_json(recorded))
    assert load(Config, str(path)) == replace(Config(), seed=3)


def test_a_setting_that_is_left_out_keeps_its_default() -> None:
    assert from_json(Config, json.dumps({"run": {"seed": 5}})) == replace(Config(), seed=5)


def test_replacing_an_unknown_setting_is_refused() -> None:
    wrong: dict[str, Any] = {"cliping": 0.1}
    with pytest.raises(ConfigError, match="cliping"):
        replace(Config(), **wrong)
