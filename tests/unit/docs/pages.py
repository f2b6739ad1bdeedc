"""The pages of docs/ as data: sections, tables, blocks; and every text that the code can show.

Not a test: what the tests of this folder share.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import yaml

from fedclient.__main__ import main as fl_client
from fedctl.__main__ import main as fl

ROOT = Path(__file__).parents[3]
WILDCARD = "…"  # in a page: whatever stands there


def page(name: str) -> str:
    """Return a page of docs/."""
    return (ROOT / "docs" / name).read_text()


def section(text: str, title: str) -> str:
    """Return what stands below a heading, up to the next one of the same level."""
    match = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert match is not None, f"there is no section {title}"
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def table(text: str, *columns: str) -> list[list[str]]:
    """Return the rows, cell by cell, of the one table that has these columns."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        head, _, *rows = [
            [cell.strip() for cell in line.strip("|\n").split(" | ")] for line in block.splitlines()
        ]
        if [cell.strip() for cell in head] == list(columns):
            found.append(rows)
    assert len(found) == 1, f"{len(found)} tables have the columns {columns}"
    assert all(len(row) == len(columns) for row in found[0]), found[0]
    return found[0]


def codes(cell: str) -> list[str]:
    """Return what stands between backticks, outside of fenced blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```$", "", cell, flags=re.DOTALL | re.MULTILINE))


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def unknown_options(line: str) -> set[str]:
    """Return the options, such as --watch, that a line of shell gives to our commands and that they do not have."""
    words = shlex.split(line, comments=True)
    commands: dict[str, click.Command] = {"fl": fl, "fl-client": fl_client}
    at = next(number for number, word in enumerate(words) if word in commands)
    command, words = commands[words[at]], words[at + 1 :]
    while isinstance(command, click.Group):
        inner = command.get_command(click.Context(command), words.pop(0))
        assert inner is not None, line
        command = inner
    known = {spelling for parameter in command.params for spelling in parameter.opts}
    return {word for word in words if word.startswith("--")} - known


# ---- what the code can say


def _of_python(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    inner = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else WILDCARD for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inner:
            yield re.sub(r"\{[^{}]*\}", WILDCARD, node.value)


def _of_yaml(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield re.sub(r"\{\{.*?\}\}|\{%.*?%\}", WILDCARD, value, flags=re.DOTALL)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _of_yaml(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _of_yaml(inner)


@cache
def texts_of_the_code() -> tuple[str, ...]:
    """Return every string that daemons, tools, units and playbooks hold; what is filled in later is a WILDCARD."""
    found: set[str] = set()
    for folder in ("lib", "daemons"):
        for file in (ROOT / folder).rglob("*.py"):
            found |= set(_of_python(file.read_text()))
    for file in (ROOT / "ansible").rglob("*.yml"):
        if "secrets" not in file.parts:
            found |= set(_of_yaml(yaml.safe_load(file.read_text())))
    for file in (ROOT / "systemd").rglob("*"):
        if file.is_file():
            found |= set(file.read_text().splitlines())
    return tuple(" ".join(text.split()) for text in found)


def shown_by_the_code(text: str) -> bool:
    """Whether the code can show a text of a page; a WILDCARD in it stands for anything."""
    pieces = text.split(WILDCARD)
    pattern = re.compile(".*?".join(map(re.escape, pieces)))
    likely = (each for each in texts_of_the_code() if all(piece in each for piece in pieces))
    return any(pattern.search(each) for each in likely)
