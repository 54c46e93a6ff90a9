"""Counting compute: arithmetic on shapes, beside the equations of the model.

A product of a (rows, inputs) and an (inputs, outputs) matrix is 2 · rows · inputs · outputs FLOPs.
An attention is 4 · pairs · d, for q·k and p·v of all heads, where a pair is a query and a key that
it reads: the halves that causality and windows leave out are not counted. With d the local and
S·d the global width, S slots to a patch::

    h = embed(tokens)                                              nothing: a look-up
    encoder:  layers(h)                                  T rows,   local pairs
              linear(pool(h))                            P rows,   d → S·d
              q, output: P·S rows, d → d;  k, v: T rows, d → 2·d;  encoder pairs
    global:   layers(u)                                  P rows,   global pairs
    decoder:  k, v of all layers                         P·S rows, d → layers · 2·d
              each layer: q, output: T rows, d → d;                decoder pairs
                          layer(h)                       T rows,   local pairs
    head:     logits                                     T rows,   d → V

    a layer of width d:  q, k, v, output: d → 4·d;  SwiGLU of width f: d → 2·f, f → d;  attention

Training is three times the forward pass: the backward pass makes two products of each one. What is
computed twice to save memory (the logits, the scores of attention) counts once; norms, rotary
embeddings, pooling, softmax and the optimizer, which multiply no matrices, and the dead tail of a
training batch, which no result needs, do not count.

Shape letters: T tokens, P patches, S slots, V ids of the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from lst.data.batch import Batch
from lst.errors import UserError, run_command
from lst.model import ModelConfig, StackConfig
from lst.presets import PRESETS
from lst.train.config import TrainConfig
from lst.vocabulary import Vocabulary

__all__ = ["Counts", "Mix", "batch_counts", "expected_counts", "forward_flops", "training_flops"]

TRAINING = 3  # forward passes that a training step is worth
TOKENS_PER_HOUR = 25 * 3600  # speech units
PARTS = ("embedding", "encoder", "global_transformer", "decoder", "head")

DEMO_CORPUS = "data/demo"
DEMO_VOCABULARY = Vocabulary(num_pieces=2000, num_units=501)
PAPER_VOCABULARY = Vocabulary(num_pieces=32000, num_units=501)  # Llama 2's pieces, HuBERT's units


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the compute of a stream depends on: rows of products, pairs of each attention.

    Pairs are ``KeyRanges.num_pairs``, the same in every layer and for every head. The three of the
    local modules are 0 for a token-level model.
    """

    tokens: float
    units: float  # patches
    local_pairs: float  # token × token
    encoder_pairs: float  # slot × token
    global_pairs: float  # patch × patch
    decoder_pairs: float  # token × slot

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    def __mul__(self, factor: float) -> "Counts":
        return Counts(**{name: value * factor for name, value in vars(self).items()})


def batch_counts(batch: Batch) -> Counts:
    """The counts of a batch made on the CPU, its dead tail left out."""
    local, encoder, decoder = (
        0 if ranges is None else ranges.num_pairs
        for ranges in (batch.local_ranges, batch.encoder_ranges, batch.decoder_ranges)
    )
    return Counts(
        tokens=batch.num_tokens,
        units=batch.num_units,
        local_pairs=local,
        encoder_pairs=encoder,
        global_pairs=batch.global_ranges.num_pairs,
        decoder_pairs=decoder,
    )


