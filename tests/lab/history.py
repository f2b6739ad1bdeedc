"""What the servers of the hosts have told: how iterations ended, and which updates were given up.

Read from the journals and failure event files on the hosts' disks, which outlive processes and power cuts (metrics do
not), and can be read while a host is down.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence

from integration.oracle import Outcome
from lab.devices import Loss
from lab.host import Host

EVENTS = "var/lib/fl/events.txt"
ENDED = re.compile(r"^iteration (\d+) ended: (.*?) \[[^\[]*\bvalid=(true|false)", re.MULTILINE)
LOST = re.compile(r"Iteration (\d+) attempt \d+ lost (\d+) accepted updates in the ledger of (\S+): (.*);$")
SLACK_S = 5  # a journal is on the disk a little later than things happen


class HostsHistory:
    """The history of a job from now on.

    Args:
        hosts: those that have servers, or may have some.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = hosts
        self._since = {host.name: time.time() for host in hosts}
        self._skip = {host.name: len(_events(host)) for host in hosts}
        self._outcomes: dict[int, Outcome] = {}

    def outcomes(self) -> Mapping[int, Outcome]:
        """Return how iterations ended; fail if two servers tell it differently."""
        for host in self._hosts:
            since, now = self._since[host.name], time.time()
            told = host.journal("--unit", "fl-serverd@*", "--since", f"@{since:.0f}")
            for number, result, valid in ENDED.findall(told):
                outcome = Outcome(valid == "true", result)
                known = self._outcomes.setdefault(int(number), outcome)
                assert known.valid == outcome.valid, f"iteration {number} ended twice: {known}, {outcome}"
            self._since[host.name] = now - SLACK_S
        return dict(self._outcomes)

    def losses(self) -> Sequence[Loss]:
        """Return the lost updates, host by host."""
        return losses_in([line for host in self._hosts for line in _events(host)[self._skip[host.name] :]])


def losses_in(lines: Sequence[str]) -> list[Loss]:
    """Return the losses among the lines of a failure event file."""
    found = (LOST.search(line) for line in lines)
    return [Loss(int(match[1]), int(match[2]), match[3], match[4]) for match in found if match]


def _events(host: Host) -> list[str]:
    path = host.root / EVENTS
    return path.read_text().splitlines() if path.exists() else []
