"""Images are read ahead by one pool of processes, in bounded memory, and change nothing."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.resource_sharer import DupFd
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from nflab.data import feed as feeds
from nflab.data import load_dataset
from nflab.data.feed import CHUNK, Feed, Part, parts_of_training
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace

pytestmark = pytest.mark.slow

CONFIG = replace(Config(), batch_size=256)


def meet(error: type[Exception]) -> Any:
    """What a function does that meets an error, which nothing holds when it is handled."""
    raise error


class Watched:
    """The digits, told who reads how many images."""

    def __init__(self, pause: float = 0.0) -> None:
        self._digits: Any = load_dataset(CONFIG)
        self._pause = pause
        self.read = multiprocessing.Value("i", 0)
        self.readers = multiprocessing.Array("i", 64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_digits"], name)

    def _note(self, count: int) -> None:
        time.sleep(self._pause)
        with self.read.get_lock():
            self.read.value += count
        with self.readers.get_lock():
            if os.getpid() not in self.readers[:]:
                self.readers[self.readers[:].index(0)] = os.getpid()

    def train_images(self, indices_N: Tensor, keys_N: Tensor) -> tuple[Tensor, Tensor]:
        self._note(len(indices_N))
        found: tuple[Tensor, Tensor] = self._digits.train_images(indices_N, keys_N)
        return found

    def eval_images(self, split: str, indices_N: Tensor) -> tuple[Tensor, Tensor]:
        self._note(len(indices_N))
        found: tuple[Tensor, Tensor] = self._digits.eval_images(split, indices_N)
        return found


def test_one_pool_reads_all_epochs_and_evaluations() -> None:
    dataset: Any = Watched()
    feed = Feed(dataset, CONFIG, parts_of_training(0, 3), loaders=2)
    for epoch in range(3):
        for chunks in feed.train(epoch):
            assert sum(len(chunk.places_N) for chunk in chunks) == 256
        assert sum(len(labels) for _, labels in feed.evaluation("val")) == dataset.sizes["val"]
    assert sum(len(labels) for _, labels in feed.evaluation("test")) == dataset.sizes["test"]
    readers = {pid for pid in dataset.readers if pid}
    assert len(readers) == 2
    assert os.getpid() not in readers
    del feed
    alive = [pid for pid in readers if psutil.pid_exists(pid)]
    psutil.wait_procs([psutil.Process(pid) for pid in alive], timeout=30)
    assert not [pid for pid in readers if psutil.pid_exists(pid)]


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_a_reader_that_is_killed_is_replaced_and_no_image_lost(
    in_main_thread: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, mixup=True, augmentation_level=3)

    def all_of(killed: int) -> list[Any]:
        dataset: Any = Watched(pause=0.05)
        feed = Feed(dataset, config, parts_of_training(0, 1), loaders=2)
        found: list[Any] = []
        for chunks in feed.train(0):
            for chunk in chunks:
                found += [chunk.images_NCHW, chunk.targets_NK]
                if killed:
                    killed -= 1
                    alive = [pid for pid in dataset.readers if pid and psutil.pid_exists(pid)]
                    os.kill(alive[-1], signal.SIGKILL)
        found += [part for chunk in feed.evaluation("val") for part in chunk]
        return found

    with ThreadPoolExecutor(1) as pool:

        def of(killed: int) -> list[Any]:
            return all_of(killed) if in_main_thread else pool.submit(all_of, killed).result()

        whole, disturbed = of(0), of(1)
    assert len(whole) == len(disturbed)
    assert all(torch.equal(a, b) for a, b in zip(whole, disturbed, strict=True))
    assert capsys.readouterr().out.count("a process that reads images was lost") == 1


@pytest.mark.parametrize("error", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_reader_that_is_lost_while_it_hands_a_chunk_over_is_replaced(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection ends a moment before it is known to have ended. The others end before new ones
    begin, for shared memory may not hold what both read ahead."""
    begin, others = feeds._begin_reading, set(multiprocessing.active_children())
    beside: list[Any] = []

    def begun(*words: Any) -> Any:
        beside.extend(set(multiprocessing.active_children()) - others)
        return begin(*words)

    monkeypatch.setattr(feeds, "_begin_reading", begun)

    def all_of() -> list[Any]:
        feed = Feed(load_dataset(CONFIG), CONFIG, [Part("train", 0)], loaders=1)
        return [chunk.images_NCHW for chunks in feed.train(0) for chunk in chunks]

    whole, left = all_of(), [error]
    detach = DupFd.detach
    monkeypatch.setattr(DupFd, "detach", lambda fd: meet(left.pop()) if left else detach(fd))
    disturbed = all_of()
    assert (left, beside) == ([], [])
    assert len(whole) == len(disturbed)
    assert all(torch.equal(a, b) for a, b in zip(whole, disturbed, strict=True))


