"""Faults made up from a seed, and what lets them happen to a fleet."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from integration.cluster import Cluster
from integration.faults import Fleet, NodeLinks, Run


class Kind(StrEnum):
    """What may happen; everything but ADD, RESET and the end of Redis heals by itself after some time."""

    KILL = "SIGKILL, restart"
    STOP = "SIGTERM, restart"
    PAUSE = "SIGSTOP, SIGCONT"
    CUT = "cut the link to Redis, restore it"
    HANG = "let the link to Redis hang, restore it"
    RESET = "reset the link to Redis"
    NODE_CUT = "cut the links between a server and the others, restore them"
    NODE_VANISH = (
        "let nothing through between a server and the others, not even an attempt to connect; restore"
    )
    NODE_DEAF = "let nothing through from the others to a server, while it reaches them; restore"
    NODE_MUTE = "hold the answers between a server and the others, deliver them later"
    ADD = "start another server"
    REDIS_RESTART = "restart Redis with its data"
    REDIS_WIPE = "restart Redis without its data"
    REDIS_PAUSE = "SIGSTOP Redis, SIGCONT"


SERVER_FAULTS = (Kind.KILL, Kind.STOP, Kind.PAUSE, Kind.CUT, Kind.HANG)  # a server is away meanwhile
REDIS_FAULTS = (Kind.REDIS_RESTART, Kind.REDIS_WIPE, Kind.REDIS_PAUSE)
NODE_FAULTS: Mapping[Kind, Callable[[NodeLinks, int], None]] = {  # devices do not notice
    Kind.NODE_CUT: NodeLinks.cut,
    Kind.NODE_VANISH: NodeLinks.vanish,
    Kind.NODE_DEAF: NodeLinks.deafen,
    Kind.NODE_MUTE: NodeLinks.mute,
}
LENGTHS: Mapping[Kind, tuple[float, float]] = {
    Kind.KILL: (0.0, 5.0),
    Kind.STOP: (0.0, 5.0),
    Kind.PAUSE: (1.0, 3.0),
    Kind.CUT: (0.2, 3.0),
    Kind.HANG: (0.2, 3.0),
    Kind.REDIS_PAUSE: (0.5, 3.0),
    **dict.fromkeys(NODE_FAULTS, (0.2, 6.0)),
}
STARTUP_S = 3.0  # a started server counts as away for so long
REJOIN_S = 3.0  # between two faults of node links; in it an iteration that waited can be completed


@dataclass(frozen=True)
class Action:
    """One fault.

    Attributes:
        at: seconds from the start.
        kind: what happens.
        server: to whom, -1 for Redis.
        length: seconds until it heals.
    """

    at: float
    kind: Kind
    server: int = -1
    length: float = 0.0

    def __str__(self) -> str:
        whom = "" if self.server < 0 else f" server {self.server}"
        return f"{self.kind.name}{whom}" + (f" for {self.length:.2f} s" if self.length else "")


@dataclass(frozen=True)
class Schedule:
    """What faults a run may have; ``actions`` makes them up, the same for the same seed.

    Attributes:
        servers: those that run at the start.
        spare: those that ADD may start, in this order.
        kinds: what may happen; a kind given twice happens twice as often.
        most_away: servers that may be away at once.
        least_there: servers that must be there at any time.
        pause: least and greatest seconds between two faults.
    """

    servers: Sequence[int]
    spare: Sequence[int] = ()
    kinds: Sequence[Kind] = tuple(Kind)
    most_away: int = 1
    least_there: int = 1
    pause: tuple[float, float] = (0.1, 2.0)

    def actions(self, seed: int, seconds: float) -> list[Action]:
        """Return faults for so many seconds, in order."""
        chance = random.Random(seed)
        away = dict.fromkeys(self.servers, 0.0)  # server -> until when it is away
        spare = list(self.spare)
        redis_until, nodes_until, now, actions = 0.0, 0.0, 0.0, []
        while (now := now + chance.uniform(*self.pause)) < seconds:
            kind = chance.choice(self.kinds)
            length = round(chance.uniform(*LENGTHS[kind]), 2) if kind in LENGTHS else 0.0
            there = [n for n, until in away.items() if until <= now]
            if kind in REDIS_FAULTS:
                if now < redis_until:
                    continue
                redis_until = now + length + 1.0
                actions.append(Action(now, kind, -1, length))
            elif kind is Kind.ADD:
                if spare:
                    away[spare[0]] = now + STARTUP_S
                    actions.append(Action(now, kind, spare.pop(0)))
            elif kind in NODE_FAULTS:
                if there and now >= nodes_until:
                    nodes_until = now + length + REJOIN_S
                    actions.append(Action(now, kind, chance.choice(there), length))
            elif kind is Kind.RESET and there:
                actions.append(Action(now, kind, chance.choice(there)))
            elif (
                kind in SERVER_FAULTS
                and len(there) > self.least_there
                and len(away) - len(there) < self.most_away
            ):
                victim = chance.choice(there)
                away[victim] = now + length + (STARTUP_S if kind in (Kind.KILL, Kind.STOP) else 0.5)
                actions.append(Action(now, kind, victim, length))
        return actions


@dataclass(order=True, frozen=True)
class _Step:
    """One half of an action: its begin or its healing."""

    at: float
    order: int
    text: str = field(compare=False)
    act: Callable[[], object] = field(compare=False)


def perform(
    run: Run, actions: Sequence[Action], log: list[str], *, may_be_alone: bool = False, hosts: int = 1
) -> None:
    """Let the actions happen to a run's fleet, each as soon as its time has come; return when all have healed.

    A server is spared if no other one listens at that moment, whatever the schedule believes; and SIGTERM is spared a
    server that does not listen yet, for before that it does not end in order.

    Args:
        run: the run; if one of its clients gives up, nothing more happens.
        actions: see Schedule.
        log: grows by a line for everything that was done.
        may_be_alone: whether the last server may be away too.
        hosts: machines on which ADD starts servers, in turn.
    """
    fleet, began, spared = run.fleet, time.monotonic(), set[Action]()

    def listens(n: int) -> bool:
        return Cluster.get_http(fleet.cluster.admin + n, "/livez") is not None

    def may_be_away(n: int) -> bool:
        others = [other for other in fleet.running() if other not in (n, *fleet.paused)]
        return fleet.up(n) and (may_be_alone or any(map(listens, others)))

    def begin(action: Action) -> str:
        early = action.kind is Kind.STOP and not listens(action.server)
        if early or (action.kind in SERVER_FAULTS and not may_be_away(action.server)):
            spared.add(action)
            return " (spared)"
        _begin(run, action, hosts)
        return ""

    def heal(action: Action) -> str:
        if action not in spared:
            _heal(fleet, action)
        return " (healed)" if action not in spared else " (spared)"

    number = itertools.count()
    steps = []
    for action in actions:
        steps.append(_Step(action.at, next(number), str(action), lambda action=action: begin(action)))
        if action.kind in LENGTHS:
            end = action.at + action.length
            steps.append(_Step(end, next(number), str(action), lambda action=action: heal(action)))
    for step in sorted(steps):
        while not run.faults and (left := began + step.at - time.monotonic()) > 0:
            threading.Event().wait(min(left, 0.1))
        if run.faults:
            log.append(f"{time.monotonic() - began:7.2f} s  a client gave up: {run.faults[0]!r}")
            return
        due = time.monotonic() - began
        log.append(f"{due:7.2f} s  iteration {run.status.current}: {step.text}{step.act()}")


def _begin(run: Run, action: Action, hosts: int) -> None:
    fleet, n = run.fleet, action.server
    match action.kind:
        case Kind.KILL:
            fleet.kill(n)
        case Kind.STOP:
            code = fleet.kill(n, signal.SIGTERM)
            assert code == 0, f"server {n} ended with {code} after SIGTERM"
        case Kind.PAUSE:
            fleet.pause(n)
        case Kind.CUT:
            fleet.links[n].cut()
        case Kind.HANG:
            fleet.links[n].hang()
        case Kind.RESET:
            fleet.links[n].reset()
        case Kind.ADD:
            fleet.add(n, n % hosts)
            fleet.start(n, ready=False)
            run.prober.watch()
        case Kind.REDIS_RESTART:
            fleet.restart_redis()
        case Kind.REDIS_WIPE:
            fleet.wipe_redis()
        case Kind.REDIS_PAUSE:
            fleet.cluster.pause("redis")
            _in_time(action, fleet.cluster.resume, "redis")
        case kind:
            links = node_links_of(fleet)
            NODE_FAULTS[kind](links, n)
            _in_time(action, links.restore, n)


def _in_time(action: Action, back: Callable[..., object], *words: object) -> None:
    """End a fault when it is due, even while a server is stopped here, which may take as long as devices are held."""
    timer = threading.Timer(action.length, back, words)
    timer.daemon = True
    timer.start()


def _heal(fleet: Fleet, action: Action) -> None:
    n = action.server
    match action.kind:
        case Kind.KILL | Kind.STOP:
            fleet.start(n, ready=False)
        case Kind.PAUSE:
            fleet.resume(n)
        case Kind.CUT | Kind.HANG:
            fleet.links[n].restore()
        case Kind.REDIS_PAUSE:
            fleet.cluster.resume("redis")
        case kind if kind in NODE_FAULTS:
            node_links_of(fleet).restore(n)


def node_links_of(fleet: Fleet) -> NodeLinks:
    """Return the links between a fleet's servers; it must have been made with some."""
    assert fleet.node_links is not None, "fleet_of(..., node_links=True)"
    return fleet.node_links
