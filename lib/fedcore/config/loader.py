"""From the flat values of a file to Settings: types, ranges, required keys, all faults at once.

Messages of MindSpore Federated 0.1 are kept to the letter. It stops at the first fault; here each fault is a
line of one ConfigError, in the order in which the keys are read, so its first line is the original's message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedcore.config.crosscheck import cross_checks, cross_faults, forced, in_force
from fedcore.config.document import Document, Given, read_document
from fedcore.config.keys import Key, Kind, Role, plain_text
from fedcore.config.settings import KEYS, SECTIONS, EvalType, Settings
from fedcore.config.support import reduced
from fedcore.core.quorum import to_float32
from fedcore.errors import ConfigError

_OWN = "fedcore"
_EXPONENT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+")  # 1e-3, to YAML 1.1 a string

_SWITCH = frozenset({"on", "off"})


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """What a file gave.

    Attributes:
        settings: the settings.
        warnings: one sentence each, for the log.
    """

    settings: Settings
    warnings: tuple[str, ...]


def load_settings(path: Path, role: Role) -> LoadedSettings:
    """Read and check a configuration file.

    A scheduler reads only what concerns all roles; the other sections of its Settings hold their defaults.
    The section `fedcore` is checked whole for every role. Sections that a switch turns off (TLS, the kinds
    of protection) also keep their defaults, and a bad value in them is only a warning.

    Args:
        path: the YAML file, named in messages as given here.
        role: which program asks.

    Raises:
        ConfigError: the file cannot be used; one line per fault, then one line `warning: ...` for each
            oddity that may be the reason, such as a misspelt key.
    """
    document = read_document(path, {key.path for key in KEYS}, SECTIONS)
    check = _Check(document, str(path), role)
    for key in KEYS:
        check.take(key)
    faults, warnings = check.faults, check.warnings
    for remark in document.remarks:
        own = remark.path.partition(".")[0] == _OWN
        (faults if own and remark.useless else warnings).append(remark.text)
    if faults:
        raise ConfigError(
            "\n".join(_one_line(line) for line in [*faults, *(f"warning: {w}" for w in warnings)])
        )
    given = _assemble(Settings, check.values)
    settings = in_force(given)
    warnings += forced(given)
    if faults := cross_faults(settings):
        raise ConfigError("\n".join(f"{fault}, yaml config file: {path}" for fault in faults))
    warnings += [*cross_checks(settings, role), *reduced(settings, role)]
    return LoadedSettings(settings, tuple(_one_line(warning) for warning in warnings))


class _Check:
    """Judges one key after the other; collects values, faults and warnings."""

    def __init__(self, document: Document, file: str, role: Role) -> None:
        self._given = document.given
        self._file = file
        self._role = role
        self.values: dict[str, object] = {}
        self.faults: list[str] = []
        self.warnings: list[str] = []

    def take(self, key: Key) -> None:
        """Judge one key; the keys that its condition names have been judged before."""
        self.values[key.path] = key.option.default
        if self._role not in key.roles:
            return
        condition = key.condition
        if condition and self.values[condition.path] not in condition.values:
            self._glance(key, f"it would be read only if {condition}")
            return
        try:
            self.values[key.path] = self._value(key)
        except ConfigError as fault:
            if key.option.forgiving:
                self.warnings.append(f"{fault}; {plain_text(key.option.default)} is used")
            else:
                self.faults.append(str(fault))
        else:
            self._judge_together(key)

    def _glance(self, key: Key, reason: str) -> None:
        """A key out of force does no harm, but what is wrong with it deserves a word."""
        if key.path in self._given:
            try:
                self._value(key)
            except ConfigError as fault:
                self.warnings.append(f"{fault} ({reason})")

    def _judge_together(self, key: Key) -> None:
        """The one rule about two keys that is a fault."""
        if key.path == "unsupervised.eval_type" and self.values[key.path] is not EvalType.NOT_EVAL:
            number = self._given.get("unsupervised.cluster_client_num")
            if number is None:
                self.faults.append("Cluster client num is <= 0 when unsupervised eval mode is opened.")

    def _value(self, key: Key) -> object:
        """The setting of one key.

        Raises:
            ConfigError: it is missing or not what it should be.
        """
        given = self._given.get(key.path)
        empty = given is not None and given.value == "" and key.option.kind is Kind.STR
        if given is None or empty:
            if key.option.required:
                raise ConfigError(f"The parameter '{key.path}' is missing, yaml config file: {self._file}")
            return key.option.default
        value = self._typed(key, given)
        if isinstance(value, str):
            value = self._parsed(key, value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._check_limits(key, value)
        return value

    def _typed(self, key: Key, given: Given) -> object:
        """The value with the type of its kind; a size may still be a string."""
        kind, value = key.option.kind, given.value
        if kind is Kind.FLOAT and not isinstance(value, bool):
            if isinstance(value, int | float):
                return _to_float(value)
            if isinstance(value, str) and given.plain and _EXPONENT.fullmatch(value):
                return float(value)
        if isinstance(value, bool) and set(key.option.choices) >= _SWITCH:
            return "on" if value else "off"  # YAML 1.1 reads a bare on and off as true and false
        wanted = "int" if kind is Kind.SIZE else kind.value
        if given.type_name == wanted or (kind is Kind.SIZE and given.type_name == "str"):
            return value
        stray = "<< " if kind is Kind.STR else ""  # sic
        raise ConfigError(
            f"The parameter '{key.path}' is expected to be type {wanted}, "
            f"actually {stray}{given.type_name}, yaml config file: {self._file}"
        )

    def _parsed(self, key: Key, text: str) -> object:
        """The setting that a string stands for."""
        choices, parse = key.option.choices, key.option.parse
        if choices:
            if text not in choices:
                raise ConfigError(self._choice_fault(key, text))
            return type(choices[0])(text)
        if parse is None:
            return text
        try:
            return parse(text)
        except ConfigError as fault:
            if key.path.startswith(_OWN) or key.option.forgiving:
                raise ConfigError(self._value_fault(key, str(fault))) from None
            raise

    def _check_limits(self, key: Key, value: float) -> None:
        limits = key.option.limits
        if limits is None:
            return
        # Peers see single precision: a ratio of 1e-50 would reach them as 0.
        seen = to_float32(value) if isinstance(value, float) and not key.path.startswith(_OWN) else value
        if not limits.holds(value) or not limits.holds(seen):
            raise ConfigError(self._value_fault(key, limits.fault(value)))

    def _choice_fault(self, key: Key, text: str) -> str:
        if key.option.choice_fault:
            return key.option.choice_fault.format(text)
        return (
            f"The value of parameter '{key.path}' can be only one of "
            f"[const vector][{', '.join(key.option.choices)}], but got {text}, yaml config file: {self._file}"
        )

    def _value_fault(self, key: Key, detail: str) -> str:
        return f"Failed to check value of parameter '{key.path}': {detail}, yaml config file: {self._file}"


def _to_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _one_line(text: str) -> str:
    """Text with line breaks from the file made visible, so that a line is a fault."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _assemble(cls: type[Any], values: Mapping[str, object], prefix: str = "") -> Any:
    """The dataclass of a section, filled with the values below its path."""
    return cls(
        **{
            member.name: _assemble(member.metadata["section"].cls, values, f"{prefix}{member.name}.")
            if "section" in member.metadata
            else values[prefix + member.name]
            for member in fields(cls)
        }
    )
