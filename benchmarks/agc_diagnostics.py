"""What do AGC's diagnostics cost?

Times steps of one network with and without them, in turns, and prints the median of the ratios of
whole steps (forward, backward, optimizer), in CPU time, which other processes disturb the least.

Example:
  python benchmarks/agc_diagnostics.py --model dm_nf_resnet50 --image-size 64 --batch-size 8
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import nfnet
from nflab.learning.diagnostics import Diagnostics


def main() -> None:
    """Measures, then prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="dm_nf_resnet_digits")
    parser.add_argument("--image-size", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--steps", type=int, default=200, help="steps of the training it stands for"
    )
    parser.add_argument("--repeats", type=int, default=15)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = nfnet.create_model(asked.model)
    channels = next(p.shape[1] for p in model.parameters() if p.ndim == 4)
    images = torch.randn(asked.batch_size, channels, asked.image_size, asked.image_size)
    labels = torch.zeros(asked.batch_size, dtype=torch.long)
    optimizer = nfnet.SGD_AGC(nfnet.param_groups(model, 2e-5, 0.01), lr=0.0)

    def seconds(diagnostics: Diagnostics | None) -> float:
        begun = time.process_time()
        for step in range(16):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            if diagnostics is not None:
                diagnostics.before(step)
            optimizer.step()
        if diagnostics is not None:
            diagnostics.pop()
        return time.process_time() - begun

    seconds(None)
    ratios = []
    for _ in range(asked.repeats):
        with_them = seconds(Diagnostics(model, optimizer, asked.steps))
        optimizer.ratios = None
        ratios.append(with_them / seconds(None))
    print(f"{asked.model}: a step takes {statistics.median(ratios):.3f} times as long with them")


if __name__ == "__main__":
    main()
