"""Prefill, decoding and streaming, on the model that training runs."""
