"""What a training run measures: shown, stored and drawn."""
