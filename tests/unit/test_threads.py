"""Threads: as many as other programs leave room for."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from specdec_engine.system import threads
from specdec_engine.system.threads import free_threads, set_threads

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
