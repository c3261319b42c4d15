"""What the lesson's experiments look like."""

from __future__ import annotations

from specdec_tui.bars import bar
from specdec_tui.panels import Line, PanelContent
from specdec_tui.toy import MOST, TOKENS, Draws, P, Q, WhatIf

_ARMS = (
    ("target alone", "target", "target"),
    ("speculative", "speculative", "draft"),
    ("careless", "careless", "refused"),
)


def histograms(draws: Draws, width: int) -> PanelContent:
    """Three bars a token, of the share of the draws, beside what target and draft say of it."""
    cells, lines = max(8, width - 34), list[Line]()
    for i, token in enumerate(TOKENS):
        for n, (label, name, style) in enumerate(_ARMS):
            share = getattr(draws, name)[i] / draws.made if draws.made else 0.0
            what = f"“{token}” {P[i]:.2f}" if n == 0 else f"  draft {Q[i]:.2f}" if n == 1 else ""
            lines.append(
                [
                    (what.ljust(13), "strong" if n == 0 else "muted"),
                    (label.ljust(14), "muted"),
                    (bar(share / 0.5, cells), style),
                    (f" {share:.3f}", ""),
                ]
            )
    return PanelContent(f"one token, drawn {draws.made:,} times in each way", lines)


def curve(what: WhatIf, width: int) -> PanelContent:
    """The speedup by k, with plain decoding at 1."""
    cells = max(8, width - 26)
    top = max(2.0, max(what.speedup(k) for k in range(MOST + 1)))
    lines: list[Line] = [
        [(f"α {what.alpha:.1f}", "strong"), (" a drafted token's chance · ", "muted"), (f"k {what.k}", "strong")],
        [(f"a draft step costs {what.cost:.2f} of a pass, each further token to verify {what.wider:.2f}", "muted")],
        [],
    ]
    for k in range(MOST + 1):
        speed = what.speedup(k)
        style = "refused" if speed < 0.995 else "draft"
        said = (
            "  plain decoding"
            if k == 0
            else "  slower!"
            if speed < 0.995
            else "  best"
            if k == what.k == what.best
            else ""
        )
        here = "▶" if k == what.k else " "
        lines.append(
            [
                (f"{here} k {k} ", "key" if k == what.k else "muted"),
                (bar(speed / top, cells), style),
                (f" {speed:.2f}×{said}", ""),
            ]
        )
    return PanelContent("how fast, in plain decodings", lines)
