"""Parameters sharded over two processes, against one process that has them all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import nfnet

pytestmark = pytest.mark.slow

BATCH = 8


def train(model: nn.Module, own: slice) -> dict[str, Tensor]:
    """The weights after three steps on a slice of each batch."""
    optimizer = nfnet.SGD_AGC(nfnet.param_groups(model, 1e-4, 0.01), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        images = torch.randn(BATCH, 1, 8, 8, generator=generator)
        labels = torch.randint(10, (BATCH,), generator=generator)
        nn.functional.cross_entropy(model(images[own]), labels[own]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }


def build() -> nfnet.ResNet:
    torch.manual_seed(0)
    model = nfnet.create_model("dm_nf_resnet_digits")
    for p in model.parameters():
        if p.ndim == 0:
            nn.init.constant_(p, 0.3)
    return model


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = build()
    model.gains_as_vectors()
    for stage in model.stages:
        for block in stage.children():
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    half = BATCH // 2
    torch.save(train(model, slice(rank * half, (rank + 1) * half)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sharded_training_is_that_of_one_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(nfnet.__file__).parents[1])}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    expected = train(build(), slice(None))
    for rank in range(2):
        found = nfnet.create_model("dm_nf_resnet_digits", pretrained=tmp_path / f"{rank}.pt")
        for name, value in found.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=5e-5, msg=name)
    gains = [name for name in expected if name.endswith("skipinit_gain")]
    assert all((expected[name] - 0.3).abs() > 1e-4 for name in gains)  # they moved


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2])
