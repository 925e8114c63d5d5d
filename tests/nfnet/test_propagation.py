"""Signal propagation against the theory that the networks are built on."""

import pytest
import torch

import nfnet

DEPTHS = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3)}


@pytest.mark.parametrize("size", ["50", "101"])
def test_variance_of_every_blocks_input_is_the_one_that_theory_expects(size: str) -> None:
    model = nfnet.create_model(f"dm_nf_resnet{size}", widths=(128, 256, 512, 1024))
    found = nfnet.signal_propagation(model, torch.randn(4, 3, 96, 96))
    # arXiv 2101.08692: variance 1 after a transition's shortcut, plus 0.2^2 for every block; the
    # stem's max pool, which no theory covers, comes before the first block.
    expected = [1 + 0.04 * b for depth in DEPTHS[size] for b in range(1, depth + 1)]
    assert [block.expected_variance for block in found[1:]] == pytest.approx(expected[:-1])
    assert [block.variance for block in found[1:]] == pytest.approx(expected[:-1], rel=0.15)
    assert all(block.squared_mean < 0.15 for block in found[1:])
    # Residual branches keep the variance of what they start from, where images are large enough
    # that the padding of their edges takes little away.
    early = [block.residual_variance for block in found[: sum(DEPTHS[size][:2])]]
    assert early == pytest.approx([1] * len(early), rel=0.2)


def test_pooled_shortcuts_shrink_the_signal_of_nfnets() -> None:
    model = nfnet.create_model(
        "dm_nfnet_f0", depths=(1, 2, 2, 1), widths=(64, 128, 128, 128), group_size=16
    )
    found = nfnet.signal_propagation(model, torch.randn(4, 3, 128, 128))
    assert [block.name for block in found][:2] == ["stages.0.0", "stages.1.0"]
    # The block after a stage's first one: an average of four pixels varies less than one.
    assert found[2].variance < 0.8 * (found[2].expected_variance or 0)


def test_batch_norm_lets_the_signal_grow_and_expects_nothing() -> None:
    model = nfnet.create_model("preact_resnet50", widths=(64, 128, 256, 512))
    found = nfnet.signal_propagation(model, torch.randn(4, 3, 96, 96))
    assert all(block.expected_variance is None for block in found)
    # Within the third stage, block by block.
    variances = [block.variance for block in found[8:13]]
    assert variances == sorted(variances)


@pytest.mark.parametrize("name", ["dm_nf_resnet50", "nf_resnet50", "preact_resnet50"])
def test_measuring_leaves_the_model_as_it_was(name: str) -> None:
    model = nfnet.create_model(name, depths=(1, 2), widths=(16, 32)).eval()
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    nfnet.signal_propagation(model, torch.randn(2, 3, 32, 32))
    assert not model.training
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_at_initialisation_residual_branches_add_nothing() -> None:
    for name in ("dm_nf_resnet50", "nf_resnet50"):
        model = nfnet.create_model(name, depths=(3,), widths=(32,)).eval()
        x = torch.randn(2, 3, 64, 64)
        found = nfnet.signal_propagation(model, x, skip_gain=None)
        assert found[1].variance == found[2].variance
        grown = nfnet.signal_propagation(model, x)
        assert grown[2].variance > grown[1].variance
