"""What the platform costs a training: `experiments/train.py` beside the same loop bare.

Random images of Fashion-MNIST's shape, its recipe's network, and images a second of all epochs but
the first; on one worker against a plain loop, and on two against the same loop under torchrun. The
bare loop shifts and mirrors its images too, from a generator instead of keys. Each process has one
thread, as a worker of one core has.

Example:
  python benchmarks/training.py --images 30000
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import numpy as np  # noqa: E402

from benchmarks.compare import Row, arguments, of_rounds, show  # noqa: E402

EPOCHS, BATCH = 3, 256


def write_images(folder: Path, count: int) -> None:
    """IDX files: `count` training images beside those kept for validation, and some to test."""
    rng = np.random.default_rng(0)
    for name, images in (("train", count + 10_000), ("t10k", 1000)):
        pixels = rng.integers(256, size=(images, 28, 28), dtype=np.uint8)
        labels = (np.arange(images) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = np.array([0x0800 + array.ndim, *array.shape], dtype=">i4").tobytes()
            (folder / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())


def ours(folder: Path, workers: int) -> float:
    """Images a second of train.py."""
    flags = "--recipe fashion_mnist --augmentation-level 0 --clipping 0.04 --ema-decay 0.999"
    command = [
        *(sys.executable, str(ROOT / "experiments/train.py"), *flags.split()),
        *("--dataset", str(folder), "--epochs", str(EPOCHS), "--batch-size", str(BATCH)),
        *("--num-workers", str(workers)),
    ]
    stores = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "NFLAB_STORAGE": f"{folder}/runs",
        "RAY_worker_niceness": "0",
    }
    done = subprocess.run(
        command, env=os.environ | stores, capture_output=True, text=True, check=True
    )
    rates = re.findall(r"(\d+) images/s", done.stdout)
    return statistics.mean(float(rate) for rate in rates[1:])


def bare(folder: Path, workers: int) -> float:
    """Images a second of the bare loop."""
    script = [str(ROOT / "benchmarks/bare_loop.py"), str(folder), str(EPOCHS), str(BATCH)]
    start = [sys.executable]
    if workers > 1:
        start += ["-m", "torch.distributed.run", f"--nproc-per-node={workers}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        start + script, env=environment, capture_output=True, text=True, check=True
    )
    rates: list[float] = json.loads(done.stdout.splitlines()[-1])
    return statistics.mean(rates[1:])


def measure(images: int, rounds: int) -> list[Row]:
    """On one worker and on two."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder, images)
        for workers, peer in ((1, "the loop bare"), (2, "the loop under torchrun")):
            pairs = [(ours(folder, workers), bare(folder, workers)) for _ in range(rounds)]
            mine, theirs = ([pair[n] for pair in pairs] for n in (0, 1))
            name = f"train.py, {workers} worker{'s' * (workers > 1)}"
            found = mine, theirs
            rows.append(of_rounds(name, peer, *found, 0.97, "least", "images/s"))
    return rows


def main() -> None:
    """Measures."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=30_000, help="of an epoch")
    asked = parser.parse_args()
    show(measure(asked.images, asked.rounds), asked.json)


if __name__ == "__main__":
    main()
