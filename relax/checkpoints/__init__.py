"""Checkpoints on disk: our own, and the released ones of others."""
