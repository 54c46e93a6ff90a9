"""The Latent Speech-Text Transformer, and the token-level model that it is compared with.

::

    h = embed(tokens)                 (T, d_local)
    h, u = patch encoder(h)           (T, d_local), (P, d_global)
    z = global transformer(u)         (P, d_global)
    h = patch decoder(h, z)           (T, d_local)
    logits = head(norm(h))            (T, V)   next token at every position

    token-level: logits = head(norm(global transformer(embed(tokens))))

With ``text_path="local"`` every token passes the encoder and the decoder, text too (a text token is
a patch of one), as in the authors' code. With "global", text and specials pass the global
transformer alone, and each token's owner predicts the next one::

    h = embed_speech(units)           (Ts, d_local)
    h, u = patch encoder(h)           (Ts, d_local), (Ps, d_global)
    x = u and embed(text), in order   (P, d_global)
    z = global transformer(x)         (P, d_global)
    h = patch decoder(h, z)           (Ts, d_local)
    logits = head(norm(z))            (Tt, V)  next token after text and specials
             head_speech(norm(h))     (Ts, Vs) next token after units: a unit or a special

T tokens, Ts of them units and Tt text or specials, P patches, Ps of them of units, V ids of the
joint vocabulary, Vs of the speech vocabulary.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lst.data.batch import Batch, Split
from lst.model.config import ModelConfig
from lst.model.cross_entropy import row_losses, token_losses
from lst.model.global_transformer import GlobalTransformer
from lst.model.layers import Draw, RMSNorm, initialise, stream, truncated_normal
from lst.model.patch_decoder import PatchDecoder
from lst.model.patch_encoder import PatchEncoder
from lst.vocabulary import Vocabulary

PARTS = (  # of any model, in the order of the forward pass
    "embedding",
    "speech_embedding",
    "encoder",
    "global_transformer",
    "decoder",
    "norm",
    "head",
    "speech_norm",
    "speech_head",
)


class LanguageModel(nn.Module, ABC):
    """Embedding, norm and head over the joint vocabulary: what all models have in common."""

    global_transformer: GlobalTransformer
    encoder: PatchEncoder  # these two not in a token-level model
    decoder: PatchDecoder

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, dim: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary.size, dim)
        self.norm = RMSNorm(dim, eps=config.norm_eps)
        self.head = nn.Linear(dim, vocabulary.size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the two weights one again after ``to_empty``, which gives each memory of its own."""
        if self.config.tied:
            self.head.weight = self.embedding.weight

    def weights(self) -> dict[str, Tensor]:
        """Every weight by its name, one that is tied only once."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def initialise(self, draw: Draw = truncated_normal) -> None:
        """Give every weight its first value; ``draw`` may know of weights that ranks share."""
        branches = self.residual_branches()
        for name in (*branches, *(name for name in PARTS if name not in branches)):
            if hasattr(self, name):
                initialise(getattr(self, name), branches.get(name, 1), draw)

    @abstractmethod
    def residual_branches(self) -> dict[str, int]:
        """How many branches each part adds to its stream, by the part's name."""

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """(T, V) scores of the next token at every position; −inf for what cannot follow."""

    def token_losses(self, x: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        """(T,) float32 losses in nats of what ``head`` reads (T, d); 0 where there is no target."""
        return token_losses(x, head, targets, row_losses=self.row_losses)

    @staticmethod
    def row_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Those of few rows at a time; training may put compiled code here."""
        return row_losses(x, weight, targets)

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """(T,) float32 losses in nats of ``batch.targets``; 0 where there is none."""


class OneHead(LanguageModel):
    """A model in which every token's state is read by the same head."""

    @abstractmethod
    def states(self, batch: Batch) -> Tensor:
        """(T, d) what the head reads, before its norm."""

    def logits(self, batch: Batch) -> Tensor:
        return self.head(self.norm(self.states(batch)))

    def forward(self, batch: Batch) -> Tensor:
        return self.token_losses(self.norm(self.states(batch)), self.head, batch.targets)


class LatentSpeechTextTransformer(OneHead):
    """Patches in the middle, tokens at both ends."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary, config.encoder.dim)
        self.encoder = PatchEncoder(config)
        self.global_transformer = GlobalTransformer(config)
        self.decoder = PatchDecoder(config)
        self.initialise()

    def residual_branches(self) -> dict[str, int]:
        return _branches(self.config)

    def states(self, batch: Batch) -> Tensor:
        h, u = self.encoder(stream(self.embedding(batch.tokens)), batch)
        return self.decoder(h, self.global_transformer(u, batch), batch)


def _branches(config: ModelConfig) -> dict[str, int]:
    return {
        "encoder": 2 * config.encoder.layers + 1,
        "global_transformer": 2 * config.global_transformer.layers,
        "decoder": 3 * config.decoder.layers,
    }


class GlobalTextTransformer(LanguageModel):
    """The same for speech, inside a transformer over text: ``text_path="global"``."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary, config.global_transformer.dim)
        self.vocabulary = vocabulary
        dim = config.encoder.dim
        self.speech_embedding = nn.Embedding(vocabulary.speech_size, dim)
        self.encoder = PatchEncoder(config)
        self.global_transformer = GlobalTransformer(config)
        self.decoder = PatchDecoder(config)
        self.speech_norm = RMSNorm(dim, eps=config.norm_eps)
        self.speech_head = nn.Linear(dim, vocabulary.speech_size, bias=False)
        self.initialise()

    def residual_branches(self) -> dict[str, int]:
        return _branches(self.config)

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the heads read, before their norms: text (Tt, d_global), speech (Ts, d_local)."""
        split = _split(batch)
        h, u = self.encoder(stream(self.speech_embedding(split.speech_tokens)), batch)
        x = torch.cat((u, stream(self.embedding(split.text_tokens)))).index_select(
            0, split.patch_rows
        )
        z = self.global_transformer(x, batch)
        h = self.decoder(h, z.index_select(0, split.read_patches), batch)
        return z.index_select(0, split.text_patches), h

    def logits(self, batch: Batch) -> Tensor:
        text, speech = self.states(batch)
        return self.joint_logits(text, speech).index_select(0, _split(batch).token_rows)

    def joint_logits(self, text: Tensor, speech: Tensor) -> Tensor:
        """(Ts + Tt, V): speech first; −inf for the pieces, none of which follows a unit."""
        units = self.speech_head(self.speech_norm(speech))
        specials, units = units.tensor_split([self.vocabulary.first_piece], dim=-1)
        pieces = units.new_full((len(units), self.vocabulary.num_pieces), -torch.inf)
        return torch.cat((torch.cat((specials, pieces, units), dim=-1), self.head(self.norm(text))))

    def forward(self, batch: Batch) -> Tensor:
        split = _split(batch)
        text, speech = self.states(batch)
        speech = self.token_losses(self.speech_norm(speech), self.speech_head, split.speech_targets)
        text = self.token_losses(self.norm(text), self.head, split.text_targets)
        return torch.cat((speech, text)).index_select(0, split.token_rows)


def _split(batch: Batch) -> Split:
    assert batch.split is not None, 'the batch was planned for text_path="local"'
    return batch.split


class TokenLevelTransformer(OneHead):
    """The baseline: the global transformer alone, every token a patch."""

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary, config.global_transformer.dim)
        self.global_transformer = GlobalTransformer(config)
        self.initialise()

    def residual_branches(self) -> dict[str, int]:
        return {"global_transformer": 2 * self.config.global_transformer.layers}

    def states(self, batch: Batch) -> Tensor:
        return self.global_transformer(stream(self.embedding(batch.tokens)), batch)


def build_model(config: ModelConfig, vocabulary: Vocabulary) -> LanguageModel:
    """A freshly initialised model; under ``torch.device("meta")`` it takes no memory."""
    if config.architecture == "token":
        return TokenLevelTransformer(config, vocabulary)
    if config.text_path == "global":
        return GlobalTextTransformer(config, vocabulary)
    return LatentSpeechTextTransformer(config, vocabulary)


def count_parameters(model: LanguageModel) -> dict[str, int]:
    """Parameters of each part, in the order of the forward pass, and their ``total``."""
    parts = dict(model.named_children())
    counts, seen = {}, set[nn.Parameter]()
    for name in PARTS:
        if name in parts:
            own = set(parts[name].parameters()) - seen  # a tied weight counts where it comes first
            counts[name] = sum(parameter.numel() for parameter in own)
            seen |= own
    return counts | {"total": sum(counts.values())}
