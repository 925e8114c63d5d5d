"""Weights from files: every format, whole or not at all, and nothing executed."""

import argparse
import hashlib
import http.server
import pickle
import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
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
    assert "  missing: stages.0.0.conv2b.gain" in lines
    assert (
        "  of another shape: stages.0.0.conv1.gain: (8, 1, 1, 1), expected (128, 1, 1, 1)" in lines
    )


def test_a_missing_file_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"there is no file 'nowhere\.pt'"):
        nfnet.create_model(DIGITS, pretrained="nowhere.pt")


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """As HF_ENDPOINT and HF_HUB_CACHE would, had they been set when the client was imported."""
    at = "huggingface_hub.constants"
    monkeypatch.setattr(f"{at}.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(f"{at}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{at}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{at}.HF_HUB_DISABLE_XET", True)


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
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    message = f"cannot fetch {re.escape(theirs.hf_hub_id)} from the hub .* network"
    with pytest.raises(ValueError, match=message):
        nfnet.create_model(name, pretrained="hub")


def of_training(state: dict[str, torch.Tensor], kind: str) -> dict[str, object]:
    """What trainings save, each with the weights where it puts them."""
    other = {name: torch.full_like(value, 7) for name, value in state.items()}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    if kind == "timm":
        arguments = argparse.Namespace(model="dm_nf_resnet_digits", lr=0.1, mean=None)
        return {
            "epoch": 3,
            "arch": DIGITS,
            "args": arguments,
            "version": 2,
            "metric": 81.5,
            "state_dict": other,
            "state_dict_ema": state,
            "optimizer": optimizer,
        }
    if kind == "ours":
        history = [{"epoch": 1, "val_top1": 50.0, "outcome": "running"}]
        return {"history": history, "model": other, "optimizer": optimizer, "ema": state}
    if kind == "ours without an average":
        return {"history": [], "model": state, "optimizer": optimizer, "ema": None}
    return {"epoch": 3, kind: state, "optimizer": optimizer}


@pytest.mark.parametrize(
    "kind", ["timm", "ours", "ours without an average", "model", "model_state_dict", "state_dict"]
)
def test_reads_what_trainings_save(saved: nn.Module, kind: str, tmp_path: Path) -> None:
    torch.save(of_training(saved.state_dict(), kind), tmp_path / "last.pth.tar")
    assert_same(nfnet.create_model(DIGITS, pretrained=tmp_path / "last.pth.tar"), saved)


@pytest.mark.parametrize("ema", ["model_ema", "ema_state_dict", "ema", "nested"])
@pytest.mark.parametrize("raw", ["state_dict", "model_state_dict", "model"])
def test_averaged_weights_come_first(saved: nn.Module, ema: str, raw: str, tmp_path: Path) -> None:
    state = saved.state_dict()
    other = {name: torch.full_like(value, 7) for name, value in state.items()}
    averaged = {"ema": {"decay": 0.9, "module": state}} if ema == "nested" else {ema: state}
    torch.save({raw: other, **averaged}, tmp_path / "x.pt")
    assert_same(nfnet.create_model(DIGITS, pretrained=tmp_path / "x.pt"), saved)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."]
)
def test_prefixes_of_wrappers_are_taken_off(saved: nn.Module, prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{name}": value for name, value in saved.state_dict().items()}
    torch.save({"model": state}, tmp_path / "a.pt")
    safetensors.torch.save_file(state, tmp_path / "b.safetensors")
    for file in ("a.pt", "b.safetensors"):
        assert_same(nfnet.create_model(DIGITS, pretrained=str(tmp_path / file)), saved)


def test_what_holds_no_network_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "optimizer": {"state": {}}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"no tensors by name.*; it holds epoch, optimizer\."):
        nfnet.create_model(DIGITS, pretrained=str(tmp_path / "x.pt"))


