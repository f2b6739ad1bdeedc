"""Clients that follow the protocol and change the server with every request; unmodified devices among them.

What they are promised and what they get goes into a Journal, see oracle.py.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from integration.oracle import (
    CLIENTS,
    MODEL,
    Acknowledged,
    Answered,
    Asked,
    Journal,
    data_size_of,
    update_of,
)
from strict_device import StrictDevice

from fedcore.errors import MalformedRequest
from fedcore.wire import codec
from fedcore.wire.messages import (
    FeatureMap,
    RequestFLJob,
    RequestGetModel,
    RequestUpdateModel,
    ResponseFLJob,
    ResponseGetModel,
    ResponseUpdateModel,
)

POLL_S = 0.02  # of a getModel that answers 201
REPLY_S = 8.0  # longest wait for an answer; servers hold a request for 2 s in these tests
PATIENCE_S = 30.0  # longest time in which a client's request must be answered by somebody
_NEVER = 1 << 40  # no iteration has such a number
LONGEST_WAIT_S = 0.5  # a client's waits for a next_req_time are cut to this


# ---- requests that roam


class Servers(Protocol):
    """Servers that are asked, by numbers: those of a Fleet, or some at any addresses."""

    def known(self) -> Collection[int]:
        """Return all that there are or may be."""

    def running(self) -> Sequence[int]:
        """Return those that it makes sense to ask."""

    def life(self, n: int) -> int:
        """Return which process of a server answers now, counted from 0; a step too many does no harm."""

    def connect(self, n: int) -> http.client.HTTPConnection:
        """Return a new connection, open or not; raise OSError."""

    def told(self, n: int, answered: bool) -> None:
        """Hear whether a server that was asked has answered."""


@dataclass(frozen=True)
class Reply:
    """An answer, and who gave it when, after how many tries in vain."""

    server: int
    life: int
    asked: float
    at: float
    status: int
    body: bytes
    repeats: int


class NobodyAnswers(AssertionError):
    """No server has answered a request in time."""


class Turnstile:
    """Where clients wait before they upload, so that a test knows who has uploaded what to whom when a fault comes.

    It stands open until somebody holds what belongs to later iterations.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open_until: int = _NEVER  # the last iteration that passes freely
        self._admitted: list[int | None] = []  # where those go that are let through one by one
        self._waiting = 0
        self._passed = 0  # latest iteration

    def hold(self, after: int) -> int:
        """Let nobody through with an update of an iteration after this one, or after one that somebody is through with.

        Returns:
            The first iteration that is held.
        """
        with self._changed:
            self._open_until = max(after, self._passed)
            return self._open_until + 1

    def admit(self, clients: int, server: int | None = None) -> None:
        """Let so many through who wait or come; they ask this server first."""
        with self._changed:
            self._admitted += [server] * clients
            self._changed.notify_all()

    def open(self) -> None:
        """Let everybody through."""
        with self._changed:
            self._open_until = _NEVER
            self._admitted.clear()
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """How many clients wait."""
        with self._changed:
            return self._waiting

    def pass_(self, iteration: int, over: threading.Event, servers: Collection[int]) -> int | None:
        """Wait until it is one's turn, or the run is over.

        Args:
            iteration: that the update belongs to.
            over: ends the waiting.
            servers: those that the client can ask at all.

        Returns:
            The server to ask first, None for any.
        """
        with self._changed:
            self._waiting += 1
            try:
                while iteration > self._open_until and not over.is_set():
                    for place, server in enumerate(self._admitted):
                        if server is None or server in servers:
                            return self._admitted.pop(place)
                    self._changed.wait(POLL_S * 10)
                self._passed = max(self._passed, iteration)
                return None
            finally:
                self._waiting -= 1


