"""A run of several workers as far as one GPU shows it: one worker on NCCL, beside a step without.

The collectives are those of training; on a CPU they go over gloo.

Example:
  python benchmarks/nccl.py --device cuda
"""

import copy
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import nfnet
from benchmarks.compare import Row, arguments, compare, show
from benchmarks.peers import a_batch, our_pass, training_step

STEPS = 3


def measure(model: str, batch_size: int, image_size: int, device: str, rounds: int) -> list[Row]:
    """One model, in a group of one worker and in none."""
    alone = nfnet.create_model(model).to(device).train()
    batch = a_batch(alone, batch_size, image_size, device)
    grouped = copy.deepcopy(alone)
    # As `nflab.learning.network` has it.
    parallel = DistributedDataParallel(
        grouped, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    in_group = training_step(parallel, our_pass(grouped), *batch)
    in_none = training_step(alone, our_pass(alone), *batch)
    for step in range(STEPS):
        for run in (in_group, in_none):
            torch.manual_seed(step)  # both drop the same
            run()
    check_weights(grouped, alone)
    check_sums(device)
    name = f"step of {model}, batch {batch_size} at {image_size} px, in a group of one worker"
    return [compare(name, in_group, {"in none": in_none}, None, "most", rounds, device=device)]


def check_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Ends with a sentence unless both networks are the same but for rounding."""
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        apart = float((ours - theirs).detach().abs().max())
        if not apart <= 1e-4 * max(1.0, float(theirs.detach().abs().max())):
            sys.exit(
                f"error: after {STEPS} steps {name} is {apart:g} apart with a group of workers"
            )


def check_sums(device: str) -> None:
    """Ends with a sentence unless sums over workers are exact: of losses in float64, of flags."""
    for given in ([[0.1, 1e300], [3.0, -2.0]], 1.0):
        for kind in (torch.float64, torch.float32):
            total = torch.tensor(given, dtype=kind, device=device)
            expected = total.clone()
            dist.all_reduce(total)
            if not torch.equal(total, expected):
                sys.exit(
                    f"error: the sum over one worker of {expected.tolist()} is {total.tolist()}"
                )


def main() -> None:
    """Measures."""
    asked = arguments(__doc__, "dm_nfnet_f0", batch_size=8, image_size=96).parse_args()
    cuda = asked.device == "cuda"
    if cuda:
        torch.cuda.set_device(0)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
        try:
            shape = asked.batch_size, asked.image_size
            rows = measure(asked.model, *shape, asked.device, asked.rounds)
        finally:
            dist.destroy_process_group()
    show(rows, asked.json)


if __name__ == "__main__":
    main()