@pytest.mark.parametrize("file", ["weights.pt", "model.safetensors", "state.pt"])
def test_a_folder_stands_for_the_weights_in_it(saved: nn.Module, file: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights: expected weights"):
        nfnet.create_model(DIGITS, pretrained=tmp_path)
    state = saved.state_dict()
    if file == "model.safetensors":
        safetensors.torch.save_file(state, tmp_path / file)
    else:
        torch.save(
            state if file == "weights.pt" else {"model": state, "ema": None}, tmp_path / file
        )
    assert_same(nfnet.create_model(DIGITS, pretrained=tmp_path), saved)


def test_weights_are_adapted_to_what_is_asked_for(saved: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(saved.state_dict(), path)
    with pytest.warns(UserWarning, match="a new classifier of 10 classes, not 7"):
        model = nfnet.create_model(DIGITS, num_classes=10, pretrained=path)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(model.forward_features(x), saved.forward_features(x))  # type: ignore[operator]
    assert model.head.fc.weight.std() < 0.02  # it begins as any does

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing begins anew
        features = nfnet.create_model(DIGITS, num_classes=0, pretrained=path)
        assert torch.equal(features(x), saved.forward_features(x).mean((2, 3)))  # type: ignore[operator]

    with pytest.warns(UserWarning, match="the first kernels for 3 channels, not 1"):
        colour = nfnet.create_model(DIGITS, in_channels=3, pretrained=path)
    # A colour that is grey is what the grey was.
    assert torch.allclose(colour(x.expand(-1, 3, -1, -1)), saved(x), atol=1e-4)
    torch.save(colour.state_dict(), path)
    with pytest.warns(UserWarning, match="the first kernels for 1 channels, not 3"):
        grey = nfnet.create_model(DIGITS, in_channels=1, pretrained=path)
    assert torch.allclose(grey(x), saved(x), atol=1e-4)
    assert nfnet.create_model(DIGITS, pretrained=path).variant.in_channels == 3


def test_other_channels_are_as_timm_makes_them(tmp_path: Path) -> None:
    theirs = timm.create_model("nf_regnet_b0", num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    for channels in (1, 2, 4, 7):
        with pytest.warns(UserWarning, match=f"for {channels} channels, not 3"):
            ours = nfnet.create_model(
                "nf_regnet_b0", in_channels=channels, pretrained=tmp_path / "w.pth"
            )
        expected = timm.models.adapt_input_conv(channels, theirs.stem.conv.weight.detach())
        assert torch.allclose(ours.stem.conv.weight, expected)
        if channels == 1:  # a colour that is grey is what the grey was
            x = torch.randn(1, 1, 64, 64)
            colour = nfnet.create_model("nf_regnet_b0", pretrained=tmp_path / "w.pth").eval()
            for model in (ours.eval(), colour):
                nn.init.constant_(model.head.fc.weight, 0.1)
            logits = colour(x.expand(-1, 3, -1, -1))
            assert torch.allclose(ours(x), logits, atol=1e-4 * float(logits.abs().max()))


def test_weights_without_a_classifier_give_features(saved: nn.Module, tmp_path: Path) -> None:
    state = {n: v for n, v in saved.state_dict().items() if not n.startswith("head.")}
    torch.save(state, tmp_path / "w.pt")
    x = torch.randn(1, 1, 8, 8)
    model = nfnet.create_model(DIGITS, pretrained=tmp_path / "w.pt")
    assert torch.equal(model(x), saved.forward_features(x).mean((2, 3)))  # type: ignore[operator]
    with pytest.warns(UserWarning, match="a new classifier of 4 classes, not 0"):
        assert nfnet.create_model(DIGITS, num_classes=4, pretrained=tmp_path / "w.pt")(x).shape == (
            1,
            4,
        )


def test_another_stem_begins_anew(tmp_path: Path) -> None:
    settings = {"depths": (1, 1), "widths": (16, 32), "stem_width": 8}
    saved = nfnet.create_model("dm_nf_resnet50", num_classes=3, **settings)
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="a new stem 3x3, not 7x7_pool"):
        small = nfnet.create_model(
            "dm_nf_resnet50", stem="3x3", pretrained=tmp_path / "w.pt", **settings
        )
    assert small(torch.randn(1, 3, 8, 8)).shape == (1, 3)
    assert torch.equal(small.stages[1][0].conv1.weight, saved.stages[1][0].conv1.weight)
    torch.save(small.state_dict(), tmp_path / "w.pt")
    again = nfnet.create_model(
        "dm_nf_resnet50", stem="3x3", pretrained=tmp_path / "w.pt", **settings
    )
    assert_same(again, small)


def test_a_stem_is_known_by_the_first_shortcut_where_kernels_are_alike(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for own, other in (("3x3", "3x3_stride2"), ("3x3_stride2", "3x3")):
        saved = nfnet.create_model("nf_regnet_b0", stem=own, num_classes=3)
        torch.save(saved.state_dict(), path)
        same = nfnet.create_model("nf_regnet_b0", pretrained=path)
        assert (same.variant.stem, same.adapted) == (own, ())
        assert_same(same, saved)
        shortcut = "without the" if own == "3x3_stride2" else "a new"
        message = f"a new stem {other}, not {own}; {shortcut} stages.0.0.downsample.conv"
        with pytest.warns(UserWarning, match=message):
            nfnet.create_model("nf_regnet_b0", stem=other, pretrained=path)


def test_a_stem_that_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    settings = {"depths": (1, 1), "widths": (16, 32), "stem_width": 8, "num_classes": 3}
    saved = nfnet.create_model("dm_nf_resnet50", stem="3x3_stride2", **settings)
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"whose stride they do not tell; say stem="):
        nfnet.create_model("dm_nf_resnet50", pretrained=tmp_path / "w.pt", **settings)
    model = nfnet.create_model(
        "dm_nf_resnet50", stem="3x3_stride2", pretrained=tmp_path / "w.pt", **settings
    )
    assert model.adapted == ()
    assert_same(model, saved)


def test_models_are_listed_by_pattern_and_by_what_the_hub_has() -> None:
    assert nfnet.list_models("nf_*", pretrained=True) == ["nf_regnet_b1", "nf_resnet50"]
    assert set(nfnet.list_models("dm_nfnet_f?", pretrained=True)) == {
        f"dm_nfnet_f{n}" for n in range(7)
    }
    for name in nfnet.list_models(pretrained=True):
        assert timm.get_pretrained_cfg(name).hf_hub_id


class Hub:
    """A server that answers as the Hugging Face hub does, of one file of each repository."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.digest: str | None = None
        self.cut = 0
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(False)

            def do_GET(self) -> None:
                self.answer(True)

            def answer(self, whole: bool) -> None:
                found = re.fullmatch(r"/(.+)/resolve/main/model\.safetensors", self.path)
                content = hub.content.get(found[1]) if found else None
                self.send_response(404 if content is None else 200)
                if content is None:
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                digest = hub.digest or hashlib.sha256(content).hexdigest()
                self.send_header("ETag", f'"{digest}"')
                self.send_header("X-Linked-Etag", f'"{digest}"')
                self.send_header("X-Linked-Size", str(len(content)))
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if whole:
                    self.wfile.write(content[: len(content) - hub.cut])

            def log_message(self, *words: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    served = Hub()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    use_hub(monkeypatch, served.address, tmp_path / "cache")
    yield served
    served.server.shutdown()
    served.server.server_close()


NARROW = {"depths": (1, 1, 1, 1), "widths": (64, 64, 64, 64), "group_size": 8}
"""Of the same layout, and small enough to be sent."""


@pytest.mark.parametrize("name", [*(f"dm_nfnet_f{n}" for n in range(7)), "eca_nfnet_l0"])
def test_weights_come_from_the_hub(name: str, hub: Hub) -> None:
    saved = nfnet.create_model(name, **NARROW)
    state = {key: torch.randn_like(value) for key, value in saved.state_dict().items()}
    repository = timm.get_pretrained_cfg(name).hf_hub_id
    hub.content[repository] = safetensors.torch.save(state)
    model = nfnet.create_model(name, pretrained=True, **NARROW)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    hub.content.clear()  # what was fetched once is there
    assert_same(nfnet.create_model(name, pretrained="hub", **NARROW), model)


@pytest.mark.parametrize("how", ["cut", "another digest", "not there"])
def test_what_the_hub_did_not_send_whole_is_refused(how: str, hub: Hub) -> None:
    state = nfnet.create_model("dm_nfnet_f0", **NARROW).state_dict()
    if how != "not there":
        hub.content["timm/dm_nfnet_f0.dm_in1k"] = safetensors.torch.save(state)
    hub.cut = 1000 if how == "cut" else 0
    hub.digest = "0" * 64 if how == "another digest" else None
    message = "is not what the hub says" if how == "another digest" else "cannot fetch timm/dm_nfn"
    with pytest.raises(ValueError, match=message):
        nfnet.create_model("dm_nfnet_f0", pretrained=True, **NARROW)
    hub.cut, hub.digest = 0, None
    if how == "cut":  # and is fetched again
        nfnet.create_model("dm_nfnet_f0", pretrained=True, **NARROW)


def test_a_model_saved_inside_its_wrapper_for_several_devices_loads(tmp_path: Path) -> None:
    saved = nfnet.create_model("dm_nf_resnet_digits")
    wrapped = {f"module.{name}": value for name, value in saved.state_dict().items()}
    torch.save({"state_dict": wrapped}, tmp_path / "ddp.pt")
    model = nfnet.create_model("dm_nf_resnet_digits", pretrained=str(tmp_path / "ddp.pt"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved.state_dict()[name])
