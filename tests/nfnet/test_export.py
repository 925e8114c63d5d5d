"""Exported models against the originals, at other numbers of images than at the export."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import nfnet

pytestmark = pytest.mark.slow

SMALL = {"depths": (1, 2), "widths": (16, 32), "num_classes": 5}
MODELS = [
    ("dm_nfnet_f0", {**SMALL, "group_size": 8}, (33, 48)),
    ("preact_resnet50", SMALL, (32, 32)),
    ("nf_regnet_b0", {**SMALL, "stem_width": 16}, (31, 30)),
    ("nf_ecaresnet50", SMALL, (32, 32)),
]


@pytest.mark.parametrize(("name", "settings", "size"), MODELS)
def test_exported_logits_are_the_models(
    name: str, settings: dict[str, Any], size: tuple[int, int], tmp_path: Path
) -> None:
    model = nfnet.create_model(name, drop_rate=0.3, stochdepth_rate=0.3, **settings)
    for p in model.parameters():
        if p.ndim in (0, 1):
            nn.init.normal_(p)
    nfnet.export_torch(model, tmp_path / "model.pt2", size)
    nfnet.export_onnx(model, tmp_path / "model.onnx", size)
    assert model.training
    model.eval()
    program = torch.export.load(tmp_path / "model.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for images in (1, 5):
        x = torch.randn(images, 3, *size)
        with torch.no_grad():
            expected = model(x)
            tolerance = 1e-4 * expected.abs().max().item()
            torch.testing.assert_close(program(x), expected, rtol=0, atol=tolerance)
        (logits,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=tolerance)


def test_an_export_leaves_what_was_frozen_in_evaluation_mode(tmp_path: Path) -> None:
    model = nfnet.create_model("preact_resnet_digits").train()
    model.stem.eval()
    before = {name: module.training for name, module in model.named_modules()}
    nfnet.export_torch(model, tmp_path / "model.pt2", 8)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2


def test_kernels_are_folded(tmp_path: Path) -> None:
    """Each convolution of the file has a kernel that is stored, and nothing computes one."""
    settings = {**SMALL, "group_size": 8}
    model = nfnet.create_model("dm_nfnet_f0", **settings)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nfnet.export_onnx(model, tmp_path / "model.onnx", (32, 32))
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = {tensor.name for tensor in graph.initializer}
    kernels = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    assert len(kernels) == len(convolutions)
    assert set(kernels) <= stored
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {"ReduceL2", "ReduceSum", "Sqrt", "Reciprocal", "Clip", "Max"}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_difference_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nfnet.create_model("dm_nf_resnet_digits")
    load = torch.export.load

    def damaged(path: Path) -> Any:
        program = load(path)
        program.state_dict["head.fc.bias"].data += 1
        return program

    monkeypatch.setattr("torch.export.load", damaged)
    with pytest.raises(RuntimeError, match="differ from the original's by"):
        nfnet.export_torch(model, tmp_path / "model.pt2", 8)


def test_an_image_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fewer than the network's stride of 4"):
        nfnet.export_torch(nfnet.create_model("dm_nf_resnet_digits"), tmp_path / "x.pt2", 3)
