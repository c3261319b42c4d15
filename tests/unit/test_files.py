"""Files are replaced whole or not at all; what is no regular file stays what it is."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from specdec_engine.record.files import parse_json, read_json, replace_file


def test_a_pipe_that_stands_for_a_file_is_written_to():
    reading, writing = os.pipe()
    replace_file(Path(f"/dev/fd/{writing}"), b"whole")
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"whole"


def test_a_link_is_followed_and_the_mode_stays(tmp_path):
    (there := tmp_path / "there").write_text("old")
    there.chmod(0o640)
    (link := tmp_path / "link").symlink_to(there)
    replace_file(link, b"new")
    assert link.is_symlink()
    assert there.read_bytes() == b"new"
    assert stat.S_IMODE(there.stat().st_mode) == 0o640


def test_a_new_file_has_the_mode_that_the_user_wants(tmp_path):
    usual = os.umask(0o027)
    try:
        replace_file(tmp_path / "new", b"")
    finally:
        os.umask(usual)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    replace_file(pipe, b"record")
    reader.join(5)
    assert got == [b"record"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_disk_that_fills_up_costs_nothing_that_is_there(tmp_path, monkeypatch):
    (file := tmp_path / "record").write_text("old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(file, b"new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("record", "old")]


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff", b"nul", b'{"a":' * 50_000])
def test_whatever_is_no_json_is_a_value_error(text, tmp_path):
    with pytest.raises(ValueError, match="it is "):
        parse_json(text)
    (file := tmp_path / "f").write_bytes(text)
    with pytest.raises(ValueError, match="it is "):
        read_json(file)
