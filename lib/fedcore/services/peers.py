"""What this server asks of the others over the node channel."""

from __future__ import annotations

from collections.abc import Callable

from fedcore.core.node_id import address_of
from fedcore.errors import PeerError
from fedcore.ledger.copy import PartialCopy
from fedcore.ledger.ledger import Partial
from fedcore.net.node_client import NodeClient, PeerRefused
from fedcore.net.node_listener import WRONG_NODE
from fedcore.services.ledgers import Whereabouts
from fedcore.wire import node_messages as messages
from fedcore.wire.node import Command
from fedcore.wire.node_messages import CHUNK, PartialOffer

PING_TIMEOUT_S = 2.0
SEAL_TIMEOUT_S = 5.0  # a peer first waits for its open questions and adds up what is left
READ_TIMEOUT_S = 5.0  # for one chunk
TAKE_TIMEOUT_S = 30.0  # for a peer that reads a whole ledger


class PeerReplaced(PeerError):
    """Another process listens at the peer's address: the peer is gone."""


class Peers:
    """The other servers of a job; they are named by their node ids.

    Every call raises PeerError if the peer cannot be reached in time, refuses, or answers nonsense.
    """

    def __init__(self, client: NodeClient) -> None:
        self._client = client

    async def locate(self, peer: str, ledger_id: str) -> Whereabouts:
        """Ask what the peer's host knows of a ledger."""
        data = await self._ask(peer, Command.LOCATE_LEDGER, messages.LocateLedger(ledger_id), PING_TIMEOUT_S)
        try:
            return Whereabouts(messages.unpack(messages.Located, data).whereabouts)
        except ValueError as error:
            raise PeerError(f"{peer} answered nonsense: {error}") from error

    async def seal(self, peer: str, instance: str, iteration: int, attempt: int) -> list[PartialOffer]:
        """Have a peer close what it holds of a sealed iteration."""
        request = messages.SealPartials(instance, iteration, attempt)
        return messages.unpack_offers(await self._ask(peer, Command.SEAL_PARTIAL, request, SEAL_TIMEOUT_S))

    async def copy_partial(
        self, peer: str, offer: PartialOffer, instance: str, iteration: int, attempt: int, copy: PartialCopy
    ) -> None:
        """Read a sealed sum into a file."""

        def request(offset: int, length: int) -> object:
            return messages.ReadPartial(instance, iteration, attempt, offer.ledger, offset, length)

        await self._read(peer, Command.READ_PARTIAL, offer.length, request, copy.fill)

    async def hand_over(self, peer: str, partial: Partial, instance: str, attempt: int) -> None:
        """Have a peer take a sealed sum of this server and keep it."""
        request = messages.TakeLedger(
            instance=instance,
            attempt=attempt,
            iteration=partial.iteration,
            **{
                field: getattr(offer_of(partial), field)
                for field in ("ledger", "updates", "head", "start", "length")
            },
        )
        await self._ask(peer, Command.TAKE_LEDGER, request, TAKE_TIMEOUT_S)

    async def offer_model(self, peer: str, iteration: int, digest: str, timeout: float) -> None:
        """Tell a peer of a new model and wait until it holds it."""
        await self._ask(peer, Command.OFFER_MODEL, messages.OfferModel(iteration, digest), timeout)

    async def read_model(self, peer: str, digest: str, limit: int) -> bytearray:
        """Read a model of at most ``limit`` bytes; the caller checks its digest."""
        data = await self._ask(peer, Command.DESCRIBE_MODEL, messages.DescribeModel(digest), PING_TIMEOUT_S)
        length = messages.unpack(messages.ModelOffer, data).length
        if length > limit:
            raise PeerError(f"{peer} offers a model of {length} bytes, this one has {limit}")
        content = bytearray(length)

        def place(offset: int, chunk: bytes | memoryview) -> None:
            content[offset : offset + len(chunk)] = chunk

        await self._read(
            peer,
            Command.READ_MODEL,
            length,
            lambda offset, count: messages.ReadModel(digest, offset, count),
            place,
        )
        return content

    async def _read(
        self,
        peer: str,
        command: Command,
        length: int,
        request: Callable[[int, int], object],
        place: Callable[[int, bytes | memoryview], None],
    ) -> None:
        for offset in range(0, length, CHUNK):
            count = min(CHUNK, length - offset)
            chunk = await self._ask(peer, command, request(offset, count), READ_TIMEOUT_S)
            if len(chunk) != count:
                raise PeerError(f"{peer} sent {len(chunk)} bytes instead of {count}")
            place(offset, chunk)

    async def _ask(self, peer: str, command: Command, message: object, timeout: float) -> bytes | memoryview:
        address = address_of(peer)
        if not address:
            raise PeerError(f"{peer} tells no address")
        try:
            answer = await self._client.request(
                address, peer, command, messages.pack(message), timeout=timeout
            )
        except PeerRefused as error:
            if str(error).startswith(WRONG_NODE):
                raise PeerReplaced(f"{peer} is gone: {error}") from error
            raise
        return answer.data


def offer_of(partial: Partial) -> PartialOffer:
    """Describe a sealed sum to a peer."""
    return messages.offer_of(
        partial.ledger_id, partial.totals.count, partial.head, partial.start, len(partial.content)
    )
