"""Decisions: pure functions over small values; no arrays, no clock, no socket."""
