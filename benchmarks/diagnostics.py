"""What AGC's diagnostics cost: steps of a network with them, against steps without.

Example:
  python benchmarks/diagnostics.py --model dm_nf_resnet50 --image-size 64 --batch-size 8
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import nfnet  # noqa: E402
from benchmarks.compare import Row, arguments, compare, show  # noqa: E402
from benchmarks.peers import CLIPPING, WEIGHT_DECAY, a_batch, training_step  # noqa: E402
from nflab.learning.diagnostics import Diagnostics  # noqa: E402

STEPS = 16
"""Of a turn: they look at some steps, and tell at the end of an epoch."""

TRAINING_STEPS = 200
"""Of the training that the steps stand for."""


def measure(model: str, batch_size: int, image_size: int, device: str, rounds: int) -> list[Row]:
    """One model, with and without."""
    network = nfnet.create_model(model).to(device).train()
    groups = nfnet.param_groups(network, WEIGHT_DECAY, CLIPPING)
    optimizer = nfnet.SGD_AGC(groups, lr=0.0, momentum=0.9)
    batch = a_batch(network, batch_size, image_size, device)
    step = training_step(network, lambda: None, *batch)

    def without() -> None:
        for _ in range(STEPS):
            step()
            optimizer.step()

    def with_them() -> None:
        diagnostics = Diagnostics(network, optimizer, TRAINING_STEPS)
        for number in range(STEPS):
            step()
            diagnostics.before(number)
            optimizer.step()
        diagnostics.pop()
        optimizer.ratios = None

    name = f"step of {model}, batch {batch_size} at {image_size} px, --diagnostics"
    return [compare(name, with_them, {"without": without}, 1.03, "most", rounds, 1, device)]


def main() -> None:
    """Measures."""
    asked = arguments(__doc__, "dm_nf_resnet50", batch_size=8, image_size=64).parse_args()
    shape = asked.batch_size, asked.image_size
    show(measure(asked.model, *shape, asked.device, asked.rounds), asked.json)


if __name__ == "__main__":
    main()
