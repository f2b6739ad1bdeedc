"""The failure event file: its lines, its start, and what a bad disk does."""

import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from twisted.logger import LogLevel, globalLogPublisher

from fedcore.errors import ConfigError
from fedcore.observe.journal import Journal

NOW = datetime(2022, 11, 1, 10, 0, 2, 120_999)
HEAD = "nodeRole:SERVER,10.0.0.7:6766,currentTime:2022-11-01 10:00:02.120,event:"


def journal(path):
    return Journal(path, "10.0.0.7:6766", lambda: NOW)


@pytest.fixture
def errors():
    """The sentences that are logged as errors."""
    found = []

    def observe(event):
        if event["log_level"] is LogLevel.error:
            found.append(event["log_format"].format(**event))

    globalLogPublisher.addObserver(observe)
    yield found
    globalLogPublisher.removeObserver(observe)


def test_the_file_is_there_from_the_start(tmp_path):
    journal(tmp_path / "new" / "er" / "event.txt")
    assert (tmp_path / "new" / "er" / "event.txt").read_bytes() == b""


def test_an_alarm(tmp_path):
    journal(tmp_path / "event.txt").failed_continuously(10)
    assert (tmp_path / "event.txt").read_text() == HEAD + "Iteration failed 10 times continuously;\n"


def test_lost_updates(tmp_path):
    journal(tmp_path / "event.txt").updates_lost(5, 2, 7, "10.0.0.8:6766::1", "checksum mismatch")
    text = (
        "Iteration 5 attempt 2 lost 7 accepted updates in the ledger of 10.0.0.8:6766::1: checksum mismatch"
    )
    assert (tmp_path / "event.txt").read_text() == f"{HEAD}{text};\n"


def test_lines_are_added_to_what_is_there(tmp_path):
    path = tmp_path / "event.txt"
    path.write_text("older\n")
    first, second = journal(path), journal(path)
    first.write("one")
    second.write("two")
    first.write("three")
    assert path.read_text() == "older\n" + "".join(f"{HEAD}{word};\n" for word in ("one", "two", "three"))


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a;b", r"a\x3bb"),
        ("a\nb\r\0", r"a\nb\r\x00"),
        ("a\u2028b", r"a\u2028b"),
        (r"C:\x3b", r"C:\\x3b"),
        ("\udc80", r"\udc80"),
        ("größer 'x' \"y\"", "größer 'x' \"y\""),
    ],
)
def test_a_text_cannot_break_the_form(tmp_path, text, written):
    journal(tmp_path / "event.txt").write(text)
    assert (tmp_path / "event.txt").read_text(encoding="utf-8") == f"{HEAD}{written};\n"


def test_a_relative_path_begins_where_the_server_was_started(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    own = journal(Path("logs/event.txt"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    own.write("x")
    assert (tmp_path / "logs" / "event.txt").read_text() == HEAD + "x;\n"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_file_may_be_rotated(tmp_path):
    path = tmp_path / "event.txt"
    own = journal(path)
    own.write("one")
    path.rename(tmp_path / "event.txt.1")
    own.write("two")
    assert path.read_text() == HEAD + "two;\n"


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "event.txt"
    with pytest.raises(ConfigError, match=f"^Failed to create directory for event file {path} \\("):
        journal(path)


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(ConfigError, match=f"^Failed to open event txt file {tmp_path} \\(Is a directory"):
        journal(tmp_path)


def test_a_failed_write_is_logged_and_no_more(tmp_path, errors):
    path = tmp_path / "event.txt"
    own = journal(path)
    path.unlink()
    path.mkdir()
    own.write("x")
    assert errors == [f"an event cannot be written to {path}: [Errno 21] Is a directory: '{path}'"]


def test_a_full_disk_is_logged(tmp_path, errors):
    path = tmp_path / "event.txt"
    own = journal(path)
    path.unlink()
    path.symlink_to("/dev/full")
    own.write("x")
    assert len(errors) == 1 and "No space left" in errors[0]


def test_servers_that_share_a_file_keep_each_others_lines_whole(tmp_path):
    words = """
import sys
from datetime import datetime
from pathlib import Path
from fedcore.observe.journal import Journal
own = Journal(Path(sys.argv[1]), sys.argv[2], datetime.now)
for k in range(200):
    own.write(f"{k} " + "x" * 500)
"""
    path = tmp_path / "event.txt"
    writers = [subprocess.Popen([sys.executable, "-c", words, str(path), name]) for name in ("a:1", "b:2")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = path.read_text().splitlines()
    for name in ("a:1", "b:2"):
        own = [line for line in lines if line.startswith(f"nodeRole:SERVER,{name},currentTime:")]
        assert [int(line.partition("event:")[2].split()[0]) for line in own] == list(range(200))
    assert len(lines) == 400 and all(line.endswith("x;") for line in lines)
