"""What a person is told while runs wait for machines."""

import time
from pathlib import Path

import pytest
from ray.autoscaler.v2.schema import (
    ClusterStatus,
    LaunchRequest,
    NodeInfo,
    PlacementGroupResourceDemand,
    RayTaskActorDemand,
    ResourceDemandSummary,
    ResourceRequestByCount,
)

from nflab.cluster import waiting
from nflab.cluster.placement import ON_HEAD
from nflab.cluster.waiting import (
    Arrivals,
    Refusal,
    hopeless,
    note_refusal,
    reasons,
    refusals,
)

WORKER = {"CPU": 1.0, "GPU": 1.0, "bundle_group_0_ab12": 0.001, "node:10.0.0.1": 0.001}


def demand(count: int) -> ResourceDemandSummary:
    """So many trials wait, and a task."""
    return ResourceDemandSummary(
        placement_group_demand=[
            PlacementGroupResourceDemand([ResourceRequestByCount(WORKER, 1)], "")
            for _ in range(count)
        ],
        ray_task_actor_demand=[RayTaskActorDemand([ResourceRequestByCount({"CPU": 2.0}, 3)])],
    )


def test_nothing_is_said_where_nobody_waits() -> None:
    refused = [Refusal(0.0, "spot", "Short", None)]
    assert reasons(ClusterStatus(), refused, {"spot": 1}) == []


def test_a_trial_on_its_way_to_the_head_waits_for_no_machine() -> None:
    waits = PlacementGroupResourceDemand([ResourceRequestByCount(dict(ON_HEAD), 1)], "")
    status = ClusterStatus(resource_demands=ResourceDemandSummary(placement_group_demand=[waits]))
    assert reasons(status, [], {}) == []


def test_who_waits_learns_what_is_asked_for_and_what_comes() -> None:
    launch = LaunchRequest("g5", "spot", 2, LaunchRequest.Status.PENDING, 0)
    node = NodeInfo("g5", "spot", "i-1", "10.0.0.1")
    status = ClusterStatus(
        resource_demands=demand(4), pending_launches=[launch, launch], pending_nodes=[node]
    )
    assert reasons(status, [], {}) == [
        "the cluster waits for 4 x 1 GPU, 1 CPU and 3 x 2 CPU: "
        "1 spot are being started, 4 spot are asked for"
    ]


def test_who_waits_in_vain_learns_why() -> None:
    refused = [Refusal(0.0, "spot", "Short: none", "dear"), Refusal(1.0, "dear", "Quota", None)]
    assert reasons(ClusterStatus(resource_demands=demand(1)), refused, {"spot": 2}) == [
        "there is no spot (Short: none): dear is asked for instead",
        "there is no dear (Quota): no type follows it, and it is asked for again",
        "2 spot went away before joining: make logs says why",
        "the cluster waits for 1 x 1 GPU, 1 CPU and 3 x 2 CPU: "
        "the cluster's machines have no room, and none is being started",
    ]


def test_machines_that_never_join_are_counted() -> None:
    def node(instance: str, status: str = "") -> NodeInfo:
        return NodeInfo("g5", "spot", instance, "", node_status=status, node_id=f"node-{instance}")

    arrivals = Arrivals()
    before = node("i-1")
    assert arrivals.missed(ClusterStatus(active_nodes=[before])) == {}
    pending = [node("a"), node("b"), node("c")]
    assert arrivals.missed(ClusterStatus(idle_nodes=[before], pending_nodes=pending)) == {}
    joined = ClusterStatus(active_nodes=[before, node("i-2")], pending_nodes=pending[1:])
    assert arrivals.missed(joined) == {}
    gone = ClusterStatus(active_nodes=[before], failed_nodes=[node("i-2")])
    assert arrivals.missed(gone) == {"spot": 2}


def test_refusals_of_earlier_runs_and_repeated_ones_are_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "REFUSALS", tmp_path / "refusals.jsonl")
    begun = time.time()
    for when, kind in ((begun - 60, "old"), (begun, "spot"), (begun + 1, "dear"), (begun, "spot")):
        note_refusal(Refusal(when, kind, 'a "reason"', None))
    assert [(r.node_type, r.reason) for r in refusals(begun)] == [
        ("spot", 'a "reason"'),
        ("dear", 'a "reason"'),
    ]


OUT = "NeverJoined: 3 machines in a row went away"

HEAD = NodeInfo("m7i", "head", "i-0", "10.0.0.1")

GPU = NodeInfo("g5", "spot", "i-1", "10.0.0.2")


@pytest.mark.parametrize(
    ("nodes", "coming", "asked", "refused", "gives_up"),
    [
        ([HEAD], [], "", [("spot", OUT, "dear"), ("dear", OUT, None)], True),
        ([HEAD], [], "spot", [("spot", OUT, "dear"), ("dear", OUT, None)], True),  # in vain
        ([HEAD], [], "other", [("spot", OUT, "dear"), ("dear", OUT, None)], False),
        ([HEAD], [], "", [("spot", OUT, None)], True),
        ([HEAD], [], "", [], False),
        ([HEAD], [], "", [("spot", OUT, "dear")], False),  # which is being asked for
        ([HEAD], [], "", [("spot", "Short: none", "dear"), ("dear", OUT, None)], False),
        ([HEAD], [], "", [("spot", OUT, "dear"), ("dear", "Short: none", None)], False),
        ([HEAD], [GPU], "", [("spot", OUT, None)], False),
        ([HEAD, GPU], [], "", [("spot", OUT, None)], False),  # others' runs end some time
    ],
)
def test_a_run_gives_up_when_every_type_is_left_out(
    nodes: list[NodeInfo],
    coming: list[NodeInfo],
    asked: str,
    refused: list[tuple[str, str, str | None]],
    gives_up: bool,
) -> None:
    launch = LaunchRequest("g5", asked, 1, LaunchRequest.Status.PENDING, 0)
    status = ClusterStatus(
        active_nodes=nodes, pending_nodes=coming, pending_launches=[launch] if asked else []
    )
    told = hopeless(status, [Refusal(time.time(), *words) for words in refused])
    assert (told is not None) is gives_up
    if told is not None:
        assert all(f"{kind} ({OUT})" in told for kind, _, _ in refused)


def test_a_launch_that_is_not_refused_again_is_coming() -> None:
    launch = LaunchRequest("g5", "spot", 1, LaunchRequest.Status.PENDING, 0)
    status = ClusterStatus(active_nodes=[HEAD], pending_launches=[launch])
    for ago, gives_up in ((0.0, True), (30.0, False)):
        told = hopeless(status, [Refusal(time.time() - ago, "spot", OUT, None)])
        assert (told is not None) is gives_up
