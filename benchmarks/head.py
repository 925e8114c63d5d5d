"""What one head can drive: trials that train nothing, on simulated nodes, recorded for real.

The sweep's own code runs, with Optuna's study and an MLflow server, on a Ray cluster of so many
simulated nodes on this machine; only training is replaced by a function that reports at once. So
every second that a trial takes is the head's. Prints one line of JSON.

    python benchmarks/head.py --nodes 16 --trials 600
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

EPOCHS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=16, help="simulated nodes, of one CPU each")
    parser.add_argument("--trials", type=int, default=600)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as (address, server):
        print(json.dumps(measure(asked.nodes, asked.trials, folder, address, server)))


def measure(nodes: int, trials: int, folder: str, address: str, server: int) -> dict[str, Any]:
    """Runs the sweep and says what it took.

    Args:
        server: id of the process above MLflow's.
    """
    os.environ |= {
        "MLFLOW_TRACKING_URI": address,
        "NFLAB_STORAGE": f"{folder}/runs",
        "RAY_worker_niceness": "0",
    }
    import ray
    from ray.cluster_utils import Cluster

    import nflab.running.tuner
    from nflab.settings.leaves import replace
    from nflab.settings.recipes import RECIPES
    from nflab.settings.studies import SweepConfig
    from nflab.studies.sweep import run_sweep

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    begun = time.monotonic()
    for _ in range(nodes):
        cluster.add_node(num_cpus=1, wait=False)
    cluster.wait_for_nodes(timeout=600)
    os.environ["RAY_ADDRESS"] = cluster.address
    started = time.monotonic() - begun

    def nothing(proposal: dict[str, Any]) -> None:
        for epoch in range(1, EPOCHS + 1):
            outcome = "finished" if epoch == EPOCHS else "running"
            ray.tune.report(
                {
                    **dict.fromkeys(("val_top1", "test_top1"), 50.0 + epoch),
                    **dict.fromkeys(("train_loss", "val_loss", "learning_rate"), 1.0 / epoch),
                    "epoch": epoch,
                    "samples_seen": 1071 * epoch,
                    "seconds": 1.0 * epoch,
                    "images_per_second": 1071.0,
                    "outcome": outcome,
                }
            )

    def trainable(base: object, placement: object) -> object:
        return ray.tune.with_resources(nothing, {"CPU": 1})

    nflab.running.tuner.trainable = trainable
    fields = RECIPES["digits"].config
    config = SweepConfig(**{f: getattr(fields, f) for f in fields.__dataclass_fields__})
    config = replace(config, epochs=EPOCHS, warmup_epochs=0.5, trials=trials, name="nothing")
    begun = time.monotonic()
    run_sweep(config, "agc_sweep")
    seconds = time.monotonic() - begun
    usage = resource.getrusage(resource.RUSAGE_SELF)
    main_process = psutil.Process(server)
    processes = [main_process, *main_process.children(recursive=True)]
    cpu_of_server = sum(sum(process.cpu_times()[:2]) for process in processes)
    cluster.shutdown()
    return {
        "nodes": nodes,
        "nodes_up_s": round(started, 1),
        "trials": trials,
        "sweep_s": round(seconds, 1),
        "trials_per_minute": round(60 * trials / seconds, 1),
        "driver_cpu_ms_per_trial": round(1000 * (usage.ru_utime + usage.ru_stime) / trials, 1),
        "driver_peak_MB": round(usage.ru_maxrss / 1024),
        "mlflow_cpu_s": round(cpu_of_server, 1),
    }


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, int]]:
    """MLflow's server as the head of a cluster runs it; its address, and the process above it."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    env = {
        "HOME": str(folder),
        "NFLAB_RESULTS": f"{folder}/results",
        "MLFLOW_TRACKING_URI": address,
    }
    script = Path(__file__).resolve().parents[1] / "cluster" / "mlflow_server.py"
    subprocess.run([sys.executable, str(script), "start"], env={**os.environ, **env}, check=True)
    keeper = int((folder / "mlflow" / ".lock").read_text())
    try:
        yield address, keeper
    finally:
        process = psutil.Process(keeper)
        process.terminate()  # and it ends the server
        process.wait(30)


if __name__ == "__main__":
    main()
