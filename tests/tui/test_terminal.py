"""The whole command in a real terminal: keys go in, a screen comes out, and the terminal is as it was afterwards."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import uuid

import pytest

from specdec_engine.record.trace import TraceWriter
from tests.fakes import CHAT_TEMPLATE, byte_tokenizer, save_checkpoint
from tests.tui.scenes import events, name

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")


class Terminal:
    """A tmux session with a shell in it."""

    def __init__(self, folder, size=(100, 30)):
        self._socket = f"specdec-{uuid.uuid4().hex[:8]}"
        self._tmux("new-session", "-d", "-s", "t", "-x", str(size[0]), "-y", str(size[1]), "-c", str(folder), "sh")
        self.type("PS1='ready> '; clear", "Enter")
        self.shows("ready>")

    def _tmux(self, *arguments):
        command = ["tmux", "-L", self._socket, "-f", "/dev/null", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "TERM": "xterm-256color"}
        ).stdout

    def type(self, *keys):
        self._tmux("send-keys", "-t", "t", *keys)

    def screen(self):
        return self._tmux("capture-pane", "-p", "-t", "t")

    def shows(self, *texts, seconds=90):
        end = time.monotonic() + seconds
        while not all(text in self.screen() for text in texts):
            assert time.monotonic() < end, f"{texts} did not come:\n{self.screen()}"
            time.sleep(0.1)
        return self.screen()

    @property
    def alternate(self):
        return self._tmux("display-message", "-p", "-t", "t", "#{alternate_on}").strip() == "1"

    def close(self):
        subprocess.run(["tmux", "-L", self._socket, "kill-server"], capture_output=True)


@pytest.fixture
def terminal(tmp_path):
    made = Terminal(tmp_path)
    yield made
    made.close()


@pytest.fixture
def trace(tmp_path):
    with TraceWriter(tmp_path / "run.jsonl", name) as writer:
        for event in events(40):
            writer.write(event)
    return "run.jsonl"


COMMAND = f"{sys.executable} -m specdec_cli"


def restored(terminal):
    terminal.type("echo said $((40 + 2))", "Enter")
    terminal.shows("said 42", "ready>")
    assert not terminal.alternate


def test_a_replay_is_stepped_inspected_and_left(terminal, trace):
    terminal.type(f"{COMMAND} replay {trace}; echo code $?", "Enter")
    terminal.shows("cycles", "draft draft-model → target tar")
    terminal.type("Home", "n", "n")
    terminal.shows("cycle 2/40", "paused")
    terminal.type("i")
    terminal.shows("q draft", "min(1, p/q)")
    terminal.type("q")
    terminal.shows("code 0")
    restored(terminal)


def test_a_live_run_is_paused_stepped_turned_and_left(terminal, tmp_path):
    room = {"hidden": 256, "max_position_embeddings": 8192}  # 10 seconds and more of decoding, not a few tenths of one
    save_checkpoint(tmp_path / "model", layers=8, vocab=len(byte_tokenizer()), endless=True, **room)
    terminal.type(
        f"{COMMAND} watch -t ./model -d ngram -k 3 -n 4000 --dtype float32 'la la la la la la'; echo code $?", "Enter"
    )
    terminal.shows("loading", seconds=10)
    terminal.shows("▶ live", "cycles")
    terminal.type("Space")
    terminal.shows("paused")
    terminal.type("End", "]")
    for _ in range(50):  # the first cycle that comes may have been under way when k was turned
        terminal.type("n")
        time.sleep(0.3)
        if "k 4 " in terminal.screen():
            break
    terminal.shows("k 4 ", seconds=10)
    terminal.type("q")
    terminal.shows("code 0")
    restored(terminal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_restore_the_terminal_and_are_the_code(terminal, trace, number):
    terminal.type(f"{COMMAND} replay {trace}; echo code $?", "Enter")
    terminal.shows("cycles")
    (pid,) = subprocess.run(
        ["pgrep", "-f", f"specdec_cli replay {trace}$"], capture_output=True, text=True
    ).stdout.split()[-1:]
    os.kill(int(pid), number)
    terminal.shows(f"code {128 + number}", "ready>")
    restored(terminal)


@pytest.mark.parametrize("after", ["screen", "chat"])
def test_sigterm_leaves_a_chat_in_its_screen_and_after_it(terminal, tmp_path, after):
    """The screen's end took it for a Ctrl-C, and left the chat with no handler: then it died with its trace open."""
    model, trace = tmp_path / "model", tmp_path / "chat.jsonl"
    save_checkpoint(model, tokenizer=byte_tokenizer(), vocab=len(byte_tokenizer()))
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    terminal.type(f"{COMMAND} chat -t ./model -d ngram -n 8 --trace {trace.name}; echo code $?", "Enter")
    terminal.shows("/help lists commands")
    terminal.type("la la la", "Enter")
    terminal.shows("tok/s")
    terminal.type("/watch", "Enter")
    terminal.shows("cycles")
    if after == "chat":
        terminal.type("q")
        terminal.shows("/help ·")
    found = subprocess.run(["pgrep", "-f", f"specdec_cli chat .*{trace.name}$"], capture_output=True, text=True).stdout
    os.kill(int(found.split()[-1]), signal.SIGTERM)
    terminal.shows("code 143", "ready>")
    restored(terminal)


