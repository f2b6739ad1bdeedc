"""The schema files and the dataclasses say the same."""

import re
from enum import IntEnum
from graphlib import TopologicalSorter
from importlib.resources import files

import pytest
from unit.wire.samples import MESSAGES

from fedcore.wire.codec import MAX_VTABLE, slots_of
from fedcore.wire.messages import CompressType, Kind, UnsupervisedEvalFlg

Fields = list[tuple[str, Kind, str | None]]

KINDS = {
    "int": Kind.INT,
    "float": Kind.FLOAT,
    "bool": Kind.BOOL,
    "byte": Kind.BYTE,
    "string": Kind.STRING,
    "[ubyte]": Kind.UBYTES,
    "[byte]": Kind.BYTES,
    "[int]": Kind.INTS,
    "[float]": Kind.FLOATS,
    "[string]": Kind.STRINGS,
}


def parse(text: str) -> tuple[dict[str, Fields], dict[str, dict[str, int]]]:
    """Return the tables and enums of a schema; fail on anything that is neither."""
    text = re.sub(r"//.*", "", text)
    text = re.sub(r'(namespace|include|file_identifier|file_extension)\s+("[^"]*"|[\w.]+)\s*;', "", text)
    declaration = re.compile(r"(table|enum)\s+(\w+)\s*(?::\s*byte\s*)?\{([^}]*)\}")
    assert not declaration.sub("", text).split(), "the parser does not know a word of the schema"
    found = declaration.findall(text)
    enums = {
        name: {key: int(number) for key, number in re.findall(r"(\w+)\s*=\s*(-?\d+)", body)}
        for word, name, body in found
        if word == "enum"
    }

    def field(declared: str) -> tuple[str, Kind, str | None]:
        name, type_ = re.fullmatch(r"(\w+)\s*:\s*(\[?\w+\]?)", declared.strip()).groups()  # type: ignore[union-attr]
        inner = type_.strip("[]")
        known = KINDS.get(type_.replace(inner, "byte") if inner in enums else type_)
        if known:
            return name, known, None
        return name, Kind.TABLE if type_ == inner else Kind.TABLES, inner

    tables = {
        name: [field(declared) for declared in body.split(";") if declared.strip()]
        for word, name, body in found
        if word == "table"
    }
    assert len(tables) + len(enums) == len(found), "a name is declared twice"
    return tables, enums


SCHEMA = sorted(path.name for path in (files("fedcore.wire") / "schema").iterdir())
TABLES, ENUMS = parse("\n".join((files("fedcore.wire") / "schema" / name).read_text() for name in SCHEMA))
BY_NAME = {message.__name__: message for message in MESSAGES}


def test_the_schema_is_found() -> None:
    assert SCHEMA == ["cipher.fbs", "fl_job.fbs"]
    assert {"RequestFLJob", "ResponseGetModel", "CipherPublicParams"} <= TABLES.keys()


def test_every_table_has_a_class_and_every_class_a_table() -> None:
    assert BY_NAME.keys() == TABLES.keys()


@pytest.mark.parametrize("name", TABLES)
def test_slots_are_alike(name: str) -> None:
    slots = slots_of(BY_NAME[name])
    assert [(s.name, s.kind, s.table and s.table.__name__) for s in slots] == TABLES[name]


@pytest.mark.parametrize("name", TABLES)
def test_defaults_are_zero_and_absent(name: str) -> None:
    scalars = {Kind.INT: 0, Kind.FLOAT: 0.0, Kind.BOOL: False, Kind.BYTE: 0}
    slots = slots_of(BY_NAME[name])
    assert [(s.name, s.default) for s in slots] == [(s.name, scalars.get(s.kind)) for s in slots]
    assert [type(s.default) for s in slots] == [type(scalars.get(s.kind)) for s in slots]


@pytest.mark.parametrize("enum", [CompressType, UnsupervisedEvalFlg])
def test_enums_are_alike(enum: type[IntEnum]) -> None:
    assert {member.name: member.value for member in enum} == ENUMS[enum.__name__]


def test_tables_are_bounded_as_the_codec_expects() -> None:
    graph = {name: {table for _, _, table in fields if table} for name, fields in TABLES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError if a table can hold itself
    assert max(map(len, TABLES.values())) * 2 + 4 <= MAX_VTABLE
