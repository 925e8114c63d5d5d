"""The pass of AGC, Nesterov SGD and the moving average over a model's parameters, beside timm's.

The floor is what memory allows: each parameter, its gradient, its momentum and its average are
read once, and all but the gradient written once, 28 bytes, at a plain copy's fastest rate.

Example:
  python benchmarks/optimizer_pass.py --model dm_nfnet_f0
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import nfnet
from benchmarks.compare import Row, arguments, in_turns, of_rounds, show
from benchmarks.peers import SGDS, give_gradients, our_pass, timms, timms_pass

BYTES_OF_A_PARAMETER = 28


def measure(model: str, device: str, rounds: int) -> list[Row]:
    """Against timm's fastest, and against the floor."""
    works = {}
    ours = nfnet.create_model(model).to(device)
    give_gradients(ours)
    works["ours"] = our_pass(ours)
    for way in SGDS:
        theirs = timms(model).to(device)
        give_gradients(theirs)
        works[way] = timms_pass(theirs, way)
    count = sum(p.numel() for p in ours.parameters())
    copied, into = torch.randn(2, count, device=device)
    works["copy"] = lambda: into.copy_(copied)
    times = in_turns(works, rounds, device=device)
    way = min(SGDS, key=lambda one: sorted(times[one])[rounds // 2])
    floor = [min(times["copy"]) * BYTES_OF_A_PARAMETER / 8] * rounds
    mine, gpu = times["ours"], device == "cuda"
    return [
        of_rounds(
            f"optimizer's pass, {model}",
            f"timm, SGD {way}",
            mine,
            times[way],
            5.0 if gpu else 2.0,
            "least",
        ),
        of_rounds(
            f"optimizer's pass, {model}",
            "28 bytes a parameter, copied",
            mine,
            floor,
            1.5 if gpu else None,
            "most",
        ),
    ]


def main() -> None:
    """Measures."""
    asked = arguments(__doc__, "dm_nfnet_f0").parse_args()
    show(measure(asked.model, asked.device, asked.rounds), asked.json)


if __name__ == "__main__":
    main()
