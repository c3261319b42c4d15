"""`--attach` at the command line, against servers as they were recorded."""

from __future__ import annotations

import json

import pytest

from specdec_engine.record.trace import read_trace
from tests.servers.record import REPEAT
from tests.servers.replayed import NAMES, replayed


@pytest.fixture(params=NAMES)
def server(request):
    with replayed(request.param) as state:
        yield state


def test_a_servers_text_is_shown_with_who_ran_it(specdec, server, tmp_path):
    result = specdec("generate", "--attach", server.url, "--trace", tmp_path / "t", REPEAT)
    assert result.code == 0, result.err
    assert "quick brown fox" in result.out
    name = "llama.cpp" if server.said["/props"]["status"] == 200 else "vLLM 0.32.0"
    assert f"{name}" in result.err
    assert server.url in result.err
    recorded = specdec("replay", tmp_path / "t", "--plain")
    assert ("quick" if name == "llama.cpp" else "sentence") in recorded.out
    assert next(iter(read_trace(tmp_path / "t"))).observer == name.split()[0]


def test_one_object_tells_what_is_known_and_leaves_the_rest_null(specdec, server):
    found = json.loads(specdec("generate", "--attach", server.url, "--json", REPEAT).out)
    assert found["schema"] == "specdec.generate/1"
    assert found["exactness"] == ("exact" if found["observer"] == "llama.cpp" else "inferred")
    assert found["draft_s"] is None
    assert found["verify_s"] is None
    assert found["tokens_per_second"] > 0
    assert found["emitted"] == len(found["token_ids"])
    assert found["accepted"] > 0
    lines = specdec("generate", "--attach", server.url, "--jsonl", REPEAT).out.splitlines()
    assert {json.loads(line)["kind"] for line in lines} >= {"started", "cycle", "finished"}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("-k", "3"), "-k"),
        (("-d", "ngram"), "--draft"),
        (("-t", "org/other"), "--target"),
        (("--rule", "block"), "--rule"),
        (("--coupling", "gumbel"), "--coupling"),
        (("--draft-temperature", "0.5"), "--draft-temperature"),
        (("--dtype", "float32"), "where models run"),
    ],
)
def test_what_a_server_cannot_be_told_is_refused_by_name(specdec, typed, said):
    result = specdec("generate", "--attach", "http://127.0.0.1:9", *typed, "hello")
    assert result.code == 2
    assert f"cannot be told {said}" in result.err or said in result.err


def test_a_server_that_is_not_there_or_breaks_off(specdec, server):
    assert specdec("generate", "--attach", "http://127.0.0.1:9", "hello").code == 3

    def dies(handler, lines):
        handler.wfile.write(f"{lines[0]}\n\n".encode())

    server.send = dies
    result = specdec("generate", "--attach", server.url, REPEAT)
    assert result.code == 1
    assert result.out.strip(), "what came is kept"
    assert "ended the stream before the text ended" in result.err
    assert "Traceback" not in result.err


def test_counters_for_people_for_scripts_and_for_alarms(specdec, server):
    server.said["/metrics"] = server.said["/metrics after"]
    watch = ("watch", "--attach", server.url, "--metrics", "--once")
    assert "drafted tokens accepted" in specdec(*watch).out
    found = json.loads(specdec(*watch, "--json").out)
    assert found["schema"] == "specdec.metrics/1"
    engine = found["engines"][0]
    assert engine["acceptance_rate"] == pytest.approx(engine["accepted"] / engine["drafted"])
    assert engine["mean_emitted_per_cycle"] == pytest.approx(1 + engine["accepted"] / engine["cycles"])
    assert engine["accepted_at"][0] > 0
    assert specdec(*watch, "--fail-below", "0.99").code == 6
    assert specdec(*watch, "--fail-below", "0.01").code == 0


@pytest.mark.parametrize(
    "typed",
    [("--metrics",), ("--once",), ("--attach", "x:1", "--json"), ("--metrics", "--attach", "x:1", "--fail-below", "2")],
)
def test_options_of_counters_that_do_not_belong_together(specdec, typed):
    assert specdec("watch", *typed).code == 2


def test_a_servers_labels_do_not_steer_the_terminal(specdec, server, capsys):
    from rich.console import Console

    from specdec_cli.servers.metrics import _table
    from specdec_engine.attach.counters import read_counters
    from specdec_engine.attach.watching import EngineHistory

    text = 'vllm:generation_tokens_total{engine="\x1b]0;x [/x] [red]"} 3\n'
    found = {reading.engine: EngineHistory(reading) for reading in read_counters(text, 0.0)}
    console = Console(width=100, force_terminal=False)
    with console.capture() as drawn:
        console.print(_table(found))
    assert "\x1b" not in drawn.get()
    assert "[/x] [red]" in drawn.get()
