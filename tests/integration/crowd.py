"""Clients that take part by hand or in threads, whoever the servers are, and the record of what they see.

``faults.Run`` is this with a fleet of its own; here nothing is known of the servers but how to ask them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Self

from integration.cluster import wait_until
from integration.oracle import Journal
from integration.roaming import PATIENCE_S, REPLY_S, RovingClient, RovingHttp, Servers, Turnstile
from integration.watching import PROBE_S, Prober


class Crowd:
    """Clients, each of which asks another server with every request, and probes.

    Args:
        servers: whom they ask.
        clients: so many take part in threads; by hand any others may.
        seed: of their choices.
        probes: whether every server is probed.
        every: seconds between two probes of a server.
        patience: seconds within which a client must get its answer from somebody.
        rest: seconds between two participations of a client in a thread.

    Attributes:
        journal: what the clients see.
        prober: when servers answer.
        turnstile: what all pass before they upload.
        clients: number -> client; made as they are asked for.
        faults: what ended a client's thread.
    """

    def __init__(
        self,
        servers: Servers,
        *,
        clients: int = 0,
        seed: int = 1,
        probes: bool = True,
        every: float = PROBE_S,
        patience: float = PATIENCE_S,
        rest: float = 0.0,
    ) -> None:
        self.servers = servers
        self.journal = Journal()
        self.prober = Prober(servers, self.journal, every)
        self.turnstile = Turnstile()
        self.clients: dict[int, RovingClient] = {}
        self.faults: list[BaseException] = []
        self._seed, self._probes, self._patience, self._rest = seed, probes, patience, rest
        self._over = threading.Event()
        self._members: list[tuple[threading.Thread, RovingHttp]] = []
        for number in range(clients):
            client = self.client(number)
            self.add(f"client-{number}", client.take_part, client.http)

    def add(self, name: str, take_part: Callable[[], object], http: RovingHttp) -> None:
        """Let somebody else take part in a thread, over and over; what it raises is a fault."""
        thread = threading.Thread(target=self._work, args=(take_part,), name=name, daemon=True)
        self._members.append((thread, http))

    def __enter__(self) -> Self:
        if self._probes:
            self.prober.watch()
        for thread, _ in self._members:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.prober.stop()
        for client in self.clients.values():
            client.http.close()

    def stop(self) -> None:
        """Let those in threads come to an end."""
        self._over.set()
        limit = time.monotonic() + 2 * REPLY_S
        for thread, http in self._members:
            if thread.is_alive():
                http.over.set()
        for thread, http in self._members:
            thread.join(max(0.0, limit - time.monotonic()))
            http.over.clear()

    def _work(self, take_part: Callable[[], object]) -> None:
        try:
            while not self._over.is_set():
                take_part()
                self._over.wait(self._rest)
        except BaseException as error:
            if not self._over.is_set():
                self.faults.append(error)

    # ---- by hand

    def client(self, number: int) -> RovingClient:
        """Return a client."""
        if number not in self.clients:
            self.clients[number] = RovingClient(
                self.servers,
                self.journal,
                number,
                self._seed * 1000 + number,
                self._patience,
                self.turnstile,
            )
        return self.clients[number]

    def start_all(self, clients: Iterable[int], server: int | None = None) -> None:
        """Let clients get their places; each must."""
        for number in clients:
            assert self.client(number).start(server), f"client {number} gets no place"

    def upload(self, clients: Iterable[int], server: int | None = None) -> None:
        """Let clients upload; each must get its 200."""
        for number in clients:
            assert self.client(number).upload(server), f"the update of client {number} is refused"

    def fetch(self, clients: Iterable[int], server: int | None = None) -> None:
        """Let clients get the model of their iteration."""
        for number in clients:
            self.client(number).fetch(server)

    def see_everywhere(self, iteration: int) -> None:
        """Get the model of an iteration from every running server."""
        for n in self.servers.running():
            self.client(0).fetch(n, iteration=iteration)

    # ---- in threads

    def wait_for_iterations(self, more: int, seconds: float) -> None:
        """Wait until the clients got the models of so many more iterations; fail if one of them has given up."""
        goal = self.journal.newest() + more
        wait_until(lambda: self.faults or self.journal.newest() >= goal, f"{more} more iterations", seconds)
        self.check_clients()

    def check_clients(self) -> None:
        """Fail with what ended a client's thread."""
        if self.faults:
            raise AssertionError(f"a client gave up: {self.faults}") from self.faults[0]
