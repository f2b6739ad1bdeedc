"""Bytes to values and back: the device protocol, and that between nodes."""
