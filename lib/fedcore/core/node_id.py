"""What a node's id tells: ``{ip}:{port}::{local time}::{10000..99999}``, the protocol's form."""

from __future__ import annotations

from collections.abc import Iterable


def address_of(node_id: str) -> str:
    """Return ``ip:port`` of the node channel, "" if the id tells none (workers)."""
    address, separator, _ = node_id.partition("::20")
    return address if separator and address.rpartition(":")[2].isdigit() else ""


def replaced(nodes: Iterable[str], living: Iterable[str]) -> set[str]:
    """Return those of ``nodes`` that are gone for certain, as a living one has their address."""
    heirs = {address_of(node): node for node in living}
    heirs.pop("", None)
    return {node for node in nodes if heirs.get(address_of(node), node) != node}


def host_of(node_id: str) -> str:
    """Return the address of the node's host, "" if the id tells none."""
    return address_of(node_id).rpartition(":")[0]
