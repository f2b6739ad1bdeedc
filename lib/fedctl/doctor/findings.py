"""What ``fl doctor`` finds: measured facts in, findings out. Nothing is measured here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from fedcore.config import Address

CLOCK_LIMIT_S = 5.0  # next_req_time must lie in the future of devices, at least retry_margin, 5 s by default
MEMORY_SHARE = 0.85  # of the host's memory; what fl.slice may have
CHECKPOINTS = 4  # the three newest are kept while the next is written


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at.
        level: how it is.
        text: what was seen.
        remedy: what to do about it, "" if nothing.
    """

    check: str
    level: Level
    text: str
    remedy: str = ""


def ok(check: str, text: str) -> Finding:
    """Make a finding that asks for nothing."""
    return Finding(check, Level.OK, text)


def warning(check: str, text: str, remedy: str) -> Finding:
    """Make a finding that may need somebody."""
    return Finding(check, Level.WARNING, text, remedy)


def failed(check: str, text: str, remedy: str) -> Finding:
    """Make a finding that does need somebody."""
    return Finding(check, Level.FAILED, text, remedy)


def of_clock(offset: float, doubt: float) -> Finding:
    """Judge this host's clock.

    Args:
        offset: seconds that Redis' clock is ahead of it.
        doubt: seconds that this may be wrong, the time of the question's way.
    """
    text = f"{abs(offset):.3f} s {'behind' if offset > 0 else 'ahead of'} that of Redis, give or take {doubt:.3f} s"
    if abs(offset) - doubt > CLOCK_LIMIT_S:
        return warning(
            "clock",
            text,
            "set both clocks: chronyc tracking, systemctl enable --now chrony; devices that are told a time in their "
            "past give up",
        )
    return ok("clock", text)


def of_certificate(name: str, begins: datetime, ends: datetime, now: datetime, warn_days: int) -> Finding:
    """Judge the dates of a certificate.

    Args:
        name: what it is and where.
        begins: from then on it is good.
        ends: until then.
        now: the time.
        warn_days: ssl.cert_expire_warning_time_in_day.
    """
    renew = "renew it (ansible-playbook site.yml), then systemctl reload the daemons"
    days = (ends - now).days
    if now < begins:
        return failed(
            "certificates", f"{name} is valid only from {begins:%Y-%m-%d %H:%M} UTC on", "check the clock"
        )
    if now > ends:
        return failed("certificates", f"{name} has expired on {ends:%Y-%m-%d}", renew)
    if days < warn_days:
        return warning("certificates", f"{name} expires on {ends:%Y-%m-%d}, in {days} days", renew)
    return ok("certificates", f"{name} is valid until {ends:%Y-%m-%d}")


@dataclass(frozen=True, slots=True)
class Volume:
    """A file system.

    Attributes:
        total: bytes.
        free: bytes that an ordinary user may take.
        own: whether the folder in question is where it is mounted.
        memory: whether it is in memory (tmpfs).
    """

    total: int
    free: int
    own: bool = False
    memory: bool = False


def of_ledgers(path: str, volume: Volume, ledger: int, instances: int, host_memory: int) -> list[Finding]:
    """Judge the room for ledgers.

    Args:
        path: where they are.
        volume: in which file system.
        ledger: bytes of one.
        instances: servers of this host.
        host_memory: bytes of the host's memory.
    """
    need, spare = ledger * instances, ledger * (instances + 1)
    text = f"{path}: {_size(volume.total)} for {_count(instances, 'ledger')} of {_size(ledger)}"
    enlarge = (
        "give the mount more (server_ledger_size, then ansible-playbook site.yml; by hand size= in "
        "var-lib-fl-ledgers.mount.d/size.conf), or lower fedcore.ledger.memory_budget"
        if volume.memory
        else "make room there, or let fedcore.server.ledger_dir name another place"
    )
    findings = []
    if volume.total < need:
        findings.append(failed("ledgers", text, enlarge))
    elif volume.total < spare:
        findings.append(
            warning("ledgers", f"{text}, none to spare for the one of a server that was killed", enlarge)
        )
    else:
        findings.append(ok("ledgers", text))
    if volume.memory and volume.total > MEMORY_SHARE * host_memory:
        findings.append(
            warning(
                "ledgers",
                f"{path} may grow to {_size(volume.total)} of the host's {_size(host_memory)} memory",
                "make the mount smaller, or the host larger: memory would end before the mount is full",
            )
        )
    return findings


