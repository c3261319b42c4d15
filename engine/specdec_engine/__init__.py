"""Speculative decoding as a library: load a pair, iterate events, fold a summary.

Names are resolved when first used (PEP 562), so that importing this package costs no torch: a trace can be read and
summed up on a machine without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from specdec_engine.control import Controls as Controls
    from specdec_engine.errors import SpecdecError as SpecdecError
    from specdec_engine.events import Cycle as Cycle
    from specdec_engine.events import Event as Event
    from specdec_engine.events import Failed as Failed
    from specdec_engine.events import Finished as Finished
    from specdec_engine.events import SettingChanged as SettingChanged
    from specdec_engine.events import Started as Started
    from specdec_engine.loading import LoadOptions as LoadOptions
    from specdec_engine.loop import decode as decode
    from specdec_engine.pair import Pair as Pair
    from specdec_engine.pair import load_pair as load_pair
    from specdec_engine.stats import Summary as Summary
    from specdec_engine.stopping import Stop as Stop
    from specdec_engine.text import TextStream as TextStream
    from specdec_engine.text import printable as printable
    from specdec_engine.trace import TraceWriter as TraceWriter
    from specdec_engine.trace import read_trace as read_trace
    from specdec_engine.types import Sampling as Sampling

_HOME = {
    "Controls": "control",
    "Cycle": "events",
    "Event": "events",
    "Failed": "events",
    "Finished": "events",
    "LoadOptions": "loading",
    "Pair": "pair",
    "Sampling": "types",
    "SettingChanged": "events",
    "SpecdecError": "errors",
    "Started": "events",
    "Stop": "stopping",
    "Summary": "stats",
    "TextStream": "text",
    "TraceWriter": "trace",
    "decode": "loop",
    "load_pair": "pair",
    "printable": "text",
    "read_trace": "trace",
}

__all__ = [
    "Controls",
    "Cycle",
    "Event",
    "Failed",
    "Finished",
    "LoadOptions",
    "Pair",
    "Sampling",
    "SettingChanged",
    "SpecdecError",
    "Started",
    "Stop",
    "Summary",
    "TextStream",
    "TraceWriter",
    "decode",
    "load_pair",
    "printable",
    "read_trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
