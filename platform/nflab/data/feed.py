"""All images of a run, in the order in which it needs them, read ahead by one pool of processes."""

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Items

from nflab.data.batches import Batch, Crops, augmented, cut, eval_chunk, mixes, read_crops
from nflab.data.dataset import Dataset, Split
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError

CHUNK = 32
"""Images that a process reads at a time."""

IN_FLIGHT_BYTES = 2_000_000_000
"""Memory of the images that are read ahead for a worker, at most."""

_EACH = 4
"""Chunks that each process may be ahead, where memory allows."""

LOST_READERS = 3
"""How often in a row the processes that read images begin anew after one was lost."""

_LOST = ("DataLoader worker (pid", "Pin memory thread exited")
"""How errors of lost processes begin; what they were sending is lost with them."""

_SEVERED = (ConnectionError, EOFError, FileNotFoundError)
"""What is met where one is lost while it hands a chunk over, as long as it still ends."""

_SHARED = "/dev/shm"
"""Where they lie until they are used."""


@dataclass(frozen=True)
class Part:
    """An epoch of training, or an evaluation of a split."""

    split: Split
    epoch: int | None = None
    """Of training; None evaluates."""
    first_step: int = 0
    """Of the epoch, of which earlier ones were done before."""


def parts_of_training(first_epoch: int, epochs: int, first_step: int = 0) -> list[Part]:
    """What training from a step of an epoch on goes through: each epoch with its validation, then
    the test."""
    each = [
        [Part("train", n, first_step if n == first_epoch else 0), Part("val")]
        for n in range(first_epoch, epochs)
    ]
    return [part for pair in each for part in pair] + [Part("test")]


class Feed:
    """Gives a worker its slices of the batches of each part, in the order of the parts.

    Images are uint8, in chunks, so that what is read ahead is bounded whatever the batch size. The
    processes live as long as the feed: they read the next part while this one is computed.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        parts: Sequence[Part],
        rank: int = 0,
        world_size: int = 1,
        loaders: int = 0,
        pinned: bool = False,
        augments_on: torch.device | None = None,
    ) -> None:
        """Starts the processes.

        Args:
            parts: all that will be asked for.
            loaders: processes that read ahead; with 0 images are read when they are asked for, and
                a worker's slice is one chunk.
            pinned: whether a device is to fetch them from memory by itself.
            augments_on: device on which images are mixed and augmented; None: where they are read.

        Raises:
            ConfigError: what is read ahead does not fit into shared memory.
        """
        self._cutting = _Cutting(
            dict(dataset.sizes), config.optimizer.batch_size, rank, world_size, bool(loaders)
        )
        self._waiting = list(parts)
        self._augments_on, self._config = augments_on, config
        self._classes = len(dataset.class_names)
        self.waited = 0.0
        """Seconds that were waited for images."""
        self._taken = self._lost = 0
        read = partial(_read, dataset, config, augments_on is None)
        with_partners = augments_on is not None and mixes(config)
        self._begin_reading = partial(
            _begin_reading,
            self._cutting,
            list(parts),
            read,
            loaders,
            _prefetch(dataset, loaders, with_partners) if loaders else 0,
            pinned,
        )
        self._ahead = self._begin_reading(0)

    def train(self, epoch: int, first_step: int = 0) -> Iterator[Iterator[Batch]]:
        """The slices of an epoch's batches, each as chunks, all of which are to be taken.

        The last images of the epoch's order, too few for a whole batch, wait for another epoch's.
        """
        self._begin(Part("train", epoch, first_step))
        cutting = self._cutting
        for _ in range(first_step, cutting.steps):
            yield self._ready(self._take(cutting.starts(cutting.own(cutting.batch_size))))

    def evaluation(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """A worker's share of a split, each image once: uint8 images and labels (N,)."""
        self._begin(Part(split))
        cutting = self._cutting
        yield from self._take(cutting.starts(cutting.own(cutting.sizes[split])))

    def _ready(self, chunks: Iterator[Batch | Crops]) -> Iterator[Batch]:
        for chunk in chunks:
            if isinstance(chunk, Batch):
                yield chunk
            else:
                assert self._augments_on is not None
                yield augmented(chunk.to(self._augments_on), self._config, self._classes)

    def _begin(self, part: Part) -> None:
        planned = self._waiting.pop(0)
        assert planned == part, f"{part} was asked for, and {planned} is next"

    def _take(self, starts: Sequence[int]) -> Iterator[Any]:
        """The next chunks, which begin there."""
        for _ in starts:
            begun = time.monotonic()
            chunk = self._next()
            self.waited += time.monotonic() - begun
            yield chunk

    def _next(self) -> Any:
        """The next chunk, also if a process that was to read it is lost.

        Raises:
            RuntimeError, OSError, EOFError: such processes are lost again and again.
        """
        while True:
            try:
                chunk = next(self._ahead)
            except (RuntimeError, *_SEVERED) as error:
                if not (self._cutting.ahead and _tells_of_a_lost_process(error)):
                    raise
                self._lost += 1
                if self._lost > LOST_READERS:
                    raise
            else:
                self._taken, self._lost = self._taken + 1, 0
                return chunk
            # Not before the error is gone, which holds those that are left of them.
            print("a process that reads images was lost: others take its place", flush=True)
            self._ahead = iter(())  # first the others end, and what they hold is free
            self._ahead = self._begin_reading(self._taken)


