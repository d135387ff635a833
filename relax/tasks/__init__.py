"""What infer.py can do with a model."""