class RovingHttp:
    """Posts every request to any running server, and again to any after a broken connection.

    That is what old HTTP libraries and load balancers do between a device and the servers. Connections are kept.
    """

    def __init__(
        self,
        servers: Servers,
        seed: int,
        on_repeat: Callable[[], None] = lambda: None,
        patience: float = PATIENCE_S,
        turnstile: Turnstile | None = None,
    ) -> None:
        """Choose servers by ``seed``; ``patience`` is in seconds."""
        self._servers = servers
        self._random = random.Random(seed)
        self._on_repeat = on_repeat
        self._patience = patience
        self._kept: dict[int, tuple[int, http.client.HTTPConnection]] = {}
        self.over = threading.Event()
        self._turnstile = turnstile or Turnstile()

    def pass_turnstile(self, iteration: int) -> int | None:
        """Wait for one's turn to upload; return the server to ask first, None for any."""
        return self._turnstile.pass_(iteration, self.over, self._servers.known())

    def ask(self, round_: str, body: bytes, first: int | None = None) -> Reply:
        """Ask any server, ``first`` at first if given.

        Raises:
            NobodyAnswers: the patience or the run is over.
        """
        limit, trouble, repeats = time.monotonic() + self._patience, "", 0
        while time.monotonic() < limit and not self.over.is_set():
            running = self._servers.running()
            if not running:
                self.over.wait(POLL_S)
                continue
            server, first = self._random.choice(running) if first is None else first, None
            life, asked = self._servers.life(server), time.monotonic()
            try:
                status, answer = self._post(server, life, round_, body)
            except (OSError, http.client.HTTPException) as error:
                trouble, repeats = f"server {server}: {error!r}", repeats + 1
                self._drop(server)
                self._servers.told(server, answered=False)
                self._on_repeat()
                self.over.wait(POLL_S)
                continue
            self._servers.told(server, answered=True)
            return Reply(server, life, asked, time.monotonic(), status, answer, repeats)
        raise NobodyAnswers(f"nobody answers {round_}; {trouble}")

    def close(self) -> None:
        """Close the kept connections."""
        for server in list(self._kept):
            self._drop(server)

    def _post(self, server: int, life: int, round_: str, body: bytes) -> tuple[int, bytes]:
        known, connection = self._kept.get(server, (None, None))
        if connection is None or known != life:
            self._drop(server)
            connection = self._servers.connect(server)
            self._kept[server] = life, connection
        connection.request("POST", f"/{round_}", body)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def _drop(self, server: int) -> None:
        _, connection = self._kept.pop(server, (None, None))
        if connection is not None:
            connection.close()


# ---- clients


