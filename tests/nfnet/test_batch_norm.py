"""The baseline's batch norm: two processes with parts of a batch, against one with all of it."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import nfnet
from nfnet.layers import GlobalBatchNorm2d

CUTS = (3, 7, 0)  # samples of 7 that process 0 gets: uneven, all, none


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 2.0 * torch.randn(7, 4, 3, 5, generator=generator) + 5.0
    return x, torch.randn(7, 4, 3, 5, generator=generator)


def train(norm: nn.BatchNorm2d, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Two steps of a loss that is a sum over samples; what the second one left."""
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, -1.0, 2.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    for _ in range(2):
        x = x.detach().requires_grad_()
        norm.zero_grad()
        y = norm(x)
        (y.square() * weight + y * weight).sum().backward()
    grads = {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {"y": y.detach(), **grads, **dict(norm.named_buffers())}


def worker(rank: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for cut in CUTS:
        part = slice(None, cut) if rank == 0 else slice(cut, None)
        norm = GlobalBatchNorm2d(4)
        x, weight = batch()
        result = train(norm, x[part], weight[part])
        norm.eval()
        result["eval"] = norm(x[part]).detach()
        torch.save(result, f"{folder}/{cut}_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch_norm")
    environment = {**os.environ, "PYTHONPATH": str(Path(nfnet.__file__).parents[1])}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
def test_two_processes_agree_with_one(results: Path, cut: int) -> None:
    first, second = (torch.load(results / f"{cut}_{rank}.pt") for rank in range(2))
    norm = nn.BatchNorm2d(4)
    x, weight = batch()
    expected = train(norm, x, weight)
    close = {"rtol": 1e-4, "atol": 1e-4}
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), expected[name], **close)
    for name in ("weight", "bias"):
        torch.testing.assert_close(first[name] + second[name], expected[name], **close)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(first[name], expected[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second[name], expected[name], rtol=1e-5, atol=1e-5)
    evaluated = norm.eval()(x).detach()
    torch.testing.assert_close(torch.cat([first["eval"], second["eval"]]), evaluated, **close)


def test_alone_it_is_nn_batch_norm() -> None:
    ours, theirs = GlobalBatchNorm2d(4), nn.BatchNorm2d(4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    expected, actual = train(theirs, *batch()), train(ours, *batch())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


if __name__ == "__main__":
    worker(rank=int(sys.argv[1]), folder=sys.argv[2])
