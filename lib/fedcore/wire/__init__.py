"""Bytes to values and back: the device protocol."""
