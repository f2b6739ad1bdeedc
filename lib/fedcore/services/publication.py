"""A new model on its way to being served: held by this process, durable in a checkpoint, held by the other servers.

The finaliser publishes once its checkpoint is durable and every living server holds the model, or after SPREAD_S those
that do. A server that missed it reads it from another one before it serves the iteration.

What a worker has pushed is no checkpoint yet: it has a folder of its own beside the checkpoints, one file per digest,
so that pushes neither take each other's place on the disk nor that of a published model.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any

from twisted.internet import defer, threads
from twisted.logger import Logger

from fedcore.errors import ArrayError, ConfigError, FedcoreError, PeerError
from fedcore.ledger.layout import Totals
from fedcore.models import checkpoints
from fedcore.models.durable import make_directory, remove_leftovers
from fedcore.models.formats import read_metadata, read_model, write_model
from fedcore.models.history import KEPT, ModelHistory
from fedcore.net.node_client import PeerRefused
from fedcore.services.peers import PeerReplaced, Peers
from fedcore.wire.image import ImageTemplate, ModelImage

SPREAD_S = 2.0  # longest wait for the other servers to read a new model
DIGEST = "digest"  # key of a checkpoint's metadata
_PUSHED = re.compile(r"(?P<iteration>[0-9]+)_[0-9a-f]{64}\.safetensors")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may become that of an iteration.

    Attributes:
        number: the iteration.
        image: the model.
        totals: what is known of its updates, None if another server made it.
        checkpoint: file that holds it, or None.
    """

    number: int
    image: ModelImage
    totals: Totals | None = None
    checkpoint: Path | None = None


class Found(Enum):
    """What became of the search for a model."""

    HERE = auto()
    NOWHERE = auto()  # every server that lives says that it does not have it
    UNKNOWN = auto()  # not every server could be asked


