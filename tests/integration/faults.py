"""A kit for faults: servers on hosts that can be killed, paused and cut off, clients that roam among them, a record.

    with fleet_of(tmp_path, {0: 0, 1: 1}) as fleet, Run(fleet) as run:     # server 0 on host 0, server 1 on host 1
        run.start_all(range(4))                     # by hand: clients 0 to 3 get their places ...
        run.upload(range(2))                        # ... and two of them upload, each request at another server
        fleet.kill(1)
        run.upload(range(2, 4))
        run.fetch(range(4))
        report = run.judge()                        # see oracle.py; for what clients do, crowd.py

``Run(fleet, clients=10)`` lets clients take part in threads instead; schedule.py makes up faults from a seed. With
``fleet_of(..., node_links=True)`` the ways between servers can be cut, see ``NodeLinks``. Only loopback and processes
of the test's own are touched.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from integration.cluster import Cluster, Host, wait_until
from integration.crowd import Crowd
from integration.detour import detour
from integration.links import Link
from integration.oracle import MODEL, Outcome, Report, judge
from integration.roaming import REPLY_S
from integration.watching import StatusWatch

from fedcore.models.formats import write_model

BAD_WORDS = ("Traceback", "Unhandled", "inner error", '"level": "critical"')


class NodeLinks:
    """The ways between servers: one link from each to each other one, see detour.py.

    What is done to a link ends with ``restore`` of one of its ends. Nobody listens on the links to a server that does
    not run, so that those who ask for it are refused as they would be by its host.

    Attributes:
        links: (who connects, to whom) -> the link.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.links: dict[tuple[int, int], Link] = {}
        self._absent: set[int] = set()
        self._broken: dict[tuple[int, int], Callable[[Link], None]] = {}
        self._lock = threading.RLock()  # a link may come back while a server ends

    def add(self, n: int, hosts: Mapping[int, Host]) -> None:
        """Lay the links between a server and all others."""
        with self._lock:
            for other in hosts.keys() - {n}:
                for one, to in ((n, other), (other, n)):
                    if (one, to) not in self.links:
                        port, host = self._cluster.tcp + to, hosts[to].address
                        self.links[one, to] = Link(port, host, (detour(one, host), port))
            self._absent.discard(n)
            self._apply(self._to(n))

    def remove(self, n: int) -> None:
        """Refuse all who connect to a server."""
        with self._lock:
            self._absent.add(n)
            self._apply(self._to(n))

    def cut(self, n: int) -> None:
        """End all connections between a server and the others, and refuse new ones."""
        self._break(Link.cut, [*self._to(n), *self._of(n)])

    def vanish(self, n: int) -> None:
        """Let nothing through between a server and the others, and no connection come about."""
        self._break(Link.vanish, [*self._to(n), *self._of(n)])

    def deafen(self, n: int) -> None:
        """Let nothing through on connections that others make to a server; it still reaches them."""
        self._break(Link.vanish, self._to(n))

    def mute(self, n: int) -> None:
        """Carry what a server and the others ask of each other, but hold the answers."""
        self._break(Link.mute, [*self._to(n), *self._of(n)])

    def restore(self, n: int) -> None:
        """Let everything through again between a server and the others."""
        with self._lock:
            pairs = [*self._to(n), *self._of(n)]
            for pair in pairs:
                self._broken.pop(pair, None)
            self._apply(pairs)

    def close(self) -> None:
        """End the links."""
        with self._lock:
            for link in self.links.values():
                link.close()
            self.links.clear()

    def _to(self, n: int) -> list[tuple[int, int]]:
        return [pair for pair in self.links if pair[1] == n]

    def _of(self, n: int) -> list[tuple[int, int]]:
        return [pair for pair in self.links if pair[0] == n]

    def _break(self, how: Callable[[Link], None], pairs: Iterable[tuple[int, int]]) -> None:
        with self._lock:
            for pair in pairs:
                self._broken[pair] = how
                self._apply([pair])

    def _apply(self, pairs: Iterable[tuple[int, int]]) -> None:
        for one, to in pairs:
            link, how = self.links[one, to], self._broken.get((one, to))
            if how is None:
                how = Link.cut if to in self._absent else Link.restore
            how(link)


