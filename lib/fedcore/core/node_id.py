"""What a node's id tells: ``{ip}:{port}::{local time}::{10000..99999}``, the protocol's form."""

from __future__ import annotations


def address_of(node_id: str) -> str:
    """Return ``ip:port`` of the node channel, "" if the id tells none (workers)."""
    address, separator, _ = node_id.partition("::20")
    return address if separator and address.rpartition(":")[2].isdigit() else ""


def host_of(node_id: str) -> str:
    """Return the address of the node's host, "" if the id tells none."""
    return address_of(node_id).rpartition(":")[0]
