"""What it costs to compute a batch in pieces: a step in 8 against a step at once.

Example:
  python benchmarks/micro_batches.py --model dm_nfnet_f0 --batch-size 32 --image-size 192
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nfnet
from benchmarks.compare import Row, arguments, compare, show
from benchmarks.peers import a_batch, our_pass, training_step

PIECES = 8


def measure(model: str, batch_size: int, image_size: int, device: str, rounds: int) -> list[Row]:
    """One model, in pieces and at once."""
    network = nfnet.create_model(model).to(device).train()
    batch, update = a_batch(network, batch_size, image_size, device), our_pass(network)
    cuda = device == "cuda"
    name = f"step of {model}, batch {batch_size} at {image_size} px, in {PIECES} pieces"
    in_pieces = training_step(network, update, *batch, PIECES, bfloat16=cuda)
    at_once = training_step(network, update, *batch, bfloat16=cuda)
    target = 1.05 if cuda else 1.10
    return [compare(name, in_pieces, {"at once": at_once}, target, "most", rounds, device=device)]


def main() -> None:
    """Measures."""
    asked = arguments(__doc__, "dm_nfnet_f0", batch_size=32, image_size=192).parse_args()
    shape = asked.batch_size, asked.image_size
    show(measure(asked.model, *shape, asked.device, asked.rounds), asked.json)


if __name__ == "__main__":
    main()
