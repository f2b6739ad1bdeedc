"""Updates on their way into the sum: room for bodies, acceptance by the shared state, merging, sealing."""

from __future__ import annotations

from collections import deque
from typing import Any

from twisted.application.service import Service
from twisted.internet import defer, task, threads
from twisted.logger import Logger

from fedcore.core.admission import Acceptance
from fedcore.errors import FedcoreError, LocalError, StoreUnavailable
from fedcore.ledger.ledger import Ledger, Partial, Slot, Upload
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
        self._accepting = 0
        self._merging = False
        self._fault: BaseException | None = None
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
        waiter: defer.Deferred[Slot] = defer.Deferred()
        self._waiting.append(waiter)
        waiter.addTimeout(self._room_timeout, self._reactor)
        try:
            return await waiter
        except defer.TimeoutError:
            self._waiting.remove(waiter)
            raise NoRoom("all upload slots are taken", hint="raise fedcore.ledger.memory_budget") from None

    def release(self, slot: Slot) -> None:
        """Take back a slot and hand it to whoever waits."""
        self.ledger.release(slot)
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
        self._accepting += 1
        try:
            acceptance, count, meta = await self._ask(request, cluster, number, attempt, quorum, fit)
            if meta is None:
                return acceptance, count
            if self.ledger.holds(request.fl_id or ""):
                return Acceptance.REPEATED, count
            self.ledger.accept(slot, _upload(request, meta))
            self._merge()
            return acceptance, count
        finally:
            self._accepting -= 1
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

    async def seal(self) -> Partial:
        """Return the sums once no acceptance is under way and every update is merged.

        Raises:
            LocalError: a merge failed, so the sums are not to be trusted.
        """
        while not self._idle:
            settled: defer.Deferred[None] = defer.Deferred()
            self._settled.append(settled)
            await settled
        if self._fault is not None:
            raise LocalError(f"updates could not be added to the sum: {self._fault}") from self._fault
        return self.ledger.seal()

    @property
    def _idle(self) -> bool:
        return not (self._accepting or self._merging or (self.ledger.unmerged and self._fault is None))

    def _merge(self) -> None:
        if self._merging or self._fault is not None or not self.ledger.unmerged:
            return
        self._merging = True
        if self._inline:
            merge = defer.execute(self.ledger.merge)
        else:
            merge = threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), self.ledger.merge)
        merge.addCallbacks(self._merged, self._merge_failed).addBoth(lambda _: self._settle())

    def _merged(self, slots: list[Slot]) -> None:
        self._merging = False
        for slot in slots:
            self.release(slot)
        self._merge()

    def _merge_failed(self, failure: Any) -> None:
        self._merging = False
        self._fault = failure.value
        self.log.failure("updates could not be added to the sum; the iteration will fail", failure)

    def _settle(self) -> None:
        if self._idle:
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
