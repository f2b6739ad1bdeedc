"""What a node's id tells: ``{ip}:{port}::{local time}::{10000..99999}``, the protocol's form."""

from __future__ import annotations

from collections.abc import Iterable


def address_of(node_id: str) -> str:
    """Return ``ip:port`` of the node channel, "" if the id tells none (workers)."""
    address, separator, _ = node_id.partition("::20")
    return address if separator and address.rpartition(":")[2].isdigit() else ""


def predecessors(nodes: Iterable[str], node_id: str) -> set[str]:
    """Return those of ``nodes`` that are gone for certain, as their address is the node's own."""
    address = address_of(node_id)
    return {node for node in nodes if address and node != node_id and address_of(node) == address}


def host_of(node_id: str) -> str:
    """Return the address of the node's host, "" if the id tells none."""
    return address_of(node_id).rpartition(":")[0]
