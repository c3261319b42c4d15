"""The command as a process: pipes, signals, a terminal, a killed run, a hub. Each start costs seconds, so each counts."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time

import pytest

from specdec_engine.record.trace import read_trace
from specdec_tui.streams import DEMO
from tests.cli.conftest import ROOT, command, environment, process
from tests.cli.hub import hub
from tests.fakes import cycles


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A checkpoint that never stops by itself: no end-of-sequence id in its vocabulary, and a long context."""
    from tests.fakes import byte_tokenizer, tiny_llama

    folder = tmp_path_factory.mktemp("endless")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    model = tiny_llama(seed=8, max_position_embeddings=100_000, eos_token_id=None)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def wait_for_lines(path, n):
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert time.monotonic() < deadline, "the run wrote no cycles"
        time.sleep(0.02)


def background(endless, *options):
    """A run that goes on for ever, its streams in our hands."""
    return subprocess.Popen(
        command("generate", "hello", "-t", endless, "-n", "90000", *options),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )


def started(tmp_path, endless, *options):
    """A run in the background that has written a few cycles to its trace."""
    trace = tmp_path / "t.jsonl"
    running = background(endless, "--trace", trace, *options)
    wait_for_lines(trace, 5)
    return running, trace


def test_a_run_killed_in_the_middle_leaves_a_readable_trace(tmp_path, endless):
    running, trace = started(tmp_path, endless)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    found = list(read_trace(trace))
    assert found[0].kind == "started"
    assert len(cycles(found)) >= 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_the_run_with_what_there_is(tmp_path, endless, number):
    """Text so far, the partial summary, 130, and the trace says cancelled."""
    running, trace = started(tmp_path, endless)
    running.send_signal(number)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130, err
    assert out
    assert b"tok/s" in err
    assert b"Traceback" not in err
    assert list(read_trace(trace))[-1].reason == "cancelled"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_leave_at_once_while_loading_and_say_so(endless, number):
    running = background(endless)
    time.sleep(1.5)  # past our own imports, inside torch's
    running.send_signal(number)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out, err) == (130, b"", b"specdec: interrupted while loading\n")


