"""`cluster/kuberay.yaml` against the schemas of KubeRay and Kubernetes, and against gpu.yaml."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray._private import ray_constants
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as read_by_ray,
)

from nflab.data.feed import IN_FLIGHT_BYTES
from tests.cluster.kubernetes import ApiServer
from tests.conftest import ROOT, free_port, stop_marked

KUBERNETES = "1.29", "1.37"
"""The oldest that will do, and a recent one."""

HOME = "/home/ray"
"""In the image."""

RAYJOB = jsonschema.Draft202012Validator(
    json.loads((ROOT / "tests" / "cluster" / "rayjob_schema.json").read_text())
)
BIN = Path(sys.executable).parent
Documents = list[dict[str, Any]]


def documents() -> Documents:
    """What `kubectl apply` is given, the RayJob first; nothing in it is shared."""
    text = (ROOT / "cluster" / "kuberay.yaml").read_text()
    return list(json.loads(json.dumps(list(yaml.safe_load_all(text)))))


def gpu_yaml() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "cluster" / "gpu.yaml").read_text()))


def spec(written: Documents) -> dict[str, Any]:
    """Of the RayJob."""
    return written[0]["spec"]


def cluster(written: Documents) -> dict[str, Any]:
    return spec(written)["rayClusterSpec"]


def head(written: Documents) -> dict[str, Any]:
    return cluster(written)["headGroupSpec"]


def workers(written: Documents) -> dict[str, Any]:
    (group,) = cluster(written)["workerGroupSpecs"]
    return group


def submitter(written: Documents) -> dict[str, Any]:
    """The template of the Pod that submits the job."""
    return spec(written)["submitterPodTemplate"]


def templates(written: Documents) -> list[dict[str, Any]]:
    """Of all Pods; that of the head with the container that KubeRay adds to it."""
    whole = json.loads(json.dumps(head(written)["template"]))
    options = cluster(written)["autoscalerOptions"]
    beside = {"name": "autoscaler", "image": "i", "securityContext": options["securityContext"]}
    whole["spec"]["containers"].append(beside)
    return [whole, workers(written)["template"], submitter(written)]


def pods(written: Documents) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (head(written), workers(written))]


def containers(written: Documents) -> dict[str, dict[str, Any]]:
    found = [
        c for pod in pods(written) for c in (*pod.get("initContainers", []), *pod["containers"])
    ]
    return {container["name"]: container for container in found}


def env_of(container: dict[str, Any]) -> dict[str, str]:
    """As a container gets it: later variables may name earlier ones."""
    values: dict[str, str] = {}
    for variable in container["env"]:
        values[variable["name"]] = re.sub(
            r"\$\((\w+)\)", lambda match: values[match[1]], variable["value"]
        )
    return values


def validate(written: Documents, kubernetes: str = KUBERNETES[-1]) -> None:
    """Raises jsonschema's ValidationError unless an API server would take it all."""
    RAYJOB.validate(written[0])
    for template in templates(written):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
        kubernetes_validate.validate(pod, kubernetes, strict=True)
    for resource in written[1:]:
        kubernetes_validate.validate(resource, kubernetes, strict=True)


@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_it_is_what_the_schemas_want(kubernetes: str) -> None:
    RAYJOB.check_schema(RAYJOB.schema)
    validate(documents(), kubernetes)