class Publication:
    """Holds the models that are not served yet: the candidate, and what was read from other servers."""

    log = Logger()

    def __init__(
        self,
        fl_name: str,
        checkpoint_dir: Path,
        models: ModelHistory,
        template: ImageTemplate,
        peers: Peers,
        reactor: Any,
        wall_clock: Callable[[], datetime],
    ) -> None:
        self._fl_name = fl_name
        self._checkpoint_dir = checkpoint_dir
        self._models = models
        self._template = template
        self._peers = peers
        self._reactor = reactor
        self._wall_clock = wall_clock
        self._pushed_dir = checkpoint_dir / f"{fl_name}_pushed"
        self._candidates: dict[str, Candidate] = {}  # by digest, the newest last
        self._complained: tuple[str, set[str]] = "", set()  # digest of an offer, and who did not take it
        self._reading: dict[str, defer.Deferred[None]] = {}

    def hold(self, candidate: Candidate) -> None:
        """Keep a model until it is taken."""
        self._candidates.pop(candidate.image.digest, None)
        self._candidates[candidate.image.digest] = candidate
        while len(self._candidates) > KEPT:
            del self._candidates[next(iter(self._candidates))]

    def candidate(self, digest: str) -> Candidate | None:
        """Return the model with a digest if it is held here and not served yet."""
        return self._candidates.get(digest)

    def nominate(self, digest: str, number: int) -> Candidate | None:
        """Hold the model with a digest as that of an iteration, if this process has it.

        It may be one that is served already: a worker may push what it has pushed before.
        """
        candidate, image = self._candidates.get(digest), self.held(digest)
        if image is not None and (candidate is None or candidate.number != number):
            candidate = Candidate(number, image)
            self.hold(candidate)
        return candidate

    def held(self, digest: str) -> ModelImage | None:
        """Return the model with a digest if this process has it."""
        candidate = self._candidates.get(digest)
        return self._models.find(digest) if candidate is None else candidate.image

    def take(self, digest: str) -> Candidate | None:
        """Return the candidate with a digest, to be served; all others are forgotten."""
        candidate = self._candidates.get(digest)
        self._candidates.clear()
        return candidate

    async def spread(self, candidate: Candidate, instance: str, others: Sequence[str]) -> None:
        """Make a candidate durable and give it to the others; return when it may be published.

        Raises:
            OSError: it is on no disk and in no other process.
        """
        saving = defer.Deferred.fromCoroutine(self.save(candidate, instance))
        copies = await self.offer(candidate, others)
        try:
            await saving
        except (OSError, FedcoreError) as error:
            if not copies:
                raise
            self.log.error(
                "the model of iteration {iteration} has no checkpoint, {copies} other servers hold it: {error}",
                iteration=candidate.number,
                copies=len(copies),
                error=str(error),
            )

    async def offer(self, candidate: Candidate, others: Sequence[str]) -> list[str]:
        """Have the others read a model that the shared state names; return who has it."""
        offers = [defer.Deferred.fromCoroutine(self._offer(peer, candidate)) for peer in others]
        taken = await defer.DeferredList(offers)
        return [peer for peer, (_, good) in zip(others, taken, strict=True) if good]

    async def save(self, candidate: Candidate, instance: str) -> None:
        """Make a candidate durable, unless it is.

        Raises:
            OSError: it cannot be written.
        """
        if candidate.checkpoint is not None:
            return
        path = await self._write(candidate, instance)
        if self.candidate(candidate.image.digest) is candidate:
            self.hold(replace(candidate, checkpoint=path))

    async def _offer(self, peer: str, candidate: Candidate) -> bool:
        try:
            await self._peers.offer_model(peer, candidate.number, candidate.image.digest, SPREAD_S)
        except PeerError as error:
            if self._complained[0] != candidate.image.digest:
                self._complained = candidate.image.digest, set()
            if peer not in self._complained[1]:  # while a worker trains, it is offered again and again
                self._complained[1].add(peer)
                self.log.warn("{peer} does not hold the new model yet: {error}", peer=peer, error=str(error))
            return False
        return True

    async def _write(self, candidate: Candidate, instance: str) -> Path:
        image = candidate.image
        path: Path = await self._in_thread(
            lambda: checkpoints.save(
                self._checkpoint_dir,
                self._fl_name,
                candidate.number,
                image.shaped(),
                _plain(image),
                self._metadata(image, instance),
                self._wall_clock(),
            )
        )
        return path

    def _metadata(self, image: ModelImage, instance: str) -> dict[str, str]:
        return {"fl_name": self._fl_name, "instance": instance, DIGEST: image.digest}

    # ---- what workers push

    async def save_pushed(self, image: ModelImage, number: int, instance: str) -> None:
        """Make a model durable that a worker has pushed for an iteration.

        Raises:
            OSError: it cannot be written.
        """
        path = self._pushed_dir / f"{number}_{image.digest}.safetensors"

        def write() -> None:
            if not path.exists():
                make_directory(self._pushed_dir)
                remove_leftovers(self._pushed_dir, lambda name: _PUSHED.fullmatch(name) is not None)
                write_model(path, image.shaped(), _plain(image), self._metadata(image, instance))

        await self._in_thread(write)

    async def drop_pushed(self, ended: int, instance: str) -> None:
        """Remove from the disk what was pushed for iterations up to ``ended``, or in other instances of the job."""
        await self._in_thread(lambda: self._drop_pushed(ended, instance))

    def _drop_pushed(self, ended: int, instance: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            for path in self._pushed_dir.iterdir():
                match = _PUSHED.fullmatch(path.name)
                if match and (int(match["iteration"]) <= ended or _instance_of(path) != instance):
                    path.unlink(missing_ok=True)

    async def save_behind(self, candidate: Candidate, instance: str) -> None:
        """Write the checkpoint of a model that is already served, unless a server of this host has."""
        digest = candidate.image.digest
        written = await self._in_thread(
            lambda: checkpoints.holds(self._checkpoint_dir, self._fl_name, candidate.number, DIGEST, digest)
        )
        if not written:
            await self._write(candidate, instance)

    async def obtain(self, digest: str, number: int, others: Sequence[str]) -> Found:
        """Get a model: from this server's checkpoints, or from whoever of the others has it.

        Args:
            digest: of the model.
            number: of the iteration whose result it is.
            others: node ids.
        """
        while digest in self._reading:  # one reader is enough
            waiter: defer.Deferred[None] = defer.Deferred()
            self._reading[digest].addBoth(waiter.callback)
            await waiter
        if self.held(digest) is not None:
            return Found.HERE
        done = self._reading[digest] = defer.Deferred()
        try:
            candidate = await self._in_thread(lambda: self._recall(digest, number))
            if candidate is not None:
                self.hold(candidate)
                return Found.HERE
            return await self._read(digest, number, others)
        finally:
            del self._reading[digest]
            done.callback(None)

    async def recall(self, digest: str, number: int) -> None:
        """Hold a model again that this process has only on its disk."""
        if self.held(digest) is None:
            candidate = await self._in_thread(lambda: self._recall(digest, number))
            if candidate is not None:
                self.hold(candidate)

    def _recall(self, digest: str, number: int) -> Candidate | None:
        """Load a model from the checkpoints, or from what was pushed."""
        for path in self._pushed_dir.glob(f"*_{glob.escape(digest)}.safetensors"):
            with contextlib.suppress(ConfigError, ArrayError):  # damaged, or dropped by a sibling this moment
                image = self._template.image(read_model(path).weights)
                if image.digest == digest:
                    return Candidate(number, image)
        found = checkpoints.find(self._checkpoint_dir, self._fl_name, DIGEST, digest)
        if found is not None:
            with contextlib.suppress(ArrayError):
                image = self._template.image(found.model.weights)
                if image.digest == digest:
                    return Candidate(number, image, checkpoint=found.path)
        return None

    async def _read(self, digest: str, number: int, others: Sequence[str]) -> Found:
        """Read a model from whoever of the others has it."""
        everybody_refused = True
        for peer in others:
            try:
                tail = await self._peers.read_model(peer, digest, self._template.size)
                image = await self._in_thread(partial(self._template.restore, tail, digest))
            except (PeerError, ArrayError) as error:
                everybody_refused = everybody_refused and isinstance(error, PeerRefused | PeerReplaced)
                self.log.info("{peer} gave no model: {error}", peer=peer, error=str(error))
                continue
            self.hold(Candidate(number, image))
            return Found.HERE
        return Found.NOWHERE if everybody_refused else Found.UNKNOWN

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await threads.deferToThreadPool(self._reactor, self._reactor.getThreadPool(), work)


def _plain(image: ModelImage) -> set[str]:
    """Return the names of the weights that are not aggregated."""
    return {weight.name for weight in image.layout if not weight.aggregated}


def _instance_of(path: Path) -> str:
    """Return the instance that a model was pushed in, "" if its file does not say or is gone."""
    try:
        return read_metadata(path).get("instance", "")
    except ConfigError:
        return ""
