"""`specdec info`: what is installed, what there is to run on, what is in the cache, and which config is in force."""

from __future__ import annotations

import json as jsonlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from specdec_cli import options as opt
from specdec_cli import output, profiles
from specdec_engine import __version__
from specdec_engine.errors import UsageError
from specdec_engine.record.text import counted

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "textual",
    "typer",
    "rich",
    "safetensors",
    "gguf",
    "matplotlib",
    "pillow",
)


def info(json: opt.Json = False) -> None:
    """Show versions, devices, the runtime that the built-in pair would get and why, cached models, and profiles.

    specdec info --json
    """
    with output.narrated():
        found = _found()
    if json:
        typer.echo(jsonlib.dumps(found, indent=1))
        return
    output.say(f"specdec {found['specdec']} · Python {found['python']} · {found['platform']}")
    output.say(" · ".join(f"{name} {number}" for name, number in found["packages"].items() if number is not None))
    for device in found["devices"]:
        free = "" if device["free_bytes"] is None else f", {device['free_bytes'] / 2**30:.1f} GiB free"
        output.say(f"{device['name']}: {device['about']}{free}")
    output.say(f"runtime: {found['runtime']['name']} on {found['runtime']['device']}, {found['runtime']['why']}")
    for line in _measured(found["runtime"]):
        output.say(line)
    output.say(f"built-in target: {'in the cache' if found['builtin_cached'] else 'fetched at the first use, 98 MB'}")
    for model in found["models"]:
        fits = f" · drafts for it: {', '.join(model['drafts'])}" if model["drafts"] else ""
        output.say(f"{model['name']}: {model['model_type']}, {model['size'] / 1e9:.1f} GB{fits}")
    for name, about in found["drafters"].items():
        output.say(f"draft {name}: {about}")
    if not found["models"]:
        output.say("no other models are in the hub's cache")
    config = found["config"]
    if config["error"]:
        output.say(f"× config: {config['error']}")
    for block in config["profiles"]:
        output.say(f"profile: {profiles.of_block(block).said} · {config['file']}")
    if not config["profiles"] and not config["error"]:
        output.say(f"no profiles in {config['file']}: drafts and k are the defaults; specdec tune --save writes one")


def _measured(runtime: dict[str, Any]) -> Iterator[str]:
    """Milliseconds for 100 million weights, of each form that was timed on this machine; the built-in target's first."""
    if runtime.get("own_kernels", "compiled") != "compiled":
        yield f"no kernels of our own: {runtime['own_kernels']}"
    for number, one in enumerate(runtime.get("measured", ())):
        whose = "for the built-in target" if number == 0 else "remembered for other widths or threads"
        forms = sorted(one["timings"], key=lambda form: form["one_ms"] + form["four_ms"])
        figures = " · ".join(f"{form['form']} {form['one_ms']:.1f} and {form['four_ms']:.1f}" for form in forms)
        size = f"{one['rows']} x {one['columns']}, {counted(one['threads'], 'thread')}, torch {one['torch']}"
        yield f"{whose}, ms for 1 and 4 rows of 100M weights ({size}{_READING.get(one['reading'], '')}):"
        yield f"  {figures}"


_READING = {
    "unpacked": "; a prompt's rows of packed weights by torch in bfloat16, unpacked",
    "tiles": "; a prompt's rows in tiles of bfloat16 by our own kernels",
}


def _found() -> dict[str, Any]:
    from specdec_engine.core.registry import foreign
    from specdec_engine.models.builtin import is_cached
    from specdec_engine.models.hub_cache import cached_models, drafts_for

    models = cached_models()
    return {
        "schema": "specdec.info/1",
        "specdec": __version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        **_devices(),
        "builtin_cached": is_cached(),
        "models": [
            {
                "name": m.name,
                "model_type": m.model_type,
                "size": m.size,
                "drafts": [d.name for d in drafts_for(m, models)],
            }
            for m in models
        ],
        "drafters": {entry.name: entry.about for entry in foreign()},
        "config": _config(),
    }


def _config() -> dict[str, Any]:
    """What is wrong with it is a finding, and no reason to say nothing else."""
    found: dict[str, Any] = {"file": str(profiles.path()), "profiles": [], "error": None}
    try:
        found["profiles"] = [p.block() for p in profiles.profiles()]
    except UsageError as error:
        found["error"] = error.message
    return found


def _devices() -> dict[str, Any]:
    """What `--device auto` sees, and takes."""
    import torch

    from specdec_engine.system.devices import idle_gpu, pick_device, pick_dtype
    from specdec_engine.system.machine import cpu_name, instructions, usable_cores
    from specdec_engine.system.memory import free_bytes

    cpu = torch.device("cpu")
    about = f"{cpu_name() or 'CPU'}, {usable_cores()} cores, {instructions()}"
    devices = [{"name": "cpu", "about": about, "free_bytes": free_bytes(cpu)}]
    for i in range(torch.cuda.device_count()):
        device = torch.device("cuda", i)
        devices.append({"name": str(device), "about": torch.cuda.get_device_name(i), "free_bytes": free_bytes(device)})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "about": "Apple GPU", "free_bytes": None})
    chosen = pick_device("auto")
    if chosen.type == "cpu":
        return {"devices": devices, "runtime": _cpu_runtime()}
    dtype = str(pick_dtype("auto", chosen)).removeprefix("torch.")
    name, why = {
        "cuda": ("graph", f"recorded as CUDA graphs; dense weights in {dtype}"),
    }.get(chosen.type, ("generic", f"the transformers forward, in {dtype}"))
    why = "; ".join(filter(None, [why, idle_gpu(chosen)]))
    return {"devices": devices, "runtime": {"name": name, "device": str(chosen), "why": why}}


def _cpu_runtime() -> dict[str, Any]:
    """What was measured here, and now for the built-in target where nothing was."""
    import torch

    from specdec_engine.runtime import native
    from specdec_engine.runtime.arithmetic import Matrices, choose, current, measured
    from specdec_engine.system.threads import set_threads

    cpu, builtin = torch.device("cpu"), Matrices(rows=3072, columns=576, packed=True, lean=True)
    set_threads("auto", cpu)
    packed = choose(builtin, "auto", "auto", cpu)
    dense = choose(replace(builtin, packed=False), "auto", "auto", cpu)
    own = measured(builtin.rows, builtin.columns)
    return {
        "name": "lean",
        "device": "cpu",
        "why": f"as measured: packed weights run {packed.name}, dense ones in {dense.name}",
        "own_kernels": native.why_none() or "compiled",
        "measured": [asdict(one) for one in (own, *(other for other in current() if other != own))],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
