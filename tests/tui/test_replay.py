"""Traces on screen and as files: hostile, cut short, of another version, large."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from specdec_engine.errors import UsageError
from specdec_engine.record.events import Counters, Failed, SettingChanged
from specdec_engine.record.trace import TraceWriter
from specdec_tui import export
from specdec_tui.frame import View
from specdec_tui.narrate import script, step_words
from specdec_tui.streams import DEMO, ReplayStream, read_frame
from tests.tui.conftest import on_screen, screen_of
from tests.tui.scenes import PIECES, events, frame, name

HOSTILE = [
    "\x1b[2J\x1b]52;c;YQ==\x07", "[/bold]", "[red]x[/]", "[@click=app.quit]x[/]", "\u202egnp.exe\u2066",
    "\u200b\ufeff\u2028", "👨‍👩‍👧‍👦🇩🇪",
    "e\u0301\u0301", "\udce2\udc82", "\x9b31m", "a\tb\nc\r\n", "$draft", "漢字", "", "\U000e0041", "%s{0}\\",
]  # fmt: skip


@pytest.fixture
def trace(tmp_path):
    def write(found, named=name, file="t.jsonl"):
        path = tmp_path / file
        with TraceWriter(path, named) as writer:
            for event in found:
                writer.write(event)
        return path

    return write


def replayed(path, *keys, size=(120, 40)):
    async def act(app, pilot):
        for _ in range(100):
            await pilot.pause(0.05)
            if app.player.view.at_end or app.stream.stage is not None:
                break
        for key in keys:
            await pilot.press(key)
            await pilot.pause()
        await pilot.pause(0.1)
        return screen_of(app)

    return on_screen(ReplayStream(path), act, size=size)


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_no_token_reaches_the_terminal_unseen(trace, size):
    def named(token):
        return HOSTILE[token % len(HOSTILE)]

    evil = "\x1b]52;c;YQ==\x07evil\n\u202e[/]"
    begun, *rest = events(60)
    begun = replace(
        begun,
        settings={**begun.settings, "target": evil, "draft": evil, "rule": evil, "coupling": evil, "temperature": None},
    )
    rest = [replace(e, reason=evil) if isinstance(e, SettingChanged) else e for e in rest[:-1]]
    path = trace([begun, *rest, Failed("X", evil, evil)], named)
    for line in script(*read_frame(path)):
        assert not [c for c in line if not c.isprintable() and c not in "\u200c\u200d"], line
    for keys in ((), ("p", "i"), ("home", *["full_stop"] * 9)):
        shown = replayed(path, *keys, size=size)
        assert not [
            c
            for c in shown
            if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2066\u200b\ufeff\u2028"
        ]


def test_a_trace_cut_short_shows_what_it_has(trace):
    path = trace(events(30))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:20]) + lines[20][:40])
    shown = replayed(path)
    assert "cycle 17/17" in shown  # besides the start and two changes of k
    assert "finished" not in shown


def test_a_trace_damaged_in_the_middle_says_so_below_what_it_has(trace):
    path = trace(events(12))
    lines = path.read_text().splitlines()
    lines[7] = "damaged"
    path.write_text("\n".join(lines) + "\n")
    shown = replayed(path)
    assert "cycle 4/4" in shown
    assert "line 8 is not an event" in shown


@pytest.mark.parametrize(
    "change", [{"p": []}, {"accepted": 9}, {"u": [0.5]}, {"pieces": 5}, {"overlap": [1, 2, 3, 4, 5]}]
)
def test_cycles_that_contradict_themselves_are_refused(trace, change):
    path = trace(events(5))
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    path.write_text("\n".join(lines) + "\n")
    assert "line 2 is not an event" in " ".join(replayed(path).split())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no run"), (b"\n\n", "holds no run"), (b"no json\n", "line 1 is not an event"),
        (b"\xff\xfe\x00\n", "line 1"), (b'{"kind": "started", "schema": "specdec.trace/9"}\n', "schema"),
        (b"[]\n", "line 1"), (b'{"kind": "zzz"}\n', "line 1"),
    ],
)  # fmt: skip
def test_what_is_no_trace_says_so(tmp_path, content, said):
    path = tmp_path / "t"
    path.write_bytes(content)
    assert said in " ".join(replayed(path).split())


def test_of_several_runs_the_last_is_shown(trace):
    assert "cycle 5/5" in replayed(trace([*events(9), *events(5, seed=2)]))


def test_a_large_trace_shows_its_beginning_at_once(trace):
    """50 MB, 120,000 cycles."""
    path = trace(events(200))
    lines = path.read_text().splitlines()
    padded = [lines[0], *(lines[1:-1] * 600), lines[-1]]
    path.write_text("\n".join(padded) + "\n")
    assert path.stat().st_size > 50e6

    async def act(app, pilot):
        began = time.monotonic()
        while app.player.view.shown < 1000:
            await pilot.pause(0.05)
            assert time.monotonic() - began < 20
        return screen_of(app)

    assert "inspector" in on_screen(ReplayStream(path), act)


# -- as files and sentences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["svg", "html", "md", "gif", "png"])
def test_a_run_is_exported(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(export, "MOST_CYCLES", 6)
    path = tmp_path / f"run.{ending}"
    export.export(frame(20), name, path)
    content = path.read_bytes()
    if ending == "gif":
        from PIL import Image

        with Image.open(path) as image:
            assert image.n_frames > 6
            assert len(image.convert("RGB").getcolors(100_000)) > 10
    elif ending == "png":
        assert content.startswith(b"\x89PNG")
    else:
        assert b"lantern" in content or b"20 target passes" in content


@pytest.mark.parametrize("ending", ["svg", "png", "html"])
def test_a_picture_is_of_the_cycle_that_was_asked_for(tmp_path, ending):
    files = [tmp_path / f"{cycle}.{ending}" for cycle in (2, 5)]
    for cycle, path in zip((2, 5), files, strict=True):
        export.export(frame(20), name, path, cycle)
    assert files[0].read_bytes() != files[1].read_bytes()
    if ending == "svg":
        assert ["cycle&#160;2/20" in path.read_text() for path in files] == [True, False]
    for path, cycle, said in ((files[0], 21, "there is no cycle 21"), (tmp_path / "run.gif", 2, "of the whole run")):
        with pytest.raises(UsageError, match=said):
            export.export(frame(20), name, path, cycle)


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(Exception, match="no ending that can be exported"):
        export.export(frame(3), name, tmp_path / "run.pdf")


def replay(*arguments):
    command = [sys.executable, "-m", "specdec_cli", "replay", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_narration_says_every_cycle_and_nothing_else(trace):
    result = replay(trace(events(12)), "--plain")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("Cycle")] == [f"Cycle {i + 1}" for i in range(12)]
    assert "tokens in 12 target passes" in lines[-1]
    assert lines[1] == "Prompt: the quick brown fox jumps⏎".replace("⏎", "")
    said = [token for e in events(12) if e.kind == "cycle" for token in e.emitted]
    assert lines[-2].startswith("Text: ")
    assert PIECES[said[0]].strip() in lines[-2]
    assert result.stderr == ""


def test_of_several_runs_the_last_is_shown_and_that_is_said(trace):
    result = replay(trace([*events(12), *events(3)]), "--plain")
    assert "tokens in 3 target passes" in result.stdout
    assert "holds 2 runs, and this is the last" in result.stderr


def test_a_run_that_was_cut_short_is_said_to_have_no_end(trace):
    cut = replay(trace(events(12)[:-1]), "--plain")
    assert "has no end: it was cut short" in cut.stderr
    assert cut.returncode == 0


def test_numbers_in_sentences_are_the_traces(trace):
    found = next(e for e in events(12) if e.kind == "cycle" and e.accepted < len(e.drafted))
    line = replay(trace(events(12)), "--plain").stdout.splitlines()[2 + found.index]
    at = found.accepted
    assert f"u {found.u[at]:.3f} ≥ min(1, p/q) {min(1, found.p[at] / found.q[at]):.3f}" in line
    assert PIECES[found.drafted[at]].strip() in line


def test_replay_off_a_terminal_says_what_to_do(trace, tmp_path):
    result = replay(trace(events(3)))
    assert result.returncode == 2
    assert "--plain" in result.stderr
    (tmp_path / "empty").touch()
    for how in (["--plain"], ["--export", tmp_path / "x.md"]):
        empty = replay(tmp_path / "empty", *how)
        assert empty.returncode == 1
        assert "holds no run" in empty.stderr
    missing = replay(tmp_path / "none")
    assert missing.returncode == 2
    assert "is not a file" in missing.stderr


def test_replaying_imports_no_torch(trace):
    path = trace(events(3))
    code = (
        "import sys; from specdec_cli.main import app; app(['replay', sys.argv[1], '--plain'], standalone_mode=False);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True).returncode == 0


def test_a_trace_says_nothing_that_json_cannot(trace):
    assert all(json.loads(line) for line in trace(events(5)).read_text().splitlines())
    again, named = read_frame(trace(events(5), file="again.jsonl"))
    assert list(again.events()) == events(5)
    assert named(12345) == "⟨12345⟩"


def test_the_bundled_run_is_whole_and_shows_a_rejection_and_a_correction():
    run, named = read_frame(DEMO)
    assert run.over
    assert run.settings["draft"] == "ngram,builtin"
    assert any(0 < c.accepted < len(c.drafted) and c.end == "recovered" for c in run.cycles)
    assert "lighthouse" in "".join(named(token) for token in run.prompt)
    assert "cycle 1/" in replayed(DEMO, "home", "n", size=(80, 24))


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
def test_a_run_of_a_server_says_who_observed_it_and_shows_no_figure_it_does_not_tell(trace, size):
    started, *found = events(12)
    unknown = {"draft_s": None, "verify_s": None, "other_s": None, "cycle_s": 0.02, "exactness": "inferred"}
    told = [
        replace(
            e,
            drafted=(*e.drafted[: e.accepted], *[None] * (len(e.drafted) - e.accepted)),
            emitted=tuple(None if i == 1 else token for i, token in enumerate(e.emitted)),
            **dict.fromkeys(("p", "q", "u", "overlap"), (None,) * len(e.drafted)),
            residual=(),
            **unknown,
        )
        if e.kind == "cycle"
        else e
        for e in found
    ]
    path = trace([replace(started, observer="llama.cpp", environment={}), *told])
    screen = replayed(path, size=size)
    assert "llama.cpp, inferred" in screen
    assert "⟨?⟩" in screen
    assert not {"0.0ms", "draft 0.0", "verify 0.0"} & set(screen.split("  "))
    for keys in (["left", "left", "v"], ["!", "w"], ["g", "g"]):
        assert replayed(path, *keys, size=size)
    assert "⟨?⟩" in "\n".join(script(*read_frame(path)))


def test_an_engine_that_tells_totals_alone_has_figures_of_them(trace):
    started, *_ = events(12)
    path = trace([replace(started, observer="vllm", environment={}), Counters(9.0, 100, 300, 210, 330, (90, 70, 50))])
    found, _ = read_frame(path)
    assert (found.summary().mean_emitted_per_cycle, found.summary().acceptance_rate) == (3.1, 0.7)
    screen = replayed(path)
    for shown in ("vllm, counted", "3.10 tokens a cycle", "210 of 300 drafted tokens were kept"):
        assert shown in screen


def test_a_token_tree_is_told_by_its_path(trace):
    started, *found = events(12)
    chain = next(e for e in found if e.kind == "cycle" and len(e.drafted) >= 3)
    k = len(chain.drafted)
    tree = replace(
        chain,
        index=0,
        parents=(-1, -1, 1, *[2] * (k - 3)),
        path=(1, 2),
        accepted=2,
        emitted=(*chain.drafted[1:3], 7),
        u=(None,) * k,
        residual=(),
    )
    path = trace([started, tree])
    assert tree.tests == (1, 2, 3)
    frame, name = read_frame(path)
    stepped = [step_words(View(frame, 1, step=k + 1 + n), name) for n in (1, 2, 3)]
    verdicts = ("is kept", "is kept", "is rejected")
    assert all(verdict in words for verdict, words in zip(verdicts, stepped, strict=True))
    (told,) = [line for line in script(*read_frame(path)) if line.startswith("Cycle 1")]
    kept = "".join(map(name, chain.drafted[1:3])).replace("\n", "⏎")
    assert f"kept 2 of {k} in 2 branches, “{kept}”, on another than the first" in told
    screen = replayed(path)
    row = next(line for line in screen.splitlines() if "2/" in line)
    assert row.count("✓") == 2
    assert row.index("·") < row.index(
        "/ ✓"
    )  # the sibling that was not taken stands first, and where another begins is marked
