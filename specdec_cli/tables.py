"""A benchmark's record for people and for other programs: tables, CSV, Markdown, a plot, a comparison."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from specdec_cli.output import one_line
from specdec_engine.errors import UsageError
from specdec_engine.record.text import as_markdown, counted, printable

_COLUMNS = (
    "draft",
    "k",
    "T",
    "tok/s",
    "vs plain (95 %)",
    "slower",
    "α",
    "tok/cycle",
    "draft/verify/other",
    "predicted",
    "same",
)


def threads(made: Mapping[str, Any]) -> str:
    """Of an environment. Fewer than there are cores are left, where nobody asked for so few, by other programs."""
    n, cores = made["threads"], made.get("cores", 0)
    return f"{n} of {counted(cores, 'thread')}" if n < cores else counted(n, "thread")


def show(found: Mapping[str, Any], format: str) -> None:
    """On stdout."""
    match format:
        case "json":
            typer.echo(json.dumps(found, indent=1))
        case "jsonl":
            for arm in found["arms"]:
                typer.echo(json.dumps({key: value for key, value in arm.items() if key != "samples"}))
        case "csv":
            typer.echo(printable(_csv(found)), nl=False)
        case "md":
            typer.echo(printable(_markdown(found)), nl=False)
        case _:
            _table(found)


def _row(arm: Mapping[str, Any]) -> list[str]:
    shares = "/".join(f"{100 * arm[f'{part}_share']:.0f}" for part in ("draft", "verify", "other"))
    same = "–" if arm["compared"] is None else f"{arm['identical']}/{arm['compared']}"
    low = arm["speedup_low"]  # None of one prompt, which says nothing about others
    said = [*([] if arm["rule"] == "token" else [arm["rule"]]), *filter(None, [arm.get("quantize")])]
    said += ["structured"] if arm.get("structured") else []
    said += [f"context {arm['context']:,}"] if arm.get("context") else []
    rule = f" ({', '.join(said)})" if said else ""
    return [
        f"{arm['draft']}{rule}",
        str(arm["k"]),
        f"{arm['temperature']:g}",
        f"{arm['tokens_per_second']:.1f}",
        f"{arm['speedup']:.2f}×" + ("" if low is None else f" ({low:.2f}–{arm['speedup_high']:.2f})"),
        f"{arm['slower_share']:.0%}",
        "–" if arm["alpha"] is None else f"{arm['alpha']:.2f}",
        f"{arm['mean_emitted_per_cycle']:.2f}",
        f"{shares} %",
        f"{arm['predicted_speedup']:.2f}×",
        same,
    ]


_DISTURBED = 1.05
"""A pass gives its tokens at once, and cannot cost less than a plain one: what is above is noise of the machine."""


def notes(found: Mapping[str, Any]) -> Iterator[str]:
    """What the table does not say."""
    plan, base, made = found["plan"], found["baseline"], found["environment"]
    if not found["lossless"]:
        yield f"NOT LOSSLESS: drafted tokens were accepted at a chosen chance of {found['synthetic_acceptance']:g}."
    kinds = dict.fromkeys(q["category"] for q in plan["questions"])
    rate = f"{base['tokens_per_second']:.1f} tok/s" if base["tokens_per_second"] else "not run"
    rate += f" after {base['context']:,} tokens" if base.get("context") else ""
    yield (
        f"plain decoding {rate} · {plan['target']}, {made['weights']} on {made['device']}, {threads(made)} · "
        f"{counted(found['prompts']['count'], 'prompt')} ({', '.join(kinds)}), {plan['max_tokens']} tokens, "
        f"{counted(plan['repeats'], 'round')}"
    )
    yield from _of_forms(base, found["arms"])
    if (roof := base["roofline"]) is not None:
        yield (
            f"a plain pass takes {1e3 * roof['pass_s']:.1f} ms and reads {1e-9 * roof['bytes_per_second']:.1f} GB/s: "
            f"{roof['share_of_bandwidth']:.0%} of what this memory gives"
        )
    for arm in found["arms"]:
        yield from _of_arm(arm)
    if (best := max(found["arms"], key=lambda arm: float(arm["speedup"]), default=None)) is not None:
        yield f"{_named(best)}: {best['cause']}"
        kinds_said = ", ".join(f"{kind} {found_['mean']:.2f}×" for kind, found_ in best["categories"].items())
        yield f"by category: {kinds_said}"
    if found["recommendation"] is not None:
        yield f"→ {found['recommendation']['reason']}"


def _of_forms(base: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What plain decoding did where arms are held against several."""
    if base.get("by_weights"):
        rates = (f"{form} {rate:.1f}" for form, rate in base["by_weights"].items() if rate is not None)
        yield f"plain decoding by weights, tok/s: {', '.join(rates)}"
    if (structured := base.get("structured")) is not None:
        forced = sum(arm.get("forced", 0) for arm in arms)
        yield f"plain decoding under the grammar {structured:.1f} tok/s; of its arms' tokens it forced {forced}"
    for context, at in (base.get("by_context") or {}).items():
        if at["token_s"] is not None:
            took = f"read in {at['prefill_s']:.2f} s, {1e3 * at['token_s']:.1f} ms a token"
            yield f"plain decoding after {int(context):,} tokens: {took}"


