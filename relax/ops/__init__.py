"""Arithmetic without parameters: pure functions on arrays."""
