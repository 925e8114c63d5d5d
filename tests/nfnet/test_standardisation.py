"""Kernels' standardisation and its gradient, held to autograd's own."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nfnet
from nfnet import layers
from nfnet.standardisation import MIN_NORM, standardise

SHAPE = (5, 3, 3, 2)


def plain(weight: Tensor, factor: Tensor, eps: float | None) -> Tensor:
    """The formula, operation by operation."""
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    squared = centred.square().sum((1, 2, 3), keepdim=True)
    if eps is None:
        return centred * factor / squared.clamp_min(MIN_NORM**2).sqrt()
    return centred * factor / (squared + eps * weight[0].numel()).sqrt()


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(SHAPE, dtype=dtype)
    weight[1] = 0.3 + 1e-4 * torch.randn(SHAPE[1:], dtype=dtype)  # below the authors' bound
    weight[2] += 50
    return weight.requires_grad_(), torch.randn(SHAPE[0], 1, 1, 1, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("eps", [None, 1e-5], ids=["authors", "timm"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_kernel_and_gradients_are_those_of_the_formula(
    dtype: torch.dtype,
    tolerance: float,
    eps: float | None,
    layout: torch.memory_format,
    device: str,
) -> None:
    weight, factor = inputs(dtype)
    weight = weight.detach().to(device, memory_format=layout).requires_grad_()
    factor = factor.detach().to(device).requires_grad_()
    towards = torch.randn(SHAPE, dtype=dtype).to(device)
    found = standardise(weight, factor, eps)
    expected = plain(weight.double(), factor.double(), eps)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    ours = torch.autograd.grad(found, (weight, factor), towards)
    theirs = torch.autograd.grad(expected, (weight, factor), towards.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("eps", [None, 1e-5], ids=["authors", "timm"])
def test_gradients_have_right_gradients(eps: float | None) -> None:
    weight, factor = inputs(torch.float64)
    with torch.no_grad():
        weight[1] *= 0  # inside the bound a finite difference stays inside
        weight[2] -= 50
    arguments = (weight, factor, eps)
    assert torch.autograd.gradcheck(standardise, arguments)
    assert torch.autograd.gradgradcheck(standardise, arguments)


def test_gradients_of_single_samples_are_found_by_vmap() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits").eval()
    parameters = dict(model.named_parameters())
    images, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, images, labels)
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    for name, p in parameters.items():
        assert p.grad is not None
        torch.testing.assert_close(found[name].sum(0), p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_pieces_with_kept_kernels_add_up_and_standardise_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nfnet.create_model("dm_nf_resnet_digits").double()
    convs = sum(isinstance(module, nfnet.ScaledStdConv2d) for module in model.modules())
    images, labels = torch.randn(8, 1, 8, 8).double(), torch.arange(8)
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    calls = []

    def counted(*arguments: object) -> Tensor:
        calls.append(1)
        return standardise(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "standardise", counted)
    with nfnet.kernels_kept(model):
        for piece in range(0, 8, 2):
            part = slice(piece, piece + 2)
            F.cross_entropy(model(images[part]), labels[part], reduction="sum").backward()
    assert len(calls) == convs
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_an_error_leaves_no_kernels_and_no_gradients() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits")
    before = model(torch.ones(1, 1, 8, 8))

    def fail() -> None:
        with nfnet.kernels_kept(model):
            model(torch.ones(1, 1, 8, 8)).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.stem.conv.weight.grad is None
    with torch.no_grad():
        model.stem.conv.gain *= 2  # what was kept would not know it
    assert not torch.equal(model(torch.ones(1, 1, 8, 8)), before)


def test_kernels_kept_within_kernels_kept_lose_nothing() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits").double()
    images = torch.randn(2, 1, 8, 8).double()
    for _ in range(2):
        model(images).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with nfnet.kernels_kept(model):
        model(images).square().sum().backward()
        with nfnet.kernels_kept(model.stages[0]):
            model(images).square().sum().backward()
        assert model.stages[0][0].conv1.kept is not None
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_trace_is_of_torchs_own_operations(tmp_path: Path) -> None:
    model = nfnet.create_model("dm_nf_resnet_digits").eval()
    images = torch.randn(2, 1, 8, 8)
    torch.jit.trace(model, images).save(str(tmp_path / "model.pt"))
    assert torch.allclose(torch.jit.load(str(tmp_path / "model.pt"))(images), model(images))


def test_frozen_kernels_are_kept_too() -> None:
    model = nfnet.create_model("dm_nf_resnet_digits")
    model.stem.requires_grad_(False)
    with nfnet.kernels_kept(model):
        model(torch.ones(2, 1, 8, 8)).sum().backward()
    assert all(p.grad is None for p in model.stem.parameters())
    assert model.stages[0][0].conv1.weight.grad is not None
    model.zero_grad()
    with torch.no_grad(), nfnet.kernels_kept(model):
        model(torch.ones(2, 1, 8, 8))
    assert all(p.grad is None for p in model.parameters())