@pytest.mark.parametrize(
    ("part", "name", "other"),
    [
        (lambda d: d[0], "spec", "specs"),
        (spec, "entrypoint", "entryPoint"),
        (cluster, "enableInTreeAutoscaling", "enableInTreeAutoScaling"),
        (lambda d: cluster(d)["authOptions"], "secretName", "secret"),
        (
            lambda d: cluster(d)["autoscalerOptions"]["securityContext"],
            "capabilities",
            "capability",
        ),
        (lambda d: spec(d)["submitterConfig"], "backoffLimit", "backOffLimit"),
        (submitter, "spec", "pod"),
        (workers, "maxReplicas", "maxWorkers"),
        (lambda d: pods(d)[1], "tolerations", "toleration"),
        (lambda d: containers(d)["mlflow"], "volumeMounts", "volumes"),
        (lambda d: containers(d)["ray-worker"]["resources"], "limits", "limit"),
        (lambda d: d[1]["spec"], "accessModes", "accessMode"),
        (lambda d: d[-1]["spec"], "podSelector", "selector"),
    ],
)
def test_a_misspelt_field_is_refused(
    part: Callable[[Documents], dict[str, Any]], name: str, other: str
) -> None:
    written = documents()
    part(written)[other] = part(written).pop(name)
    with pytest.raises(jsonschema.ValidationError, match=other):
        validate(written)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (lambda d: d[0]["metadata"], "name", "n" * 48),
        (spec, "backoffLimit", "0"),
        (spec, "shutdownAfterJobFinishes", "yes"),
        (lambda d: cluster(d)["authOptions"], "mode", "password"),
        (lambda d: cluster(d)["autoscalerOptions"], "version", 2),
        (lambda d: head(d)["rayStartParams"], "num-cpus", 0),
        (workers, "minReplicas", 0.5),
        (lambda d: containers(d)["mlflow"], "command", "python"),
        (lambda d: containers(d)["ray-head"], "env", {"A": "b"}),
        (lambda d: containers(d)["ray-worker"]["env"][0], "value", 0),
        (lambda d: d[-1]["spec"], "ingress", {}),
    ],
)
def test_a_wrong_type_is_refused(
    part: Callable[[Documents], dict[str, Any]], name: str, value: object
) -> None:
    written = documents()
    assert name in part(written)
    part(written)[name] = value
    with pytest.raises(jsonschema.ValidationError, match=re.escape(repr(value))):
        validate(written)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (lambda d: d[0], "kind"),
        (spec, "rayClusterSpec"),
        (cluster, "headGroupSpec"),
        (head, "template"),
        (workers, "groupName"),
        (workers, "maxReplicas"),
        (lambda d: pods(d)[1], "containers"),
        (lambda d: containers(d)["ray-head"], "name"),
        (lambda d: containers(d)["ray-head"]["volumeMounts"][0], "mountPath"),
        (lambda d: pods(d)[0]["volumes"][0]["persistentVolumeClaim"], "claimName"),
    ],
)
def test_a_missing_field_is_refused(part: Callable[[Documents], dict[str, Any]], name: str) -> None:
    written = documents()
    del part(written)[name]
    with pytest.raises(jsonschema.ValidationError, match=f"'{name}' is a required property"):
        validate(written)


def test_ray_reads_of_it_what_it_reads_of_gpu_yaml() -> None:
    on_aws = gpu_yaml()
    metadata = {"name": "nflab-gpu", "namespace": "default"}
    read = read_by_ray({"metadata": metadata, "spec": cluster(documents())})
    for setting in ("idle_timeout_minutes", "max_workers"):
        assert read[setting] == on_aws[setting]

    def resources(launcher: dict[str, Any], name: str) -> dict[str, float]:
        told = launcher["available_node_types"][name]["resources"]
        return {key: told[key] for key in ("CPU", "GPU") if key in told}

    assert resources(read, read["head_node_type"]) == resources(on_aws, "head") == {"CPU": 0}
    assert resources(read, "gpu") == resources(on_aws, "gpu-spot")
    assert read["available_node_types"]["gpu"]["min_workers"] == 0


def test_every_container_has_the_environment_that_the_nodes_of_gpu_yaml_have(
    tmp_path: Path,
) -> None:
    (settings, *_) = gpu_yaml()["setup_commands"]
    read = f"{settings}; . {ROOT}/cluster/env.sh; env"
    done = subprocess.run(
        ["bash", "-c", read],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    told = dict(line.split("=", 1) for line in done.stdout.splitlines())
    told["NFLAB_OF_DRIVERS"] = told["NFLAB_OF_DRIVERS"].replace(str(tmp_path), "/home/ray")
    names = {
        "NFLAB_RESULTS",
        "NFLAB_STORAGE",
        "NFLAB_OF_DRIVERS",
        "MLFLOW_TRACKING_URI",
        "RAY_USAGE_STATS_ENABLED",
    }
    written = documents()
    for container in containers(written).values():
        assert env_of(container) == {name: told[name] for name in names}
    # KubeRay tells every container of Ray.
    assert cluster(written)["authOptions"]["mode"] == told["RAY_AUTH_MODE"]


def test_versions_are_the_pinned_ones() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster(documents())['rayVersion']}" in pins
    (python,) = re.findall(r"NFLAB_PYTHON=([0-9.]+)", "\n".join(gpu_yaml()["setup_commands"]))
    assert f"FROM python:{python}" in instructions()


