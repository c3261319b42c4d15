"""Threads: as many as other programs leave room for."""

from __future__ import annotations

from itertools import accumulate
from typing import cast

import pytest
import torch

from specdec_engine.decoding.following import followed
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import Loader, load_pair
from specdec_engine.record.events import Cycle, Event, SettingChanged
from specdec_engine.system import threads
from specdec_engine.system.threads import FollowedThreads, Threads, free_threads, set_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    free_threads.cache_clear()


@pytest.mark.parametrize(("cores", "room", "free"), [(16, 16, 16), (16, 5, 4), (6, 1, 1), (2, 0, 1), (1, 0, 1)])
def test_half_as_many_until_they_keep_step(cores, room, free):
    """One thread waits for nobody."""
    assert free_threads(cores, lambda n: n <= room) == free


@pytest.mark.parametrize(("late", "in_step"), [(0, True), (2, True), (8, False)])
def test_operations_that_wait_for_a_thread_are_noticed(late, in_step):
    """Two of 0.01 ms each second that took a millisecond are chance; eight are another program's doing."""
    times = iter([0.0011] * late + [0.00001] * 20_000)
    assert threads.keep_step(2, clock=accumulate(times, initial=0.0).__next__) == in_step


@pytest.mark.parametrize("room", [4, 2])
def test_threads_are_those_that_get_to_run(monkeypatch, room):
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(threads, "keep_step", lambda n: n <= room)
    set_threads("auto", CPU)
    assert torch.get_num_threads() == room


def test_a_number_that_was_given_is_taken(monkeypatch):
    monkeypatch.setattr(threads, "keep_step", lambda n: False)
    set_threads(3, CPU)
    assert torch.get_num_threads() == 3
    set_threads(None, CPU)
    assert torch.get_num_threads() == 3


def test_a_gpus_target_leaves_the_cores_alone(monkeypatch):
    """Its passes do not wait for the CPU's threads."""
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(threads, "keep_step", lambda n: False)
    set_threads("auto", torch.device("cuda"))
    assert torch.get_num_threads() == 2


class Machine:
    """Cores that other programs take from passes, and a clock that stands still between them."""

    def __init__(self, cores: int) -> None:
        self.now = self.used = 0.0
        self.free = self.cores = cores
        self.share = 1.0
        self.looks = 0
        torch.set_num_threads(cores)
        self.followed = FollowedThreads(cores, fit=self.fit, clock=lambda: self.now, used=lambda: self.used)

    def fit(self, threads: int) -> bool:
        self.looks += 1
        torch.set_num_threads(threads)
        return threads <= self.free

    def passes(self, seconds: float) -> int:
        """So long of them, of 10 ms each; the threads after them."""
        for _ in range(round(seconds * 100)):
            with self.followed:
                self.now += 0.01
                self.used += 0.01 * self.share * min(torch.get_num_threads(), self.free)
            self.followed.look()
        return torch.get_num_threads()


def test_threads_are_given_up_while_others_need_the_cores_and_taken_again():
    machine = Machine(4)
    assert machine.passes(3) == 4
    assert not machine.looks
    assert machine.followed.told == ""
    machine.free = 1
    assert machine.passes(3) == 1
    machine.free = 3
    assert machine.passes(20) == 2
    machine.free = 4
    assert machine.passes(20) == 4
    assert machine.followed.told == "at times 1 of 4 threads"
    machine.followed.begin()
    assert machine.passes(3) == 4
    assert machine.followed.told == ""


def test_passes_that_get_less_for_another_reason_are_looked_at_ever_more_seldom():
    """Threads that sleep while they wait do so (OMP_WAIT_POLICY=passive)."""
    machine = Machine(4)
    machine.share = 0.6
    assert machine.passes(60) == 4
    assert machine.looks < 10
    machine.free = 1
    assert machine.passes(40) == 1
    machine.free = 4
    assert machine.passes(40) == 4


def test_many_cores_lose_a_hundredth_each_and_are_not_looked_at():
    machine = Machine(64)
    machine.share = 0.99
    assert machine.passes(60) == 64
    assert not machine.looks