def _named(arm: Mapping[str, Any]) -> str:
    return f"{arm['draft']} k {arm['k']}" + (f" after {arm['context']:,} tokens" if arm.get("context") else "")


def _of_arm(arm: Mapping[str, Any]) -> Iterator[str]:
    name = _named(arm)
    if arm["speedup"] > _DISTURBED * arm["mean_emitted_per_cycle"]:
        yield (
            f"{name}: {arm['speedup']:.2f}× from {arm['mean_emitted_per_cycle']:.2f} tokens a cycle "
            "is more than these explain: plain decoding may have been disturbed; measure again, with nothing else running"
        )
    for d in arm["first_divergences"]:
        gap = "" if d["gap"] is None else f", logits {d['gap']:.3f} apart"
        yield (
            f"{name}: prompt {d['question']} differs from token {d['position']} on, "
            f"{d['plain']!r} and {d['arm']!r}{gap}: {d['verdict']}"
        )


def _table(found: Mapping[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Figures that are cut off are none: on a narrow terminal lines wrap.
    console = Console(width=max(Console().width, 126) if sys.stdout.isatty() else 140, highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    best = max((arm["speedup"] for arm in found["arms"]), default=None)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "draft" else "right", no_wrap=column != "draft")
    for arm in found["arms"]:
        row = _row(arm)
        row[4] += " best" if arm["speedup"] == best else "     "
        table.add_row(*(Text(one_line(cell)) for cell in row))
    console.print(table)
    for line in notes(found):
        console.print(one_line(line), markup=False)


def _markdown(found: Mapping[str, Any]) -> str:
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    lines += ["| " + " | ".join(map(_cell, _row(arm))) + " |" for arm in found["arms"]]
    return "\n".join([*lines, "", *(f"{_cell(line)}  " for line in notes(found))]) + "\n"


def _cell(text: str) -> str:
    return as_markdown(one_line(text))


def _csv(found: Mapping[str, Any]) -> str:
    plain = (str, int, float, type(None))
    rows = [{key: value for key, value in arm.items() if isinstance(value, plain)} for arm in found["arms"]]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def compared(older: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Arms that both records have, old and new."""
    then, now = older["environment"]["threads"], found["environment"]["threads"]
    if then != now:
        yield f"{then} threads before, {now} now: part of the change is theirs"
    before = {_key(arm): arm for arm in older["arms"]}
    for arm in found["arms"]:
        if (old := before.get(_key(arm))) is None:
            continue
        change = arm["speedup"] / old["speedup"] - 1
        known = None not in (arm["speedup_low"], old["speedup_low"])
        surely = known and (arm["speedup_low"] > old["speedup_high"] or arm["speedup_high"] < old["speedup_low"])
        yield (
            f"{arm['draft']} k {arm['k']}, T {arm['temperature']:g}: {old['speedup']:.2f}× before, "
            f"{arm['speedup']:.2f}× now, {change:+.0%}" + ("" if surely else " (within the intervals)")
        )


def _key(arm: Mapping[str, Any]) -> tuple[Any, ...]:
    form = arm.get("quantize"), bool(arm.get("structured")), arm.get("context")
    return arm["draft"], arm["k"], arm["temperature"], arm["rule"], *form


def check_plot(path: Path) -> None:
    """Before anything is measured. Raises UsageError without matplotlib, or for a kind of file that it does not write."""
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib", "pip install 'specdec-cli[plot]'")
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise UsageError(
            f"--plot {path} is no kind of picture that is drawn here", "give a name ending in .svg or .png"
        )


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Raises UsageError for a place that cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    series = dict[tuple[Any, ...], list[Mapping[str, Any]]]()
    for arm in found["arms"]:
        series.setdefault(_key(arm)[:1] + _key(arm)[2:], []).append(arm)
    for (draft, temperature, _, form, structured, context), arms in series.items():
        fixed = [arm for arm in arms if isinstance(arm["k"], int)]
        ks = [arm["k"] for arm in fixed]
        more = [form, "structured" if structured else "", f"context {context:,}" if context else ""]
        label = ", ".join(filter(None, [draft, f"T {temperature:g}", *more]))
        speeds = [arm["speedup"] for arm in fixed]
        below = [speed - (arm["speedup_low"] or speed) for speed, arm in zip(speeds, fixed, strict=True)]
        above = [(arm["speedup_high"] or speed) - speed for speed, arm in zip(speeds, fixed, strict=True)]
        [line, *_] = axes.errorbar(ks, speeds, [below, above], marker="o", capsize=3, label=label)
        axes.plot(ks, [arm["predicted_speedup"] for arm in fixed], ":", color=line.get_color())
        for arm in arms:
            if arm["k"] == "auto":
                axes.axhline(arm["speedup"], color=line.get_color(), lw=0.8, label=f"{label}, k auto")
    axes.axhline(1.0, color="grey", lw=0.8)
    axes.set(xlabel="k, drafted tokens a cycle", ylabel="speedup over plain decoding", title="dotted: predicted")
    axes.legend()
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "choose another --plot") from error
