"""Errors of load_haiku; that it loads right is in test_golden.py."""

import numpy as np
import pytest
import torch

import nfnet

Weights = dict[str, dict[str, np.ndarray]]


def convolution(kernel: int, in_channels: int, out_channels: int) -> dict[str, np.ndarray]:
    return {
        "w": np.full((kernel, kernel, in_channels, out_channels), 2.0),
        "gain": np.full(out_channels, 3.0),
        "bias": np.full(out_channels, 4.0),
    }


@pytest.fixture
def weights() -> Weights:
    """For one stage of one block."""
    block = "NF_ResNet/~/nf_res_block"
    return {
        "NF_ResNet/~/initial_conv": convolution(3, 1, 4),
        f"{block}/~/conv_shortcut": convolution(1, 4, 8),
        f"{block}/~/conv0": convolution(1, 4, 2),
        f"{block}/~/conv1": convolution(3, 2, 2),
        f"{block}/~/conv2": convolution(1, 2, 8),
        block: {"skip_gain": np.array(5.0)},
        "NF_ResNet/~/linear": {"w": np.full((8, 3), 6.0), "b": np.full(3, 7.0)},
    }


@pytest.fixture
def model() -> torch.nn.Module:
    return nfnet.create_model(
        "dm_nf_resnet_digits", num_classes=3, depths=(1,), widths=(8,), stem_width=4
    )


def test_loads_every_parameter(model: torch.nn.Module, weights: Weights) -> None:
    nfnet.load_haiku(model, weights)
    means = {name: p.mean().item() for name, p in model.named_parameters()}
    assert means.pop("head.fc.weight") == 6
    assert means.pop("head.fc.bias") == 7
    expected = {"weight": 2, "gain": 3, "bias": 4, "skipinit_gain": 5}
    assert means == {name: expected[name.split(".")[-1]] for name in means}


@pytest.mark.parametrize("problem", ["missing", "unexpected", "shape"])
def test_says_what_is_wrong_and_loads_nothing(
    model: torch.nn.Module, weights: Weights, problem: str
) -> None:
    if problem == "missing":
        del weights["NF_ResNet/~/linear"]["b"]
        message = r"1 missing of 18 tensors\):\n  missing: head\.fc\.bias\n"
    elif problem == "unexpected":
        weights["NF_ResNet/~/nf_res_block_1"] = {"skip_gain": np.array(0.0)}
        message = "unexpected: NF_ResNet/~/nf_res_block_1::skip_gain"
    else:
        weights["NF_ResNet/~/linear"]["w"] = np.zeros((8, 4))
        message = r"head\.fc\.weight: \(4, 8\), expected \(3, 8\)"
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        nfnet.load_haiku(model, weights)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_refuses_the_batch_normalised_twin(weights: Weights) -> None:
    with pytest.raises(ValueError, match="the model has batch norm"):
        nfnet.load_haiku(nfnet.create_model("preact_resnet_digits"), weights)


def test_says_where_the_released_code_rounds_down() -> None:
    model = nfnet.create_model("dm_nfnet_f0+", depths=(1,), widths=(384,), num_classes=3)
    weights = {"NFNet/~/nf_block/~/conv0": convolution(1, 192, 128)}
    with pytest.raises(
        ValueError, match=r"128 channels inside the blocks of stage 1, expected 256"
    ):
        nfnet.load_haiku(model, weights)
