"""A page to try a trained model by, and to see its patches: ``python -m lst.demo CHECKPOINT``."""
