"""Logs: JSON lines for machines, short lines for a terminal.

Every record is a constant sentence plus fields; fields stay fields in JSON. Nothing here knows secrets: modules
never log weights, keys, shares, passwords or client ids.
"""

from __future__ import annotations

import json
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


def start_logging(stream: TextIO, level: str) -> None:
    """Send the log to a stream, as JSON lines or, on a terminal, as text.

    Args:
        stream: usually standard error.
        level: debug, info, warn or error; lower records are dropped.
    """
    observer: Any = ConsoleObserver(stream) if stream.isatty() else JsonObserver(stream)
    lowest: Any = LogLevelFilterPredicate(defaultLogLevel=LogLevel.levelWithName(level))
    lowest.setLogLevelForNamespace("twisted.application.internet", LogLevel.warn)  # each attempt to reconnect
    lowest.setLogLevelForNamespace(
        "log_legacy", LogLevel.warn
    )  # Twisted's own "starting on", "connection made"
    filtered: Any = FilteringLogObserver(observer, [lowest])
    globalLogBeginner.beginLoggingTo([filtered], redirectStandardIO=False)


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
