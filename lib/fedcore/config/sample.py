"""The sample file, written from the table of keys; etc/fl.yaml.sample is this text, as a test makes sure.

To renew it: python -c "from fedcore.config.sample import render_sample as r; print(r(), end='')"
"""

from __future__ import annotations

import json
import textwrap

from fedcore.config.keys import SERVER_ROLES, Condition, Key, Kind, Option, plain_text
from fedcore.config.settings import KEYS, SECTIONS

_HEAD = """\
# Configuration of a fedcore cluster: one file for schedulers and servers, usually /etc/fl/fl.yaml.
# It is the file of MindSpore Federated 0.1 with one more section, fedcore.
#
# Lines like "#name: value" show an option; remove the "#" to set it. The value is the default, or an example
# where the default is not to be given. Options that must be given stand here with an example.
"""


def render_sample() -> str:
    """Every option with its explanation, unit, range and default; the required ones with an example."""
    blocks = [_HEAD]
    seen: set[str] = set()
    for key in KEYS:
        parents = key.path.split(".")[:-1]
        for depth in range(1, len(parents) + 1):
            group = ".".join(parents[:depth])
            if group not in seen:
                seen.add(group)
                blocks.append(_section_block(group))
        blocks.append(_key_block(key))
    return "\n".join(blocks)


def option_facts(option: Option) -> str:
    """Type, unit, range, choices and need of an option in one line: "int, ms, [1, 65535], default 5"."""
    kind = "bytes" if option.kind is Kind.SIZE else option.kind.value
    facts = [kind]
    if option.unit and option.unit != kind:
        facts.append(option.unit)
    if option.choices:
        facts.append("one of " + " ".join(option.choices))
    if option.limits:
        facts.append(str(option.limits))
    facts.append("required" if option.required else f"default {_default_text(option)}")
    return ", ".join(facts)


def _default_text(option: Option) -> str:
    default, limits = option.default, option.limits
    if limits is not None and isinstance(default, int | float) and not limits.holds(default):
        return "none"
    return value_text(option, default)


def value_text(option: Option, value: object) -> str:
    """A value as the sample writes it: free text in quotes, sizes with a unit."""
    if option.kind is Kind.SIZE and isinstance(value, int):
        return f"{value >> 20}MiB"
    text = plain_text(value)
    return json.dumps(text) if option.kind is Kind.STR and not option.choices else text


def _section_block(path: str) -> str:
    group = SECTIONS[path]
    indent = "  " * path.count(".")
    words = group.help
    if group.roles == SERVER_ROLES:
        words += " Read by servers only."
    return _comment(words + _when(group.condition), indent) + f"{indent}{path.rpartition('.')[2]}:\n"


def _key_block(key: Key) -> str:
    option = key.option
    indent = "  " * key.path.count(".")
    own_condition = option.condition if option.condition else None
    value = option.default if option.example is None else option.example
    mark = "" if option.required and key.condition is None else "#"
    name = key.path.rpartition(".")[2]
    facts = f"{indent}# {option_facts(option)}\n"
    entry = f"{indent}{mark}{name}: {value_text(option, value)}\n"
    return _comment(option.help + _when(own_condition), indent) + facts + entry


def _when(condition: Condition | None) -> str:
    return f" Read only if {condition}." if condition else ""


def _comment(words: str, indent: str) -> str:
    lines = textwrap.wrap(words, width=108 - len(indent))
    return "".join(f"{indent}# {line}\n" for line in lines)