class Fleet:
    """Numbered servers of one job, the hosts they run on, and their links to Redis.

    Attributes:
        cluster: processes and files.
        hosts: server -> host; may grow by ``add``.
        lives: server -> which of its processes runs, or ran last; counted from 0.
        links: server -> its way to Redis; every server has one of its own.
        paused: servers that stand still.
        node_links: the ways between servers, if they can be cut.
    """

    def __init__(self, cluster: Cluster, hosts: Mapping[int, int], *, node_links: bool = False) -> None:
        self.cluster = cluster
        self.hosts: dict[int, Host] = {n: cluster.host(number) for n, number in hosts.items()}
        self.lives: dict[int, int] = {}
        self.links: dict[int, Link] = {}
        self.paused: set[int] = set()
        self.node_links = NodeLinks(cluster) if node_links else None

    def add(self, n: int, host: int) -> None:
        """Make a server known that may be started."""
        self.hosts[n] = self.cluster.host(host)

    def start(self, n: int, *options: str, ready: bool = True, env: Mapping[str, str] | None = None) -> None:
        """Start a server, or start it again."""
        if n not in self.links:
            self.links[n] = Link(self.cluster.redis_port)
        assert not self.up(n), f"server {n} runs"
        if self.node_links is not None:
            self.node_links.add(n, self.hosts)
        self.cluster.start_server_on(
            self.hosts[n],
            n,
            *options,
            redis_port=self.links[n].port,
            ready=False,
            env=env,
            detour=self.node_links is not None,
        )
        self.lives[n] = self.lives.get(n, -1) + 1
        if ready:
            self.wait_ready(n)

    def start_all(self, **options: Any) -> None:
        """Start all servers beside each other."""
        for n in self.hosts:
            self.start(n, ready=False, **options)
        self.wait_ready(*self.hosts)

    def wait_ready(self, *servers: int) -> None:
        """Wait until these servers are ready, all that run if none is named."""
        for n in servers or self.running():
            self.cluster.wait_listening(self.cluster.admin + n, self.cluster.name(n))
            wait_until(lambda n=n: self.cluster.ready(n), f"server {n} is ready")

    def kill(self, n: int, number: int = signal.SIGKILL) -> int:
        """Send a signal and wait for the end; return the exit code."""
        self.resume(n)
        code = self.cluster.kill(self.cluster.name(n), number)
        if self.node_links is not None:
            self.node_links.remove(n)
        return code

    def pause(self, n: int) -> None:
        """Let a server stand still."""
        self.paused.add(n)
        self.cluster.pause(self.cluster.name(n))

    def resume(self, n: int) -> None:
        """Let a server go on."""
        if n in self.paused:
            self.paused.discard(n)
            self.cluster.resume(self.cluster.name(n))

    def up(self, n: int) -> bool:
        """Tell whether nobody has killed this server since it was started."""
        return self.cluster.name(n) in self.cluster.processes

    def running(self) -> list[int]:
        """Return the servers that were started and not killed; paused ones too."""
        return [n for n in sorted(self.lives) if self.up(n)]

    def at(self, n: int) -> Cluster:
        """Return the cluster as seen by who talks to one server."""
        return self.cluster.at(n)

    # ---- as Servers, see roaming.py

    def known(self) -> Collection[int]:
        """Return all servers that may ever be started."""
        return self.hosts.keys()

    def life(self, n: int) -> int:
        """Return which process of a server runs, or ran last."""
        return self.lives.get(n, -1)

    def connect(self, n: int) -> http.client.HTTPConnection:
        """Return a connection to the devices' port of a server; nobody is there if it was killed."""
        if not self.up(n):
            raise ConnectionRefusedError(f"server {n} is not started")
        return self.cluster.connect(self.cluster.http + n, REPLY_S)

    def told(self, n: int, answered: bool) -> None:
        """Need no word of who answers: who kills servers here knows it."""

    # ---- what they tell

    def metric(self, line: str, servers: Iterable[int] | None = None) -> float:
        """Return the sum of a metric over the running servers, or over these."""
        return sum(self.cluster.metric(line, n) for n in (self.running() if servers is None else servers))

    def log(self, n: int) -> str:
        """Return what all processes of a server have written."""
        return self.cluster.log(self.cluster.name(n))

    def restart_redis(self) -> None:
        """Stop Redis in order and start it with its data."""
        self.cluster.kill("redis", signal.SIGTERM)
        self.cluster.start_redis(keep=True)

    def wipe_redis(self) -> None:
        """End Redis and start it without data."""
        self.cluster.wipe_redis()

    @contextmanager
    def redis_paused(self) -> Iterator[None]:
        """Let Redis stand still; connections to it are taken."""
        self.cluster.pause("redis")
        try:
            yield
        finally:
            self.cluster.resume("redis")

    def check_alive(self) -> None:
        """Fail if a server has ended that nobody killed, or has logged what no fault excuses."""
        for n in self.lives:
            if self.up(n):
                code = self.cluster.processes[self.cluster.name(n)].poll()
                assert code is None, f"server {n} ended by itself with {code}:\n{self.log(n)[-3000:]}"
            bad = [line for line in self.log(n).splitlines() if any(word in line for word in BAD_WORDS)]
            assert not bad, f"log of server {n}: {bad[0][:3000]}"

    def outcomes(self) -> list[tuple[int, Outcome]]:
        """Return what the servers' logs tell of ended iterations."""
        told = []
        for n in self.lives:
            for line in self.log(n).splitlines():
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if record.get("message", "").startswith(f"iteration {record.get('iteration')} ended: "):
                        told.append((record["iteration"], Outcome(record["valid"], record["result"])))
        return told

    def close(self) -> None:
        """End the links; the cluster ends the processes."""
        for link in self.links.values():
            link.close()
        if self.node_links is not None:
            self.node_links.close()


