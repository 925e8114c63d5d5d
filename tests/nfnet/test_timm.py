"""Agreement with timm: one random set of weights gives both the same logits."""

import pytest
import timm
import torch
from torch import Tensor

import nfnet

NAMES = sorted(set(timm.list_models(module="nfnet")) & set(nfnet.list_models()))


def random_weights(shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of usual sizes, with no zeros or ones that hide a term."""
    weights = {}
    for name, tensor in shapes.items():
        noise = torch.randn(tensor.shape)
        if name.endswith("gain"):
            weights[name] = 1 + 0.2 * noise
        elif tensor.ndim == 1:
            weights[name] = 0.1 * noise
        else:
            weights[name] = noise * tensor[0].numel() ** -0.5
    return weights


def test_every_model_of_timms_but_its_test_model_is_here() -> None:
    assert set(timm.list_models(module="nfnet")) - set(NAMES) == {"test_nfnet"}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_timms(name: str) -> None:
    with torch.device("meta"):
        ours = nfnet.create_model(name, reference="timm").eval()
        theirs = timm.create_model(name).eval()
    weights = random_weights(theirs.state_dict())
    for model in (ours, theirs):
        model.load_state_dict(weights, assign=True)
    for height, width in ((64, 64), (97, 81)):
        x = torch.randn(1, 3, height, width)
        with torch.no_grad():
            actual, expected = ours(x), theirs(x)
        assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_authors_arithmetic_is_another() -> None:
    """Else the switch would switch nothing."""
    settings = {"depths": (1, 1), "widths": (16, 32), "group_size": 8, "num_classes": 5}
    ours, timms = (
        nfnet.create_model("dm_nfnet_f0", reference=r, **settings).eval()
        for r in ("authors", "timm")
    )
    weights = random_weights(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for model in (ours, timms):
            model.load_state_dict(weights)
        difference = (ours(x) - timms(x)).abs().max() / timms(x).abs().max()
    assert 1e-4 < difference < 0.1


def test_initial_gains_are_timms() -> None:
    for name in ("dm_nfnet_f0", "nfnet_f0", "nf_regnet_b0"):
        ours = nfnet.create_model(name).state_dict()
        theirs = timm.create_model(name).state_dict()
        gains = [key for key in theirs if key.endswith("gain")]
        assert len(gains) > 40
        assert all(torch.equal(ours[key], theirs[key]) for key in gains)