def instructions() -> list[str]:
    """Of the Dockerfile, each on one line."""
    text = (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_holds_what_gpu_yaml_copies_to_its_nodes() -> None:
    copied = [line.split()[2:] for line in instructions() if line.startswith("COPY ")]
    sources = {source for *from_here, _ in copied for source in from_here}
    on_aws = set(gpu_yaml()["file_mounts"].values()) - {"~/.ray/nflab/nflab-gpu.token"}
    assert sources == on_aws
    for *from_here, to in copied:
        assert to == "./" or [to] == from_here
        assert all((ROOT / source).exists() for source in from_here)


def test_the_image_installs_what_the_project_needs(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (install,) = (line for line in instructions() if "requirements.txt" in line)
    _, listing, _ = install.removeprefix("RUN ").split(" && ")
    env = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", listing], cwd=tmp_path, env=env, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cluster"]]
    assert (tmp_path / "requirements.txt").read_text().splitlines() == wanted


def test_one_image_runs_everything_in_the_folder_that_holds_it() -> None:
    written = documents()
    found = containers(written)
    (submits,) = submitter(written)["spec"]["containers"]
    assert len({container["image"] for container in (*found.values(), submits)}) == 1
    assert "command" not in submits  # KubeRay's own
    assert f"WORKDIR {HOME}/nflab" in instructions()
    for words in (shlex.split(spec(written)["entrypoint"]), found["mlflow"]["command"]):
        assert words[0] == "python" and (ROOT / words[1]).is_file()
    assert (ROOT / found["ray-worker"]["args"][1]).is_file()
    (user,) = {t["spec"]["securityContext"]["runAsUser"] for t in templates(written)}
    assert f"USER {user}" in instructions()
    (made,) = (line for line in instructions() if line.startswith("RUN useradd"))
    assert f"--uid {user} ray" in made


def test_the_volume_is_where_mlflow_and_the_drivers_of_jobs_write() -> None:
    ask = "import backup; print(backup.DATABASE.parent, backup.RUNS)"
    done = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=ROOT / "cluster",
        env={**os.environ, "HOME": HOME},
        capture_output=True,
        text=True,
        check=True,
    )
    written = documents()
    for name in ("mlflow", "ray-head"):
        mounts = containers(written)[name]["volumeMounts"]
        assert {mount["mountPath"] for mount in mounts} == set(done.stdout.split())
        assert {mount["name"] for mount in mounts} == {"disk"}
    (disk,) = pods(written)[0]["volumes"]
    claim = disk["persistentVolumeClaim"]["claimName"]
    assert [claim] == [d["metadata"]["name"] for d in written if d["kind"].endswith("Claim")]


def test_nothing_is_open_beyond_the_cluster() -> None:
    written = documents()
    assert {"Service", "Ingress"}.isdisjoint(document["kind"] for document in written)
    assert {"serviceType", "enableIngress"}.isdisjoint(head(written))
    for pod in pods(written):
        assert "hostNetwork" not in pod
    for container in containers(written).values():
        assert "ports" not in container
    (policy,) = (d["spec"] for d in written if d["kind"] == "NetworkPolicy")
    assert policy["policyTypes"] == ["Ingress"]
    (operator,) = (
        source for rule in policy["ingress"] if "ports" in rule for source in rule["from"]
    )
    # What KubeRay's Helm chart and its Kustomize files both put onto the operator's Pod.
    labels = {"app.kubernetes.io/component": "kuberay-operator"}
    assert operator["podSelector"]["matchLabels"] == labels
    for group in (head(written), workers(written)):
        labels = group["template"]["metadata"]["labels"]
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()


def violations(pod: dict[str, Any]) -> list[str]:
    """Of the Pod Security Standard called `restricted`, as Kubernetes' documentation has it.

    Source: kubernetes.io/docs/concepts/security/pod-security-standards, with what it includes of
    `baseline`.
    """
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    volumes = "configMap csi downwardAPI emptyDir ephemeral persistentVolumeClaim projected secret"
    for volume in pod.get("volumes", []):
        found += [f"volume {kind}" for kind in volume.keys() - {"name", *volumes.split()}]
    whole = pod.get("securityContext", {})
    found += ["sysctls"] if whole.get("sysctls") else []
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        own = container.get("securityContext", {})
        both = {**whole, **own}
        powers = own.get("capabilities", {})
        fine = {
            "privileged": not own.get("privileged"),
            "escalation": own.get("allowPrivilegeEscalation") is False,
            "capabilities": "ALL" in powers.get("drop", [])
            and set(powers.get("add", [])) <= {"NET_BIND_SERVICE"},
            "root": both.get("runAsNonRoot") is True and both.get("runAsUser") != 0,
            "seccomp": both.get("seccompProfile", {}).get("type")
            in ("RuntimeDefault", "Localhost"),
            "proc": own.get("procMount", "Default") == "Default",
            "ports": not any("hostPort" in port for port in container.get("ports", [])),
        }
        found += [f"{container['name']}: {name}" for name, kept in fine.items() if not kept]
    return found