# --- a batch that there is not yet ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What the tokens of a stream are. Defaults: the paper's mix (version 2, Table 13).

    Documents are all text, or text and speech in turn; markers count as text. The paper does not
    say how long they are.
    """

    text: float = 2 / 3  # share of the tokens that are in documents of text alone
    speech: float = 0.77  # share of speech units in the tokens of the other documents
    patch_size: float = 4  # speech units to a patch, where the model has patches
    document_tokens: int = 1024

    def units_per_token(self, patch_size: float) -> float:
        """Units to a token of a document that holds speech."""
        return (1 - self.speech) + self.speech / patch_size


def expected_counts(config: ModelConfig, mix: Mix) -> Counts:
    """The counts of an average token of ``mix``, with speech spread evenly over its documents."""
    patch_size = 1 if config.architecture == "token" else mix.patch_size
    spoken = _document(config, mix.document_tokens, mix.units_per_token(patch_size))
    written = _document(config, mix.document_tokens, 1)
    return (written * mix.text + spoken * (1 - mix.text)) * (1 / mix.document_tokens)


def _document(config: ModelConfig, tokens: float, units_per_token: float) -> Counts:
    """Up to its token i the document has i · units_per_token units. (Up to half a patch of these
    is not readable yet, which is left out.)"""
    units = tokens * units_per_token
    local = encoder = decoder = 0.0
    if config.architecture == "lst":
        local = _causal_pairs(tokens, config.local_window)
        encoder = config.slots * tokens  # a token is read by the slots of its own patch
        window = config.decoder_window  # patches; in tokens, divided by units_per_token
        decoder = (config.slots * units_per_token) * _causal_pairs(
            tokens, None if window is None else window / units_per_token
        )
    return Counts(
        tokens=tokens,
        units=units,
        local_pairs=local,
        encoder_pairs=encoder,
        global_pairs=_causal_pairs(units, None),
        decoder_pairs=decoder,
    )


def _causal_pairs(length: float, window: float | None) -> float:
    """Σ min(i, window) for i = 1 … length: row i reads the last ``window`` rows, its own too."""
    window = length if window is None else min(window, length)
    return window * (window + 1) / 2 + (length - window) * window


# --- the model, part by part ----------------------------------------------------------------------


def forward_flops(config: ModelConfig, vocabulary_size: int, counts: Counts) -> dict[str, float]:
    """FLOPs of one forward pass of each part of the model (see above), in its order.

    Parts are named as by ``lst.model.count_parameters``; a token-level model has no encoder and no
    decoder.
    """
    parts = {
        "embedding": 0.0,
        "global_transformer": _stack(config.global_transformer, counts.units, counts.global_pairs),
    }
    dim = config.global_transformer.dim
    if config.architecture == "lst":
        dim = config.encoder.dim
        parts |= {"encoder": _encoder(config, counts), "decoder": _decoder(config, counts)}
    parts["head"] = _product(counts.tokens, dim, vocabulary_size)
    return {part: parts[part] for part in PARTS if part in parts}


def training_flops(config: ModelConfig, vocabulary_size: int, counts: Counts) -> dict[str, float]:
    """FLOPs of a forward and a backward pass: three times `forward_flops`."""
    forward = forward_flops(config, vocabulary_size, counts)
    return {part: TRAINING * flops for part, flops in forward.items()}


def _encoder(config: ModelConfig, counts: Counts) -> float:
    dim, slots = config.encoder.dim, config.slots
    return (
        _stack(config.encoder, counts.tokens, counts.local_pairs)
        + _product(counts.units, dim, slots * dim)  # slot queries
        + _product(counts.units * slots, dim, 2 * dim)  # q, output
        + _product(counts.tokens, dim, 2 * dim)  # k, v
        + _attention(counts.encoder_pairs, dim)
    )


def _decoder(config: ModelConfig, counts: Counts) -> float:
    dim, layers, slots = config.decoder.dim, config.decoder.layers, config.slots
    return (
        _stack(config.decoder, counts.tokens, counts.local_pairs)
        + _product(counts.units * slots, dim, layers * 2 * dim)  # k, v of all layers
        + layers * _product(counts.tokens, dim, 2 * dim)  # q, output
        + layers * _attention(counts.decoder_pairs, dim)
    )


def _stack(stack: StackConfig, rows: float, pairs: float) -> float:
    dim, hidden = stack.dim, stack.hidden_width
    heads = 2 * stack.heads + 2 * stack.num_kv_heads  # q, output; k, v
    projections = _product(rows, dim, heads * stack.head_dim)
    feed_forward = _product(rows, dim, 2 * hidden) + _product(rows, hidden, dim)
    return stack.layers * (projections + _attention(pairs, dim) + feed_forward)


def _product(rows: float, inputs: int, outputs: int) -> float:
    return 2 * rows * inputs * outputs


def _attention(pairs: float, dim: int) -> float:
    return 4 * pairs * dim


# --- python -m lst.flops --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FlopsConfig:
    """Count the compute of a preset, part by part, and what its patches save."""

    preset: Annotated[str, tyro.conf.Positional]  # a name of lst.presets
    document_tokens: int = Mix.document_tokens  # length of the documents that attention reads
    vocabulary_size: int | None = None  # None: of the demo corpus, or of the paper

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"preset: expected one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name in ("document_tokens", "vocabulary_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')}: expected 1 or more, got {value}")


def report(options: FlopsConfig) -> str:
    """What the command prints."""
    preset = PRESETS[options.preset]
    vocabulary = DEMO_VOCABULARY if preset.data.corpus == DEMO_CORPUS else PAPER_VOCABULARY
    size = options.vocabulary_size or vocabulary.size
    mix = Mix(
        text=preset.data.mixture["text"] / sum(preset.data.mixture.values()),
        patch_size=preset.data.patching.size,
        document_tokens=options.document_tokens,
    )
    sections = (_parts(preset, size, mix), _lengths(mix), _saving(preset.model, size, mix))
    return "\n\n".join("\n".join(section) for section in sections)


def _parts(preset: TrainConfig, size: int, mix: Mix) -> Iterator[str]:
    """FLOPs of each part of a model in training: per token, per unit, per hour of speech."""
    config = preset.model
    counts = expected_counts(config, mix)
    flops = training_flops(config, size, counts)
    speech = expected_counts(config, replace(mix, text=0, speech=1)) * TOKENS_PER_HOUR
    of_hour = training_flops(config, size, speech)
    static = f"static patches of {mix.patch_size:g} speech units"
    yield (
        f"{preset.name}: {static if config.architecture == 'lst' else 'token-level'}, a vocabulary "
        f"of {size:,}; {counts.units:.4f} units to a token"
    )
    yield (
        f"Documents of {mix.document_tokens:,} tokens: {mix.text:.0%} of them text alone, "
        f"the others {mix.speech:.0%} speech"
    )
    yield "FLOPs = 3 (training) × 2 × multiply-adds of every matrix product and of the attention"
    yield "scores that are needed (causal and window halves not counted)"
    yield ""
    yield _row("", "MFLOPs/token", "MFLOPs/unit", "share", "TFLOPs/hour of speech alone")
    flops["total"], of_hour["total"] = sum(flops.values()), sum(of_hour.values())
    for part, value in flops.items():
        yield _row(
            part.replace("_", " "),
            f"{value / 1e6:,.2f}",
            f"{value / counts.units / 1e6:,.2f}",
            f"{value / flops['total']:.1%}",
            f"{of_hour[part] / 1e12:,.2f}",
        )


def _lengths(mix: Mix) -> Iterator[str]:
    """Table 13 of the paper's version 2: units of a sample with one token in spoken documents."""
    token = (mix.speech, 1 - mix.speech, mix.text / (1 - mix.text))
    lst = (mix.speech / mix.patch_size, *token[1:])
    yield "Units of the global transformer for the same words (paper, version 2, Table 13)"
    yield ""
    yield _row("", "speech", "text beside", "text alone", "total")
    totals = []
    for name, exact in (("token-level", token), (f"lst, static {mix.patch_size:g}", lst)):
        units = [round(value, 2) for value in exact]  # the paper adds what it prints
        totals.append(sum(units))
        yield _row(name, *(f"{value:.2f}" for value in (*units, totals[-1])))
    yield ""
    yield (
        f"saving in length = 1 − {totals[1]:.2f} / {totals[0]:.2f} = "
        f"{1 - totals[1] / totals[0]:.1%} ({1 - sum(lst) / sum(token):.2%} before rounding)"
    )


