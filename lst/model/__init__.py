"""The Latent Speech-Text Transformer and its token-level baseline."""

from lst.model.config import ModelConfig, RopeScaling, StackConfig
from lst.model.latent import (
    GlobalTextTransformer,
    LanguageModel,
    LatentSpeechTextTransformer,
    TokenLevelTransformer,
    build_model,
    count_parameters,
)

__all__ = [
    "GlobalTextTransformer",
    "LanguageModel",
    "LatentSpeechTextTransformer",
    "ModelConfig",
    "RopeScaling",
    "StackConfig",
    "TokenLevelTransformer",
    "build_model",
    "count_parameters",
]