def test_one_core_is_not_looked_at():
    machine = Machine(1)
    machine.share = 0.1
    assert machine.passes(3) == 1
    assert not machine.looks


def test_what_interrupts_a_look_leaves_the_threads_as_they_were():
    machine = Machine(4)
    machine.free = 1

    def interrupted(threads: int) -> bool:
        torch.set_num_threads(2)
        raise KeyboardInterrupt

    machine.followed._fit = interrupted
    with pytest.raises(KeyboardInterrupt):
        machine.passes(3)
    assert torch.get_num_threads() == 4


def test_torchs_own_products_keep_the_threads_of_the_start():
    set_threads(2, CPU)
    torch.set_num_threads(1)
    with threads.as_at_first():
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


def options(number: Threads) -> LoadOptions:
    return LoadOptions(threads=number)


def test_pairs_of_a_target_share_what_they_follow(checkpoint, monkeypatch):
    """A chat that changes its draft while threads are given up gets them back all the same."""
    monkeypatch.setattr(threads, "keep_step", lambda n: True)
    loader = Loader(str(checkpoint), options("follow"))
    one = loader.pair("ngram").target
    if loader.target().kernels != "own":
        pytest.skip("no kernels of our own")
    most = torch.get_num_threads()
    torch.set_num_threads(1)
    other = loader.pair("none").target
    assert one.followed is other.followed is not None
    assert other.followed._most == most
    lanes = loader.pair("ngram")._lanes(2, 3, None)
    assert all(lane.target.followed is one.followed for lane in lanes)


def test_cores_that_were_busy_at_the_start_are_taken_later(checkpoint, monkeypatch):
    for name in ("specdec_engine.system.threads", "specdec_engine.pair", "specdec_engine.runtime.arithmetic"):
        monkeypatch.setattr(f"{name}.usable_cores", lambda: 4)
    monkeypatch.setattr(threads, "keep_step", lambda n: n <= 2)
    loader = Loader(str(checkpoint), options("follow"))
    if loader.target().kernels != "own":
        pytest.skip("no kernels of our own")
    assert torch.get_num_threads() <= 2
    assert loader.followed is not None
    assert loader.followed._most > 2


@pytest.mark.parametrize(
    "given",
    [
        LoadOptions(threads=2),
        LoadOptions(threads="auto"),
        LoadOptions(),
        LoadOptions(threads="follow", dtype="float32"),
        LoadOptions(threads="follow", runtime="generic"),
    ],
    ids=["a number", "auto", "none", "torch's kernels", "transformers"],
)
def test_threads_are_not_followed(checkpoint, given):
    """That was not asked for, or sums would fall otherwise in the middle of a text."""
    assert Loader(str(checkpoint), given).pair("none").target.followed is None


class Once:
    """Changes threads after the second pass."""

    def __init__(self) -> None:
        self.looks = 0

    def begin(self) -> None:
        torch.set_num_threads(2)

    def look(self) -> bool:
        self.looks += 1
        torch.set_num_threads(2 if self.looks < 2 else 1)
        return self.looks == 2


def test_a_change_is_an_event_before_the_cycle_that_it_holds_for(checkpoint):
    pair = load_pair(str(checkpoint), "none")
    plain = list(pair.decode([5, 6, 7], k=0, max_tokens=4, seed=1))
    events = list(followed(pair.decode([5, 6, 7], k=0, max_tokens=4, seed=1), cast("FollowedThreads", Once())))
    assert [event.kind for event in events] == [
        "started",
        "cycle",
        "cycle",
        "setting_changed",
        "cycle",
        "cycle",
        "finished",
    ]
    changed = events[3]
    assert isinstance(changed, SettingChanged)
    assert (changed.cycle, changed.name, changed.old, changed.new) == (2, "threads", 2, 1)
    assert changed.reason == "other programs keep the cores busy"
    assert tokens(events) == tokens(plain)


def tokens(events: list[Event]) -> list[int | str]:
    return [token for event in events if isinstance(event, Cycle) for token in event.emitted]
