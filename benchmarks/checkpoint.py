"""What a checkpoint within an epoch costs training: how long it stands still, and what is written.

Saves a model of ImageNet with its momentum and averaged weights several times, as the loop does
within an epoch: copies, and then a thread that writes to a folder. Training stands still for the
copies, and while a checkpoint before it is still being written; on a GPU machine the thread has
cores of its own, and here it shares them.

Example:
  python benchmarks/checkpoint.py --model dm_nfnet_f0 --times 5
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch  # noqa: E402

import nfnet  # noqa: E402
from nflab.data import load_dataset  # noqa: E402
from nflab.learning.state import Saver, Training  # noqa: E402
from nflab.settings.config import Config  # noqa: E402
from nflab.settings.leaves import replace  # noqa: E402
from nflab.storage.checkpoints import Checkpoints  # noqa: E402


def main() -> None:
    """Prints seconds of each checkpoint, and their share of training at the default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="dm_nfnet_f0", help="a name of nfnet.list_models()")
    parser.add_argument("--times", type=int, default=5, help="checkpoints to make")
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    asked = parser.parse_args()

    config = replace(Config(), model=asked.model)
    model = nfnet.create_model(asked.model)
    optimizer = nfnet.SGD_AGC(nfnet.param_groups(model, 2e-5, 0.01), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    training = Training(
        config,
        {},
        load_dataset(config),
        model,
        optimizer,
        nfnet.EMA(model, config.optimizer.ema_decay or 0.0),
    )
    still, written = [], []
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        saver = Saver(training, Checkpoints(folder))
        for step in range(1, asked.times + 1):
            begun = time.perf_counter()
            saver.save_midst([], None, {"step": step, "sums": {}})
            still.append(time.perf_counter() - begun)
            saver.finish()
            written.append(time.perf_counter() - begun)
        size = sum(f.stat().st_size for f in max(Path(folder).glob("epoch-*")).iterdir())
    every = 60 * (config.scale.checkpoint_minutes or 0.0)
    found = {
        "model": asked.model,
        "gigabytes": size / 1e9,
        "still_seconds": statistics.median(still),
        "written_seconds": statistics.median(written),
        "share_of_training": statistics.median(still) / every,
        "share_with_the_thread": statistics.median(written) / every,
    }
    if asked.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:>22}  {value:.4g}" if isinstance(value, float) else f"{name:>22}  {value}")


if __name__ == "__main__":
    main()
