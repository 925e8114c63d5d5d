"""What a training costs its machine, as a trace and as figures of every epoch."""

import gzip
import json
from typing import Any

import pytest
import torch

import nfnet
from nflab.learning.loop import train
from nflab.learning.profile import Profile
from nflab.learning.worker import Worker
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES
from nflab.studies.replay import TIMES

CONFIG = replace(RECIPES["digits"].config, epochs=2, batch_size=96, seed=1)  # 11 steps an epoch


def reports(steps: int) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    train(replace(CONFIG, profile=steps), Worker(report=told.append))
    return told


def results(report: dict[str, Any]) -> dict[str, Any]:
    of_the_machine = {*TIMES, "profile", "profile_trace"}
    return {k: v for k, v in report.items() if k.split("/")[0] not in of_the_machine}


@pytest.mark.parametrize(("steps", "traced"), [(2, 2), (30, 8)], ids=["some", "the whole epoch"])
def test_the_first_steps_are_traced_once_and_computed_as_ever(steps: int, traced: int) -> None:
    plain, profiled = reports(0), reports(steps)
    assert [results(report) for report in profiled] == [results(report) for report in plain]
    assert ["profile" in report for report in profiled] == [True, False]
    said = profiled[0]["profile"]
    assert f"in {traced} steps: " in said
    assert said.count(" % ") == 3
    assert "conv" in said
    events = json.loads(gzip.decompress(profiled[0]["profile_trace"]))["traceEvents"]
    backwards = [e for e in events if e.get("name") == "aten::convolution_backward"]
    model = nfnet.create_model(CONFIG.model.model)
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert len(backwards) == traced * convolutions
    assert any(event.get("name") == "[memory]" for event in events)


def test_epochs_of_three_steps_are_traced_from_the_second_on() -> None:
    watched, found = Profile(2, torch.device("cpu")), []
    for _ in range(3):
        for _ in range(3):
            watched.before_step()
            torch.ones(3).sum()
        watched.finish()
        found.append(watched.pop())
    assert [bool(one) for one in found] == [False, True, False]
    assert "in 2 steps: " in found[1]["profile"]


def test_nothing_is_traced_unless_asked_for() -> None:
    watched = Profile(0, torch.device("cpu"))
    for _ in range(10):
        watched.before_step()
    watched.finish()
    assert watched.pop() == {}


def test_every_epoch_tells_what_it_took() -> None:
    for report in reports(0):
        figures = {k: v for k, v in report.items() if k.startswith("system/")}
        assert figures.keys() == {
            "system/worker_0/cpu_cores",
            "system/worker_0/memory_megabytes",
        }
        assert 0 < figures["system/worker_0/cpu_cores"] < 64
        assert 100 < figures["system/worker_0/memory_megabytes"] < 10_000
