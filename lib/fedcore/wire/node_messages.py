"""What servers say to each other in fedcore's own commands: small JSON objects; bytes of models and sums follow alone.

Every message names what it is about in full (instance, iteration, attempt, digest), so that an answer never depends on
what the peer asked before.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from fedcore.errors import MalformedRequest

CHUNK = 1 << 20  # bytes of a sum or a model in one frame
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LocateLedger:
    """Where is this ledger? Answered by Located."""

    ledger: str


@dataclass(frozen=True, slots=True)
class Located:
    """``here``, ``held`` or ``absent``, see ``services.ledgers.Whereabouts``."""

    whereabouts: str


@dataclass(frozen=True, slots=True)
class SealPartials:
    """Close what you hold of this iteration and say what it is. Answered by Offers."""

    instance: str
    iteration: int
    attempt: int


@dataclass(frozen=True, slots=True)
class PartialOffer:
    """A sealed sum that can be read.

    Attributes:
        ledger: id of the ledger.
        updates: how many are in it.
        head: page that makes a ledger file of it, base64.
        start: position of the accumulator in the file.
        length: bytes of the accumulator.
    """

    ledger: str
    updates: int
    head: str
    start: int
    length: int

    def head_bytes(self) -> bytes:
        """Return the page.

        Raises:
            MalformedRequest: it is no base64.
        """
        try:
            return base64.b64decode(self.head, validate=True)
        except ValueError as error:  # not only binascii.Error: text that is no ASCII is refused otherwise
            raise MalformedRequest(f"the head of a partial is no base64: {error}") from error


@dataclass(frozen=True, slots=True)
class ReadPartial:
    """Give me these bytes of a sealed sum. Answered by the bytes."""

    instance: str
    iteration: int
    attempt: int
    ledger: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class TakeLedger:
    """I am about to stop: read this sealed sum from me and keep it. Answered by Done once it is kept."""

    instance: str
    iteration: int
    attempt: int
    ledger: str
    updates: int
    head: str
    start: int
    length: int

    @property
    def offer(self) -> PartialOffer:
        """What there is to read."""
        return PartialOffer(self.ledger, self.updates, self.head, self.start, self.length)


@dataclass(frozen=True, slots=True)
class OfferModel:
    """A new model is ready: read it from me. Answered by Done once it is held."""

    iteration: int
    digest: str


@dataclass(frozen=True, slots=True)
class DescribeModel:
    """Do you hold the model with this digest? Answered by ModelOffer."""

    digest: str


@dataclass(frozen=True, slots=True)
class ModelOffer:
    """A model that can be read; ``length`` is in bytes."""

    digest: str
    length: int


@dataclass(frozen=True, slots=True)
class ReadModel:
    """Give me these bytes of a model. Answered by the bytes."""

    digest: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Done:
    """It is done."""


def offer_of(ledger: str, updates: int, head: bytes, start: int, length: int) -> PartialOffer:
    """Describe a sealed sum."""
    return PartialOffer(ledger, updates, base64.b64encode(head).decode(), start, length)


def pack(message: object) -> bytes:
    """Write a message."""
    return json.dumps(asdict(message), separators=(",", ":")).encode()  # type: ignore[call-overload]


def unpack(kind: type[T], data: bytes | memoryview) -> T:
    """Read a message.

    Raises:
        MalformedRequest: it is not of this kind.
    """
    return _build(kind, _load(data))


def pack_offers(offers: list[PartialOffer]) -> bytes:
    """Write a list of offers."""
    return json.dumps([asdict(offer) for offer in offers], separators=(",", ":")).encode()


def unpack_offers(data: bytes | memoryview) -> list[PartialOffer]:
    """Read a list of offers.

    Raises:
        MalformedRequest: it is none.
    """
    items = _load(data)
    if not isinstance(items, list):
        raise MalformedRequest("a list of offers was expected")
    return [_build(PartialOffer, item) for item in items]


def _load(data: bytes | memoryview) -> Any:
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise MalformedRequest(f"a message between nodes is no JSON: {error}") from error


_TYPES = {"int": int, "str": str}


def _build(kind: type[T], values: Any) -> T:
    """Make a message of a JSON value, every field of the right type; numbers are not negative."""
    fields: Mapping[str, str] = kind.__annotations__
    if not isinstance(values, dict) or values.keys() != fields.keys():
        raise MalformedRequest(f"a message between nodes is no {kind.__name__}")
    for name, type_name in fields.items():
        if type(values[name]) is not _TYPES[type_name] or (type_name == "int" and values[name] < 0):
            raise MalformedRequest(f"{name} of a {kind.__name__} between nodes is not a sound {type_name}")
    return kind(**values)
