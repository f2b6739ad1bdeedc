"""Clients that follow the protocol and change the server with every request.

What they are promised and what they get goes into a Journal, see oracle.py.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from integration.oracle import (
    MODEL,
    Acknowledged,
    Answered,
    Journal,
    data_size_of,
    update_of,
)

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

if TYPE_CHECKING:
    from integration.faults import Fleet

HOST = "127.0.0.1"
POLL_S = 0.02  # of a getModel that answers 201
REPLY_S = 8.0  # longest wait for an answer; servers hold a request for 2 s in these tests
PATIENCE_S = 30.0  # longest time in which a client's request must be answered by somebody
LONGEST_WAIT_S = 0.5  # a client's waits for a next_req_time are cut to this


# ---- requests that roam


@dataclass(frozen=True)
class Reply:
    """An answer, and who gave it when."""

    server: int
    life: int
    asked: float
    at: float
    status: int
    body: bytes


class NobodyAnswers(AssertionError):
    """No server has answered a request in time."""


class RovingHttp:
    """Posts every request to any running server, and again to any after a broken connection.

    That is what old HTTP libraries and load balancers do between a device and the servers. Connections are kept.
    It also carries the requests of a ``StrictDevice``, see ``post``.
    """

    def __init__(
        self,
        fleet: Fleet,
        seed: int,
        on_repeat: Callable[[], None] = lambda: None,
        patience: float = PATIENCE_S,
    ) -> None:
        """Choose servers by ``seed``; ``patience`` is in seconds."""
        self._fleet = fleet
        self._random = random.Random(seed)
        self._on_repeat = on_repeat
        self._patience = patience
        self._kept: dict[int, tuple[int, http.client.HTTPConnection]] = {}
        self.over = threading.Event()

    def post(self, round_: str, body: bytes) -> tuple[int, bytes]:
        """Ask; raise OSError if nobody answers."""
        try:
            reply = self.ask(round_, body)
        except NobodyAnswers as error:
            raise OSError(str(error)) from error
        return reply.status, reply.body

    def ask(self, round_: str, body: bytes, first: int | None = None) -> Reply:
        """Ask any server, ``first`` at first if given.

        Raises:
            NobodyAnswers: the patience or the run is over.
        """
        limit, trouble = time.monotonic() + self._patience, ""
        while time.monotonic() < limit and not self.over.is_set():
            running = self._fleet.running()
            if not running:
                self.over.wait(POLL_S)
                continue
            server, first = self._random.choice(running) if first is None else first, None
            life, asked = self._fleet.lives[server], time.monotonic()
            try:
                status, answer = self._post(server, life, round_, body)
            except (OSError, http.client.HTTPException) as error:
                trouble = f"server {server}: {error!r}"
                self._drop(server)
                self._on_repeat()
                self.over.wait(POLL_S)
                continue
            return Reply(server, life, asked, time.monotonic(), status, answer)
        raise NobodyAnswers(f"nobody answers {round_}; {trouble}")

    def close(self) -> None:
        """Close the kept connections."""
        for server in list(self._kept):
            self._drop(server)

    def _post(self, server: int, life: int, round_: str, body: bytes) -> tuple[int, bytes]:
        known, connection = self._kept.get(server, (None, None))
        if connection is None or known != life:
            self._drop(server)
            connection = http.client.HTTPConnection(HOST, self._fleet.cluster.http + server, timeout=REPLY_S)
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

    Attributes:
        client: its number, which is its place in the model.
        iteration: of the last place it got.
        texts: "not ready" texts and how often they came.
    """

    def __init__(self, fleet: Fleet, journal: Journal, client: int, seed: int) -> None:
        self.client, self.fl_id = client, f"client-{client}"
        self.iteration = 0
        self.texts: Counter[str] = Counter()
        self._journal = journal
        self.http = RovingHttp(fleet, seed, lambda: journal.count(repeated=1))
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
        limit = time.monotonic() + PATIENCE_S
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
        body, limit = codec.encode(request), time.monotonic() + PATIENCE_S
        while True:
            reply = self.http.ask(round_, body, server)
            assert reply.status == 200, (round_, reply.status, reply.body)
            try:
                return reply, codec.decode(kind, reply.body)
            except MalformedRequest:
                self.texts[reply.body.decode()] += 1
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


def upload_of(client: int, iteration: int) -> RequestUpdateModel:
    """Return a client's updateModel: its weights times its data size, as devices send them."""
    size = data_size_of(client)
    weights = tuple(
        FeatureMap(name, values.reshape(-1) * size) for name, values in update_of(client, iteration).items()
    )
    return RequestUpdateModel(
        fl_name="job", fl_id=f"client-{client}", iteration=iteration, feature_map=weights, timestamp="1"
    )