def of_mount(path: str, volume: Volume) -> list[Finding]:
    """Judge whether the ledgers of a deployed host are on the mount that is made for them."""
    if volume.own:
        return []
    return [
        warning(
            "ledgers",
            f"{path} is not mounted: ledgers would share the file system of the folder around it",
            "systemctl start var-lib-fl-ledgers.mount; starting a server does so, too",
        )
    ]


def of_checkpoints(path: str, volume: Volume, model: int) -> Finding:
    """Judge the room for models.

    Args:
        path: where they are.
        volume: in which file system.
        model: bytes of one.
    """
    text = f"{path}: {_size(volume.free)} free, a model has {_size(model)}"
    remedy = "free some room, or let fedcore.server.checkpoint_dir name another place"
    if volume.free < model:
        return failed("checkpoints", text, remedy)
    if volume.free < CHECKPOINTS * model:
        return warning("checkpoints", text, remedy)
    return ok("checkpoints", text)


class Port(StrEnum):
    """What was seen at an address of ours."""

    FREE = "free"
    LISTENS = "listens"
    TAKEN = "taken"
    NO_ADDRESS = "no such address on this host"
    REFUSED = "this user may not listen there"


@dataclass(frozen=True, slots=True)
class Daemon:
    """A daemon of this host.

    Attributes:
        name: its unit.
        admin: address of its admin listener.
        others: purpose -> address of its other listeners.
    """

    name: str
    admin: Address
    others: dict[str, Address]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of a daemon.

    Attributes:
        alive: whether its admin listener answers as a daemon's.
        ready: why it is not ready, "" if it is.
        ports: what was seen at its addresses.
    """

    alive: bool
    ready: str
    ports: dict[Address, Port]


_PORT_REMEDIES = {
    Port.TAKEN: "end what uses it (ss -ltnp), or configure another port",
    Port.NO_ADDRESS: "configure an address that this host has (ip address)",
    Port.REFUSED: "configure a port above 1023",
}


def of_daemon(daemon: Daemon, seen: Seen, *, awaited: bool) -> list[Finding]:
    """Judge a daemon and its ports.

    Args:
        daemon: which.
        seen: what was seen of it.
        awaited: whether it should run.
    """
    addresses = {**daemon.others, "admin": daemon.admin}
    if seen.alive:
        deaf = [
            failed("ports", f"{daemon.name} runs, but nobody listens at {address} ({purpose})", _look(daemon))
            for purpose, address in daemon.others.items()
            if seen.ports[address] is not Port.LISTENS
        ]
        if seen.ready:
            return [*deaf, warning("daemons", f"{daemon.name} is not ready: {seen.ready}", _look(daemon))]
        return [*deaf, ok("daemons", f"{daemon.name} is ready")]
    bad = [
        failed("ports", f"{address}, {purpose} of {daemon.name}: {_word(port)}", _PORT_REMEDIES[_bad(port)])
        for purpose, address in addresses.items()
        if (port := seen.ports[address]) is not Port.FREE
    ]
    free = ", ".join(str(address) for address in addresses.values())
    findings = bad or [ok("ports", f"{daemon.name}: free, {free}")]
    if awaited:
        findings.append(
            warning(
                "daemons", f"{daemon.name} does not run", f"systemctl start {daemon.name}; {_look(daemon)}"
            )
        )
    return findings


def _bad(port: Port) -> Port:
    """What listens where our daemon does not run is somebody else's."""
    return Port.TAKEN if port is Port.LISTENS else port


def _word(port: Port) -> str:
    return _bad(port).value


def _look(daemon: Daemon) -> str:
    return f"see systemctl status {daemon.name} and journalctl -u {daemon.name}"


def of_nodes(reached: dict[str, str]) -> list[Finding]:
    """Judge the ways to the servers that Redis lists as alive.

    Args:
        reached: address -> why it cannot be reached, "" if it can.
    """
    if not reached:
        return [ok("nodes", "Redis lists no server that is alive")]
    good = [address for address, problem in reached.items() if not problem]
    findings = [ok("nodes", f"reachable: {', '.join(good)}")] if good else []
    findings += [
        failed(
            "nodes",
            f"{address} is alive, but cannot be reached from here: {problem}",
            "open the node ports between all hosts of the subnet, and check fedcore.server.tcp_ip there",
        )
        for address, problem in reached.items()
        if problem
    ]
    return findings


def _size(count: int) -> str:
    """Bytes in words: 1536 -> "1.5 KiB"."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
