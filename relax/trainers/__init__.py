"""Trainers: one loop, and for each way of training a loss and its data."""
