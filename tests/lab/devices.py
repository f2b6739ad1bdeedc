"""The devices of the lab: they train all the while, whatever happens to the servers, and keep exact accounts.

A dozen clients on the controller, over HTTPS: most ask another server with every request, one always goes through the
load balancer, two are unmodified devices that would end at the first answer they cannot stomach. All upload the
synthetic updates of ``integration.oracle``, so every model tells to the bit whose updates are in it.

    with Devices(addresses, tls, history) as devices:
        with devices.watched("a fault") as seen:
            ...                                     # break something, mend it
            devices.wait_for_iterations(3, 60)
        assert seen.lost == 0 and seen.silence < 10     # seen is filled at the end of the block

What the servers themselves told, how iterations ended and which updates they gave up, comes from their hosts; see
``history.py``.
"""

from __future__ import annotations

import functools
import http.client
import math
import ssl
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from integration.cluster import wait_until
from integration.crowd import Crowd
from integration.oracle import MODEL, Asked, Outcome, Report, judge, longest_gap
from integration.roaming import RovingClient, RovingHttp, strict_device
from strict_device import Fatal

FL_NAME = "job"  # what clients of integration.roaming ask for
PLACES = 8  # all of them must upload: an unmodified device may not survive an update that is refused as one too many
ROVING, STRICT = 9, 2  # and one client behind the balancer
CONNECT_S = 2.0  # longest time until a server has taken a connection, TLS included
REPLY_S = 15.0  # longest time until a server has answered; it may hold a request for 8 s
HELD_S = 7.5  # who was answered sooner was not held to the end
PROBE_S = 0.5  # between two probes of a server
PATIENCE_S = 120.0  # a client gives up, and the test fails, when nobody answered it properly for so long
REST_S = 0.1  # of a client between two participations: the machine carries all hosts as well
WINDOW_MS = 120_000  # longer than any fault but the longest: iterations shall not end by the clock
GLOBAL_WINDOW_MS = 600_000
STRICT_TRAINING_S = 0.1
STRICT_TIME_SCALE = 0.5  # polls every 5 s instead of 10: patience of 90 s with a model that is late
STRICT_PATIENCE_S = 30.0
TRAIL = 6  # questions of a device that gave up, which are told

Address = tuple[str, int]


class Impatient(Exception):
    """The user of an unmodified device starts it again instead of waiting for minutes.

    A server that has not seen an iteration yet tells those whom it refuses to return when all windows are over.
    """


def job() -> dict[str, Any]:
    """Return the sections of the YAML under which these devices train without end."""
    return {
        "fl_name": FL_NAME,
        "fl_iteration_num": 1_000_000,
        "server_mode": "FEDERATED_LEARNING",
        "round": {
            "start_fl_job_threshold": PLACES,
            "update_model_ratio": 1.0,
            "start_fl_job_time_window": WINDOW_MS,
            "update_model_time_window": WINDOW_MS,
            "global_iteration_time_window": GLOBAL_WINDOW_MS,
        },
    }


def initial_model() -> dict[str, Any]:
    """Return the model that the job starts from."""
    return dict(MODEL)


# ---- servers at addresses


class AddressedServers:
    """Servers at any addresses, numbered; some may not exist yet. ``integration.roaming.Servers``.

    Clients leave those alone that did not answer when they were asked last, as long as any other does; the prober
    asks all.

    Args:
        addresses: of the servers, number 0 first.
        tls: None for plain HTTP.
        one_process: whether behind an address there is one server, and not a balancer before many.
    """

    def __init__(
        self, addresses: Sequence[Address], tls: ssl.SSLContext | None, *, one_process: bool = True
    ) -> None:
        self.addresses = list(addresses)
        self._tls, self._one_process = tls, one_process
        self._lives = dict.fromkeys(range(len(addresses)), 0)
        self._silent: set[int] = set()
        self._lock = threading.Lock()

    def known(self) -> Collection[int]:
        return self._lives.keys()

    def running(self) -> Sequence[int]:
        with self._lock:
            return sorted(self._lives.keys() - self._silent) or sorted(self._lives)

    def life(self, n: int) -> int:
        """Return how often a server was found silent; whoever asks a balancer finds another one each time."""
        with self._lock:
            if not self._one_process:
                self._lives[n] += 1
            return self._lives[n]

    def told(self, n: int, answered: bool) -> None:
        with self._lock:
            if answered:
                self._silent.discard(n)
            else:
                self._silent.add(n)
                self._lives[n] += 1

    def connect(self, n: int) -> http.client.HTTPConnection:
        host, port = self.addresses[n]
        if self._tls is None:
            connection = http.client.HTTPConnection(host, port, timeout=CONNECT_S)
        else:
            connection = http.client.HTTPSConnection(host, port, timeout=CONNECT_S, context=self._tls)
        connection.connect()
        connection.sock.settimeout(REPLY_S)
        return connection

    def at(self, host: str) -> list[int]:
        """Return the numbers of the servers at an address."""
        return [n for n, address in enumerate(self.addresses) if address[0] == host]


# ---- what the hosts tell


