"""The ledgers in this server's hands: its own, and those it took over from processes that died on this host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet import defer, threads
from twisted.logger import Logger

from fedcore.errors import FedcoreError
from fedcore.ledger import layout
from fedcore.ledger.files import Held, MappedFile, create_file, ledger_files, open_file
from fedcore.ledger.layout import Damaged, Entry, Epoch, Shape, SlotState
from fedcore.ledger.ledger import Ledger, Partial, Update
from fedcore.store.cluster_state import ClusterState
from fedcore.wire import codec
from fedcore.wire.arrays import Layout
from fedcore.wire.messages import RequestUpdateModel

LOSS_S = (
    10.0  # how long a ledger may be out of reach, its owner's lease gone, until its updates count as lost
)
_QUARANTINE = ".damaged"


def update_of(request: RequestUpdateModel, data_size: int, eval_data_size: int) -> Update:
    """Return what a ledger keeps of a counted updateModel."""
    weights = {item.weight_fullname: item.data for item in request.feature_map or ()}
    return Update(
        request.fl_id or "",
        {name: data for name, data in weights.items() if name is not None and data is not None},
        data_size,
        eval_data_size,
        request.upload_loss,
        request.upload_accuracy,
    )


def _read(body: memoryview, data_size: int, eval_data_size: int) -> Update:
    return update_of(codec.decode(RequestUpdateModel, body), data_size, eval_data_size)


class Ledgers:
    """Makes, adopts and drops ledger files.

    Attributes:
        own: the ledger that takes this server's updates, None while there is no room for it.
        problem: why there is none.
        adopted: sealed sums of dead processes' ledgers, of the current epoch, by ledger id.
        inherited: node ids of these processes.
    """

    log = Logger()

    def __init__(self, directory: Path, model: Layout, shape: Shape, durable: bool, reactor: Any) -> None:
        """Keep ledgers of one shape in a directory that the host's servers share.

        Args:
            directory: made if missing.
            model: the layout of the job's model.
            shape: measures of the own ledger.
            durable: whether updates must reach a disk before they are answered.
            reactor: for threads.
        """
        self.own: Ledger | None = None
        self.problem = "the update ledger is not open yet"
        self.adopted: dict[str, Partial] = {}
        self._dropped: list[str] = []  # ledgers that are gone, but still on the shared list of owners
        self._dead_since: dict[str, float] = {}  # ledger id -> when its owner was first found dead
        self.inherited: set[str] = set()
        self.durable = durable
        self._directory = directory
        self._model = model
        self._shape = shape
        self._reactor = reactor
        self._epoch: Epoch | None = None
        self._file: MappedFile | None = None
        self._taken: dict[str, tuple[Epoch, MappedFile]] = {}  # by ledger id, as ``adopted``
        self._passed: set[Path] = set()  # files that are none of ours, or of a later iteration
        self._unreadable: set[Path] = set()  # files that were complained of
        self._adopting = defer.DeferredLock()

    def open(self) -> bool:
        """Make the own ledger if there is none; False, with ``problem`` said, if there is no room."""
        if self.own is not None:
            return True
        try:
            self._tidy()
            name = f"{os.getpid()}-{os.urandom(6).hex()}"
            file = create_file(self._directory, name, self._shape.size, self.durable)
            try:
                self.own = Ledger.create(file, self._model, self._shape)
            except BaseException:
                file.remove()
                raise
            self._file = file
        except (FedcoreError, OSError) as error:
            if self.problem != str(error):
                self.log.error("there is no update ledger: {problem}", problem=str(error))
            self.problem = str(error)
            return False
        self.problem = ""
        return True

    def _tidy(self) -> None:
        """Remove files whose makers died before they were finished."""
        for path in self._directory.glob("*.new"):
            with contextlib.suppress(Held, Damaged):
                open_file(path).remove()

    def discard(self) -> None:
        """Drop the own ledger, which belongs to somebody else now."""
        if self._file is not None:
            self._file.remove()
        self.own, self._file, self.problem = None, None, "the update ledger was revoked"

    def begin(self, epoch: Epoch) -> None:
        """Drop what was adopted for another epoch; what was adopted for this one stays."""
        for ledger_id, (adopted_for, file) in list(self._taken.items()):
            if adopted_for != epoch:
                file.remove()
                del self._taken[ledger_id], self.adopted[ledger_id]
                self._dropped.append(ledger_id)
        if epoch != self._epoch:
            self.inherited.clear()
        self._passed.clear()
        self._epoch = epoch

    # ---- who holds what

    @property
    def in_hand(self) -> set[str]:
        """Ledgers whose updates this server can sum."""
        return set(self.adopted) | (set() if self.own is None else {self.own.id})

    async def hold_updates(self, cluster: ClusterState, number: int) -> bool:
        """Tell whether counted updates of an iteration are in this server's hands."""
        counted = await cluster.uploads_by_ledger(number)
        return not counted.keys().isdisjoint(self.in_hand)

    async def count_lost(self, cluster: ClusterState, number: int, now: float) -> int:
        """Return how many counted updates of an iteration nobody will ever read.

        Those are in a ledger that is in nobody's hands and whose owner's lease has been gone for LOSS_S, or in an
        adopted one that turned out to hold fewer than were counted.

        Args:
            cluster: the shared state.
            number: the iteration.
            now: seconds of the monotonic clock.
        """
        counted = await cluster.uploads_by_ledger(number)
        dead = []
        for ledger_id in counted.keys() - self.in_hand:
            if not await cluster.is_alive("server", await cluster.ledger_owner(ledger_id)):
                dead.append(ledger_id)
        self._dead_since = {ledger_id: self._dead_since.get(ledger_id, now) for ledger_id in dead}
        unreachable = sum(
            counted[ledger_id] for ledger_id in dead if now - self._dead_since[ledger_id] >= LOSS_S
        )
        short = (
            max(0, counted.get(ledger_id, 0) - partial.totals.count)
            for ledger_id, partial in self.adopted.items()
            if partial.iteration == number
        )
        return unreachable + sum(short)

    def close(self) -> None:
        """Let go of the own ledger at a clean stop: an empty one is removed, another waits to be adopted.

        A slot in use may hold an update that the shared state counts, though nobody waits for the answer any more.
        """
        if self._file is None or self.own is None:
            return
        if self.own.idle and self.own.free_slots == self._shape.slots:
            self._file.remove()

    async def adopt(self, cluster: ClusterState, epoch: Epoch, node_id: str) -> list[str]:
        """Take over what dead processes left of an epoch on this host.

        One call at a time does so; another one waits, as the first holds the locks.

        Returns:
            The ids of the ledgers that were adopted now.
        """
        await self._adopting.acquire()
        try:
            while self._dropped:
                await cluster.forget_ledger(self._dropped[-1])
                self._dropped.pop()
            return [
                ledger_id
                for path in ledger_files(self._directory)
                if (ledger_id := await self._take(path, cluster, epoch, node_id)) is not None
            ]
        finally:
            self._adopting.release()

    async def _take(self, path: Path, cluster: ClusterState, epoch: Epoch, node_id: str) -> str | None:
        """Adopt one file if nobody holds it; return the ledger's id if it was adopted."""
        mine = self._file is not None and path == self._file.path
        if mine or path in self._passed or any(path == file.path for _, file in self._taken.values()):
            return None
        try:
            file = open_file(path, self.durable)
        except Held:
            return None
        except (Damaged, OSError) as error:  # looked at again: its owner may be about to fill it
            if path not in self._unreadable:
                self._unreadable.add(path)
                self.log.error("a ledger cannot be adopted: {error}", error=str(error))
            return None
        try:
            return await self._adopt(file, cluster, epoch, node_id)
        except BaseException:
            file.close()  # or our own lock would keep us from the next try
            raise

    async def _adopt(self, file: MappedFile, cluster: ClusterState, epoch: Epoch, node_id: str) -> str | None:
        """Take over one file whose lock we hold; it is removed, passed over, quarantined or kept."""
        if not any(file.buffer[: layout.PAGE]):
            file.remove()  # its maker died before the first word: it never held anything
            return None
        try:
            _, shape = layout.read_shape(file.buffer)
            if shape.job != self._shape.job or shape.layout != self._shape.layout:
                self._pass(file)
                return None
            _, examined = layout.examine(file.buffer)
        except Damaged as error:
            self._quarantine(file, error)
            return None
        if examined.origin != epoch.origin:
            if examined.iteration < epoch.iteration:
                file.remove()
            else:
                self._pass(file)  # ahead of this server, or of another base than its own: not for it to judge
            return None
        before = await cluster.ledger_owner(examined.ledger_id)
        if not await cluster.own_ledger(examined.ledger_id, node_id, before):
            self._pass(file)
            return None
        # From here on the shared state counts nothing more in this ledger: its owner is another node.
        ledger, entries = Ledger.recover(file, self._model, epoch)
        lost = await self._settle(cluster, epoch, ledger, entries)
        while ledger.unmerged:
            await self._in_thread(ledger.merge)
        if self._epoch is not None and self._epoch.iteration > epoch.iteration:
            file.remove()  # the iteration ended meanwhile
            return None
        partial = ledger.seal()
        if before:
            self.inherited.add(before)
        if not partial.totals.count and not lost:
            file.remove()
            return ledger.id
        self._taken[ledger.id] = (epoch, file)
        self.adopted[ledger.id] = partial
        self.log.warn(
            "adopted a ledger with {updates} updates of iteration {iteration}; its process is gone",
            updates=partial.totals.count,
            iteration=epoch.iteration,
            recovered=len(entries) - lost,
            lost=lost,
        )
        return ledger.id

    async def _settle(
        self, cluster: ClusterState, epoch: Epoch, ledger: Ledger, entries: tuple[Entry, ...]
    ) -> int:
        """Give each pending update the verdict of the shared state; return how many counted ones are unreadable.

        A client that repeated its upload may have left several; one of them counts, first the one that was accepted.
        """
        asked = [entry.record.fl_id for entry in entries if entry.state is SlotState.RECEIVED]
        counted = await cluster.counted(epoch.iteration, ledger.id, asked)
        sizes = {fl_id: (meta.data_size, meta.eval_data_size) for fl_id, meta in counted.items()}
        lost = ledger.settle(entries, sizes, _read)
        for reason in lost:
            self.log.error("a counted update is unreadable: {error}", error=reason)
        return len(lost)

    def _pass(self, file: MappedFile) -> None:
        self._passed.add(file.path)
        file.close()

    def _quarantine(self, file: MappedFile, error: Damaged) -> None:
        kept = file.path.with_name(file.path.name + _QUARANTINE)
        file.path.rename(kept)
        file.close()
        self.log.error("a damaged ledger is set aside as {path}: {error}", path=str(kept), error=str(error))

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)
