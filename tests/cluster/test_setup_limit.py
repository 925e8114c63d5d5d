"""How long a worker's setup may take before the autoscaler ends it: Ray's own reconciler, in the
environment that `cluster/env.sh` makes on the head."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

RECONCILE = """
import logging, sys, time
from ray.autoscaler.v2.instance_manager.config import InstanceReconcileConfig
from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager
from ray.autoscaler.v2.instance_manager.instance_storage import InstanceStorage
from ray.autoscaler.v2.instance_manager.reconciler import Reconciler
from ray.autoscaler.v2.instance_manager.storage import InMemoryStorage
from ray.core.generated.instance_manager_pb2 import Instance

storage = InstanceStorage("test", InMemoryStorage())
worker = Instance(instance_id="a", cloud_instance_id="i-1", status=Instance.RAY_INSTALLING)
worker.status_history.add(
    instance_status=Instance.RAY_INSTALLING,
    timestamp_ns=time.time_ns() - int(float(sys.argv[1]) * 1e9),
)
assert storage.upsert_instance(worker)[0]
Reconciler._handle_stuck_instances(
    InstanceManager(storage, []), InstanceReconcileConfig(), logging.getLogger()
)
(found,) = storage.get_instances()[0].values()
print(Instance.InstanceStatus.Name(found.status))
"""

ENV = '. "$1/cluster/env.sh"; [ -z "$2" ] || export "$2"; exec "$3" -c "$4" "$5"'

LIMIT = "RAY_AUTOSCALER_RECONCILE_RAY_INSTALL_STATUS_TIMEOUT_S"


@pytest.mark.parametrize(
    ("setting", "seconds", "status"),
    [
        ("", 40 * 60, "RAY_INSTALLING"),
        ("", 70 * 60, "RAY_INSTALL_FAILED"),
        (f"{LIMIT}=5", 1, "RAY_INSTALLING"),
        (f"{LIMIT}=5", 10, "RAY_INSTALL_FAILED"),
    ],
)
def test_a_worker_may_take_an_hour_for_its_setup(
    tmp_path: Path, setting: str, seconds: float, status: str
) -> None:
    (tmp_path / ".nflab").write_text("export NFLAB_RESULTS=s3://x NFLAB_PYTHON=3.12\n")
    words = [str(ROOT), setting, sys.executable, RECONCILE, str(seconds)]
    done = subprocess.run(
        ["bash", "-c", ENV, "bash", *words],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{status}\n", done.stderr
