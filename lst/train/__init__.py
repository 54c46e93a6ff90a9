"""Training: ``torchrun -m lst.train``."""
