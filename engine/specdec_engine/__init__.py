"""Speculative decoding as a library: load a pair, iterate events, fold a summary.

Names are resolved when first used (PEP 562), so that importing this package costs no torch: a trace can be read and
summed up on a machine without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from specdec_engine.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from specdec_engine.core.cycle_types import Sampling as Sampling
    from specdec_engine.decoding.control import Controls as Controls
    from specdec_engine.decoding.loop import decode as decode
    from specdec_engine.decoding.stopping import Stop as Stop
    from specdec_engine.errors import SpecdecError as SpecdecError
    from specdec_engine.models.options import LoadOptions as LoadOptions
    from specdec_engine.pair import Pair as Pair
    from specdec_engine.pair import load_pair as load_pair
    from specdec_engine.record.events import Cycle as Cycle
    from specdec_engine.record.events import Event as Event
    from specdec_engine.record.events import Failed as Failed
    from specdec_engine.record.events import Finished as Finished
    from specdec_engine.record.events import SettingChanged as SettingChanged
    from specdec_engine.record.events import Started as Started
    from specdec_engine.record.stats import Summary as Summary
    from specdec_engine.record.text import TextStream as TextStream
    from specdec_engine.record.text import printable as printable
    from specdec_engine.record.trace import TraceWriter as TraceWriter
    from specdec_engine.record.trace import read_trace as read_trace

_HOME = {
    "Controls": "decoding.control",
    "Cycle": "record.events",
    "Event": "record.events",
    "Failed": "record.events",
    "Finished": "record.events",
    "LoadOptions": "models.options",
    "Pair": "pair",
    "Sampling": "core.cycle_types",
    "SettingChanged": "record.events",
    "SpecdecError": "errors",
    "Started": "record.events",
    "Stop": "decoding.stopping",
    "Summary": "record.stats",
    "TextStream": "record.text",
    "TraceWriter": "record.trace",
    "decode": "decoding.loop",
    "load_pair": "pair",
    "printable": "record.text",
    "read_trace": "record.trace",
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
