"""Options of device and weights, as every command hands them on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from specdec_engine.models.pretrained import DeviceMap
from specdec_engine.models.progress import Report, silent
from specdec_engine.runtime.linear import Packing, Quantize
from specdec_engine.system.threads import Threads

RuntimeName = Literal["auto", "lean", "graph", "generic"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """A place and a form for models that are loaded; the same for target and draft."""

    device: str = "auto"
    """auto (cuda, then mps, then cpu), or a torch device such as cuda:1."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    device_map: DeviceMap | None = None
    """`auto` spreads the target over all GPUs and the CPU, by accelerate."""
    runtime: RuntimeName = "auto"
    """How forwards are run: auto chooses the fastest that computes this model exactly."""
    quantize: Packing = "auto"
    """auto (four to eight bits of a GGUF stay packed), none (unpacked), int8 or int4 (pack the target's); on a CPU."""
    draft_quantize: Quantize = "auto"
    """The same for a draft model, of which auto packs dense weights too, in 8 bits (`light`): what it proposes is tested."""
    threads: Threads = None
    """CPU threads for all of torch, see `system.threads.Threads`."""
    offline: bool = False
    trust_remote_code: bool = False
    tokens: int = 2048
    """Context to reckon with when memory is estimated: prompt and output."""
    report: Report = silent

    def for_draft(self) -> LoadOptions:
        """With which the pair's draft is loaded."""
        packing: Packing = "light" if self.draft_quantize == "auto" else self.draft_quantize
        return replace(self, device_map=None, quantize=packing)