@contextmanager
def fleet_of(
    directory: Path,
    hosts: Mapping[int, int],
    *,
    places: int = 10,
    fedcore: Mapping[str, Any] | None = None,
    start: bool = True,
    redis: int | None = None,
    node_links: bool = False,
    **settings: Any,
) -> Iterator[Fleet]:
    """Prepare a job whose model is ``oracle.MODEL``, start a Redis that keeps its data, and the servers.

    Args:
        directory: for everything.
        hosts: server -> number of its host.
        places: start_fl_job_threshold.
        fedcore: sections of the YAML's ``fedcore``.
        start: whether to start the servers.
        redis: port of a Redis that runs already, if the job is to have that one.
        node_links: whether the ways between servers can be cut.
        settings: keys of ``round``, or fl_iteration_num; windows are ten minutes if not given.
    """
    windows = dict.fromkeys(
        ("start_fl_job_time_window", "update_model_time_window", "global_iteration_time_window"), 600_000
    )
    sections = {"device": {"hold_time": 2.0, "retry_margin": 0.1}} | dict(fedcore or {})
    given = {"fl_iteration_num": 1_000_000} | windows | settings
    directory.mkdir(parents=True, exist_ok=True)
    with Cluster(directory, start_fl_job_threshold=places, fedcore=sections, **given) as cluster:
        write_model(directory / "model.safetensors", MODEL, set(), {})
        if redis is None:
            cluster.start_redis(keep=True)
        else:
            cluster.use_redis(redis)
        fleet = Fleet(cluster, hosts, node_links=node_links)
        try:
            if start:
                fleet.start_all()
            yield fleet
        finally:
            fleet.close()


class Run(Crowd):
    """A fleet at work under observation: clients by hand or in threads, probes, the status, the journal.

    Attributes:
        fleet: the servers.
        status: how iterations end.
    """

    def __init__(self, fleet: Fleet, *, clients: int = 0, seed: int = 1, probes: bool = True) -> None:
        """Let so many clients take part in threads; by hand any others may."""
        super().__init__(fleet, clients=clients, seed=seed, probes=probes)
        self.fleet = fleet
        self.status = StatusWatch(fleet.cluster)

    def __enter__(self) -> Run:
        self.status.start()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.status.stop()

    # ---- the end

    def outcomes(self) -> dict[int, Outcome]:
        """Return how each iteration ended; fail if Redis or two servers tell it differently."""
        merged: dict[int, Outcome] = {}
        for iteration, outcome in [*self.fleet.outcomes(), *self.status.outcomes]:
            known = merged.setdefault(iteration, outcome)
            assert known.valid == outcome.valid, f"iteration {iteration} ended twice: {known}, {outcome}"
        return merged

    def judge(self, **options: Any) -> Report:
        """Let the oracle judge what was seen until now; for its options see ``oracle.judge``."""
        self.check_clients()
        self.fleet.check_alive()
        return judge(self.journal, self.outcomes(), **options)
