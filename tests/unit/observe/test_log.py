"""Records as files, terminals and systemd's journal get them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from twisted.logger import FilteringLogObserver, Logger, LogPublisher
from twisted.python.failure import Failure

from fedcore.observe.log import JournalObserver, JsonObserver, Log, complain, is_journal


class Fails(Exception):
    """For a traceback."""


def logger_to(observer: object, level: str = "debug") -> tuple[Logger, Log]:
    its_log = Log(level)
    return Logger("here", observer=LogPublisher(FilteringLogObserver(observer, [its_log.filter]))), its_log


class TestJournal:
    @pytest.fixture
    def stream(self) -> io.StringIO:
        return io.StringIO()

    @pytest.fixture
    def logger(self, stream: io.StringIO) -> Logger:
        return logger_to(JournalObserver(stream))[0]

    def test_a_line_has_its_priority(self, logger: Logger, stream: io.StringIO) -> None:
        for level in ("debug", "info", "warn", "error", "critical"):
            getattr(logger, level)("said")
        assert stream.getvalue() == "<7>said\n<6>said\n<4>said\n<3>said\n<2>said\n"

    def test_fields_that_the_sentence_does_not_show_follow_it(
        self, logger: Logger, stream: io.StringIO
    ) -> None:
        logger.info("iteration {iteration} ended", iteration=7, it=True, valid=None, path=Path("/a b"))
        assert stream.getvalue() == '<6>iteration 7 ended [it=true, valid=null, path="/a b"]\n'

    def test_formats_of_fields_are_understood(self, logger: Logger, stream: io.StringIO) -> None:
        logger.info("loss {loss:.2f}, {error!r}", loss=0.125, error="x")
        assert stream.getvalue() == "<6>loss 0.12, 'x'\n"

    def test_each_line_of_a_record_has_its_priority(self, logger: Logger, stream: io.StringIO) -> None:
        try:
            raise Fails("two\nlines")
        except Fails:
            logger.failure("it broke", Failure())
        first, *others = stream.getvalue().splitlines()
        assert first == "<2>it broke"
        assert others[0] == "<2>Traceback (most recent call last):" and others[-1].startswith("<2>")
        assert any("Fails: two" in line for line in others)

    def test_words_of_fields_cannot_begin_a_line(self, logger: Logger, stream: io.StringIO) -> None:
        logger.warn("refused", reason="a\n<0>emerg")
        assert stream.getvalue() == '<4>refused [reason="a\\n<0>emerg"]\n'
        logger.warn("refused: {reason}", reason="a\n<0>emerg")
        assert stream.getvalue().splitlines()[1:] == ["<4>refused: a", "<4><0>emerg"]


class TestWhereTheJournalIs:
    def test_it_is_the_stream_that_systemd_names(self, tmp_path: Path) -> None:
        with (tmp_path / "one").open("w") as one, (tmp_path / "two").open("w") as two:
            status = os.fstat(one.fileno())
            environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
            assert is_journal(one, environ)
            assert not is_journal(two, environ)
            assert not is_journal(one, {})
        assert not is_journal(io.StringIO(), environ)

    def test_an_error_that_is_no_record_has_a_priority_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "stderr"
        with path.open("w") as stream:
            complain(stream, "a\nb")
            status = os.fstat(stream.fileno())
            monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
            complain(stream, "a\nb")
        assert path.read_text() == "a\nb\n<3>a\n<3>b\n"


def test_the_level_may_be_changed() -> None:
    stream = io.StringIO()
    logger, its_log = logger_to(JsonObserver(stream), "warn")
    logger.info("one")
    its_log.show("info")
    logger.info("two")
    its_log.show("error")
    logger.warn("three")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["two"]