def _tells_of_a_lost_process(error: Exception) -> bool:
    """Rather than of what one has met: `DataLoader` passes such an error on with another text."""
    if isinstance(error, _SEVERED):
        return not str(error).startswith("Caught ")
    return str(error).startswith(_LOST)


@dataclass(frozen=True)
class _Cutting:
    """How what a worker needs is cut into chunks."""

    sizes: Mapping[Split, int]
    batch_size: int
    rank: int
    world_size: int
    ahead: bool
    """Whether others read; else a worker's slice of a batch is one chunk."""

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.sizes["train"] // self.batch_size

    def own(self, size: int) -> slice:
        """What this worker has of so many items."""
        return cut(size, self.rank, self.world_size)

    def starts(self, own: slice) -> list[int]:
        """Where the chunks of a slice begin, of which an empty one has one too: at even places, so
        that few pairs of neighbours are parted."""
        batch = self.own(self.batch_size)
        chunk = CHUNK if self.ahead else batch.stop - batch.start + 1
        return [own.start, *range(own.start + chunk - own.start % 2, own.stop, chunk)]

    def tasks(self, part: Part) -> Iterator["_Task"]:
        """What is to be read for a part, chunk by chunk."""
        evaluates = part.epoch is None
        own = self.own(self.sizes[part.split] if evaluates else self.batch_size)
        for step in range(1) if evaluates else range(part.first_step, self.steps):
            for start, stop in pairwise((*self.starts(own), own.stop)):
                yield part, step, start, stop


_Task = tuple[Part, int, int, int]
"""Part, step, and the first place (or index) and that after the last."""


class _Tasks:
    """What is to be read, in order, but for the first tasks."""

    def __init__(self, cutting: _Cutting, parts: Sequence[Part], first: int) -> None:
        self._cutting, self._parts, self._first = cutting, parts, first

    def __iter__(self) -> Iterator[_Task]:
        tasks = (task for part in self._parts for task in self._cutting.tasks(part))
        return islice(tasks, self._first, None)


def _begin_reading(
    cutting: _Cutting,
    parts: Sequence[Part],
    read: Callable[[_Task], Any],
    loaders: int,
    ahead: int,
    pinned: bool,
    first: int,
) -> Iterator[Any]:
    """The chunks of all tasks from one on, read by processes of their own if there are any."""
    left = _Tasks(cutting, parts, first)
    if not loaders:
        return map(read, left)
    loader = DataLoader(
        _Read(read),
        batch_size=None,
        sampler=left,
        num_workers=loaders,
        prefetch_factor=ahead,
        pin_memory=pinned,
    )
    before = signal.getsignal(signal.SIGCHLD)
    chunks = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # Of a process that is lost it would tell by an error, wherever the training is.
        signal.signal(signal.SIGCHLD, before)
    return chunks


class _Read(Items[Any]):
    """Chunks as the items of a `DataLoader`."""

    def __init__(self, read: Callable[[_Task], Any]) -> None:
        self._read = read

    def __getitem__(self, task: _Task) -> Any:
        return self._read(task)


def _read(dataset: Dataset, config: Config, augments: bool, task: _Task) -> Any:
    part, step, start, stop = task
    places_N = torch.arange(start, stop)
    if part.epoch is None:
        return eval_chunk(dataset, part.split, places_N, config.data.bad_images == "skip")
    crops = read_crops(dataset, config, part.epoch, step, places_N)
    return augmented(crops, config, len(dataset.class_names)) if augments else crops


def _prefetch(dataset: Dataset, loaders: int, with_partners: bool) -> int:
    """Chunks that each process may be ahead.

    Args:
        with_partners: whether each image has the one beside it that it is mixed with.

    Raises:
        ConfigError: not even one fits into shared memory.
    """
    channels = dataset.image_shape[0]
    side = max(*dataset.image_shape[1:], dataset.preprocessing.test_size)
    chunk = CHUNK * channels * side * side * (2 if with_partners else 1)
    ahead = max(1, min(_EACH, IN_FLIGHT_BYTES // (chunk * loaders)))
    if not Path(_SHARED).is_dir():  # a Mac has no such bound
        return ahead
    free = shutil.disk_usage(_SHARED).free
    fits = free // (chunk * loaders)
    if fits < 1:
        raise ConfigError(
            f"{_SHARED} has {free / 1e6:.0f} MB left, and {loaders} loaders need "
            f"{chunk * loaders / 1e6:.0f} MB there: give fewer --loaders, or more shared memory "
            "(--shm-size of a container)"
        )
    return min(ahead, fits)
