"""How long does a training step take, and what accuracy does that buy?

Measures a step (forward, backward, optimizer) of each model on random images of the size that its
authors train it on, and draws the published accuracy over it (arXiv 2102.06171, figure 1). The
models take turns; each is built anew, and its second step counts.

Example:
  python experiments/latency.py dm_nfnet_f0 dm_nfnet_f1 efficientnet_b7 --batch-size 2 --rounds 1
"""

import argparse
import statistics
from pathlib import Path

import _start  # noqa: F401

MODELS = (
    *(f"dm_nfnet_f{n}" for n in range(7)),
    *(f"efficientnet_b{n}" for n in range(8)),
    *(name for size in (50, 101, 152) for name in (f"dm_nf_resnet{size}", f"preact_resnet{size}")),
)


def main() -> None:
    """Measures, prints a table and says where the figure is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS, help="default: all of the paper's")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a step")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="activations in bfloat16")
    parser.add_argument("--out", type=Path, default=Path("latency.png"))
    asked = parser.parse_args()
    if min(asked.batch_size, asked.rounds) < 1:
        parser.error("--batch-size and --rounds must be at least 1")

    import torch
    from tqdm import tqdm

    from nflab.analysis.figures import draw_latency
    from nflab.analysis.published import EFFICIENTNETS, NFNETS
    from nflab.learning.step_time import step_seconds, train_size

    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU here: leave out --device cuda")
    try:
        sizes = {name: train_size(name) for name in asked.models}
        times: dict[str, list[float]] = {name: [] for name in sizes}
        turns = [name for _ in range(asked.rounds) for name in sizes]
        for name in tqdm(turns, desc="steps", unit="model"):
            times[name].append(step_seconds(name, asked.batch_size, device, asked.bfloat16))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    published = {"NFNet": NFNETS, "EfficientNet": EFFICIENTNETS}
    top1 = {**NFNETS, **EFFICIENTNETS}
    print("| model | pixels | step, s | images a second | published top-1, % |")
    print("| --- | ---: | ---: | ---: | ---: |")
    middle = {name: statistics.median(found) for name, found in times.items()}
    for name, seconds in middle.items():
        rate = asked.batch_size / seconds
        told = f"{top1[name]:.1f}" if name in top1 else ""
        print(f"| {name} | {sizes[name]} | {seconds:.2f} | {rate:.2f} | {told} |")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    draw_latency(middle, published, f"batch {asked.batch_size}, {where}", asked.out)
    print(f"Figure: {asked.out}")


if __name__ == "__main__":
    main()
