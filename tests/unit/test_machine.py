"""Cores: no more than this process can use."""

from __future__ import annotations

import os

import psutil
import pytest

from specdec_engine.system.machine import usable_cores


@pytest.mark.parametrize(("quota", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1)])
def test_a_containers_quota_counts(tmp_path, monkeypatch, quota, cores):
    """Half a core more is a thread more."""
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert usable_cores(tmp_path / "cpu.max") == cores


@pytest.mark.parametrize("text", [None, "max 100000\n", "rubbish"])
def test_without_a_quota_cores_and_affinity_count(tmp_path, monkeypatch, text):
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert usable_cores(tmp_path / "cpu.max") == 3