def test_its_pods_are_taken_by_a_restricted_namespace() -> None:
    """Init containers that KubeRay adds have what the container of Ray has."""
    for template in templates(documents()):
        assert violations(template["spec"]) == []
    loose = documents()
    del containers(loose)["mlflow"]["securityContext"]["capabilities"]
    del pods(loose)[0]["securityContext"]["seccompProfile"]
    missing = [f"{name}: seccomp" for name in ("mlflow", "ray-head", "autoscaler")]
    assert violations(templates(loose)[0]["spec"]) == ["mlflow: capabilities", *missing]


def test_no_autoscaler_moves_what_runs() -> None:
    asked = {
        "karpenter.sh/do-not-disrupt": "true",
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    }
    for template in templates(documents()):
        assert template["metadata"]["annotations"] == asked


GIB = 1 << 30


def test_shared_memory_holds_rays_objects_and_what_loaders_read_ahead() -> None:
    written = documents()
    limits = containers(written)["ray-worker"]["resources"]["limits"]
    memory = int(limits["memory"].removesuffix("Gi")) * GIB
    (volume,) = pods(written)[1]["volumes"]
    shared = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) * GIB
    objects = ray_constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION * memory
    # Each GPU has a worker that trains.
    assert objects + limits["nvidia.com/gpu"] * IN_FLIGHT_BYTES <= shared < memory / 2


def test_accounts_are_those_that_the_file_makes_and_workers_may_not_ask_kubernetes() -> None:
    written = documents()
    made = [d["metadata"]["name"] for d in written if d["kind"] == "ServiceAccount"]
    assert [pod["serviceAccountName"] for pod in pods(written)] == made
    profiles = [
        gpu_yaml()["available_node_types"][name]["node_config"]["IamInstanceProfile"]["Name"]
        for name in ("head", "gpu-spot")
    ]
    assert made == profiles
    assert pods(written)[1]["automountServiceAccountToken"] is False


def test_a_sweep_on_the_head_counts_on_the_workers_that_may_come(tmp_path: Path) -> None:
    port, mark = free_port(), f"kuberay-of-test-{tmp_path}"
    ask = "from nflab.cluster import connection; from nflab.settings.config import ScaleConfig; "
    ask += "print(connection.connect(ScaleConfig()))"
    written = documents()
    params = head(written)["rayStartParams"]
    flags = [f"--{name}={value}" for name, value in params.items()]
    flags += ["--no-monitor", "--include-dashboard=false", "--disable-usage-stats"]
    with ApiServer(tmp_path, "nflab-gpu-x7k2p", cluster(written)) as kubernetes:
        env = {
            **os.environ,
            **kubernetes.env,
            "HOME": str(tmp_path),
            "NFLAB_TEST": mark,
            "RAY_AUTH_MODE": cluster(written)["authOptions"]["mode"],
            "RAY_AUTH_TOKEN": "0" * 64,
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        start = ["ray", "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1"]
        try:
            subprocess.run([*start, *flags], env=env, check=True, timeout=120)
            done = subprocess.run(
                [sys.executable, "-c", ask], env=env, capture_output=True, text=True, timeout=120
            )
        finally:
            stop_marked(mark)
    assert done.stdout.strip() == "1 worker a run, 1 GPU each; 4 at once", done.stderr


def test_mlflow_answers_the_probe_and_saves_its_database_when_its_container_ends(
    tmp_path: Path,
) -> None:
    written = documents()
    mlflow = containers(written)["mlflow"]
    port = str(free_port())
    results = tmp_path / "results"
    env = {
        **os.environ,
        **{name: value.replace("5000", port) for name, value in env_of(mlflow).items()},
        "NFLAB_RESULTS": str(results),
        "HOME": str(tmp_path),
        "NFLAB_TEST": f"mlflow-of-test-{tmp_path}",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    for mount in mlflow["volumeMounts"]:
        (tmp_path / Path(mount["mountPath"]).relative_to(HOME)).mkdir(parents=True)
    probe = [word.replace("5000", port) for word in mlflow["startupProbe"]["exec"]["command"]]
    process = subprocess.Popen(mlflow["command"], cwd=ROOT, env=env)
    try:
        for _ in range(mlflow["startupProbe"]["failureThreshold"]):
            assert process.poll() is None
            if subprocess.run(probe, env=env, capture_output=True, check=False).returncode == 0:
                break
            time.sleep(1)
        else:
            pytest.fail("it does not answer")
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        stop_marked(env["NFLAB_TEST"])
    assert (results / "backup" / "mlflow.db").stat().st_size > 0
