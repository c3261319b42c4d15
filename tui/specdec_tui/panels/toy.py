"""What the lesson's experiments look like."""

from __future__ import annotations

from specdec_tui.bars import bar, dart
from specdec_tui.panels import Line, PanelContent, number
from specdec_tui.toy import MOST, TOKENS, Branches, Draws, ToyPair, WhatIf

_ARMS = (
    ("target alone", "target", "target"),
    ("speculative", "speculative", "draft"),
    ("careless", "careless", "refused"),
)


def _top(pair: ToyPair) -> float:
    """The chance that a whole bar stands for: one in two, or more where the target is surer."""
    return max(0.5, *pair.p)


def histograms(draws: Draws, width: int) -> PanelContent:
    """Three bars a token, of the share of the draws, beside what target and draft say of it."""
    cells, lines = max(8, width - 35), list[Line]()
    p, q, top = draws.pair.p, draws.pair.q, _top(draws.pair)
    for i, token in enumerate(TOKENS):
        for n, (label, name, style) in enumerate(_ARMS):
            share = getattr(draws, name)[i] / draws.made if draws.made else 0.0
            what = f"“{token}” p {p[i]:.2f}" if n == 0 else f"q {q[i]:.2f}".rjust(12) if n == 1 else ""
            lines.append(
                [
                    (what.ljust(14), "strong" if n == 0 else "muted"),
                    (label.ljust(14), "muted"),
                    (bar(share / top, cells), style),
                    (f" {share:.3f}", ""),
                ]
            )
    far = [f"{label} {number(draws.distance(getattr(draws, name)), 3)}" for label, name, _ in _ARMS]
    lines.append([("distance to p: ", "strong"), (" · ".join(far), "")])
    return PanelContent(f"one token, drawn {draws.made:,} times in each way", lines)


def stacks(draws: Draws, width: int) -> PanelContent:
    """A bar a token: the share of draws that were kept guesses, and on it the corrections; under it where p is."""
    cells, made = max(8, width - 44), max(1, draws.made)
    p, q, top = draws.pair.p, draws.pair.q, _top(draws.pair)
    lines: list[Line] = [
        [
            ("█ kept: min(p, q)   ", "draft"),
            ("▓ corrected: what is left of p", "target"),
            ("   ▲ p, the target", "muted"),
        ],
        [],
    ]
    for i, token in enumerate(TOKENS):
        kept, corrected = draws.kept[i] / made, draws.corrected[i] / made
        first, both = round(kept / top * cells), round((kept + corrected) / top * cells)
        sums = f"{kept:.3f} + {corrected:.3f} = {round(kept, 3) + round(corrected, 3):.3f}"
        lines += [
            [
                (f"“{token}” q {q[i]:.2f}".ljust(16), "strong"),
                ("█" * min(first, cells), "draft"),
                ("▓" * (min(both, cells) - min(first, cells)), "target"),
                (" " * (cells - min(both, cells)), ""),
                (f" {sums}", ""),
            ],
            [(" " * 16, ""), (dart(p[i] / top, cells), "muted"), (f" p {p[i]:.2f}", "muted")],
        ]
    said = "kept q · min(1, p/q) = min(p, q), corrected p − min(p, q): together p, for every token and every q"
    return PanelContent(
        f"one token, drawn {draws.made:,} times by draft, test and correction", [*lines, [(said, "strong")]]
    )


def branches(draws: Branches, width: int) -> PanelContent:
    """A bar a token: kept first guesses, kept second ones, corrections; under it where p is."""
    cells, made = max(8, width - 44), max(1, draws.made)
    p, q, top = draws.pair.p, draws.pair.q, _top(draws.pair)
    lines: list[Line] = [
        [
            ("█ the first guess, kept   ", "draft"),
            ("▓ the second, kept   ", "accepted"),
            ("░ corrected   ", "target"),
            ("▲ p", "muted"),
        ],
        [],
    ]
    for i, token in enumerate(TOKENS):
        shares = [counts[i] / made for counts in (draws.first, draws.second, draws.corrected)]
        ends = [min(cells, round(sum(shares[: n + 1]) / top * cells)) for n in range(3)]
        sums = " + ".join(f"{share:.2f}" for share in shares)
        lines += [
            [
                (f"“{token}” q {q[i]:.2f}".ljust(16), "strong"),
                ("█" * ends[0], "draft"),
                ("▓" * (ends[1] - ends[0]), "accepted"),
                ("░" * (ends[2] - ends[1]), "target"),
                (" " * (cells - ends[2]), ""),
                (f" {sums} = {sum(shares):.2f}", ""),
            ],
            [(" " * 16, ""), (dart(p[i] / top, cells), "muted"), (f" p {p[i]:.2f}", "muted")],
        ]
    one, two = sum(draws.first) / made, (sum(draws.first) + sum(draws.second)) / made
    said = f"a guess is kept in {100 * one:.0f} of 100 places with one guess, in {100 * two:.0f} with two"
    return PanelContent(f"one token, drawn {draws.made:,} times by two guesses", [*lines, [(said, "strong")]])


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
            "  plain decoding" + (", best" if what.best == 0 else "")
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