def _saving(config: ModelConfig, size: int, mix: Mix) -> Iterator[str]:
    """The saving on the same sample with everything counted."""
    tokens = 1 / (1 - mix.text)
    token, lst = _both(config, size, mix)
    units = mix.text + (1 - mix.text) * mix.units_per_token(mix.patch_size)
    before, after = tokens * sum(token.values()), tokens * sum(lst.values())
    large = f"{token['global_transformer'] / 1e6:,.2f} + {token['head'] / 1e6:,.2f}"
    local = " + ".join(f"{lst[part] / 1e6:,.2f}" for part in ("encoder", "decoder", "head"))
    yield "MFLOPs for the same words with everything counted; text too passes encoder and decoder"
    yield ""
    yield _row("token-level", "tokens · (global + head)")
    yield _row("", f"{tokens:.2f} · ({large}) = {before / 1e6:,.1f}")
    yield _row("lst", "tokens · (encoder + decoder + head) + units · global")
    yield _row(
        "",
        f"{tokens:.2f} · ({local}) + {tokens * units:.2f} · "
        f"{lst['global_transformer'] / units / 1e6:,.2f} = {after / 1e6:,.1f}",
    )
    yield ""
    yield f"saving = 1 − {after / 1e6:,.1f} / {before / 1e6:,.1f} = {1 - after / before:.1%}"
    lengths, savings = (256, 1024, 4096), []
    for length in lengths:
        token, lst = _both(config, size, replace(mix, document_tokens=length))
        savings.append(1 - sum(lst.values()) / sum(token.values()))
    yield (
        f"with documents of {', '.join(f'{length:,}' for length in lengths)} tokens: "
        f"{', '.join(f'{saving:.1%}' for saving in savings)}"
    )


def _both(config: ModelConfig, size: int, mix: Mix) -> tuple[dict[str, float], dict[str, float]]:
    """Training FLOPs of an average token at token level, and in patches."""
    token, lst = replace(config, architecture="token"), replace(config, architecture="lst")
    return (
        training_flops(token, size, expected_counts(token, mix)),
        training_flops(lst, size, expected_counts(lst, mix)),
    )


def _row(name: str, *cells: str) -> str:
    return f"{name:18}" + "".join(f"  {cell:>12}" for cell in cells)


def main() -> None:
    print(report(tyro.cli(FlopsConfig, prog="python -m lst.flops")))


if __name__ == "__main__":
    run_command(main)
