"""Weights from files: every format, whole or not at all, and nothing executed."""

import pickle
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import nfnet

GOLDEN = Path(__file__).parents[1] / "golden" / "nfnet_tiny.npz"
TINY = {"depths": (1, 2, 2, 1), "widths": (32, 64, 96, 96), "group_size": 8}
DIGITS = "dm_nf_resnet_digits"


@pytest.fixture
def saved() -> nn.Module:
    model = nfnet.create_model(DIGITS, num_classes=7)
    for p in model.parameters():
        nn.init.normal_(p)
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "training"])
def test_reads_every_format_and_takes_its_number_of_classes(
    saved: nn.Module, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights"  # the ending says nothing
    state = saved.state_dict()
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "training":
        torch.save({"epoch": 3, "state_dict": state}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    assert_same(nfnet.create_model(DIGITS, pretrained=str(path)), saved)


def haiku_weights() -> dict[str, dict[str, np.ndarray]]:
    weights: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    with np.load(GOLDEN) as data:
        for key in data:
            if key.startswith("init/"):
                module, parameter = key.removeprefix("init/").split("::")
                weights[module][parameter] = data[key]
    return dict(weights)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_the_authors_pickle(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "F0_haiku.npz"
    path.write_bytes(pickle.dumps(haiku_weights(), protocol=protocol))
    if protocol < 2:  # which are text, and none of what the authors released
        with pytest.raises(ValueError, match="holds no usable weights"):
            nfnet.create_model("dm_nfnet_f0", pretrained=str(path), **TINY)
        return
    model = nfnet.create_model("dm_nfnet_f0", pretrained=str(path), **TINY).eval()
    with np.load(GOLDEN) as data, torch.no_grad():
        logits = model(torch.from_numpy(data["x_nhwc"]).permute(0, 3, 1, 2))
        torch.testing.assert_close(logits, torch.from_numpy(data["logits"]), rtol=0, atol=1e-5)


def test_timms_checkpoint_loads_unchanged(tmp_path: Path) -> None:
    theirs = timm.create_model("nf_regnet_b0", num_classes=11).eval()
    torch.save(theirs.state_dict(), tmp_path / "nf_regnet_b0.pth")
    ours = nfnet.create_model("nf_regnet_b0", pretrained=str(tmp_path / "nf_regnet_b0.pth"))
    assert_same(ours, theirs)


class Malicious:
    """Runs a function when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("kind", ["pickle", "inside an array", "zip", "legacy"])
def test_nothing_in_a_file_is_executed(kind: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "weights", tmp_path / "executed"
    content = {"NFNet/~/linear": {"b": Malicious(trace)}}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif kind == "inside an array":
        array = np.array([Malicious(trace)], dtype=object)
        path.write_bytes(pickle.dumps({"NFNet/~/linear": {"b": array}}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"weights holds no usable weights: .*nothing.* executed"):
        nfnet.create_model("dm_nfnet_f0", pretrained=str(path), **TINY)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no weights",
        b"PK\x03\x04 cut off",
        b"\x80\x04 cut off",
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19. cut off",
        b"\x10\0\0\0\0\0\0\0{ cut off",
        pickle.dumps({}),
        pickle.dumps([1, 2]),
        pickle.dumps({"a": {"w": np.array(["text"])}}),
        pickle.dumps({"a": np.zeros(3)}),
    ],
)
def test_a_file_without_weights_is_refused_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.bin holds no usable weights: .") as caught:
        nfnet.create_model(DIGITS, pretrained=str(path))
    assert "\n" not in str(caught.value)


def test_a_cut_off_file_is_refused(saved: nn.Module, tmp_path: Path) -> None:
    for save in (torch.save, safetensors.torch.save_file):
        path = tmp_path / "weights"
        save(saved.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match="holds no usable weights"):
            nfnet.create_model(DIGITS, pretrained=str(path))


def test_another_models_weights_are_named_on_one_screen(saved: nn.Module, tmp_path: Path) -> None:
    path = str(tmp_path / "weights.pt")
    torch.save(saved.state_dict(), path)
    with pytest.raises(ValueError, match="do not fit the model") as caught:
        nfnet.create_model("dm_nfnet_f0", pretrained=path)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 30
    assert "  missing: stem.conv1.weight" in lines
    assert "  unexpected: stem.conv.weight" in lines
    assert (
        "  of another shape: stages.0.0.conv1.gain: (8, 1, 1, 1), expected (128, 1, 1, 1)" in lines
    )
    with pytest.raises(ValueError, match=r"head\.fc\.bias: \(7,\), expected \(10,\)"):
        nfnet.create_model(DIGITS, num_classes=10, pretrained=path)


def test_a_missing_file_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"there is no file 'nowhere\.pt'"):
        nfnet.create_model(DIGITS, pretrained="nowhere.pt")


@pytest.mark.parametrize("name", nfnet.list_models())
def test_the_hubs_weights_are_those_that_timm_names(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    theirs = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if theirs is None or not theirs.hf_hub_id:
        with pytest.raises(ValueError, match=re.escape(f"the hub has no weights of {name}, only")):
            nfnet.create_model(name, pretrained="hub")
        return
    # Nobody listens there, and waiting between two tries changes nothing.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = f"cannot fetch {re.escape(theirs.hf_hub_id)} from the hub .* network"
    with pytest.raises(ValueError, match=message):
        nfnet.create_model(name, pretrained="hub")


def test_a_model_saved_inside_its_wrapper_for_several_devices_loads(tmp_path: Path) -> None:
    saved = nfnet.create_model("dm_nf_resnet_digits")
    wrapped = {f"module.{name}": value for name, value in saved.state_dict().items()}
    torch.save({"state_dict": wrapped}, tmp_path / "ddp.pt")
    model = nfnet.create_model("dm_nf_resnet_digits", pretrained=str(tmp_path / "ddp.pt"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name])
