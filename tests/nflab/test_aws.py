"""Which type of machine follows which."""

import yaml

from nflab.aws import order
from tests.conftest import ROOT


def test_types_with_the_same_resources_follow_each_other_by_priority() -> None:
    gpu = {"CPU": 8, "GPU": 1}
    config = {
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}},
            "dear": {"resources": gpu},
            "spot": {"resources": gpu, "priority": 2},
            "large": {"resources": {"CPU": 96, "GPU": 8}, "priority": 9},
            "other": {"resources": gpu, "priority": 1},
        },
    }
    assert order(config) == {"spot": "other", "other": "dear"}


def test_the_launcher_file_goes_from_spot_to_on_demand() -> None:
    config = yaml.safe_load((ROOT / "cluster" / "gpu.yaml").read_text())
    assert config["provider"]["module"] == "nflab.aws.Provider"
    assert order(config) == {"gpu-spot": "gpu-on-demand"}