class RovingClient:
    """One client that follows the protocol, changes the server with each request and notes what it sees.

    Args:
        servers: whom it asks.
        journal: where it notes what it sees.
        client: see Attributes.
        seed: of its choices.
        patience: seconds within which a request must be answered with a table by somebody.
        turnstile: what it passes before it uploads, if a test wants to have a hand in that.

    Attributes:
        client: its number, which is its place in the model.
        iteration: of the last place it got.
        texts: "not ready" texts and how often they came.
    """

    def __init__(
        self,
        servers: Servers,
        journal: Journal,
        client: int,
        seed: int,
        patience: float = PATIENCE_S,
        turnstile: Turnstile | None = None,
    ) -> None:
        self.client, self.fl_id = client, fl_id_of(client)
        self.iteration = 0
        self.texts: Counter[str] = Counter()
        self._journal, self._patience = journal, patience
        self.http = RovingHttp(servers, seed, lambda: journal.count(repeated=1), patience, turnstile)
        self.over = self.http.over

    # ---- one round each

    def start(self, server: int | None = None) -> bool:
        """Ask once for a place; after a refusal wait as told, and return False."""
        request = RequestFLJob(
            fl_name="job", fl_id=self.fl_id, data_size=data_size_of(self.client), timestamp="1"
        )
        reply, answer = self._ask("startFLJob", request, ResponseFLJob, server)
        granted = answer.retcode == 200
        self._note(reply, answer.iteration, granted)
        if not granted:
            self._refused(answer.retcode, answer.reason, answer.next_req_time)
            return False
        self.iteration = answer.iteration
        self._take_model(reply, answer.iteration - 1, answer.iteration, answer.feature_map)
        return True

    def upload(self, server: int | None = None) -> bool:
        """Upload for the iteration of the last place; after a refusal wait as told, and return False."""
        iteration = self.iteration
        first = self.http.pass_turnstile(iteration)
        server = first if server is None else server
        self._journal.send(iteration, self.client)
        reply, answer = self._ask(
            "updateModel", upload_of(self.client, iteration), ResponseUpdateModel, server
        )
        if answer.retcode != 200:
            self._refused(answer.retcode, answer.reason, answer.next_req_time)
            return False
        assert answer.reason == "success not ready", answer.reason
        self._journal.acknowledge(Acknowledged(iteration, self.client, reply.server, reply.at))
        return True

    def fetch(self, server: int | None = None, *, iteration: int | None = None) -> int:
        """Get the model of the last place's iteration, or of another; return the iteration that is then served."""
        wanted = self.iteration if iteration is None else iteration
        request = RequestGetModel(fl_name="job", iteration=wanted, timestamp="1")
        limit = time.monotonic() + self._patience
        while True:
            reply, answer = self._ask("getModel", request, ResponseGetModel, server)
            self._note(reply, answer.iteration, False)
            if answer.retcode == 200:
                self._take_model(reply, wanted, answer.iteration, answer.feature_map)
                return answer.iteration
            assert answer.retcode == 201, (answer.retcode, answer.reason)
            if time.monotonic() > limit:
                raise NobodyAnswers(f"no model of iteration {wanted}: {answer.reason}")
            self._pause(POLL_S)

    def take_part(self) -> None:
        """Start, upload, get the model; a refusal ends it early."""
        if self.start() and self.upload():
            self.fetch()

    # ---- steps

    def _ask(self, round_: str, request: Any, kind: type, server: int | None) -> tuple[Reply, Any]:
        """Ask until a table comes; a text means to come again."""
        body, began, repeats, texts = codec.encode(request), time.monotonic(), 0, 0
        limit = began + self._patience
        while True:
            reply = self.http.ask(round_, body, server)
            repeats += reply.repeats
            assert reply.status == 200, (round_, reply.status, reply.body)
            try:
                table = codec.decode(kind, reply.body)
                self._journal.ask(
                    Asked(
                        round_, self.client, began, reply.at, repeats, texts, table.retcode, told_wait(table)
                    )
                )
                return reply, table
            except MalformedRequest:
                self.texts[reply.body.decode()] += 1
                texts += 1
            if time.monotonic() > limit:
                raise NobodyAnswers(f"{round_}: {dict(self.texts)}")
            self._pause(0.1)

    def _note(self, reply: Reply, serving: int, placed: bool) -> None:
        self._journal.answer(Answered(reply.server, reply.life, reply.asked, reply.at, serving, placed))

    def _take_model(
        self, reply: Reply, iteration: int, serving: int, feature_map: Iterable[FeatureMap] | None
    ) -> None:
        weights = {item.weight_fullname: item.data.copy() for item in feature_map or ()}
        assert weights.keys() == MODEL.keys(), weights.keys()
        self._journal.receive(iteration, serving, reply.server, weights, reply.at)

    def _refused(self, code: int, reason: str | None, next_req_time: str | None) -> None:
        assert code == 300, (self.fl_id, code, reason)
        self._journal.count(refused=1)
        wait = int(next_req_time or 0) / 1000 - time.time()
        self._pause(min(max(wait, POLL_S), LONGEST_WAIT_S))

    def _pause(self, seconds: float) -> None:
        if self.over.wait(seconds):
            raise NobodyAnswers("the run is over")


