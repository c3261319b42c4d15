"""How CUDA graphs are asked for, where there is no GPU: stand-ins for torch's own functions note how they are called."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from itertools import count

import pytest
import torch

from specdec_engine.runtime import graphs
from specdec_engine.runtime.graphs import CudaRecorder
from specdec_engine.system.timing import HostTimer

DEVICE = torch.device("cuda", 1)


class Stream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        pass


class Cuda:
    """Captures, each as its pool, its stream and what it was under; and the stream that is current."""

    def __init__(self, monkeypatch):
        self.captures, self.replays, self.device = [], 0, None
        self.workspaces = []
        self.seconds = count()
        self.ordinary = self.current = Stream()
        handles = count()
        for name, stand_in in {
            "Stream": Stream,
            "graph_pool_handle": lambda: next(handles),
            "device": self.on,
            "current_stream": lambda *device: self.current,
            "set_stream": self.set_stream,
            "stream": self.use,
            "CUDAGraph": lambda: self,
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(
            torch._C, "_cuda_clearCublasWorkspaces", lambda: self.workspaces.append(len(self.captures)), raising=False
        )
        self.timer = HostTimer(lambda: 1.0 * next(self.seconds))
        monkeypatch.setattr(graphs, "timer_for", lambda device: self.timer)
        monkeypatch.setattr(graphs, "_BROKEN", [])

    @contextmanager
    def on(self, device):
        before, self.device = self.device, device
        yield
        self.device = before

    @contextmanager
    def use(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def clear_workspaces(self):
        self.workspaces.append(len(self.captures))

    def set_stream(self, stream):
        self.current = stream

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert not torch.is_inference_mode_enabled()
        assert (self.device, capture_error_mode) == (DEVICE, "thread_local")
        self.captures.append((pool, stream))
        self.current = stream  # as torch's: not set back where the capture breaks off
        yield
        self.current = self.ordinary

    def replay(self):
        self.replays += 1


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


@pytest.mark.parametrize("outside", [torch.inference_mode, nullcontext])
def test_work_is_warmed_up_and_captured_on_the_recorders_own_stream(cuda, outside):
    """In inference mode, the capture outside it; on the recorder's device, whichever is current."""
    recorder, seen = CudaRecorder(DEVICE), []

    def work():
        seen.append((cuda.current, cuda.device, torch.is_inference_mode_enabled()))
        return (torch.ones(1),)

    with outside():
        replay = recorder.record(work)
    (_, stream), *others = cuda.captures
    assert (others, stream.device) == ([], DEVICE)
    assert seen == [(stream, DEVICE, True)] * 2
    assert cuda.current is cuda.ordinary
    assert replay()[0].item() == 1.0
    assert cuda.replays == 1


def test_recorders_share_neither_pool_nor_stream_and_a_cleared_one_begins_another_pool(cuda):
    recorder = CudaRecorder(DEVICE)
    other = recorder.another()
    for one in (recorder, recorder, other):
        one.record(lambda: ())
    recorder.clear()
    for one in (recorder, other):
        one.record(lambda: ())
    pools, streams = zip(*cuda.captures, strict=True)
    assert pools[0] == pools[1] != pools[2] == pools[4]
    assert pools[3] not in (pools[0], pools[2])
    assert streams[0] is streams[1] is streams[3] is not streams[2] is streams[4]


def test_a_recording_uses_a_workspace_of_its_own_and_leaves_none(cuda):
    """Else it would replay into memory that another owner's graph, or another library, has freed."""
    CudaRecorder(DEVICE).record(lambda: ())
    assert cuda.workspaces == [0, 1]  # dropped before the capture and after it


def test_seconds_of_a_recording_are_a_pause(cuda):
    start = cuda.timer.mark()
    CudaRecorder(DEVICE).record(lambda: ())
    assert cuda.timer.paused(start, cuda.timer.mark()) > 0


def test_a_capture_that_breaks_off_leaves_the_device_usable(cuda):
    recorder, calls = CudaRecorder(DEVICE), count()

    def work():
        if next(calls):
            raise RuntimeError("operation not permitted when stream is capturing")
        return ()

    with pytest.raises(RuntimeError, match="not permitted"):
        recorder.record(work)
    assert cuda.current is cuda.ordinary
    assert cuda in graphs._BROKEN
    recorder.record(lambda: ())
    assert cuda.captures[0][0] != cuda.captures[1][0]
