"""`specdec chat` through pipes and on a terminal, on a real checkpoint from disk."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import sys
import time
from subprocess import CompletedProcess

import pytest

from specdec_cli.main import main
from specdec_engine.errors import UsageError
from specdec_engine.models.options import LoadOptions
from specdec_engine.pair import load_pair
from specdec_engine.record.chats import Message, read_chat, write_chat
from specdec_engine.record.events import Cycle, known_ids
from tests.cli.conftest import command, environment
from tests.fakes import CHAT_TEMPLATE, byte_tokenizer


@pytest.fixture
def talked(monkeypatch, capsys):
    """A chat whose lines come by a pipe, in this process: eight of them in a process each take half a minute."""

    def call(checkpoint, lines, *more):
        typed = ["specdec", "chat", "-t", checkpoint, "-n", "12", "--dtype", "float32", *more]
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [str(word) for word in typed])
            patched.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
            with pytest.raises(SystemExit) as ended:
                main()
        shown = capsys.readouterr()
        return CompletedProcess(typed, int(ended.value.code or 0), shown.out.encode(), shown.err.encode())

    return call


def saved(path):
    head, *messages = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return head, messages


@pytest.mark.parametrize("draft", ["ngram", "self:1"])
def test_each_turn_is_what_a_fresh_reading_of_the_whole_says(talked, checkpoint, tmp_path, draft):
    turns = ["the light", "a house in the night", '"""', "two lines", "of it", '"""']
    done = talked(
        checkpoint, [*turns, "/stats", f"/save {tmp_path / 'c'}"], "-d", draft, "-k", "3", "--system", "Be brief."
    )
    assert done.returncode == 0, done.stderr
    _, messages = saved(tmp_path / "c")
    assert [m["content"] for m in messages[:1] + messages[1::2]] == [
        "Be brief.", "the light", "a house in the night", "two lines\nof it",
    ]  # fmt: skip
    pair = load_pair(str(checkpoint), "none", LoadOptions(dtype="float32", quantize="none"))
    for end in range(2, len(messages), 2):
        pair.forget()
        ids = [t for e in pair.decode(pair.encode_turns(messages[:end]), k=0, max_tokens=12)
               if isinstance(e, Cycle) for t in known_ids(e.emitted)]  # fmt: skip
        assert pair.tokenizer.decode(ids, skip_special_tokens=True) == messages[end]["content"]
    kept = [int(n) for n in re.findall(rb"kept (\d+)\)", done.stderr)]
    prompts = [int(n) for n in re.findall(rb"prompt (\d+) ", done.stderr)]
    assert kept[0] == 0
    assert all(now >= before for now, before in zip(kept[1:], prompts, strict=False)), "all of the turns before"
    assert b"kept from before" in done.stdout


def test_commands_change_what_follows_and_errors_do_not(talked, checkpoint, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    wrong = ["/undo", "/retry", "/watch", "/nothing", "/k x", "/k -1", "/temp hot", "/temp -1", "/draft nowhere/at-all"]
    wrong += ["/save", "/load", "/help me", f"/load {tmp_path / 'none'}"]
    lines = [
        "hello",
        "and then",
        f"/save {before}",
        "/undo",
        "/k 2",
        "/temp 0.5",
        "/system You are kind.",
        "/draft suffix",
    ]
    lines += ["//k is said", f"/save {after}", "/system -", "/retry", "/clear", "/bye", "not asked"]
    done = talked(checkpoint, [*wrong, *lines], "--offline")
    said = done.stderr.decode()
    assert said.count("specdec: error:") == len(wrong), said
    assert "/nothing is no command" in said
    assert done.returncode in (2, 3), "the last error's"
    assert [m["content"] for m in saved(before)[1][::2]] == ["hello", "and then"]
    assert [m["content"] for m in saved(after)[1][1::2]] == ["hello", "/k is said"]
    assert saved(after)[1][0] == {"role": "system", "content": "You are kind."}
    assert "the draft is suffix" in said
    assert "taken back: and then" in said
    assert "2 turns forgotten" in said


def test_a_saved_chat_goes_on_and_one_of_another_model_does_not(talked, checkpoint, draft_checkpoint, tmp_path):
    file = tmp_path / "c"
    assert talked(checkpoint, ["hello", f"/save {file}"]).returncode == 0
    more = talked(checkpoint, ["go on", f"/save {file}"], "--load", file)
    assert more.returncode == 0
    assert [m["content"] for m in saved(file)[1][::2]] == ["hello", "go on"]
    other = talked(draft_checkpoint, [], "--load", file)
    assert (other.returncode, b"is a chat with" in other.stderr) == (2, True)


def test_bad_files_are_told_by_line_and_nothing_is_overwritten(tmp_path):
    file = tmp_path / "c"
    write_chat(file, "t", [Message("user", "a"), Message("assistant", "b\u2028c")])
    assert read_chat(file, "t")[1].content == "b\u2028c"
    good = file.read_text("utf-8")
    for text, said in [
        ("", "is no chat"),
        ("[]", "is no chat"),
        ('{"schema": "specdec.trace/2", "target": "t"}', "not specdec.chat/1"),
        (good + '{"role": "user", "content": "x"}\n', "the last answer is missing"),
        (good + '{"role": "boss", "content": "x"}\n', "line 4"),
        (good + "{", "line 4"),
    ]:
        file.write_text(text, "utf-8")
        with pytest.raises(UsageError, match=re.escape(said)):
            read_chat(file, "t")
    file.write_text("my notes")
    with pytest.raises(UsageError, match="is there already"):
        write_chat(file, "t", [])
    assert file.read_text() == "my notes"
    with pytest.raises(UsageError, match="cannot be written"):
        write_chat(tmp_path / "no" / "folder", "t", [])


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--raw",), "has no turns"),
        (("--template-kwargs", "{"), "--template-kwargs"),
        (("--template-kwargs", "[]"), "no object"),
        (("--thinking",), "no switch for thinking"),
    ],
)
def test_what_cannot_be_is_refused(specdec, checkpoint, typed, said):
    result = specdec("chat", "-t", checkpoint, *typed)
    assert (result.code, said in result.err) == (2, True), result.err


def test_the_template_is_told_whether_to_think():
    from specdec_engine.models.chat import turn_ids

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    turns = [{"role": "user", "content": "hi"}]
    plain, told = turn_ids(tokenizer, turns), turn_ids(tokenizer, turns, {"enable_thinking": False})
    assert tokenizer.decode(told) == tokenizer.decode(plain) + "<think></think>"


def test_a_full_context_is_said_and_the_turn_is_not_kept(talked, checkpoint, tmp_path):
    long = "the light in the night " * 400
    done = talked(checkpoint, ["hello", long, f"/save {tmp_path / 'c'}"])
    assert done.returncode == 2
    assert b"/undo takes the last turn back" in done.stderr
    assert [m["content"] for m in saved(tmp_path / "c")[1][::2]] == ["hello"]


class Terminal:
    """A pseudo-terminal with somebody who reads and types."""

    def __init__(self, argv, **extra):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(argv[0], argv, environment(TERM="xterm-256color", **extra))
        self.shown, self._read_to = "", 0

    def until(self, text, seconds=60):
        deadline = time.monotonic() + seconds
        while (at := self.shown.find(text, self._read_to)) < 0:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.fd], [], [], 0.2)[0]:
                self.shown += os.read(self.fd, 65536).decode("utf-8", "replace")
        self._read_to = at + len(text)

    def type(self, keys):
        os.write(self.fd, keys.encode())

    def end(self):
        deadline = time.monotonic() + 30
        while (ended := os.waitpid(self.pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < deadline, self.shown
            time.sleep(0.05)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(ended[1])


def test_on_a_terminal_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(checkpoint, tmp_path):
    typed = ("chat", "-t", checkpoint, "-n", "1900", "--temperature", "2", "-k", "0", "--dtype", "float32")
    terminal = Terminal(command(*typed), XDG_STATE_HOME=str(tmp_path))
    terminal.until("/help")
    terminal.until("›")
    terminal.type("hello\x1b\rthere\r")
    terminal.until("there")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.until("tok/s")
    terminal.until("›")
    terminal.type("\x03")
    terminal.until("Ctrl-D or /bye leaves")
    terminal.until("›")
    terminal.type("/stats\r")
    terminal.until("1 answer")
    terminal.until("›")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "hello" in (tmp_path / "specdec" / "chat_history").read_text()


def test_a_file_that_cannot_be_named_does_not_end_the_chat(talked, checkpoint, tmp_path):
    long = "x" * 300
    lines = [
        "hello",
        "/save ~nosuchuser/x",
        "/load ~nosuchuser/x",
        f"/save {long}",
        f"/load {long}",
        f"/save {tmp_path / 'c'}",
    ]
    done = talked(checkpoint, lines)
    assert done.stderr.count(b"specdec: error:") == 4
    assert b"bug" not in done.stderr
    assert saved(tmp_path / "c")[1][0]["content"] == "hello"


def test_what_is_kept_is_what_was_shown(talked, checkpoint, tmp_path):
    shown = talked(checkpoint, ["hello", f"/save {tmp_path / 'c'}"], "--stop", "li")
    said = saved(tmp_path / "c")[1][1]["content"]
    assert "li" not in said
    assert shown.stdout.decode().rstrip("\n") == said


def test_a_system_prompt_that_is_typed_wins_over_a_files(talked, checkpoint, tmp_path):
    file = tmp_path / "c"
    assert talked(checkpoint, ["hello", f"/save {file}"], "--system", "Old.").returncode == 0
    assert talked(checkpoint, [f"/save {tmp_path / 'd'}"], "--load", file, "--system", "New.").returncode == 0
    assert saved(tmp_path / "d")[1][0] == {"role": "system", "content": "New."}


def test_another_chats_file_is_not_written_over(talked, checkpoint, tmp_path):
    file = tmp_path / "c"
    assert talked(checkpoint, ["hello", f"/save {file}", "more", f"/save {file}"]).returncode == 0
    before = file.read_text()
    again = talked(checkpoint, ["another", f"/save {file}"])
    assert (again.returncode, b"is there already" in again.stderr) == (2, True)
    assert file.read_text() == before


def test_a_turn_of_several_lines_can_be_given_up(checkpoint, tmp_path):
    terminal = Terminal(command("chat", "-t", checkpoint, "-n", "5"), XDG_STATE_HOME=str(tmp_path))
    terminal.until("›")
    terminal.type('"""\r')
    terminal.until("…")
    terminal.type("line one\r")
    terminal.until("…")
    terminal.type("\x03")
    terminal.until("given up")
    terminal.until("›")
    terminal.type("/stats\r")
    terminal.until("nothing has been said yet")
    terminal.until("›")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_the_templates_own_words_cannot_be_set(specdec, checkpoint):
    result = specdec("chat", "-t", checkpoint, "--template-kwargs", '{"messages": []}')
    assert (result.code, "cannot set messages" in result.err) == (2, True)
    assert specdec("chat", "-t", checkpoint, "-n", "0").code == 2
