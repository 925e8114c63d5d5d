"""What a trial costs, two at a time, beside Ray's own pattern: 12 trials less what 4 take.

The peer is the pattern of Ray's documentation (a Tune trainable that starts a TorchTrainer), with
trials that do nothing but report a number; ours trains the digits for one epoch, and records all in
Optuna and MLflow. The second row is how soon the first number is there, from the command: of one
training by train.py, and of one TorchTrainer that does nothing.

Example:
  python benchmarks/trials.py --rounds 3
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.compare import Row, arguments, of_rounds, show  # noqa: E402

FEW, MANY = 4, 12

SWEEP = "agc_sweep.py --epochs 1 --batch-size 128 --augmentation-level 0 --trials"
TRAIN = "train.py --epochs 1 --batch-size 128"

RAYS_PATTERN = """
import sys
import ray
from ray import tune
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def train(config):
    ray.train.report({"value": 1.0})
    print("first number", flush=True)

def trial(config):
    TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=sys.argv[1], name=f"trial-{config['number']}"),
    ).fit()
    tune.report({"value": 1.0})

ray.init(address="local", num_cpus=2)
if sys.argv[2] == "1":
    trial = TorchTrainer(
        train,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=sys.argv[1]),
    ).fit()
else:
    tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.001}),
        param_space={"number": tune.grid_search(list(range(int(sys.argv[2]))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=2),
        run_config=tune.RunConfig(storage_path=sys.argv[1]),
    ).fit()
"""


def seconds(command: list[str], until: str | None = None) -> float:
    """How long a command takes, to its end or until it prints something."""
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "NFLAB_STORAGE": f"{folder}/runs",
            "RAY_worker_niceness": "0",
            "RAY_TRAIN_V2_ENABLED": "1",
        }
        command = [word.replace("FOLDER", folder) for word in command]
        begun = time.perf_counter()
        with subprocess.Popen(
            command,
            env=os.environ | stores,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            taken, said = None, ""
            for line in process.stdout:
                said += line
                if taken is None and until is not None and until in line:
                    taken = time.perf_counter() - begun
        if process.returncode != 0 or (until is not None and taken is None):
            raise RuntimeError(said)
        return time.perf_counter() - begun if taken is None else taken


def our_sweep(trials: int) -> float:
    """Seconds of a sweep."""
    script, *flags = SWEEP.split()
    return seconds([sys.executable, str(ROOT / "experiments" / script), *flags, str(trials)])


def rays_pattern(trials: int, until: str | None = None) -> float:
    """Seconds of Ray's pattern."""
    return seconds([sys.executable, "-c", RAYS_PATTERN, "FOLDER", str(trials)], until)


def measure(rounds: int) -> list[Row]:
    """Both rows."""
    ours, theirs, our_first, their_first = [], [], [], []
    script, *flags = TRAIN.split()
    train = [sys.executable, str(ROOT / "experiments" / script), *flags]
    for _ in range(rounds):
        ours.append(our_sweep(MANY) - our_sweep(FEW))
        theirs.append(rays_pattern(MANY) - rays_pattern(FEW))
        our_first.append(seconds(train, "epoch "))
        their_first.append(rays_pattern(1, "first number"))
    peer, first = "Ray's pattern", (our_first, their_first)
    return [
        of_rounds(f"{MANY - FEW} trials, two at a time", peer, ours, theirs, 0.2, "most"),
        of_rounds("from the command to the first number", peer, *first, None, "most"),
    ]


def main() -> None:
    """Measures."""
    asked = arguments(__doc__).parse_args()
    show(measure(asked.rounds), asked.json)


if __name__ == "__main__":
    main()
