"""Updates on their way into the sum: room for bodies, acceptance by the shared state, merging, sealing."""

from __future__ import annotations

from collections import deque
from typing import Any

from twisted.application.service import Service
from twisted.internet import defer, task, threads
from twisted.logger import Logger

from fedcore.core.admission import Acceptance
from fedcore.errors import FedcoreError, LocalError, StoreUnavailable
from fedcore.ledger.ledger import Ledger, Merge, Partial, Slot, Upload
from fedcore.store.cluster_state import ClientMeta, ClusterState
from fedcore.wire.messages import RequestUpdateModel

# A hop to a thread and back costs about as much as adding this many floats; smaller models are merged at once.
INLINE_FLOATS = 1 << 18
RETRY_S = 0.1  # pause before a question that Redis could not answer is asked again


class NoRoom(FedcoreError):
    """All slots are taken by other bodies."""

    wire_code = 300
    http_status = 503
    retry_after = 5.0


class UpdateIntake(Service):
    """Takes updates into one ledger."""

    log = Logger()

    def __init__(self, ledger: Ledger, model_floats: int, room_timeout: float, reactor: Any) -> None:
        """Fill ``ledger``.

        Args:
            ledger: where updates go.
            model_floats: elements of the model; decides whether merges run in a thread.
            room_timeout: seconds that a body may wait for a slot.
            reactor: for threads and time.
        """
        self.ledger = ledger
        self._inline = model_floats <= INLINE_FLOATS
        self._room_timeout = room_timeout
        self._reactor = reactor
        self._waiting: deque[defer.Deferred[Slot]] = deque()
        self._asking: set[object] = set()  # one token per question that the shared state has not answered yet
        self._merging = False
        self._fault: BaseException | None = None  # of a merge of the current iteration
        self._settled: list[defer.Deferred[None]] = []

    # ---- room

    def receive(self) -> Slot | None:
        """Return a slot, or None while all are taken or somebody waits already."""
        return None if self._waiting else self.ledger.receive()

    async def wait_for_room(self) -> Slot:
        """Wait for a slot.

        Raises:
            NoRoom: none came free in time.
        """
        waiter: defer.Deferred[Slot] = defer.Deferred(self._waiting.remove)
        self._waiting.append(waiter)
        waiter.addTimeout(self._room_timeout, self._reactor)
        try:
            return await waiter
        except defer.TimeoutError:
            raise NoRoom("all upload slots are taken", hint="raise fedcore.ledger.memory_budget") from None

    def release(self, slot: Slot) -> None:
        """Take back a slot and hand it to whoever waits."""
        self.ledger.release(slot)
        self._hand_out()

    def _hand_out(self) -> None:
        """Give free slots to those who wait, first come first served."""
        while self._waiting:
            room = self.ledger.receive()
            if room is None:
                return
            self._waiting.popleft().callback(room)

    # ---- acceptance

    async def accept(
        self,
        slot: Slot,
        request: RequestUpdateModel,
        cluster: ClusterState,
        number: int,
        attempt: int,
        *,
        quorum: int,
        fit: bool,
    ) -> tuple[Acceptance, int]:
        """Ask the shared state to count an update; if it says ACCEPTED, the slot is the ledger's from then on.

        A lost reply leaves open whether the update counts, so the question is asked again until it is answered:
        the shared state answers a repeat as it did before, and ``seal`` waits meanwhile.

        Returns:
            The outcome, and the count of accepted updates where it is ACCEPTED.

        Raises:
            StoreError: the shared state is not where the caller is.
        """
        question = object()
        self._asking.add(question)
        try:
            acceptance, count, meta = await self._ask(request, cluster, number, attempt, quorum, fit)
            if meta is None:
                return acceptance, count
            if not fit or self.ledger.holds(request.fl_id or ""):
                # Counted before. If this ledger does not hold it yet, the question that brought it is still open.
                return Acceptance.REPEATED, count
            self.ledger.accept(slot, _upload(request, meta))
            self._merge()
            return acceptance, count
        finally:
            self._asking.remove(question)
            self._settle()

    async def _ask(
        self,
        request: RequestUpdateModel,
        cluster: ClusterState,
        number: int,
        attempt: int,
        quorum: int,
        fit: bool,
    ) -> tuple[Acceptance, int, ClientMeta | None]:
        while True:
            try:
                return await cluster.accept_upload(
                    number,
                    attempt,
                    request.iteration,
                    request.fl_id or "",
                    quorum=quorum,
                    ledger_id=self.ledger.id,
                    fit=fit,
                )
            except StoreUnavailable:
                await task.deferLater(self._reactor, RETRY_S)
                await cluster.redis.connected()

    # ---- the sum

    def begin(self, iteration: int, attempt: int) -> None:
        """Start an iteration with empty sums."""
        self._fault = None
        self.ledger.begin(iteration, attempt)
        self._hand_out()

    async def seal(self) -> Partial:
        """Return the sums once every update that may count is in them.

        To be called when the shared state is sealed: only questions that are open now can still be answered with
        ACCEPTED. Later ones are not waited for, or a stream of late uploads could hold up the iteration.

        Raises:
            LocalError: a merge failed, so the sums are not to be trusted.
        """
        open_questions = set(self._asking)
        while not self._asking.isdisjoint(open_questions) or self._unmerged:
            settled: defer.Deferred[None] = defer.Deferred()
            self._settled.append(settled)
            await settled
        if self._fault is not None:
            raise LocalError(f"updates could not be added to the sum: {self._fault}") from self._fault
        return self.ledger.seal()

    @property
    def _unmerged(self) -> bool:
        """Whether updates are still on their way into the sums."""
        return self._merging or (self.ledger.unmerged > 0 and self._fault is None)

    def _merge(self) -> None:
        if self._merging or self._fault is not None or not self.ledger.unmerged:
            return
        self._merging = True
        merge = self.ledger.start_merge()
        if self._inline:
            done = defer.execute(merge.run)
        else:
            done = threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), merge.run)
        done.addErrback(self._merge_failed, merge).addBoth(lambda _: self._merged())

    def _merge_failed(self, failure: Any, merge: Merge) -> None:
        if self.ledger.current(merge):
            self._fault = failure.value
        self.log.failure("updates could not be added to the sum of their iteration", failure)

    def _merged(self) -> None:
        self._merging = False
        self.ledger.finish_merge()
        self._hand_out()
        self._merge()
        self._settle()

    def _settle(self) -> None:
        settled, self._settled = self._settled, []
        for waiter in settled:
            waiter.callback(None)


def _upload(request: RequestUpdateModel, meta: ClientMeta) -> Upload:
    weights = {item.weight_fullname: item.data for item in request.feature_map or ()}
    return Upload(
        request.fl_id or "",
        {name: data for name, data in weights.items() if name is not None and data is not None},
        meta.data_size,
        meta.eval_data_size,
        request.upload_loss,
        request.upload_accuracy,
    )