def test_ctrl_c_twice_is_an_interrupt(terminal, trace):
    terminal.type(f"{COMMAND} replay {trace}; echo code $?", "Enter")
    terminal.shows("cycles")
    terminal.type("C-c")
    terminal.shows("once more quits")
    terminal.type("C-c")
    terminal.shows("code 130", "ready>")
    restored(terminal)


def test_an_error_on_a_screen_is_one_line_and_a_code(terminal, trace, tmp_path):
    """No traceback with all that the frames hold."""
    (tmp_path / "broken.py").write_text(
        "import sys\n"
        "from specdec_tui.screens.watch import WatchScreen\n"
        "def broken(self, *args): secret = 'held by the frame'; raise LookupError('of a panel')\n"
        "WatchScreen.on_screen_resume = broken\n"
        "from specdec_cli.main import main\n"
        f"sys.argv = ['specdec', 'replay', '{trace}']\n"
        "main()\n"
    )
    terminal.type(f"{sys.executable} broken.py; echo code $?", "Enter")
    shown = terminal.shows("code 1", "LookupError: of a panel", "this is a bug")
    assert "held by" not in shown
    assert "Traceback" not in shown
    restored(terminal)


def test_a_terminal_that_nobody_reads_is_left(trace, tmp_path):
    """Every byte written to it waits for a reader; a signal ends it all the same."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "specdec_cli", "replay", str(tmp_path / trace)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        shown = b""
        while b"cycles" not in shown:
            shown += os.read(ours, 1 << 16)
        time.sleep(2)  # what it draws meanwhile fills the terminal
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(10) == 128 + signal.SIGTERM
        finally:
            process.kill()
            os.close(ours)


def test_a_terminal_that_goes_without_a_signal_ends_it(trace, tmp_path):
    """As a shell that is not its session's leader leaves it: nothing but the other side's end tells."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "specdec_cli", "replay", str(tmp_path / trace)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while b"cycles" not in shown:
            shown += os.read(ours, 1 << 16)
        os.close(ours)
        try:
            assert process.wait(30) == 128 + signal.SIGHUP
        finally:
            process.kill()


def test_an_engine_that_breaks_leaves_the_terminal_whole(terminal, tmp_path):
    save_checkpoint(tmp_path / "model", layers=2, vocab=len(byte_tokenizer()))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"rubbish")
    terminal.type(f"{COMMAND} watch -t ./model -d ngram 'hello'; echo code $?", "Enter")
    terminal.shows("×", "damaged")
    terminal.type("q")
    terminal.shows("code 3", "damaged")
    restored(terminal)
