"""Sockets: HTTP for devices, TLS contexts."""
