"""Corpora and batches: what a step trains on, as a pure function of its number."""
