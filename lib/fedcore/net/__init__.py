"""Sockets: HTTP for devices, frames between nodes, TLS contexts."""
