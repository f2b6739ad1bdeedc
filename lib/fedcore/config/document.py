"""From a YAML file to flat values under known dotted names.

Only the node tree is read, never YAML's object construction, so a file cannot create anything but bool, int,
float and str. Values keep the type that MindSpore Federated 0.1 sees, lists and nulls count as missing, the
last of two equal keys wins; what is unusual leaves a remark. Types and ranges are judged by the loader.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode

from fedcore.errors import ConfigError

_LOADER: type[yaml.SafeLoader | yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAPPING_TAG = "tag:yaml.org,2002:map"
_MERGE_TAG = "tag:yaml.org,2002:merge"
# What PyYAML raises for "0x_", "!!bool maybe" and the like: text that looks like a number and is none.
_BAD_SCALAR = (ValueError, KeyError, IndexError, OverflowError)
_MAX_DEPTH = 100  # the C parser's stack breaks at tens of thousands; our tree is four deep


@dataclass(frozen=True, slots=True)
class Given:
    """A value as the file gives it.

    Attributes:
        value: bool, int, float or str; None for a mapping, which no key accepts.
        plain: written without quotes.
    """

    value: bool | int | float | str | None
    plain: bool

    @property
    def type_name(self) -> str:
        """int, float, bool, str or dict."""
        return "dict" if self.value is None else type(self.value).__name__


@dataclass(frozen=True, slots=True)
class Remark:
    """Something unusual in the file.

    Attributes:
        path: dotted name as written.
        text: a sentence for the operator.
        useless: what was written has no effect, because no such key or section exists.
    """

    path: str
    text: str
    useless: bool


@dataclass(frozen=True, slots=True)
class Document:
    """The known part of a file and the remarks about the rest."""

    given: dict[str, Given]
    remarks: list[Remark]


def read_document(path: Path, keys: Collection[str], sections: Collection[str]) -> Document:
    """Read a configuration file.

    Args:
        path: the file.
        keys: dotted names of all keys.
        sections: dotted names of all mappings that hold keys.

    Raises:
        ConfigError: there is no such file, it cannot be read, is not YAML or not a mapping.
    """
    root = _compose(path)
    if not isinstance(root, MappingNode):
        raise ConfigError(
            f"Expect content of yaml config file {path} is of the dict type, yaml config file: {path}"
        )
    reader = _Reader(keys, sections, str(path))
    try:
        reader.walk(root, "")
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_fault(path, error)) from error
    except RecursionError:
        raise ConfigError(f"yaml config file {path} merges too many mappings into each other") from None
    return Document(reader.given, reader.remarks)


def _compose(path: Path) -> Node | None:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"yaml config file {path} not exist") from None
    except OSError as error:
        raise ConfigError(f"yaml config file {path} cannot be read: {error.strerror}") from error
    try:
        depth = 0
        for event in yaml.parse(text, Loader=_LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise ConfigError(f"yaml config file {path} is nested more than {_MAX_DEPTH} deep")
        node: Node | None = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_fault(path, error)) from error
    return node


def _syntax_fault(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    return f"Syntax error in yaml config file {path}{place}: {reason}"


class _Reader:
    """Walks the known sections of a node tree; whatever lies below unknown names is not looked at."""

    def __init__(self, keys: Collection[str], sections: Collection[str], file: str) -> None:
        self._keys = keys
        self._sections = sections
        self._file = file
        self._construct = SafeConstructor()
        self.given: dict[str, Given] = {}
        self.remarks: list[Remark] = []

    def walk(self, mapping: MappingNode, prefix: str) -> None:
        """Take the values of one mapping and of the known mappings below it."""
        for name, key_node, node in self._pairs(mapping, prefix):
            path = prefix + name
            if path in self._keys:
                self._take(path, key_node, node)
            elif path not in self._sections:
                nearest = nearest_name(path, self._keys, self._sections)
                advice = f"did you mean '{nearest}'?" if nearest else "and has no effect"
                comma = "," if nearest else ""
                self._remark(path, key_node, f"is unknown{comma} {advice}", useless=True)
            elif isinstance(node, MappingNode):
                self.walk(node, path + ".")
            elif _kind(node) != "null":  # an empty section is what remains when all its keys are comments
                self._remark(path, key_node, "should hold a mapping and has no effect", useless=True)

    def _pairs(self, mapping: MappingNode, prefix: str) -> Iterator[tuple[str, Node, Node]]:
        """Name, key node and value node of each entry; of equal names the last, merged ones first."""
        if mapping.tag != _MAPPING_TAG:
            raise _unknown_tag(mapping)
        seen: set[str] = set()
        for key_node, _ in mapping.value:
            name = _name(key_node)
            if name in seen and key_node.tag != _MERGE_TAG:
                self._remark(prefix + name, key_node, "is given again, the last value counts")
            seen.add(name)
        self._construct.flatten_mapping(mapping)
        yield from {_name(key): (_name(key), key, node) for key, node in mapping.value}.values()

    def _take(self, path: str, key_node: Node, node: Node) -> None:
        kind = _kind(node)
        if kind == "dict":
            value = None
        elif kind in ("bool", "int", "float", "str"):
            value = self._scalar(node)
        else:
            self.given.pop(path, None)
            self._remark(path, key_node, f"is a {kind} and counts as missing")
            return
        if path in self.given:
            self._remark(path, key_node, "is given again, the last value counts")
        self.given[path] = Given(value, isinstance(node, ScalarNode) and not node.style)

    def _scalar(self, node: Node) -> bool | int | float | str:
        try:
            value: bool | int | float | str = self._construct.construct_object(node)
        except _BAD_SCALAR:
            raise yaml.constructor.ConstructorError(
                problem=f"'{node.value}' is not a good {_kind(node)}", problem_mark=node.start_mark
            ) from None
        return value

    def _remark(self, path: str, node: Node, text: str, *, useless: bool = False) -> None:
        line = node.start_mark.line + 1
        sentence = f"The parameter '{path}' in line {line} {text}, yaml config file: {self._file}"
        self.remarks.append(Remark(path, sentence, useless))


def nearest_name(path: str, keys: Collection[str], sections: Collection[str]) -> str:
    """The known name that was probably meant, "" for none.

    That is the same last part elsewhere, else a similar one beside it, else a very similar one elsewhere.
    """
    parent, _, last = path.rpartition(".")
    all_names: dict[str, str] = {}
    siblings: dict[str, str] = {}
    for name in (*keys, *sections):
        above, _, end = name.rpartition(".")
        all_names.setdefault(end, name)
        if above == parent:
            siblings[end] = name
    if last in all_names:
        return all_names[last]
    for names, cutoff in ((siblings, 0.6), (all_names, 0.75)):
        for close in difflib.get_close_matches(last, names, n=1, cutoff=cutoff):
            return names[close]
    return ""


def _name(node: Node) -> str:
    return str(node.value) if isinstance(node, ScalarNode) else "?"


def _kind(node: Node) -> str:
    """bool, int, float, str or dict; else null, list, timestamp, binary, which count as missing."""
    prefix, _, kind = node.tag.rpartition(":")
    if prefix != "tag:yaml.org,2002" or kind in ("value", "merge"):
        raise _unknown_tag(node)
    if isinstance(node, MappingNode):
        return "dict"
    return kind if isinstance(node, ScalarNode) else "list"


def _unknown_tag(node: Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(
        problem=f"unknown tag '{node.tag}'", problem_mark=node.start_mark
    )
