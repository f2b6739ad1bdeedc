"""The Vagrantfile against the lab's inventory: the same hosts, addresses and playbook.

It was never run under a hypervisor; what Vagrant makes of its settings is not tested here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
VAGRANTFILE = ROOT / "Vagrantfile"
INVENTORY = ROOT / "ansible/inventories/lab.yml"

pytestmark = pytest.mark.skipif(shutil.which("ruby") is None, reason="there is no ruby: apt-get install ruby")


def ruby(*arguments: object) -> str:
    done = subprocess.run(
        ["ruby", *map(str, arguments)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def inventory_addresses(group: dict[str, Any]) -> dict[str, str]:
    """Return host -> address of an inventory's group and those below it."""
    hosts = {name: facts for name, facts in (group.get("hosts") or {}).items() if facts}
    found = {name: facts["ansible_host"] for name, facts in hosts.items() if "ansible_host" in facts}
    for child in (group.get("children") or {}).values():
        found |= inventory_addresses(child or {})
    return found


@pytest.fixture(scope="module")
def defined() -> dict[str, Any]:
    defined: dict[str, Any] = json.loads(ruby(ROOT / "tests/data/vagrant_stub.rb", VAGRANTFILE))
    return defined["vm"]


def test_its_syntax() -> None:
    assert ruby("-c", VAGRANTFILE) == "Syntax OK\n"


def test_the_machines_are_the_inventorys_hosts(defined: dict[str, Any]) -> None:
    expected: dict[str, str] = {}
    for group in yaml.safe_load(INVENTORY.read_text()).values():
        expected |= inventory_addresses(group or {})
    assert len(expected) == 4
    machines = defined["machines"]
    assert {name: machine["networks"] for name, machine in machines.items()} == {
        name: [["private_network", address]] for name, address in expected.items()
    }
    assert all(machine["hostname"] == name for name, machine in machines.items())


def test_the_last_machine_has_all_provisioned_by_the_playbook(defined: dict[str, Any]) -> None:
    *others, last = defined["machines"].values()
    assert not any("provisioners" in machine for machine in others)
    [[kind, settings]] = last["provisioners"]
    assert kind == "ansible" and settings["limit"] == "all"
    for name in ("playbook", "inventory_path", "config_file"):
        assert (ROOT / settings[name]).is_file()
    assert ROOT / settings["inventory_path"] == INVENTORY
    assert ROOT / settings["playbook"] == ROOT / "ansible/site.yml"
    assert settings["extra_vars"] == {"fl_model": str(ROOT / "lenet.safetensors")}
    assert "fl model init --output lenet.safetensors" in VAGRANTFILE.read_text()


def test_debian_12_on_two_hypervisors(defined: dict[str, Any]) -> None:
    assert defined["box"] == "debian/bookworm64"
    assert set(defined["providers"]) == {"virtualbox", "libvirt"}


def test_the_file_and_the_guide_say_that_it_is_unproven() -> None:
    assert "never run under a hypervisor" in " ".join(VAGRANTFILE.read_text().replace("#", " ").split())
    assert "never run under a hypervisor" in " ".join((ROOT / "docs/DEPLOYMENT.md").read_text().split())
