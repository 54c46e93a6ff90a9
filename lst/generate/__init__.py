"""Continue prompts of text and speech with a trained model."""

from lst.generate.engine import Continuation, Generator
from lst.generate.sampling import Modality, Sampling

__all__ = ["Continuation", "Generator", "Modality", "Sampling"]
