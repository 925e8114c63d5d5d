"""Agreement with numbers computed by the authors' JAX code (see tests/golden)."""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import nfnet

GOLDEN = Path(__file__).parents[1] / "golden"
OUR_PART = {
    "conv0": "conv1",
    "conv1": "conv2",
    "conv1b": "conv2b",
    "conv2": "conv3",
    "conv_shortcut": "downsample.conv",
    "squeeze_excite/~/linear": "attn_last.fc1",
    "squeeze_excite/~/linear_1": "attn_last.fc2",
}


@dataclass(frozen=True)
class Tiny:
    """One of the networks that the authors' code trained for 8 steps."""

    file: str
    base: str
    settings: dict[str, Any]
    blocks: tuple[str, ...]
    """Our names of the blocks, in the order in which Haiku counts them."""
    peak: float
    """Highest learning rate."""


TINY = [
    Tiny(
        "nf_resnet_tiny",
        "dm_nf_resnet50",
        {"depths": (1, 2, 1, 1), "widths": (64, 128, 256, 512), "stem_width": 16},
        ("0.0", "1.0", "1.1", "2.0", "3.0"),
        0.02,
    ),
    Tiny(
        "nfnet_tiny",
        "dm_nfnet_f0",
        {"depths": (1, 2, 2, 1), "widths": (32, 64, 96, 96), "group_size": 8},
        ("0.0", "1.0", "1.1", "2.0", "2.1", "3.0"),
        0.1,
    ),
]


def from_haiku(array: np.ndarray) -> Tensor:
    """A Haiku array with its axes in PyTorch's order."""
    x = torch.from_numpy(np.array(array))
    if x.ndim == 4:
        return x.permute(3, 2, 0, 1).contiguous()
    return x.t().contiguous() if x.ndim == 2 else x


def images(x_nhwc: np.ndarray) -> Tensor:
    return torch.from_numpy(x_nhwc).permute(0, 3, 1, 2)


def our_name(tiny: Tiny, haiku_name: str) -> str:
    """Our name for the authors' `NF_ResNet/~/...::parameter` or `NFNet/~/...::parameter`."""
    path, parameter = haiku_name.split("::")
    path = path.split("/~/", 1)[1] if "/~/" in path else path
    parameter = {"w": "weight", "b": "bias", "skip_gain": "skipinit_gain"}.get(parameter, parameter)
    if found := re.fullmatch(r"stem_conv(\d)", path):
        return f"stem.conv{int(found[1]) + 1}.{parameter}"
    known = {"linear": "head.fc", "initial_conv": "stem.conv", "final_conv": "final_conv"}
    if path in known:
        return f"{known[path]}.{parameter}"
    found = re.fullmatch(r"nf_(?:res_)?block(?:_(\d))?(?:/~/(.+))?", path)
    assert found
    parts = [f"stages.{tiny.blocks[int(found[1] or 0)]}", OUR_PART.get(found[2]), parameter]
    return ".".join(part for part in parts if part)


@pytest.fixture(scope="module", params=TINY, ids=lambda tiny: tiny.file)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    found: Tiny = request.param
    return found


@pytest.fixture(scope="module")
def golden(tiny: Tiny) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{tiny.file}.npz") as data:
        return dict(data)


def golden_model(tiny: Tiny, golden: dict[str, np.ndarray]) -> nn.Module:
    model = nfnet.create_model(tiny.base, num_classes=10, **tiny.settings)
    weights: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, array in golden.items():
        if key.startswith("init/"):
            module, parameter = key.removeprefix("init/").split("::")
            weights[module][parameter] = array
    nfnet.load_haiku(model, weights)
    return model


def assert_matches(
    tiny: Tiny, golden: dict[str, np.ndarray], prefix: str, ours: dict[str, Tensor]
) -> None:
    keys = [key for key in golden if key.startswith(prefix)]
    assert len(keys) > 40
    for key in keys:
        expected = from_haiku(golden[key])
        actual = ours[our_name(tiny, key.removeprefix(prefix))].detach().reshape(expected.shape)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5, msg=lambda m, k=key: k + m)


def test_the_model_computes_the_authors_features_and_logits(
    tiny: Tiny, golden: dict[str, np.ndarray]
) -> None:
    model = golden_model(tiny, golden).eval()
    x = images(golden["x_nhwc"])
    with torch.no_grad():
        pool = model.forward_features(x).mean((2, 3))
        logits = model(x)
    torch.testing.assert_close(pool, torch.from_numpy(golden["pool"]), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(logits, torch.from_numpy(golden["logits"]), rtol=0, atol=1e-5)


def test_initial_weights_are_drawn_as_the_authors_are(
    tiny: Tiny, golden: dict[str, np.ndarray]
) -> None:
    # Their weights of before the training were drawn by their own initialisers.
    drawn = dict(nfnet.create_model(tiny.base, num_classes=10, **tiny.settings).named_parameters())
    samples: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for key, array in golden.items():
        if not (key.startswith("init/") and key.endswith("::w")):
            continue
        name = our_name(tiny, key.removeprefix("init/"))
        ours, theirs = drawn[name].detach().numpy().ravel(), array.ravel()
        assert ours.size == theirs.size
        # Layers of a kind differ by the square root of what an output sees, but for the classifier.
        scale = 1.0 if name.startswith("head") else np.prod(array.shape[:-1]) ** 0.5
        kind = next((k for k in ("head", "attn_last") if k in name), "kernel")
        samples[kind].append((scale * ours, scale * theirs))
    assert samples.keys() == {"kernel", "head", *(["attn_last"] if "nfnet" in tiny.file else [])}
    for kind, pairs in samples.items():
        ours, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
        assert ours.std() == pytest.approx(theirs.std(), rel=0.05), kind
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-3, kind


def test_training_follows_the_authors_losses_weights_and_averages(
    tiny: Tiny,
    golden: dict[str, np.ndarray],
) -> None:
    model = golden_model(tiny, golden)
    groups = nfnet.param_groups(model, weight_decay=2e-5, clipping=0.01)
    optimizer = nfnet.SGD_AGC(groups, lr=0.0)
    ema = nfnet.EMA(model)
    for step, expected in enumerate(golden["losses"]):
        lr = nfnet.warmup_cosine(step, total_steps=8, warmup_steps=2, peak=tiny.peak)
        assert lr == pytest.approx(golden["lrs"][step], abs=1e-8)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, y = images(golden["train_x_nhwc"][step]), torch.from_numpy(golden["train_y"][step])
        loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            assert_matches(tiny, golden, "grad0/", grads)
        optimizer.step()
        ema.update(model, step)
    assert_matches(tiny, golden, "final/", dict(model.named_parameters()))
    assert_matches(tiny, golden, "ema/", dict(ema.model.named_parameters()))


def test_sgd_agc_follows_the_authors_for_every_kind_of_shape() -> None:
    with np.load(GOLDEN / "sgd_agc.npz") as data:
        golden = dict(data)
    params = {
        key.removeprefix("init/"): from_haiku(array).requires_grad_()
        for key, array in golden.items()
        if key.startswith("init/")
    }
    assert len(params) == 10
    optimizer = nfnet.SGD_AGC(params.values(), lr=0.5, weight_decay=1e-3, clipping=0.05)
    for step in range(6):
        for name, p in params.items():
            p.grad = from_haiku(golden[f"grad{step}/{name}"])
        optimizer.step()
        for name, p in params.items():
            expected = from_haiku(golden[f"after{step}/{name}"])
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6)
