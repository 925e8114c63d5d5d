"""A whole training step, forward, backward and optimizer, beside timm's model with timm's pass.

Each library's model runs in the layout of memory in which it is fastest.

Example:
  python benchmarks/step.py --model dm_nfnet_f0 --batch-size 8 --image-size 96
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import nfnet
from benchmarks.compare import Row, arguments, in_turns, of_rounds, show
from benchmarks.peers import (
    SGDS,
    a_batch,
    our_pass,
    timms,
    timms_pass,
    training_step,
)

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def measure(
    model: str, batch_size: int, image_size: int, target: float | None, device: str, rounds: int
) -> list[Row]:
    """One model against timm's of the same name."""
    cuda = device == "cuda"
    steps: dict[str, Callable[[], None]] = {}
    for layout, memory_format in LAYOUTS.items():
        mine = nfnet.create_model(model).to(device, memory_format=memory_format).train()
        batch = a_batch(mine, batch_size, image_size, device)
        steps[f"ours {layout}"] = training_step(mine, our_pass(mine), *batch, bfloat16=cuda)
        theirs = timms(model).to(device, memory_format=memory_format)
        way = "fused" if cuda else _fastest(theirs, batch)
        update = timms_pass(theirs, way)
        steps[f"timm {layout}"] = training_step(theirs, update, *batch, bfloat16=cuda)
    times = in_turns(steps, rounds, device=device)
    middle = {name: sorted(seconds)[rounds // 2] for name, seconds in times.items()}
    ours, peer = (
        min((name for name in steps if name.startswith(who)), key=lambda name: middle[name])
        for who in ("ours", "timm")
    )
    return [
        of_rounds(
            f"step of {model}, batch {batch_size} at {image_size} px",
            f"{peer}, {ours}",
            times[ours],
            times[peer],
            target,
            "least",
        )
    ]


def _fastest(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> str:
    """timm's fastest pass."""
    training_step(model, lambda: None, *batch)()
    works = {way: timms_pass(model, way) for way in SGDS}
    times = in_turns(works, 3, warm_up=1)
    return min(SGDS, key=lambda way: sorted(times[way])[1])


def main() -> None:
    """Measures."""
    parser = arguments(__doc__, "dm_nfnet_f0", batch_size=8, image_size=96)
    parser.add_argument("--target", type=float, help="least ratio that is asked for")
    asked = parser.parse_args()
    shape = asked.batch_size, asked.image_size
    show(measure(asked.model, *shape, asked.target, asked.device, asked.rounds), asked.json)


if __name__ == "__main__":
    main()
