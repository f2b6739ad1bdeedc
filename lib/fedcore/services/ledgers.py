"""The ledgers in this server's hands: its own, and those it took over from processes that died on this host.

A file whose lock is free is adopted, unless the shared state names an owner on another host whose lease holds: to that
one it was handed over, and what is here is a copy that its giver had no time to remove. Once that lease has run out
the file is adopted too, by compare-and-set of the owner. So a host that comes back with another address keeps its
ledgers; and where both hosts have the sum, they are the same bytes under the same id, and one of them counts.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from twisted.internet import defer, threads
from twisted.logger import Logger

from fedcore.core.node_id import host_of
from fedcore.errors import FedcoreError, LocalError, StoreError
from fedcore.ledger import layout
from fedcore.ledger.copy import FileCopy, PartialCopy, copy_in_memory
from fedcore.ledger.decoding import Decoder
from fedcore.ledger.files import Held, MappedFile, create_file, first_page, ledger_files, open_file
from fedcore.ledger.layout import Damaged, Entry, Epoch, Shape, SlotState
from fedcore.ledger.ledger import Ledger, Partial, Read
from fedcore.services.update_forms import Forms, PlainForms
from fedcore.store.cluster_state import ClientMeta, ClusterState, LeftOut
from fedcore.store.keys import REVOKED
from fedcore.wire.arrays import Layout

PLAIN_FORMS = PlainForms()
MOST_CLIENTS = 1 << 20  # that a partial of another host may list, more than any iteration has
_QUARANTINE = ".damaged"
_TO_THE_USER = "give the folder to the daemon's user, or let fedcore.server.ledger_dir name another one"
_REMEDIES = {
    errno.EACCES: _TO_THE_USER,
    errno.EPERM: _TO_THE_USER,
    errno.ENOSPC: "free or add space there; it goes on by itself when there is room",
    errno.EROFS: "mount it writable, or let fedcore.server.ledger_dir name another folder",
    errno.ENOMEM: "lower fedcore.ledger.memory_budget, or give the daemon more memory",
}


class Whereabouts(StrEnum):
    """What a host knows of a ledger; the values go over the node channel."""

    HERE = "here"  # it can be summed
    HELD = "held"  # its file is there; its process lives, or it is about to be adopted
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Closed:
    """The sealed sums of a server that is about to stop.

    Attributes:
        where: instance, iteration and attempt in which they were sealed.
        partials: those that nobody has taken over yet.
    """

    where: tuple[str, int, int]
    partials: list[Partial]


class Ledgers:
    """Makes, adopts and drops ledger files.

    Attributes:
        own: the ledger that takes this server's updates, None while there is no room for it.
        problem: why there is none.
        adopted: sealed sums of dead processes' ledgers, of the current epoch, by ledger id.
        inherited: node ids of these processes.
        on_left_out: is told of each adopted ledger that the shared state does not take back, what it holds updates of,
            and why.
    """

    log = Logger()

    def __init__(
        self,
        directory: Path,
        model: Layout,
        shape: Shape,
        durable: bool,
        reactor: Any,
        forms: Forms = PLAIN_FORMS,
    ) -> None:
        """Keep ledgers of one shape in a directory that the host's servers share.

        Args:
            directory: made if missing.
            model: the layout of the job's model.
            shape: measures of the own ledger.
            durable: whether updates must reach a disk before they are answered.
            reactor: for threads.
            forms: reads what is recovered.
        """
        self.own: Ledger | None = None
        self.problem = "the update ledger is not open yet"
        self.adopted: dict[str, Partial] = {}
        self._dropped: list[str] = []  # ledgers that are gone, but still on the shared list of owners
        self.inherited: set[str] = set()
        self.on_left_out: Callable[[str, Epoch, LeftOut], object] = lambda ledger_id, epoch, why: None
        self.durable = durable
        self._directory = directory
        self._model = model
        self._shape = shape
        self._reactor = reactor
        self._forms = forms
        self._epoch: Epoch | None = None
        self._file: MappedFile | None = None
        self._taken: dict[str, tuple[Epoch, MappedFile]] = {}  # by ledger id, as ``adopted``
        self._former: dict[str, str] = {}  # adopted ledger -> node id of its owner before
        self._passed: set[Path] = set()  # files that are none of ours, or of a later iteration
        self._elsewhere: dict[Path, str] = {}  # files whose ledger a living node of another host owns
        self._unreadable: set[Path] = set()  # files that were complained of
        self._closed = False
        self._adopting = defer.DeferredLock()

    def open(self) -> bool:
        """Make the own ledger if there is none; False, with ``problem`` said, if there is no room."""
        if self.own is not None:
            return True
        if self._closed:
            return False
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
            problem = self._explained(error) if isinstance(error, OSError) else str(error)
            if self.problem != problem:
                self.log.error("there is no update ledger: {problem}", problem=problem)
            self.problem = problem
            return False
        self.problem = ""
        return True

    def _explained(self, error: OSError) -> str:
        remedy = _REMEDIES.get(error.errno or 0, "fedcore.server.ledger_dir may name another folder")
        why = error.strerror or str(error)
        return f"the update ledger cannot be made at {self._directory}: {why} ({remedy})"

    def _tidy(self) -> None:
        """Remove files whose makers died before they were finished."""
        for path in self._directory.glob("*.new"):
            with contextlib.suppress(Held, Damaged):
                open_file(path).remove()

    def discard(self) -> None:
        """Drop the own ledger: it belongs to somebody else now, or another is to take its place."""
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
            self._former.clear()
        self._passed.clear()
        self._elsewhere.clear()
        self._epoch = epoch

    # ---- who holds what

    @property
    def in_hand(self) -> set[str]:
        """Ledgers whose updates this server can sum."""
        return set(self.adopted) | (set() if self.own is None else {self.own.id})

    @property
    def epoch(self) -> Epoch | None:
        """Which updates the ledgers hold; None before the first."""
        return self._epoch

    @property
    def idle(self) -> bool:
        """Whether no ledger holds an update."""
        return not self.adopted and (self.own is None or self.own.idle)

    def locate(self, ledger_id: str) -> Whereabouts:
        """Tell what this host knows of a ledger."""
        if ledger_id in self.in_hand:
            return Whereabouts.HERE
        for path in ledger_files(self._directory):
            if path not in self._passed and layout.ledger_id_of(first_page(path)) == ledger_id:
                return Whereabouts.HELD
        return Whereabouts.ABSENT

    def reshape(self, shape: Shape) -> None:
        """Measure ledgers that are opened from now on; the own one makes room for a new one if it is too small."""
        self._shape = shape
        if self.own is not None and self.own.shape.clients < shape.clients:
            self.discard()
            self.open()

    def gave_away(self, ledger_id: str) -> None:
        """Let go of a ledger whose sum another host keeps now."""
        if self.own is not None and ledger_id == self.own.id:
            self.discard()
        self.drop(ledger_id)

    async def claim_again(self, cluster: ClusterState, ledger_id: str, node_id: str) -> bool:
        """Own an adopted ledger again, if the shared state has forgotten that it was adopted.

        It may have forgotten more than one owner, and name one of another host, which handed the ledger to the one
        that handed it over here. As long as that one's lease holds, the ledger stays what it is: there and here.

        Returns:
            Whether it is to be kept; False if it was revoked.
        """
        owner = await cluster.ledger_owner(ledger_id)
        if owner in (node_id, REVOKED):
            return owner == node_id
        # Nobody else on this host can own it without the file's lock.
        stranger = owner not in ("", self._former.get(ledger_id)) and host_of(owner) != host_of(node_id)
        if not stranger or not await cluster.is_alive("server", owner):
            await cluster.own_ledger(ledger_id, node_id, owner)
        return True

    def drop(self, ledger_id: str) -> None:
        """Let go of an adopted ledger, which was revoked."""
        if ledger_id in self._taken:
            _, file = self._taken.pop(ledger_id)
            del self.adopted[ledger_id]
            file.remove()

    def copy(self, head: bytes, start: int, length: int) -> FileCopy:
        """Make room for the partial of another host that is to be kept; the caller fills it.

        Raises:
            Damaged: head, start and length do not fit each other, or it is of another job or model.
            NoSpace: the directory is full.
        """
        self._check_kind(head)
        return FileCopy(self._directory, head, start, length, self.durable)

    def copy_in_memory(self, head: bytes, start: int, length: int) -> PartialCopy:
        """Make room for the partial of another host that is only to be added; the caller fills it.

        Raises:
            Damaged: head, start and length do not fit each other, or it is of another job or model.
            NoSpace: there is no memory for it.
        """
        self._check_kind(head)
        return copy_in_memory(head, start, length)

    def _check_kind(self, head: bytes) -> None:
        """Refuse the head of a partial that this server can neither add nor keep.

        Raises:
            Damaged: it is of another job or model, or lists more clients than any iteration has.
        """
        shape, own = layout.shape_of(head), self._shape
        same = (own.job, own.layout, own.floats, own.weights, 0)
        if (shape.job, shape.layout, shape.floats, shape.weights, shape.slots) != same:
            raise Damaged("the partial is of another job or model")
        if shape.clients > max(MOST_CLIENTS, own.clients):
            raise Damaged(f"the partial has room for {shape.clients} clients")

    async def keep(
        self, copy: FileCopy, epoch: Epoch, cluster: ClusterState, giver: str, node_id: str
    ) -> Partial | None:
        """Take over a ledger of another host of which this is a full copy; None if its iteration is over.

        Raises:
            Damaged: it is not what was sealed, or not the giver's.
            StoreError: the shared state cannot be reached.
        """
        try:
            partial: Partial = await self._in_thread(lambda: copy.finish(self._model, epoch))
            if not await cluster.own_ledger(partial.ledger_id, node_id, giver):
                raise Damaged("the ledger is not the giver's")
        except StoreError:
            copy.file.close()  # the step may have been done: then this is the only copy, and is adopted
            raise
        except BaseException:
            copy.file.remove()
            raise
        if self._epoch != epoch:
            copy.file.remove()  # the iteration ended meanwhile
            return None
        self._former[partial.ledger_id] = giver
        self._taken[partial.ledger_id] = (epoch, copy.file)
        self.adopted[partial.ledger_id] = partial
        return partial

    def close(self) -> None:
        """Let go of the own ledger at a clean stop: an empty one is removed, another waits to be adopted.

        A slot in use may hold an update that the shared state counts, though nobody waits for the answer any more.
        """
        self._closed = True
        if self._file is None or self.own is None:
            return
        file, own = self._file, self.own
        self._file, self.own, self.problem = None, None, "the server is stopping"
        if own.idle and own.free_slots == own.shape.slots:
            file.remove()
        else:
            file.close()

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
        if path in self._elsewhere and await cluster.is_alive("server", self._elsewhere[path]):
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
        except (LocalError, OSError) as error:
            self._pass(file)
            self.log.error("a ledger cannot be adopted: {error}", error=str(error), path=str(path))
            return None
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
        read = self._forms.reader(epoch.base)
        if read is None:
            file.close()  # looked at again: what was made from a model may be readable only with it
            return None
        before = await cluster.ledger_owner(examined.ledger_id)
        if before == REVOKED:
            file.remove()  # its clients were told to come again
            return None
        if before and host_of(before) != host_of(node_id) and await cluster.is_alive("server", before):
            self._elsewhere[file.path] = before  # it was handed over, or this host had another address
            file.close()
            return None
        if not await cluster.own_ledger(examined.ledger_id, node_id, before):
            self._pass(file)
            return None
        # From here on the shared state counts nothing more in this ledger: its owner is another node.
        ledger, entries = Ledger.recover(file, self._model, epoch)
        lost = await self._settle(cluster, epoch, ledger, entries, read)
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
            self._dropped.append(ledger.id)
            return ledger.id
        await self._tell_again(cluster, epoch, ledger, node_id)
        self._former[ledger.id] = before
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

    async def _tell_again(self, cluster: ClusterState, epoch: Epoch, ledger: Ledger, node_id: str) -> None:
        """Have the shared state know what is in an adopted ledger: it may have lost data since its owner died."""
        metas = {client.hex(): ClientMeta(size, 0, 0) for client, size in ledger.clients().items()}
        try:
            await cluster.restore_clients(epoch.iteration, ledger.id, node_id, metas, epoch.base)
        except LeftOut as why:
            self.on_left_out(ledger.id, epoch, why)

    async def _settle(
        self, cluster: ClusterState, epoch: Epoch, ledger: Ledger, entries: tuple[Entry, ...], read: Read
    ) -> int:
        """Give each pending update the verdict of the shared state; return how many counted ones are unreadable.

        A client that repeated its upload may have left several; one of them counts, first the one that was accepted.
        """
        asked = [entry.record.fl_id for entry in entries if entry.state is SlotState.RECEIVED]
        counted = await cluster.counted(epoch.iteration, ledger.id, asked)
        sizes = {fl_id: (meta.data_size, meta.eval_data_size) for fl_id, meta in counted.items()}
        if all(entry.record.decoder == Decoder.PLAIN for entry in entries):
            lost = ledger.settle(entries, sizes, read)
        else:
            lost = await self._in_thread(lambda: ledger.settle(entries, sizes, read))
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
