"""A training step of NFNet-F1 beside EfficientNet-B7's, an image, each at its own size.

The paper (table 3) has F1 train 8.7 times as fast on TPUs, at the accuracy of B7. torchvision's B7
is trained by torch.optim.SGD, and has no moving average, which the paper's has.

Example:
  python benchmarks/efficientnet.py --rounds 3
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torchvision.models import efficientnet_b7

import nfnet
from benchmarks.compare import Row, arguments, compare, show
from benchmarks.peers import a_batch, our_pass, training_step

F1_SIZE, B7_SIZE = 224, 600
"""Pixels of training images: the paper's of F1 (table 1), and B7's."""


def measure(batch_size: int, device: str, rounds: int) -> list[Row]:
    """One row."""
    cuda = device == "cuda"
    mine = nfnet.create_model("dm_nfnet_f1").to(device).train()
    ours = training_step(
        mine, our_pass(mine), *a_batch(mine, batch_size, F1_SIZE, device), bfloat16=cuda
    )
    b7 = efficientnet_b7().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(b7.parameters(), lr=1e-4, momentum=0.9, nesterov=True, fused=True)
    batch = a_batch(b7, batch_size, B7_SIZE, device)
    theirs = training_step(b7, lambda: optimizer.step() and None, *batch, bfloat16=cuda)
    name = f"step of dm_nfnet_f1 at {F1_SIZE} px, batch {batch_size}"
    peer = {f"torchvision's EfficientNet-B7 at {B7_SIZE} px": theirs}
    return [compare(name, ours, peer, None, "least", rounds, 1, device)]


def main() -> None:
    """Measures."""
    asked = arguments(__doc__, batch_size=2).parse_args()
    show(measure(asked.batch_size, asked.device, asked.rounds), asked.json)


if __name__ == "__main__":
    main()
