"""A job in memory: its servers, its devices, and what must hold whatever breaks.

``Job`` lets everything go on in small moves, one at a time: a request to Redis is executed, an answer arrives, a thread
does a job, a notice is heard, a message between nodes arrives. Between any two of them a test may break something.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from model.cluster import key_of
from model.server_in_memory import (
    CLIENTS,
    FIRST_MODEL,
    HOLD_S,
    TEMPLATE,
    Asked,
    End,
    Host,
    NodeNetwork,
    OpenFiles,
    RecordedState,
    RecordedStore,
    Server,
    content_of,
    full_disks,
    iteration_told,
    settings_of,
)
from twisted.logger import LogLevel, globalLogPublisher

from fedcore.core.iteration import GLOBAL_TIMEOUT, round_timeout
from fedcore.core.job import RunningState
from fedcore.models import checkpoints
from fedcore.services.answers import Answer
from fedcore.services.publication import DIGEST
from fedcore.services.terms import policy_of
from fedcore.wire.image import ModelImage

PATIENCE = 60  # seconds
MOST_MOVES = 5000  # of servers that were given nothing new to do
TIMEOUTS = frozenset({GLOBAL_TIMEOUT, round_timeout("startFLJob"), round_timeout("updateModel")})
_MEMORY = "/dev/shm"  # checkpoints are synced, which takes a real disk a while
_graveyard: list[Server] = []  # what a killed server was waiting for never comes, not even its end


@contextmanager
def no_failures_logged() -> Iterator[None]:
    """Every exception that only ends in the log is a fault."""
    failures: list[Any] = []

    def observe(event: Any) -> None:
        if event.get("log_level") is LogLevel.critical:
            failures.append(event.get("log_failure") or event.get("log_format"))

    globalLogPublisher.addObserver(observe)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(observe)
    assert not failures, failures


class Job:
    """The servers of one job, each at a place of its own, and everything around them.

    Attributes:
        servers: by place; None where none runs.
        promised: iteration -> clients that were told that their update counts.
        given_up: clients whose updates may be lost: their ledger was out of reach of everybody for too long.
    """

    def __init__(self, hosts: Sequence[int] = (1,), *, last: int = 1000) -> None:
        """Start one server per entry of ``hosts``, on the host with that number."""
        places, quorum = (3, 2) if len(hosts) == 1 else (4, 3)
        self.settings = settings_of(places, quorum, last)
        self.policy = policy_of(self.settings)
        self.now = 0.0
        self.starts = 0
        self.promised: dict[int, set[str]] = {}
        self.given_up: set[str] = set()
        self.told: dict[str, int] = {}
        self.models: dict[int, ModelImage] = {0: FIRST_MODEL}
        self.store = RecordedStore(lambda: self.now * 1000, self._tell)
        self.store.on_end = self._ended
        self.network = NodeNetwork()
        self._closing = ExitStack()
        enter = self._closing.enter_context
        enter(no_failures_logged())
        memory = _MEMORY if os.path.isdir(_MEMORY) else None
        directory = Path(enter(tempfile.TemporaryDirectory(dir=memory)))
        self.files = OpenFiles()
        self._closing.callback(self.files.stop)
        self.hosts = {number: Host(directory, number) for number in sorted(set(hosts))}
        enter(full_disks(list(self.hosts.values())))
        self._places = [self.hosts[number] for number in hosts]
        self.servers: list[Server | None] = [None for _ in hosts]
        self._turn = 0
        for place in range(len(hosts)):
            self.start(place)

    def close(self) -> None:
        """Drop everything; say if a failure was logged."""
        _graveyard.extend(self.living)
        self._closing.close()

    # ---- servers

    @property
    def living(self) -> list[Server]:
        return [server for server in self.servers if server is not None]

    @property
    def shared(self) -> RecordedState:
        """What Redis holds of the job."""
        return self.store.now

    @property
    def number(self) -> int:
        """The iteration that Redis names, 0 if none."""
        return 0 if self.shared.status is None else self.shared.status.number

    def start(self, place: int) -> None:
        """Start the server of a place."""
        assert self.servers[place] is None
        self.starts += 1
        self.servers[place] = Server(
            self.store,
            self.network,
            self._places[place],
            self.settings,
            6000 + place,
            self.starts,
            self.now,
        )

    def kill(self, place: int) -> None:
        """Kill the server of a place."""
        server = self.servers[place]
        assert server is not None
        self.servers[place] = None
        self.files.drop(server.ledger_dir)
        self.network.node_died(server.node_id)
        _graveyard.append(server)

    def _tell(self, word: str) -> None:
        for server in self.living:
            if server.redis.available:
                server.notices.append(word.encode())

    # ---- going on

    def move(self) -> bool:
        """Let the next thing happen, everybody in turn; False if nothing is under way."""
        movers: list[Callable[[], bool]] = [self.network.deliver, self.network.reply]
        for server in self.living:
            movers += [server.work, server.redis.execute, server.redis.answer, server.hear]
        for offset in range(len(movers)):
            turn = (self._turn + offset) % len(movers)
            if movers[turn]():
                self._turn = turn + 1
                return True
        return False

    def moves(self, most: int) -> int:
        """Let so many things happen, or what there is; return how many."""
        done = 0
        while done < most and self.move():
            done += 1
        return done

    def settle(self) -> None:
        """Let everything happen that needs no time."""
        assert self.moves(MOST_MOVES) < MOST_MOVES, "the servers do not come to rest"

    def pass_time(self, seconds: float) -> None:
        """Whatever is under way takes less than half a second, or more than the time that passes."""
        until = self.now + seconds
        while self.now < until - 1e-9:
            step = min(0.5, until - self.now)
            self.now += step
            for server in self.living:
                server.reactor.advance(step)
            if seconds >= 1.0:
                self.settle()

    # ---- devices

    def server_for(self, fl_id: str) -> Server | None:
        """The server that a device asks: devices are spread over the places, those of dead servers go elsewhere."""
        wanted = self.servers[CLIENTS.index(fl_id) % len(self.servers)]
        return wanted or next(iter(self.living), None)

    def device_starts(self, fl_id: str) -> None:
        """A device asks for a place."""
        server = self.server_for(fl_id)

        def answered(answer: Any) -> Any:
            if isinstance(answer, Answer) and answer.code == 200:
                self.told[fl_id] = iteration_told(answer)
            return answer

        if server is not None:
            server.start_client(fl_id).answer.addCallback(answered)

    def device_uploads(self, fl_id: str) -> None:
        """A device sends the update of the iteration that it was told."""
        server = self.server_for(fl_id)
        if server is not None:
            asked = server.upload(fl_id, self.told.get(fl_id, server.driver.iteration.number))
            asked.answer.addCallback(self._upload_answered, asked)

    def _upload_answered(self, answer: Any, asked: Asked) -> Any:
        if isinstance(answer, Answer) and answer.code == 200:
            self.promised.setdefault(asked.iteration, set()).add(asked.fl_id)
        return answer

    def until_next(self) -> None:
        """Let devices come and seconds pass until the iteration is another one."""
        number = self.number
        for _ in range(PATIENCE):
            status = self.shared.status
            assert status is not None
            if status.number > number or status.running is RunningState.FINISH:
                break
            for fl_id in CLIENTS[: self.policy.start_threshold + 1]:
                self.device_starts(fl_id)
            self.pass_time(1.0)
            selected = self.shared.clients.get(number, {})
            for fl_id in [fl_id for fl_id in CLIENTS if key_of(fl_id) in selected]:
                self.device_uploads(fl_id)
            self.pass_time(1.0)
        else:
            raise AssertionError(f"the job hangs in {self.shared.status}")
        self.pass_time(1.0)

    # ---- what was promised

    def _ended(self, number: int, end: End) -> None:
        """Redis goes on to the next iteration: look whether its model is safe and right."""
        self.models = {known: image for known, image in self.models.items() if known < number}
        if not end.success:
            return
        model = self._durable(end.base) or self._elsewhere(end.base)
        assert model is not None, "published before it was durable"
        made_in, inside = content_of(model)
        counted = self._names(end.counted)
        assert made_in == number and counted <= inside
        if self.store.run == 1:  # once a candidate is named, Redis is not told again who is in it
            assert counted == inside and len(inside) == self.policy.update_threshold
        self.models[number] = model

    def _durable(self, digest: str) -> ModelImage | None:
        for host in self.hosts.values():
            found = checkpoints.find(host.checkpoints, "job", DIGEST, digest)
            if found is not None:
                return TEMPLATE.image(found.model.weights)
        return None

    def _elsewhere(self, digest: str) -> ModelImage | None:
        """A model that is on no disk must be in more than one process."""
        held = [server.publication.held(digest) for server in self.living]
        found = [image for image in held if image is not None]
        return found[0] if len(found) > 1 else None

    @staticmethod
    def _names(counted: frozenset[str]) -> frozenset[str]:
        return frozenset(fl_id for fl_id in CLIENTS if key_of(fl_id) in counted)

    @property
    def published(self) -> dict[int, frozenset[str]]:
        """Valid iterations and whose updates are in their models."""
        ends = sorted(self.store.ends.items())
        return {number: content_of(self.models[number])[1] for number, end in ends if end.success}

    @property
    def failed(self) -> dict[int, str]:
        """Failed iterations, and why."""
        return {number: end.result for number, end in sorted(self.store.ends.items()) if not end.success}

    def model_after(self, number: int) -> ModelImage:
        """The model that counts once an iteration has ended."""
        return self.models[max(known for known in self.models if known <= number)]

    def check(self, *, names: frozenset[str] = TIMEOUTS) -> None:
        """Check what holds at any moment at which Redis knows all that the servers know.

        Args:
            names: why iterations may fail.
        """
        assert not self.store.forgotten, "nobody brought back what Redis had forgotten"
        assert set(self.store.ends) == set(range(1, max(1, self.number)))
        for number, result in self.failed.items():
            assert result in names, f"iteration {number} failed: {result}"
        for number, updates in self.published.items():
            broken = self.promised.get(number, set()) - updates
            assert broken <= self.given_up, f"iteration {number} lacks updates that were accepted: {broken}"
        for server in self.living:
            for end in server.ends:
                assert end.valid is self.store.ends[end.number].success
                assert end.model.digest == self.model_after(end.number).digest

    def check_counts(self) -> None:
        """Nobody is selected or counted beyond what there is room for, unless Redis has forgotten some."""
        if self.store.run == 1:
            assert all(len(of) <= self.policy.update_threshold for of in self.shared.uploads.values())
            assert all(len(of) <= self.policy.start_threshold for of in self.shared.clients.values())

    # ---- and from wherever it has come

    def come_to_rest(self, *, names: frozenset[str] = TIMEOUTS) -> None:
        """With nothing breaking any more, all is answered, the job goes on, and all servers have the same model."""
        for host in self.hosts.values():
            host.full = False
        self.network.silent = self.network.closed = self.network.lossy = False
        if not self.living:
            self.start(0)
        for server in self.living:
            server.redis.come_back()
        self.pass_time(2.0)
        status = self.shared.status
        assert status is not None
        if status.running is RunningState.DISABLE:
            self.shared.enable(self.policy.last_iteration)
        self.until_next()
        before = len(self.published)
        self.until_next()
        status = self.shared.status
        assert status is not None
        finished = status.running is RunningState.FINISH
        assert finished or len(self.published) == before + 1
        self.pass_time(HOLD_S + 1.0)
        assert all(asked.answer.called for server in self.living for asked in server.requests), (
            "a device hangs"
        )
        self.check(names=names)
        for server in self.living:
            driver = server.driver
            assert driver.serving and driver.iteration.number == self.number
            assert driver.models.newest == self.number - 1
            assert driver.models.newest_image.digest == self.model_after(self.number).digest
            ledger = server.ledgers.own
            assert ledger is not None
            assert ledger.free_slots + ledger.unmerged == ledger.shape.slots, "slots were lost"


def in_the_middle(job: Job, after: int) -> int:
    """Stop in the middle of an iteration: its updates have been sent, and so many moves were made since.

    Returns:
        How many moves were really made: fewer if nothing is left to do.
    """
    job.pass_time(1.0)
    job.until_next()
    clients = CLIENTS[: job.policy.start_threshold]
    for fl_id in clients:
        job.device_starts(fl_id)
    job.settle()
    for fl_id in clients:
        job.device_uploads(fl_id)
    return job.moves(after)