@dataclass(frozen=True)
class Loss:
    """Accepted updates that the servers gave up, as one of them told it.

    Attributes:
        iteration: they belonged to.
        updates: how many.
        owner: node that had accepted them.
        reason: why.
    """

    iteration: int
    updates: int
    owner: str
    reason: str


class History(Protocol):
    """What all servers of the job have told since the devices began."""

    def outcomes(self) -> Mapping[int, Outcome]:
        """Return how iterations ended, those that any server still knows of."""

    def losses(self) -> Sequence[Loss]:
        """Return the lost updates."""


# ---- the devices


@dataclass(frozen=True)
class End:
    """An unmodified device that gave up.

    Attributes:
        why: in its words.
        asked: the last that it asked, oldest first.
    """

    why: str
    asked: Sequence[Asked]

    def was_held_since_before(self, moment: float) -> bool:
        """Tell whether its last question was asked before a moment, and held to the end: nothing since then did it."""
        last = self.asked[-1]
        return last.began < moment and last.at - last.began >= HELD_S

    def __str__(self) -> str:
        trail = (
            f"{entry.began - self.asked[-1].at:.1f} s {entry.round} {entry.code or 'a text'}"
            + ("" if entry.told is None else f" come in {entry.told:.1f} s")
            for entry in self.asked
        )
        return f"{self.why} ({', '.join(trail)})"


@dataclass
class Seen:
    """What devices saw of one fault, and what it cost.

    Attributes:
        what: the fault.
        seconds: how long was watched.
        iterations: that were completed with a model.
        failed: iteration -> reason of those that ended without.
        silence: longest time, seconds, in which no server at all answered anybody.
        pause: longest time, seconds, without a new model.
        wait: longest time, seconds, in which a client had no proper answer to a request.
        repeats: requests that had to be sent again, their connection being broken or refused.
        texts: answers that said "not ready, come again".
        told: least and greatest time, seconds, after which refused clients were told to come back.
        ends: the unmodified devices that gave up.
        late: those whose last question was asked before and held to the end: it was the fault before that ended them.
        before: what was seen of that one.
        spares: whether it is known that this fault ends no device.
        acknowledged: updates that were answered with 200.
        lost: updates that the servers told to be lost.
        missing: acknowledged updates that are in no model; the others among the lost were sent once more.
    """

    what: str
    seconds: float = 0.0
    iterations: int = 0
    failed: Mapping[int, str] | None = None
    silence: float = 0.0
    pause: float = 0.0
    wait: float = 0.0
    repeats: int = 0
    texts: int = 0
    told: tuple[float, float] = (math.inf, -math.inf)
    ends: Sequence[End] = ()
    late: Sequence[End] = ()
    before: Seen | None = field(default=None, repr=False)
    spares: bool = False
    acknowledged: int = 0
    lost: int = 0
    missing: int = 0

    def sum_up(self, asked: Sequence[Asked], began: float, ended: float) -> None:
        """Take in what clients were answered within a span."""
        self.wait = max((entry.at - max(entry.began, began) for entry in asked), default=ended - began)
        self.repeats = sum(entry.repeats for entry in asked)
        self.texts = sum(entry.texts for entry in asked)
        told = [entry.told for entry in asked if entry.told is not None]
        self.told = min(told, default=math.inf), max(told, default=-math.inf)

    def must_be_harmless(self, *, devices_may_end: bool = False) -> None:
        """Fail unless all was kept, every iteration had its model, and no unmodified device ended.

        Args:
            devices_may_end: unmodified devices end when they are refused twice in a row, or told twice that the
                cluster is in safemode; a fault that lasts long enough cannot spare them that.
        """
        assert (self.lost, self.missing, self.failed) == (0, 0, {}), self
        self.spares = not devices_may_end
        assert devices_may_end or not self.ends, self
        spared = self.before is None or self.before.spares
        assert not (spared and self.late), f"still by the fault before, {self.before}: {self}"

    def __str__(self) -> str:
        failed = f", failed: {dict(self.failed)}" if self.failed else ""
        ends = f"; unmodified devices ended: {'; '.join(map(str, self.ends))}" if self.ends else ""
        ends += f"; still by the fault before ended: {'; '.join(map(str, self.late))}" if self.late else ""
        least, most = self.told
        told = f", refused for {least:.1f} to {most:.1f} s" if most > least else ""
        return (
            f"{self.what}: {self.iterations} iterations in {self.seconds:.0f} s{failed}; silence {self.silence:.1f} s, "
            f"no new model for {self.pause:.1f} s, longest wait {self.wait:.1f} s, {self.repeats} repeats, "
            f"{self.texts} texts{told}; "
            f"{self.acknowledged} updates accepted, {self.lost} lost, {self.missing} in no model{ends}"
        )


