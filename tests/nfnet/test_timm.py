"""Agreement with timm: one random set of weights gives both the same logits."""

import pytest
import timm
import torch
from torch import Tensor

import nfnet

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize("name", ["nf_resnet26", "nfnet_l0", "nf_regnet_b0", "dm_nfnet_f0"])
def test_features_on_the_way_are_timms(name: str) -> None:
    ours = nfnet.create_model(name, reference="timm").eval()
    theirs = timm.create_model(name).eval()
    weights = random_weights(theirs.state_dict())
    for model in (ours, theirs):
        model.load_state_dict(weights)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for indices in (None, 2, [1, 3], [-1, 0]):
            last, found = ours.forward_intermediates(x, indices)
            expected_last, expected = theirs.forward_intermediates(x, indices)
            assert [a.shape for a in found] == [b.shape for b in expected]
            for a, b in zip((last, *found), (expected_last, *expected), strict=True):
                assert (a - b).abs().max() < 1e-4 * b.abs().max()
            alone = ours.forward_intermediates(x, indices, intermediates_only=True)
            assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
        pooled = ours.forward_head(last, pre_logits=True)
        assert torch.allclose(pooled, theirs.forward_head(last, pre_logits=True), atol=1e-5)
        assert torch.equal(ours.forward_head(last), ours(x))
        headless = nfnet.create_model(name, num_classes=0, reference="timm").eval()
        headless.load_state_dict({k: v for k, v in weights.items() if "head" not in k})
        assert torch.equal(headless(x), pooled)
    assert ours.num_features == theirs.num_features == headless.num_features


@pytest.mark.parametrize("name", NAMES)
def test_what_is_told_of_features_is_what_timm_tells(name: str) -> None:
    with torch.device("meta"):
        assert nfnet.create_model(name).feature_info == timm.create_model(name).feature_info


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
