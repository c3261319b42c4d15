"""`specdec distill` as a user types it, on a tiny target."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

from tests.cli.conftest import command, environment
from tests.fakes import byte_tokenizer, save_checkpoint


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "target"
    return save_checkpoint(folder, layers=4, vocab=len(byte_tokenizer()), max_position_embeddings=512)


def test_a_draft_is_made_named_on_stdout_and_used(specdec, target, tmp_path):
    out = tmp_path / "draft"
    made = specdec("distill", "-t", target, "-o", out, "--tokens", 17_000, "--size", "small")
    assert made.code == 0, made.err
    assert made.out == f"{out}\n"
    assert "held-out agreement" in made.err
    assert "work" in made.err
    used = specdec("generate", "-t", target, "-d", out, "-k", 3, "-n", 30, "hello")
    assert used.out == specdec("generate", "-t", target, "-d", "none", "-n", 30, "hello").out
    assert f"speculation on: {out}" in used.err


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        (["--minutes", "1", "--tokens", "5"], "either --minutes or --tokens", 2),
        (["--tokens", "0"], "budget of 0", 2),
        (["--data", "nowhere.txt"], "nowhere.txt is not a file", 2),
        (["--size", "huge"], "huge", 2),
        (["-t", "nowhere"], "nowhere", 3),
    ],
)
def test_bad_input_gets_one_line_and_a_hint(specdec, target, tmp_path, options, said, code):
    result = specdec("distill", "-t", target, "-o", tmp_path / "draft", *options)
    assert result.code == code
    assert said in result.err
    assert result.out == ""
    assert "Traceback" not in result.err


def test_an_interrupted_distillation_keeps_its_work_and_says_so(target, tmp_path):
    out = tmp_path / "draft"
    running = subprocess.Popen(
        command("distill", "-t", target, "-o", out, "--minutes", 30, "--size", "small"),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    try:
        deadline = time.monotonic() + 100
        while not list((out / "work" / "text").glob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()  # it would go on for half an hour
    assert running.returncode == 130
    assert b"the same command goes on" in err
    assert list((out / "work" / "text").glob("*.safetensors"))
