"""Wrong clocks: a host's services see a time of day that the test chooses, while the machine's clock stays right.

libfaketime stands between a service and the C library. The monotonic clock stays true, as on a host whose clock
is set by hand. The offset is a file that is read again at every question for the time, so it can be changed while
the services run: a step of the clock, forward or back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.host import Host

OFFSET_FILE = "/etc/lab-clock"
DROP_IN = "/etc/systemd/system/{prefix}.service.d/lab-clock.conf"
LIBRARY = "/usr/lib/*/faketime/libfaketimeMT.so.1"


def skew(host: Host, seconds: float, prefix: str = "fl-") -> None:
    """Let a host's services live at another time of day, and restart those that run.

    Args:
        host: where.
        seconds: how far their clock is ahead; behind if negative.
        prefix: what the units' names begin with, up to and including a dash.
    """
    step(host, seconds)
    library = host.sh(f"ls {LIBRARY}").strip()
    host.write(
        DROP_IN.format(prefix=prefix),
        "[Service]\n"
        f"Environment=LD_PRELOAD={library} FAKETIME_TIMESTAMP_FILE={OFFSET_FILE}\n"
        "Environment=FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1\n",
    )
    _restart(host, prefix)


def step(host: Host, seconds: float) -> None:
    """Change the offset of services that live at another time already, at once and without a restart."""
    host.write(OFFSET_FILE, f"{seconds:+.3f}\n")


def unskew(host: Host, prefix: str = "fl-") -> None:
    """Bring the services back to the right time, and restart those that run."""
    host.run("rm", "-f", DROP_IN.format(prefix=prefix))
    _restart(host, prefix)


def _restart(host: Host, prefix: str) -> None:
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "try-restart", f"{prefix}*.service", timeout=180)
