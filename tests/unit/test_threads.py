"""Threads: as many as other programs leave room for."""

from __future__ import annotations

import pytest
import torch

from specdec_engine import threads
from specdec_engine.threads import free_threads, set_threads

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


def test_operations_that_take_too_long_are_noticed(monkeypatch):
    monkeypatch.setattr(threads, "_PATIENCE", 0.0)
    assert not threads.keep_step(2)
    monkeypatch.setattr(threads, "_PATIENCE", 60.0)
    assert threads.keep_step(2)


@pytest.mark.parametrize(("room", "said"), [(4, []), (2, ["2 of 4 threads"])])
def test_fewer_than_there_are_cores_are_told(monkeypatch, room, said):
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(threads, "keep_step", lambda n: n <= room)
    notes = set_threads("auto", CPU)
    assert torch.get_num_threads() == room
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))


def test_a_number_that_was_given_is_taken(monkeypatch):
    monkeypatch.setattr(threads, "keep_step", lambda n: False)
    assert set_threads(3, CPU) == []
    assert torch.get_num_threads() == 3
    assert set_threads(None, CPU) == []
    assert torch.get_num_threads() == 3


def test_a_gpus_target_leaves_the_cores_alone(monkeypatch):
    """Its passes do not wait for the CPU's threads."""
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(threads, "keep_step", lambda n: False)
    assert set_threads("auto", torch.device("cuda")) == []
    assert torch.get_num_threads() == 2