def told_wait(table: Any) -> float | None:
    """Return after how many seconds a refusal asks to come again, None if the answer is none."""
    if table.retcode != 300:
        return None
    moment = table.timestamp if isinstance(table, ResponseGetModel) else table.next_req_time
    return int(moment) / 1000 - time.time()


def fl_id_of(client: int) -> str:
    """Return the name under which a client comes."""
    return f"client-{client}"


def upload_of(client: int, iteration: int) -> RequestUpdateModel:
    """Return a client's updateModel: its weights times its data size, as devices send them."""
    size = data_size_of(client)
    weights = tuple(
        FeatureMap(name, values.reshape(-1) * size) for name, values in update_of(client, iteration).items()
    )
    return RequestUpdateModel(
        fl_name="job", fl_id=fl_id_of(client), iteration=iteration, feature_map=weights, timestamp="1"
    )


# ---- unmodified devices


class NotedHttp:
    """Carries the requests of a strict device to any server, and notes what it is promised and gets."""

    def __init__(self, http: RovingHttp, journal: Journal, client: int) -> None:
        assert client < CLIENTS
        self._http, self._journal, self._client = http, journal, client

    def post(self, round_: str, body: bytes) -> tuple[int, bytes]:
        """Ask; raise OSError if nobody answers."""
        iteration, server = 0, None
        if round_ == "getModel":
            iteration = codec.decode(RequestGetModel, body).iteration
        elif round_ == "updateModel":
            iteration = codec.decode(RequestUpdateModel, body).iteration
            server = self._http.pass_turnstile(iteration)
            self._journal.send(iteration, self._client)
        began = time.monotonic()
        try:
            reply = self._http.ask(round_, body, server)
        except NobodyAnswers as error:
            raise OSError(str(error)) from error
        self._note(began, round_, iteration, reply)
        return reply.status, reply.body

    def _note(self, began: float, round_: str, iteration: int, reply: Reply) -> None:
        """Put down an answer; a text or what the device cannot stomach is its own affair."""
        try:
            table: Any = codec.decode(_TABLES[round_], reply.body)
        except MalformedRequest:
            self._journal.ask(Asked(round_, self._client, began, reply.at, reply.repeats, 1, None))
            return
        code = table.retcode
        self._journal.ask(
            Asked(round_, self._client, began, reply.at, reply.repeats, 0, code, told_wait(table))
        )
        if round_ == "updateModel":
            if code == 200:
                self._journal.acknowledge(Acknowledged(iteration, self._client, reply.server, reply.at))
            return
        placed = round_ == "startFLJob" and code == 200
        self._journal.answer(
            Answered(reply.server, reply.life, reply.asked, reply.at, table.iteration, placed)
        )
        if code == 200:
            weights = {item.weight_fullname: item.data.copy() for item in table.feature_map}
            whose = table.iteration - 1 if placed else iteration
            self._journal.receive(whose, table.iteration, reply.server, weights, reply.at)


_TABLES: Mapping[str, type] = {
    "startFLJob": ResponseFLJob,
    "updateModel": ResponseUpdateModel,
    "getModel": ResponseGetModel,
}


def strict_device(
    http: RovingHttp, journal: Journal, client: int, seconds: float, **options: Any
) -> StrictDevice:
    """Make an unmodified device behind something that finds it a living server, as a load balancer does.

    Args:
        http: finds the servers.
        journal: where it is noted what the device sees.
        client: its number.
        seconds: that its training takes.
        options: of StrictDevice.
    """

    def train(weights: Mapping[str, np.ndarray], plan: object) -> tuple[dict[str, np.ndarray], float]:
        http.over.wait(seconds)
        return update_of(client, device.iteration), 0.5

    device = StrictDevice(
        "http://servers",
        train,
        data_size_of(client),
        fl_id=fl_id_of(client),
        model={name: values.size for name, values in MODEL.items()},
        http=NotedHttp(http, journal, client),
        **options,
    )
    return device