def test_the_summary_has_a_line_of_its_own_where_both_streams_meet(checkpoint):
    done = subprocess.run(
        command("generate", "hello", "-t", checkpoint, "-n", "5"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
    )
    assert b"\nspecdec: " in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_with_json_still_give_the_object(tmp_path, endless, number):
    running, _ = started(tmp_path, endless, "--json")
    running.send_signal(number)
    out, _ = running.communicate(timeout=30)
    assert running.returncode == 130
    assert json.loads(out)["finish_reason"] == "cancelled"


def test_a_reader_that_has_had_enough_ends_the_run_quietly(endless):
    """`specdec generate … | head -c 10`."""
    running = background(endless)
    assert running.stdout.read(10)
    running.stdout.close()
    err = running.stderr.read()
    running.stderr.close()
    assert running.wait(timeout=30) == 0
    assert b"Traceback" not in err
    assert b"Broken" not in err


@pytest.mark.parametrize(
    "words",
    [("replay", DEMO, "--plain"), ("diff", DEMO, DEMO), ("--help",), ("generate", "--help"), ("--version",)],
    ids=lambda words: words[-1],
)
def test_a_reader_that_is_gone_is_no_failure(words):
    """Of commands that print and are done, as `specdec diff A B | head -1` shows them."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command(*words), stdout=writing, stderr=subprocess.PIPE, env=environment(), timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_under_stdout_is_an_error_and_no_bug(checkpoint):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = subprocess.run(
            command("generate", "hello", "-t", checkpoint, "-n", "5"),
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
        )
    assert done.returncode == 1
    assert b"No space left" in done.stderr
    assert b"bug" not in done.stderr


def test_prompts_from_stdin_a_file_and_the_argument_are_joined_in_this_order(checkpoint, tmp_path):
    (tmp_path / "f").write_text("file")
    options = ["-t", checkpoint, "--raw", "--jsonl", "-n", "1", "--no-stats"]
    done = process("generate", "argument", "-f", tmp_path / "f", *options, stdin=b"stdin")
    from tests.fakes import byte_tokenizer

    prompt = json.loads(done.stdout.splitlines()[0])["prompt"]
    assert byte_tokenizer().decode(prompt) == "stdin\nfile\nargument"
    assert process("generate", "-", *options, stdin=b"stdin").returncode == 0
    bad = process("generate", *options, stdin=b"caf\xe9")
    assert (bad.returncode, b"stdin cannot be read: it is not UTF-8" in bad.stderr) == (2, True)


def in_a_terminal(argv, seconds=60, **extra):
    """Run under a pseudo-terminal; returns (exit code, everything shown)."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(argv[0], argv, environment(TERM="xterm-256color", COLORTERM="truecolor", **extra))
    shown, deadline = b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([fd], [], [], 0.5)[0]:
            try:
                shown += os.read(fd, 65536)
            except OSError:  # the other end is closed
                break
    _, status = os.waitpid(pid, 0)
    os.close(fd)
    return os.waitstatus_to_exitcode(status), shown.decode("utf-8", "replace")


def test_no_prompt_on_a_terminal_shows_an_example_and_does_not_wait():
    code, shown = in_a_terminal(command("generate"))
    assert code == 2
    assert 'specdec generate "Explain' in shown


def test_on_a_terminal_tokens_are_coloured_and_the_answer_ends_its_line(checkpoint):
    code, shown = in_a_terminal(command("generate", "hello", "-t", checkpoint, "-d", checkpoint, "-n", "12"))
    assert code == 0
    assert "\x1b[38;2;86;180;233m" in shown
    assert "accepted draft" in shown
    assert shown.endswith("\n")


def test_loading_on_a_terminal_says_what_it_does_and_is_gone_before_the_first_token(checkpoint):
    code, shown = in_a_terminal(command("generate", "hello", "-t", checkpoint, "-d", "none", "-n", "5", "--no-stats"))
    assert code == 0
    loading, _, answer = shown.rpartition("\x1b[?25h")  # the cursor is shown again
    assert re.search(r"loading PyTorch and transformers · \d s", loading)
    up_and_erased = "\r\x1b[1A\x1b[2K"
    assert answer.startswith(up_and_erased)
    assert answer.removeprefix(up_and_erased).strip()
    assert "loading" not in answer


def test_hub_models_load_by_name_then_offline_and_refusals_say_why(checkpoint, tmp_path):
    """huggingface_hub's real client against a hub on this machine: one model, one gated, one that does not exist."""
    options = ["-n", "3", "--json"]
    pickled = shutil.copytree(checkpoint, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with hub({"org/tiny": checkpoint, "org/pickled": pickled}) as endpoint:
        online = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        done = process("generate", "hello", "-t", "org/tiny", *options, **online)
        assert done.returncode == 0, done.stderr
        assert b"fetching org/tiny" in done.stderr
        gated = process("generate", "hello", "-t", "org/gated", **online)
        assert (gated.returncode, b"gated" in gated.stderr, b"hf auth login" in gated.stderr) == (3, True, True)
        unknown = process("generate", "hello", "-t", "org/unknown", **online)
        assert (unknown.returncode, b"no model 'org/unknown'" in unknown.stderr) == (3, True)
        unsafe = process("generate", "hello", "-t", "org/pickled", **online)
        assert (unsafe.returncode, b"no safetensors weights" in unsafe.stderr) == (3, True)
    offline = process("generate", "hello", "-t", "org/tiny", "--offline", *options, **online)
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout)["token_ids"] == json.loads(done.stdout)["token_ids"]
    unreachable = process("generate", "hello", "-t", "org/other", **online)
    assert (unreachable.returncode, b"cannot be reached" in unreachable.stderr) == (3, True)


def test_no_files_appear_in_the_working_directory(checkpoint, tmp_path):
    done = subprocess.run(
        command("generate", "hello", "-t", checkpoint, "-n", "1"),
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert (ROOT / "pyproject.toml").exists()


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "0<&-"])
def test_a_closed_standard_stream_is_survived(closed, checkpoint):
    """As services and cron start programs; what is said on stderr must not come on stdout."""
    run = command("generate", "hello", "-t", checkpoint, "--json", "-n", 2)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *run],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert closed == "1>&-" or json.loads(done.stdout)["emitted"] > 0


@pytest.mark.parametrize("words", [("--demo", "hello"), ("--lesson", "hello"), ("--demo", "--lesson")])
def test_a_recorded_run_takes_no_prompt(words):
    found = process("watch", *words)
    assert (found.returncode, b"a recorded run of their own" in found.stderr) == (2, True)


def test_the_lesson_on_a_run_of_ones_own_is_text_without_a_terminal(tmp_path):
    told = process("replay", DEMO, "--lesson")
    assert (told.returncode, b"14 of 14. What there is to remember" in told.stdout) == (0, True)
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(DEMO.read_text().splitlines()[:3]) + "\n")
    refused = process("replay", short, "--lesson")
    assert (refused.returncode, b"the run has no cycle that a page could show" in refused.stderr) == (2, True)
    for wrong, said in (
        (("--lesson", "--plain"), b"a screen of its own"),
        (("--cycle", "3"), b"--cycle needs --export"),
        (("--plain", "--export", tmp_path / "x.md"), b"exclude each other"),
    ):
        found = process("replay", DEMO, *wrong)
        assert (found.returncode, said in found.stderr) == (2, True)
