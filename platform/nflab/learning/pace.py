"""How fast this machine trains a configuration."""

import time
from functools import partial

import torch

import nfnet
from nflab.data import load_dataset
from nflab.data.feed import Feed, Part
from nflab.learning.models import build_model
from nflab.learning.network import Network, memory_format
from nflab.settings.config import Config
from nflab.settings.streams import Stream, keys

_ENOUGH = 0.3
"""Seconds of steps after which their pace is known."""


def seconds_per_epoch(config: Config) -> float:
    """Seconds of an epoch with its validation on one thread of this machine, as a worker has, from
    the first steps; about: a first step is slower than others, and so is SAM's search."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds_per_epoch(config)
    finally:
        torch.set_num_threads(threads)


def _seconds_per_epoch(config: Config) -> float:
    dataset, given = load_dataset(config), config.optimizer
    with torch.random.fork_rng(devices=[]):
        model = build_model(config, dataset, new_head=True)
    model = model.to(memory_format=memory_format(config))
    groups = nfnet.param_groups(model, given.weight_decay, given.clipping, given.unclipped)
    optimizer = nfnet.SGD_AGC(groups, lr=0.0, momentum=given.momentum)
    network = Network(config, dataset, model, torch.device("cpu"), 1)
    keys_of = partial(keys, config.run.seed, Stream.MODEL, 0)
    times: list[float] = []
    begun = time.monotonic()
    for chunks in Feed(dataset, config, [Part("train", 0)]).train(0):
        optimizer.zero_grad()
        network.add_gradient(chunks, given.batch_size, keys_of, given.batch_size)
        optimizer.step()
        times.append(time.monotonic() - begun)
        if sum(times) >= _ENOUGH and len(times) > 1:
            break
        begun = time.monotonic()
    train = min(times) * (dataset.sizes["train"] // given.batch_size)
    # A third of a step's time is the way forward.
    return train * (1 + dataset.sizes["val"] / dataset.sizes["train"] / 3)
