"""Logs: JSON lines for machines, short lines for a terminal and for systemd's journal.

Every record is a constant sentence plus fields; fields stay fields in JSON. The journal knows time, unit and process
by itself; it is given the priority, the sentence and the fields that the sentence does not show. Nothing here knows
secrets: modules never log weights, keys, shares, passwords or client ids.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from twisted.logger import (
    FilteringLogObserver,
    ILogObserver,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    formatEvent,
    globalLogBeginner,
)
from zope.interface import implementer

_PLAIN = (str, int, float, bool, type(None))
_OWN = {"format", "text", "message", "time", "system", "isError", "level", "namespace"}
_NAMED = re.compile(r"\{(\w+)")  # fields that a sentence shows
_PRIORITIES = {"debug": 7, "info": 6, "warn": 4, "error": 3, "critical": 2}  # of syslog(3)


class Log:
    """The log of a process; how much of it is shown may be changed."""

    def __init__(self, level: str) -> None:
        self.filter: Any = LogLevelFilterPredicate()
        self.show(level)
        # each attempt to reconnect; Twisted's own "starting on", "connection made"
        for noisy in ("twisted.application.internet", "log_legacy"):
            self.filter.setLogLevelForNamespace(noisy, LogLevel.warn)

    def show(self, level: str) -> None:
        """Show records of a level and above: debug, info, warn or error."""
        self.filter.setLogLevelForNamespace("", LogLevel.levelWithName(level))


def start_logging(stream: TextIO, level: str) -> Log:
    """Send the log to a stream: to the journal in its form, to a terminal as text, else as JSON lines.

    Args:
        stream: usually standard error.
        level: debug, info, warn or error; lower records are dropped.
    """
    its_log = Log(level)
    filtered: Any = FilteringLogObserver(_observer(stream), [its_log.filter])
    globalLogBeginner.beginLoggingTo([filtered], redirectStandardIO=False)
    return its_log


def is_journal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a stream leads to systemd's journal: $JOURNAL_STREAM is its device and inode (systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def complain(stream: TextIO, text: str) -> None:
    """Write an error that is no record, such as why a daemon does not start."""
    if is_journal(stream):
        text = _journal_lines("error", text)
    print(text, file=stream, flush=True)


def _observer(stream: TextIO) -> Any:
    if is_journal(stream):
        return JournalObserver(stream)
    return ConsoleObserver(stream) if stream.isatty() else JsonObserver(stream)


def _fields(event: LogEvent) -> dict[str, object]:
    named = {key: value for key, value in event.items() if not key.startswith("log_") and key not in _OWN}
    return {key: value if isinstance(value, _PLAIN) else str(value) for key, value in named.items()}


def _traceback(event: LogEvent) -> str:
    failure = event.get("log_failure")
    return "" if failure is None else str(failure.getTraceback())


@implementer(ILogObserver)
class JsonObserver:
    """One JSON object per record, one record per line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: LogEvent) -> None:
        record = {
            "time": datetime.fromtimestamp(event["log_time"], UTC).isoformat(timespec="milliseconds"),
            "level": event["log_level"].name,
            "logger": event.get("log_namespace", ""),
            "message": formatEvent(event),
            **_fields(event),
        }
        if traceback := _traceback(event):
            record["traceback"] = traceback
        self._stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._stream.flush()


@implementer(ILogObserver)
class ConsoleObserver:
    """Time, level and sentence on one line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: LogEvent) -> None:
        time = datetime.fromtimestamp(event["log_time"]).strftime("%H:%M:%S.%f")[:-3]
        level = event["log_level"].name
        mark = "" if level == "info" else f"{level.upper()}: "
        self._stream.write(f"{time} {mark}{formatEvent(event)}\n{_traceback(event)}")
        self._stream.flush()


@implementer(ILogObserver)
class JournalObserver:
    """Priority and sentence on one line, then the fields that the sentence does not name (sd-daemon(3))."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: LogEvent) -> None:
        sentence = event.get("log_format") or ""
        shown = _NAMED.findall(sentence)
        others = {name: value for name, value in _fields(event).items() if name not in shown}
        words = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in others.items()]
        text = f"{formatEvent(event)} [{', '.join(words)}]" if words else formatEvent(event)
        lines = _journal_lines(event["log_level"].name, f"{text}\n{_traceback(event)}")
        self._stream.write(lines + "\n")
        self._stream.flush()


def _journal_lines(level: str, text: str) -> str:
    return "\n".join(f"<{_PRIORITIES[level]}>{line}" for line in text.splitlines())
