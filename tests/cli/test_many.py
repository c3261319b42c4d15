"""`generate --prompts`: a file of prompts on a real checkpoint; interrupted, and gone on with."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import time

import pytest

from specdec_engine.core.cycle_types import Sampling
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from specdec_engine.record.events import Cycle, known_ids
from tests.cli.conftest import command, environment

WORDS = [
    "the light",
    "the night",
    "a house",
    "in the light",
    "on and on",
    "the lightning",
    "an inn",
    "ten",
    "tin",
    "line",
]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"id": f"q{i}", "prompt": f"{WORDS[i % 10]} {i}", "system": "Be brief." if i % 3 else ""} for i in range(24)
    ]
    file.write_text("\n".join(json.dumps({k: v for k, v in line.items() if v}) for line in lines))
    return file


@pytest.fixture
def generate(specdec, checkpoint, prompts):
    def call(*more):
        return specdec("generate", "-t", checkpoint, "--dtype", "float32", "-n", "10", "--prompts", prompts, *more)

    return call


def answers(path):
    head, *lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert head["schema"] == "specdec.answers/1"
    return head, {line["index"]: line for line in lines}, lines


DRAFTS = {"greedy": ("-d", "ngram"), "drawn": ("-d", "self:1", "-k", "2", "--temperature", "0.8")}


@pytest.mark.parametrize("more", DRAFTS.values(), ids=DRAFTS)
def test_answers_in_a_batch_are_those_of_each_alone(generate, checkpoint, prompts, tmp_path, more):
    out = tmp_path / "a.jsonl"
    result = generate("--batch", "5", "--out", out, "--seed", "40", *more)
    assert result.code == 0, result.err
    assert "24 answers" in result.err
    _, found, lines = answers(out)
    assert len(lines) == 24
    pair = load_pair(str(checkpoint), more[1], LoadOptions(dtype="float32", quantize="none"))
    sampling = Sampling(0.8 if len(more) > 2 else 0.0)
    for i, line in found.items():
        asked = json.loads(prompts.read_text().splitlines()[i])
        ids = pair.encode(asked["prompt"], system=asked.get("system"))
        events = pair.decode(ids, k=2, sampling=sampling, max_tokens=10, seed=40 + i)
        alone = [t for e in events if isinstance(e, Cycle) for t in known_ids(e.emitted)]
        assert (line["token_ids"], line["seed"], line["id"]) == (alone, 40 + i, f"q{i}")
        assert line["prompt_tokens"] == len(ids)
        assert line["text"] == pair.tokenizer.decode(alone, skip_special_tokens=True)


def test_killed_twice_and_resumed_nothing_is_lost_or_doubled(generate, checkpoint, prompts, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    assert generate("--batch", "3", "--out", whole, "--seed", "1", "-k", "0").code == 0
    typed = (
        "generate",
        "-t",
        checkpoint,
        "--dtype",
        "float32",
        "-n",
        "10",
        "--prompts",
        prompts,
        "--batch",
        "3",
        "-k",
        "0",
    )
    for count in (4, 9):
        running = subprocess.Popen(
            command(*typed, "--out", out, "--resume", "--seed", "1"),
            env=environment(), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not out.exists() or out.read_bytes().count(b"\n") < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        running.wait()
        with out.open("a") as file:
            file.write('{"index": 23, "te')  # as a write that was cut
    assert generate("--batch", "3", "--out", out, "--resume", "-k", "0").code == 0, "the file has the seed"
    _, found, lines = answers(out)
    assert len(lines) == len(found) == 24
    unbroken = answers(whole)[1]
    assert {i: line["token_ids"] for i, line in found.items()} == {i: line["token_ids"] for i, line in unbroken.items()}
    again = generate("--batch", "3", "--out", out, "--resume", "-k", "0")
    assert "24 of 24 prompts are answered already" in again.err
    assert len(answers(out)[2]) == 24


def test_a_prompt_that_cannot_be_is_a_line_and_tried_again(specdec, checkpoint, tmp_path):
    file, out = tmp_path / "p.txt", tmp_path / "a.jsonl"
    file.write_text("hello\n" + "the light " * 3000 + "\nand then\n")
    typed = ("generate", "-t", checkpoint, "-n", "5", "--prompts", file, "--batch", "2", "--out", out)
    result = specdec(*typed)
    assert (result.code, "1 prompt failed" in result.err) == (1, True), result.err
    _, found, _ = answers(out)
    assert found[1]["error"] == "UsageError"
    assert "context ends" in found[1]["message"]
    assert "text" in found[0]
    assert "text" in found[2]
    assert specdec(*typed, "--resume").code == 1
    assert len(answers(out)[2]) == 3


def test_without_a_file_the_lines_go_to_stdout(generate):
    result = generate("--batch", "4")
    assert result.code == 0
    assert sorted(json.loads(line)["index"] for line in result.out.splitlines()) == list(range(24))


def test_structured_answers_are_each_whole(generate, tmp_path):
    result = generate("--batch", "4", "--json-schema", '{"enum": ["the light", "night"]}', "--temperature", "1")
    assert {json.loads(json.loads(line)["text"]) for line in result.out.splitlines()} <= {"the light", "night"}


def test_files_of_other_runs_are_refused_and_left_as_they_are(generate, prompts, tmp_path):
    out = tmp_path / "a.jsonl"
    assert generate("--out", out, "--seed", "1").code == 0
    before = out.read_bytes()
    for more, said in [
        ((), "is there already"),
        (("--resume", "-n", "11"), "max_tokens"),
        (("--resume", "--seed", "2"), "with the seed 1"),
        (("--resume", "--temperature", "1"), "temperature"),
    ]:
        result = generate("--out", out, *more)
        assert (result.code, said in result.err) == (2, True), result.err
    with prompts.open("a") as file:
        file.write('\n{"prompt": "one more"}')
    assert "other prompts" in generate("--out", out, "--resume").err
    assert out.read_bytes() == before
    for text, said in [
        ("my notes", "line 1"),
        ('{"a": 1}\n', "something else than answers"),
        ("\xff", "cannot be read"),
    ]:
        out.write_text(text + "\n", "latin-1")
        result = generate("--out", out, "--resume")
        assert (result.code, said in result.err) == (2, True), result.err


def test_two_runs_on_one_file_are_refused(generate, tmp_path):
    out = tmp_path / "a.jsonl"
    with out.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = generate("--out", out)
    assert (result.code, "another run writes" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--batch", "2"), "needs --prompts"),
        (("--out", "x"), "needs --prompts"),
        (("--prompts", "P", "hello"), "PROMPT is of one prompt"),
        (("--prompts", "P", "--json"), "--json is of one prompt"),
        (("--prompts", "P", "--resume"), "--resume needs --out"),
        (("--prompts", "nowhere"), "nowhere"),
        (("--prompts", "P", "--samples", "2"), "all samples are the same answer"),
        (("hello", "--samples", "2", "--temperature", "0.0"), "all samples are the same answer"),
        (("hello", "--samples", "2", "--temperature", "1", "--attach", "x:1"), "our own engine"),
        (("hello", "--logprobs", "2"), "no place in plain text"),
        (("hello", "--logprobs", "2", "--json", "--attach", "x:1"), "our own engine"),
        (("--prompts", "P", "--attach", "x:1"), "our own engine"),
        (("--prompts", "P", "--out", "/nowhere/x"), "cannot be written"),
    ],
)
def test_what_does_not_go_together_is_refused(specdec, checkpoint, prompts, typed, said):
    given = [prompts if word == "P" else word for word in typed]
    result = specdec("generate", "-t", checkpoint, *given)
    assert (result.code, said in result.err) == (2, True), result.err


def test_a_line_that_is_broken_is_told_before_anything_is_run(specdec, checkpoint, prompts):
    with prompts.open("a") as file:
        file.write('\n{"prompt": ')
    result = specdec("generate", "-t", checkpoint, "--prompts", prompts)
    assert (result.code, "line 25" in result.err) == (2, True)


def test_ctrl_c_keeps_what_is_answered(checkpoint, prompts, tmp_path):
    out = tmp_path / "a.jsonl"
    typed = ("generate", "-t", checkpoint, "-n", "400", "--prompts", prompts, "--out", out, "--temperature", "2")
    running = subprocess.Popen(command(*typed), env=environment(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    deadline = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert b"--resume goes on" in err
    assert len(answers(out)[2]) >= 2


@pytest.mark.parametrize("batch", ["1", "3"])
def test_several_answers_to_each_prompt_are_those_of_their_seeds_and_resumed(generate, tmp_path, batch):
    out, options = tmp_path / "out.jsonl", ("--temperature", "1", "-k", "2", "-d", "self:1", "--samples", "3")
    assert generate(*options, "--seed", "7", "--batch", batch, "--out", out).code == 0
    whole = [json.loads(line) for line in out.read_text().splitlines()]
    lines = {(line["index"], line["sample"]): line for line in whole[1:]}
    assert lines.keys() == {(i, j) for i in range(24) for j in range(3)}
    assert [lines[i, j]["seed"] for i, j in ((0, 0), (0, 2), (23, 2))] == [7, 9, 7 + 71]
    assert len({lines[4, j]["text"] for j in range(3)}) == 3
    out.write_text("".join(json.dumps(line) + "\n" for line in whole[:40]))
    resumed = generate(*options, "--batch", batch, "--out", out, "--resume")
    assert "39 of 72 answers are there already" in resumed.err
    again = [json.loads(line) for line in out.read_text().splitlines()][1:]
    assert {(line["index"], line["sample"]): line for line in again} == lines
    other = generate(*options[:-1], "2", "--out", out, "--resume")
    assert (other.code, "was begun with samples 3, not 2" in other.err) == (2, True)
    other = generate(*options, "--out", out, "--resume", "--dtype", "bfloat16")
    assert (other.code, "was begun with dtype float32, not bfloat16" in other.err) == (2, True)


def test_parts_of_characters_among_the_likeliest_are_written_too(generate, tmp_path):
    """Of a tokenizer of bytes most tokens are parts of characters."""
    out = tmp_path / "out.jsonl"
    assert generate("--logprobs", "200", "-n", "2", "--batch", "4", "--out", out).code == 0
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()[1:]]
    assert len(lines) == 24
    assert any("bytes" in other for line in lines for one in line["logprobs"] for other in one["likeliest"])


def test_a_file_from_before_there_were_samples_is_gone_on_with(generate, tmp_path):
    out = tmp_path / "out.jsonl"
    assert generate("--seed", "3", "--out", out).code == 0
    head, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    del head["settings"]["samples"], head["settings"]["logprobs"]
    out.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines[:20]]))
    assert "20 of 24 prompts are answered already" in generate("--out", out, "--resume").err


def test_answers_tell_how_likely_their_tokens_were(generate):
    told = [json.loads(line) for line in generate("--logprobs", "1", "--batch", "4").out.splitlines()]
    for line in told:
        assert [one["id"] for one in line["logprobs"]] == line["token_ids"]
        assert [[other["id"] for other in one["likeliest"]] for one in line["logprobs"]] == [
            [i] for i in line["token_ids"]
        ]
