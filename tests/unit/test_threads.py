"""Threads: as many as other programs leave room for."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from specdec_engine.system import threads
from specdec_engine.system.threads import FollowedThreads, free_threads, set_threads

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
        self.looks = 0

    def fit(self, threads: int) -> bool:
        self.looks += 1
        torch.set_num_threads(threads)
        return threads <= self.free

    def passes(self, seconds: float, followed: FollowedThreads) -> int:
        """So long of them, of 10 ms each; the threads after them."""
        for _ in range(round(seconds * 100)):
            with followed:
                self.now += 0.01
                self.used += 0.01 * min(torch.get_num_threads(), self.free)
        return torch.get_num_threads()


@pytest.fixture
def machine():
    torch.set_num_threads(4)
    return Machine(4)


def following(machine: Machine) -> FollowedThreads:
    return FollowedThreads(4, fit=machine.fit, clock=lambda: machine.now, used=lambda: machine.used)


def test_threads_are_given_up_while_others_need_the_cores_and_taken_again(machine):
    followed = following(machine)
    assert machine.passes(3, followed) == 4
    assert not machine.looks
    assert followed.told == ""
    machine.free = 1
    assert machine.passes(3, followed) == 1
    machine.free = 3
    assert machine.passes(20, followed) == 2
    machine.free = 4
    assert machine.passes(20, followed) == 4
    assert followed.told == "at times 1 of 4 threads"


def test_what_takes_less_than_its_cores_for_another_reason_is_looked_at_ever_more_seldom(machine):
    """A thread that sleeps while it waits, as OMP_WAIT_POLICY=passive has it."""
    looks = list[int]()
    followed = FollowedThreads(
        4, fit=lambda n: not looks.append(n), clock=lambda: machine.now, used=lambda: machine.used / 2
    )
    assert machine.passes(60, followed) == 4
    assert len(looks) < 10


def test_one_thread_is_not_looked_at(machine):
    torch.set_num_threads(1)
    followed = FollowedThreads(1, fit=machine.fit, clock=lambda: machine.now, used=lambda: 0.0)
    machine.passes(3, followed)
    assert not machine.looks


def test_cores_that_were_busy_at_the_start_are_taken_later(monkeypatch, machine):
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(threads, "keep_step", lambda n: n <= 2)
    set_threads("follow", CPU)
    followed = FollowedThreads(fit=machine.fit, clock=lambda: machine.now, used=lambda: machine.used)
    assert torch.get_num_threads() == 2
    assert machine.passes(3, followed) == 4
