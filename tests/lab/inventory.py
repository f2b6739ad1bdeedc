"""The hosts that the lab has: those of Ansible's inventory, so that there is one list of names and addresses."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import yaml
from lab.errors import LabError

CONTROLLER = "controller"
NETWORK_BITS = 24


def read_hosts(inventory: Path) -> dict[str, IPv4Address]:
    """Name -> address of every host below ``hosts:`` of any group.

    Raises:
        LabError: a host has no address, or the addresses are not in one network with room for the controller.
    """
    hosts: dict[str, IPv4Address] = {}
    for name, variables in _entries(yaml.safe_load(inventory.read_text())):
        if "ansible_host" in (variables or {}):
            hosts[name] = IPv4Address(variables["ansible_host"])
        else:
            hosts.setdefault(name, IPv4Address(0))
    if nowhere := [name for name, address in hosts.items() if not int(address)]:
        raise LabError(f"{inventory}: no ansible_host for {', '.join(nowhere)}")
    if len({network_of(address) for address in hosts.values()}) != 1:
        raise LabError(f"{inventory}: all hosts must be in one /{NETWORK_BITS} network")
    if controller_address(hosts) in hosts.values():
        raise LabError(f"{inventory}: {controller_address(hosts)} is the controller's address")
    return hosts


def network_of(address: IPv4Address) -> IPv4Network:
    """The network that a host is in."""
    return IPv4Network((address, NETWORK_BITS), strict=False)


def controller_address(hosts: dict[str, IPv4Address]) -> IPv4Address:
    """The first address of the network, as a hypervisor's host-only network gives it to its machine."""
    return network_of(next(iter(hosts.values()))).network_address + 1


def _entries(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "hosts" and isinstance(value, dict):
                yield from value.items()
            elif key != "vars":
                yield from _entries(value)
