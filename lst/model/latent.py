"""The Latent Speech-Text Transformer, and the token-level model that it is compared with.

::

    h = embed(tokens)                 (T, d_local)
    h, u = patch encoder(h)           (T, d_local), (P, d_global)
    z = global transformer(u)         (P, d_global)
    h = patch decoder(h, z)           (T, d_local)
    logits = head(norm(h))            (T, V)   next token at every position

    token-level: logits = head(norm(global transformer(embed(tokens))))

Every token passes the encoder and the decoder, text too (a text token is a patch of one), as in the
authors' code. T tokens, P patches, V ids of the joint vocabulary.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lst.data.batch import Batch
from lst.model.config import ModelConfig
from lst.model.global_transformer import GlobalTransformer
from lst.model.layers import Draw, initialise, token_losses, truncated_normal
from lst.model.patch_decoder import PatchDecoder
from lst.model.patch_encoder import PatchEncoder
from lst.vocabulary import Vocabulary


class LanguageModel(nn.Module, ABC):
    """Embedding, a body from tokens to states, norm and head: what both models have in common."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, dim: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary.size, dim)
        self.norm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.head = nn.Linear(dim, vocabulary.size, bias=False)

    def initialise(self, draw: Draw = truncated_normal) -> None:
        """Give every weight its first value; ``draw`` may know of weights that ranks share."""
        parts = self.residual_branches() | {"embedding": 1, "norm": 1, "head": 1}
        for name, branches in parts.items():
            initialise(getattr(self, name), branches, draw)

    @abstractmethod
    def residual_branches(self) -> dict[str, int]:
        """How many branches each part adds to its stream, by the part's name."""

    @abstractmethod
    def states(self, batch: Batch) -> Tensor:
        """(T, d) what the head reads, before its norm."""

    def logits(self, batch: Batch) -> Tensor:
        """(T, V) scores of the next token at every position."""
        return self.head(self.norm(self.states(batch)))

    def forward(self, batch: Batch) -> Tensor:
        """(T,) float32 losses in nats of ``batch.targets``; 0 where there is none."""
        return token_losses(self.norm(self.states(batch)), self.head, batch.targets)


class LatentSpeechTextTransformer(LanguageModel):
    """Patches in the middle, tokens at both ends."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary, config.encoder.dim)
        self.encoder = PatchEncoder(config)
        self.global_transformer = GlobalTransformer(config)
        self.decoder = PatchDecoder(config)
        self.initialise()

    def residual_branches(self) -> dict[str, int]:
        return {
            "encoder": 2 * self.config.encoder.layers + 1,
            "global_transformer": 2 * self.config.global_transformer.layers,
            "decoder": 3 * self.config.decoder.layers,
        }

    def states(self, batch: Batch) -> Tensor:
        h, u = self.encoder(self.embedding(batch.tokens), batch)
        return self.decoder(h, self.global_transformer(u, batch), batch)


class TokenLevelTransformer(LanguageModel):
    """The baseline: the global transformer alone, every token a patch."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary, config.global_transformer.dim)
        self.global_transformer = GlobalTransformer(config)
        self.initialise()

    def residual_branches(self) -> dict[str, int]:
        return {"global_transformer": 2 * self.config.global_transformer.layers}

    def states(self, batch: Batch) -> Tensor:
        return self.global_transformer(self.embedding(batch.tokens), batch)


def build_model(config: ModelConfig, vocabulary: Vocabulary) -> LanguageModel:
    """A freshly initialised model; under ``torch.device("meta")`` it takes no memory."""
    kind = LatentSpeechTextTransformer if config.architecture == "lst" else TokenLevelTransformer
    return kind(config, vocabulary)


def count_parameters(model: LanguageModel) -> dict[str, int]:
    """Parameters of each part, in the order of the forward pass, and their ``total``."""
    counts = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in model.named_children()
    }
    order = ("embedding", "encoder", "global_transformer", "decoder", "norm", "head")
    return {name: counts[name] for name in order if name in counts} | {
        "total": sum(counts.values())
    }
