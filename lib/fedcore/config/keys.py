"""What one configuration key is: its type, range, default, unit and help, declared where its field is.

`option` and `section` make dataclass fields that carry such a description; `keys_of` walks a tree of
dataclasses and returns the descriptions with their dotted paths, in the order in which they are read.
The loader, the sample file and generated documents all follow that one table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from enum import Enum, StrEnum
from typing import Any

from fedcore.errors import ConfigError

U32_MAX = 4294967295

_SIZE = re.compile(r"([0-9]{1,12}) ?(B|KiB|MiB|GiB|TiB)")
_SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class Role(Enum):
    """Which program reads the file."""

    SCHEDULER = "scheduler"
    SERVER = "server"
    WORKER = "worker"


ALL_ROLES = frozenset(Role)
SERVER_ROLES = frozenset({Role.SERVER, Role.WORKER})  # a worker needs the server's part of the file


class Kind(Enum):
    """Type of a value in the file."""

    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    STR = "str"
    SIZE = "size"  # bytes: an int, or a string such as "512MiB"


@dataclass(frozen=True, slots=True)
class Limits:
    """An interval of numbers.

    Attributes:
        low: lower end.
        high: upper end, None if there is none.
        low_open: the lower end itself is outside.
        high_open: the upper end itself is outside.
    """

    low: float
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def __str__(self) -> str:
        if self.high is None:
            return f"{'>' if self.low_open else '>='} {self.low:g}"
        low, high = (f"{end:g}" if isinstance(end, float) else str(end) for end in (self.low, self.high))
        return f"{'(' if self.low_open else '['}{low}, {high}{')' if self.high_open else ']'}"

    def holds(self, value: float) -> bool:
        """Is value inside? NaN and infinities never are."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        above = value > self.low if self.low_open else value >= self.low
        if self.high is None:
            return above
        return above and (value < self.high if self.high_open else value <= self.high)

    def fault(self, value: float) -> str:
        """The protocol's words for a value outside, peculiar grammar included."""
        low, got = number_text(self.low), number_text(value)
        if self.high is None:
            return f"value is expected {'>' if self.low_open else '>='}{low}, but got {got}"
        high = number_text(self.high)
        if self.high_open:
            return f"expect value to be range of ({low},{high}), but got {got}"
        if self.low_open:
            return f"value is expected value to be range of ({low},{high}], but got {got}"
        return f"value is expected to be range of [{low},{high}], but got {got}"


def number_text(value: float) -> str:
    """A number as messages print it: ints plainly, floats with six decimals."""
    if isinstance(value, float):
        return f"{value:.6f}"
    return str(value) if value.bit_length() < 4096 else f"{value:#x}"  # Python refuses to print huge decimals


@dataclass(frozen=True, slots=True)
class Condition:
    """A key or section is read only if another key, which stands before it, has one of these values."""

    path: str
    values: tuple[object, ...]

    def __str__(self) -> str:
        return f"{self.path} is {' or '.join(plain_text(value) for value in self.values)}"


@dataclass(frozen=True, slots=True)
class Option:
    """Description of one key, without its place.

    Attributes:
        kind: type in the file.
        default: value if the key is missing; of a required key: value for a role that does not read it.
        help: one or two sentences for the operator.
        unit: unit of a number, empty if it has none.
        limits: interval of a number, None if any will do.
        required: the key must be given by roles that read it.
        example: value shown in the sample for a required key.
        choices: the only good values, empty if there is no list.
        choice_fault: message for a value not among choices (braces receive it); empty for the usual one.
        parse: turns the string of the file into the setting; raises ConfigError.
        forgiving: a value that parse refuses gives a warning and the default.
        condition: when the key is read; None: follows its section.
    """

    kind: Kind
    default: object
    help: str
    unit: str = ""
    limits: Limits | None = None
    required: bool = False
    example: object = None
    choices: tuple[StrEnum, ...] = ()
    choice_fault: str = ""
    parse: Callable[[str], object] | None = None
    forgiving: bool = False
    condition: Condition | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """Description of a group of keys, without its place.

    Attributes:
        cls: dataclass of the group.
        help: one sentence for the operator.
        roles: who reads it; None: as the group around it.
        condition: when it is read; None: as the group around it.
    """

    cls: type[Any]
    help: str
    roles: frozenset[Role] | None = None
    condition: Condition | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """An option at its place in the file.

    Attributes:
        path: dotted name, for instance `round.update_model_ratio`.
        option: its description.
        roles: who reads it.
        condition: when it is read, None for always.
    """

    path: str
    option: Option
    roles: frozenset[Role]
    condition: Condition | None


def option(default: object, help: str, **details: Any) -> Any:
    """A dataclass field for a key; the kind and the choices follow from the default unless given.

    Args:
        default: the setting itself, for a parsed key the parsed value.
        help: see Option.
        **details: the other attributes of Option.
    """
    details.setdefault("kind", _kind_of(default))
    if isinstance(default, StrEnum):
        details.setdefault("choices", tuple(type(default)))
    return field(default=default, metadata={"option": Option(default=default, help=help, **details)})


def section(
    cls: type[Any], help: str, *, roles: frozenset[Role] | None = None, condition: Condition | None = None
) -> Any:
    """A dataclass field for a group of keys; the arguments are the attributes of Section."""
    return field(default_factory=cls, metadata={"section": Section(cls, help, roles, condition)})


def keys_of(
    cls: type[Any], prefix: str = "", roles: frozenset[Role] = ALL_ROLES, condition: Condition | None = None
) -> Iterator[Key]:
    """All keys below a dataclass made of options and sections, in reading order."""
    for member in fields(cls):
        path = prefix + member.name
        if "section" in member.metadata:
            group: Section = member.metadata["section"]
            yield from keys_of(group.cls, path + ".", group.roles or roles, group.condition or condition)
        else:
            description: Option = member.metadata["option"]
            yield Key(path, description, roles, description.condition or condition)


def sections_of(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, Section]]:
    """Path and description of all groups below a dataclass, outer ones first."""
    for member in fields(cls):
        if "section" in member.metadata:
            group: Section = member.metadata["section"]
            yield prefix + member.name, group
            yield from sections_of(group.cls, f"{prefix}{member.name}.")


def parse_size(text: str) -> int:
    """Bytes from "512MiB", "1 GiB" or plain digits.

    Raises:
        ConfigError: another form or unit.
    """
    match = _SIZE.fullmatch(text if not text.isdigit() else text + "B")
    if match is None:
        raise ConfigError(f"value is expected to be bytes, such as 536870912 or 512MiB, but got {text}")
    return int(match[1]) * _SIZE_UNITS[match[2]]


def plain_text(value: object) -> str:
    """A setting as the file spells it, strings without quotes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return str(value)


def _kind_of(default: object) -> Kind:
    if isinstance(default, bool):
        return Kind.BOOL
    if isinstance(default, int):
        return Kind.INT
    return Kind.FLOAT if isinstance(default, float) else Kind.STR