class Devices(Crowd):
    """A dozen devices that train all the while.

    Args:
        addresses: of all servers that there may ever be, device ports.
        tls: how the servers are known, None for plain HTTP.
        history: what their hosts tell.
        balancer: the load balancer's address, None if there is none.
        seed: of the clients' choices.

    Attributes:
        at: the servers.
        ends: the unmodified devices that gave up; each was started again.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        tls: ssl.SSLContext | None,
        history: History,
        balancer: Address | None = None,
        seed: int = 1,
    ) -> None:
        self.at = AddressedServers(addresses, tls)
        super().__init__(self.at, clients=ROVING, seed=seed, every=PROBE_S, patience=PATIENCE_S, rest=REST_S)
        self.history = history
        self.ends: list[End] = []
        self._seen: Seen | None = None  # of the last fault
        if balancer is not None:
            behind = AddressedServers([balancer], tls, one_process=False)
            client = RovingClient(behind, self.journal, ROVING, seed, PATIENCE_S, self.turnstile)
            self.clients[ROVING] = client
            self.add("client behind the balancer", client.take_part, client.http)
        for number in range(ROVING + 1, ROVING + 1 + STRICT):
            self._add_strict(number, seed)

    def _add_strict(self, number: int, seed: int) -> None:
        again = functools.partial(self.journal.count, repeated=1)
        http = RovingHttp(self.at, seed * 1000 + number, again, PATIENCE_S, self.turnstile)

        def sleep(seconds: float) -> None:
            if seconds > STRICT_PATIENCE_S:
                raise Impatient
            http.over.wait(seconds)

        def take_part() -> None:
            device = strict_device(
                http, self.journal, number, STRICT_TRAINING_S, sleep=sleep, time_scale=STRICT_TIME_SCALE
            )
            try:
                device.run()
            except Impatient:
                pass
            except Fatal as end:
                if http.over.is_set():
                    raise
                asked = [entry for entry in self.journal.asked if entry.client == number]
                self.ends.append(End(str(end), asked[-TRAIL:]))

        self.add(f"unmodified device {number}", take_part, http)

    # ---- looking

    def judge(self, *, lost: int | None = None, **options: Any) -> Report:
        """Judge all that was seen since the devices began; see ``oracle.judge``.

        Training goes on: the servers may tell the end of an iteration whose model nobody has asked for yet. It is
        judged the next time. Whoever gets a place has got the model before, so the iterations until then are known.

        Args:
            lost: how many updates may be lost; None for those that the servers told.
            options: of ``oracle.judge``.
        """
        self.check_clients()
        journal = self.journal.copy()  # before the outcomes, so that none is missing for what is in it
        told = self._lost() if lost is None else lost
        ended = {n: outcome for n, outcome in self.history.outcomes().items() if n <= journal.newest()}
        return judge(journal, ended, lost=told, after=self._first_iteration() - 1, **options)

    @contextmanager
    def watched(self, what: str) -> Iterator[Seen]:
        """Watch for the length of the block, then judge; what is seen stands in the result from then on.

        Raises:
            AssertionError: the oracle found a fault, or a client gave up.
        """
        seen, began = Seen(what, before=self._seen), time.monotonic()
        self._seen = seen
        lost, known = self._lost(), self.journal.newest()
        asked, promised, ends = len(self.journal.asked), len(self.journal.acknowledged), len(self.ends)
        yield seen
        ended = time.monotonic()
        report = self.judge(may_fail=bool)
        seen.seconds = ended - began
        seen.iterations = sum(iteration > known for iteration in report.members)
        seen.failed = {k: why for k, why in report.failed.items() if k > known}
        seen.silence = longest_gap([entry.at for entry in list(self.journal.answered)], began, ended)
        seen.pause = longest_gap(self.journal.first_seen().values(), began, ended)
        seen.sum_up(self.journal.asked[asked:], began, ended)
        new = self.ends[ends:]
        seen.late = [end for end in new if end.was_held_since_before(began)]
        seen.ends = [end for end in new if not end.was_held_since_before(began)]
        seen.acknowledged = len(self.journal.acknowledged) - promised
        seen.lost = self._lost() - lost
        seen.missing = sum(iteration > known for iteration, _ in report.missing)

    def _first_iteration(self) -> int:
        """Return the first one that nobody but these devices took part in; the job may be older than they are."""
        found = self.journal.answered[0].serving
        return 1 if found == 1 else found + 1

    def _lost(self) -> int:
        return sum(loss.updates for loss in self.history.losses())

    def silence_at(self, servers: Collection[int], since: float) -> float:
        """Return the longest time since a moment in which none of these servers answered a probe; seconds."""
        return self.prober.gap(since, servers=servers)

    # ---- having a hand in who uploads what to whom

    @contextmanager
    def held(self) -> Iterator[int]:
        """Let the places of an iteration be given and nobody upload; return its number. Then all go on."""
        iteration = self.turnstile.hold(after=self.journal.serving())
        try:
            wait_until(lambda: self.faults or self.turnstile.waiting == PLACES, "all places are taken", 60)
            self.check_clients()
            yield iteration
        finally:
            self.turnstile.open()

    def let_upload(self, clients: int, iteration: int, server: int) -> None:
        """Let so many of those who are held upload to a server, and wait until each has its 200."""
        goal = len(self.journal.promised(iteration)) + clients
        self.turnstile.admit(clients, server)
        accepted = f"{clients} updates of iteration {iteration} are accepted"
        wait_until(lambda: self.faults or len(self.journal.promised(iteration)) >= goal, accepted, 30)
        self.check_clients()
