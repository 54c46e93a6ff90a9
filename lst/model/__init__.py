"""The Latent Speech-Text Transformer and its token-level baseline."""

from lst.model.config import ModelConfig, StackConfig
from lst.model.latent import (
    LanguageModel,
    LatentSpeechTextTransformer,
    TokenLevelTransformer,
    build_model,
    count_parameters,
)

__all__ = [
    "LanguageModel",
    "LatentSpeechTextTransformer",
    "ModelConfig",
    "StackConfig",
    "TokenLevelTransformer",
    "build_model",
    "count_parameters",
]
