"""A training loop as one writes it by hand, alone or under torchrun; the peer of `training.py`.

Usage: bare_loop.py FOLDER EPOCHS BATCH; prints images a second of each epoch as JSON.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import nfnet

SHIFT, HELD_OUT = 2, 10_000


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """Training images (N, 1, 28, 28) and labels."""
    pixels = np.fromfile(folder / "train-images-idx3-ubyte", np.uint8, offset=16)
    labels = np.fromfile(folder / "train-labels-idx1-ubyte", np.uint8, offset=8)
    images = torch.from_numpy(pixels).view(-1, 1, 28, 28)
    return images[HELD_OUT:], torch.from_numpy(labels).long()[HELD_OUT:]


def augmented(images: Tensor) -> Tensor:
    """Each shifted by up to 2 pixels and mirrored by chance."""
    count, size = len(images), images.shape[-1]
    padded = F.pad(images, [SHIFT] * 4)
    row, column = torch.randint(2 * SHIFT + 1, (2, count))
    rows = (row[:, None] + torch.arange(size))[:, :, None]
    columns = column[:, None] + torch.arange(size)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    items = torch.arange(count)[:, None, None]
    return padded[items, :, rows, columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def main() -> None:
    """Trains."""
    folder, epochs, batch_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    images, labels = read(folder)
    mean, std = (images / 255).mean(), (images / 255).std()
    model = nfnet.create_model("dm_nf_resnet_small", num_classes=10, in_channels=1)
    model = model.to(memory_format=torch.channels_last).train()
    call: torch.nn.Module = model
    if world > 1:
        dist.init_process_group("gloo")
        call = DistributedDataParallel(model)
    optimizer = nfnet.SGD_AGC(nfnet.param_groups(model, 1e-4, 0.04), lr=0.1, momentum=0.9)
    ema = nfnet.EMA(model, 0.999)
    rates, step = [], 0
    for epoch in range(epochs):
        begun = time.perf_counter()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        batches = order.split(batch_size)[: len(images) // batch_size]
        for batch in batches:
            own = batch.chunk(world)[rank]
            x = ((augmented(images[own]) / 255) - mean) / std
            x = x.to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            loss = F.cross_entropy(call(x), labels[own], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            ema.update(model, step)
            step += 1
        rates.append(len(batches) * batch_size / (time.perf_counter() - begun))
    if rank == 0:
        print(json.dumps(rates))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
