"""docs/DEPLOYMENT.md against the code: inventory, variables, playbooks, options. tests/lab types its commands."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from unit.docs.pages import ROOT, blocks, codes, page, unknown_options

PAGE = page("DEPLOYMENT.md")
ANSIBLE = ROOT / "ansible"
INVENTORIES = [yaml.safe_load(block) for block in blocks(PAGE, "yaml")]
COMMANDS = [
    line[2:] for block in blocks(PAGE, "console") for line in block.splitlines() if line.startswith("$ ")
]


def cluster(inventory: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = inventory["all"]["children"]["cluster"]
    return found


def known_variables() -> set[str]:
    known = set(yaml.safe_load((ANSIBLE / "group_vars/all.yml").read_text()))
    for specs in (ANSIBLE / "roles").glob("*/meta/argument_specs.yml"):
        known |= set(yaml.safe_load(specs.read_text())["argument_specs"]["main"].get("options", {}))
    return known


def test_the_first_inventory_has_the_form_of_the_one_for_three_hosts() -> None:
    ours, theirs = (
        cluster(INVENTORIES[0]),
        cluster(yaml.safe_load((ANSIBLE / "inventories/three.yml").read_text())),
    )
    assert set(ours["children"]) == set(theirs["children"])
    assert len(ours["hosts"]) == len(theirs["hosts"]) == 3
    used = {host for group in ours["children"].values() for host in group["hosts"]}
    assert used == set(ours["hosts"])


def test_the_hosts_are_those_of_the_lab() -> None:
    lab = cluster(yaml.safe_load((ANSIBLE / "inventories/lab.yml").read_text()))["hosts"]
    named = {name: facts for inventory in INVENTORIES for name, facts in cluster(inventory)["hosts"].items()}
    assert named == lab


@pytest.mark.parametrize("inventory", INVENTORIES)
def test_the_variables_are_there(inventory: dict[str, Any]) -> None:
    assert set(cluster(inventory)["vars"]) - {"ansible_user"} <= known_variables()


def test_the_job_has_only_options_that_are_there() -> None:
    sample = (ROOT / "etc/fl.yaml.sample").read_text()

    def names(section: dict[str, Any]) -> list[str]:
        inner = [name for value in section.values() if isinstance(value, dict) for name in names(value)]
        return [*section, *inner]

    for inventory in INVENTORIES:
        for name in names(cluster(inventory)["vars"]["fl_job"]):
            assert re.search(rf"^ *#?{name}:", sample, re.M), name


def test_the_variables_in_the_text_are_there() -> None:
    named = {word for word in codes(PAGE) if re.fullmatch(r"(fl|pki|common|server|worker)_[a-z_]+", word)}
    assert named and named <= known_variables()


def test_the_playbooks_and_inventories_are_there() -> None:
    for name in re.findall(r"[a-z_]+\.yml", PAGE):
        if name not in ("mine.yml", "main.yml"):
            assert list(ANSIBLE.rglob(name)), name


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.search(r"\bfl(-client)? ", line)])
def test_the_options_are_there(line: str) -> None:
    assert unknown_options(line) == set()


def test_what_the_lab_leaves_out_has_a_reason() -> None:
    assert all(len(reason) > 20 for reason in re.findall(r"<!-- not in the lab: (.*) -->", PAGE))
    assert PAGE.count("<!--") == len(re.findall(r"<!-- not in the lab: .* -->", PAGE))