@pytest.mark.parametrize("loaders", [0, 1])
def test_what_a_dataset_meets_itself_is_no_lost_reader(
    loaders: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone(Watched):
        def train_images(self, indices_N: Tensor, keys_N: Tensor) -> Any:
            raise FileNotFoundError(2, "No such file or directory", "train-00.tar")

    dataset: Any = Gone()
    feed = Feed(dataset, CONFIG, [Part("train", 0)], loaders=loaders)
    with pytest.raises(FileNotFoundError, match=r"train-00\.tar"):
        list(next(feed.train(0)))
    assert "was lost" not in capsys.readouterr().out


def test_readers_that_are_lost_again_and_again_end_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feeds, "LOST_READERS", 1)

    class Deadly(Watched):
        def train_images(self, indices_N: Tensor, keys_N: Tensor) -> Any:
            os.kill(os.getpid(), 9)

    dataset: Any = Deadly()
    feed = Feed(dataset, CONFIG, [Part("train", 0)], loaders=1)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(next(feed.train(0)))


def test_what_is_read_ahead_is_bounded_whatever_the_batch_size() -> None:
    dataset: Any = Watched()
    feed = Feed(dataset, replace(CONFIG, batch_size=1024), parts_of_training(0, 50), loaders=2)
    next(next(feed.train(0)))
    before = -1
    while before != dataset.read.value:  # until nobody reads any more
        before = dataset.read.value
        time.sleep(1)
    assert before <= CHUNK * (2 * feeds._EACH + 1)
    assert before < 1024


@pytest.mark.parametrize(
    ("budget", "chunks"), [(10**12, feeds._EACH), (3 * 32 * 64 * 2, 3), (1, 1)]
)
def test_processes_read_as_far_ahead_as_memory_allows(
    budget: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "IN_FLIGHT_BYTES", budget)
    assert feeds._prefetch(load_dataset(CONFIG), 2, False) == chunks  # a chunk has 32 x 64 pixels


def test_too_little_shared_memory_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Disk:
        free = 3000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Disk)
    with pytest.raises(ConfigError, match=r"/dev/shm has 0 MB left, and 2 loaders .*--shm-size"):
        Feed(load_dataset(CONFIG), CONFIG, parts_of_training(0, 1), loaders=2)
    Feed(load_dataset(CONFIG), CONFIG, parts_of_training(0, 1), loaders=1)


@pytest.mark.parametrize("loaders", [0, 1])
def test_time_that_is_waited_for_images_is_told(loaders: int) -> None:
    slow: Any = Watched(pause=0.2)
    feed = Feed(slow, replace(CONFIG, batch_size=CHUNK * 4), [Part("train", 0)], loaders=loaders)
    for number, chunks in enumerate(feed.train(0)):
        list(chunks)
        if number == 2:
            break
    assert feed.waited >= (3 if loaders == 0 else 12) * 0.2 * 0.9


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("partners", ["batch", "fresh"])
def test_chunks_are_the_slice(world_size: int, partners: str) -> None:
    config = replace(
        CONFIG, batch_size=201, mixup=True, augmentation_level=4, partners=partners, cutmix=True
    )
    dataset = load_dataset(config)
    for rank in range(world_size):
        found = []
        # Whole, in chunks, and in chunks that are augmented by who takes them.
        for loaders, device in ((0, None), (1, None), (1, torch.device("cpu"))):
            feed = Feed(
                dataset, config, [Part("train", 2)], rank, world_size, loaders, augments_on=device
            )
            slices = [list(chunks) for chunks in feed.train(2)]
            assert all((len(chunks) > 1) == (loaders > 0) for chunks in slices)
            found.append(
                [
                    torch.cat(
                        [
                            getattr(c, name).flatten(1) if name != "places_N" else c.places_N
                            for chunks in slices
                            for c in chunks
                        ]
                    )
                    for name in ("images_NCHW", "targets_NK", "places_N")
                ]
            )
        for whole, *others in zip(*found, strict=True):
            assert all(torch.equal(whole, other) for other in others)


def test_a_worker_without_images_gets_an_empty_chunk() -> None:
    config = replace(CONFIG, batch_size=1)
    for loaders in (0, 1):
        feed = Feed(load_dataset(config), config, [Part("train", 0)], 0, 3, loaders)
        (chunk,) = next(feed.train(0))
        assert chunk.images_NCHW.shape == (0, 1, 8, 8)
