"""Counting compute: arithmetic on shapes, beside the equations of the model.

A product of a (rows, inputs) and an (inputs, outputs) matrix is 2 · rows · inputs · outputs FLOPs.
An attention is 4 · pairs · d, for q·k and p·v of all heads, where a pair is a query and a key that
it reads: the halves that causality and windows leave out are not counted. With d the local and
S·d the global width, S slots to a patch::

    h = embed(tokens)                                              nothing: a look-up
    encoder:  layers(h)                                  Tl rows,   local pairs
              linear(pool(h))                            Pl rows,   d → S·d
              q, output: Pl·S rows, d → d;  k, v: Tl rows, d → 2·d;  encoder pairs
    global:   layers(u)                                  P rows,    global pairs
    decoder:  k, v of all layers                         Pr·S rows, d → layers · 2·d
              each layer: q, output: Tl rows, d → d;                decoder pairs
                          layer(h)                       Tl rows,   local pairs
    head:     logits                                     T rows,    d → V
    with text_path="global":                             T − Tl rows, S·d → V;  Tl rows, d → Vs

    a layer of width d:  q, k, v, output: d → 4·d, less where heads of keys are shared;
                         SwiGLU of width f: d → 2·f, f → d;  attention

Training is three times the forward pass: the backward pass makes two products of each one. What is
computed twice to save memory (the logits, the scores of attention) counts once; norms, rotary
embeddings, pooling, softmax and the optimizer, which multiply no matrices, and the dead tail of a
training batch, which no result needs, do not count.

Shape letters: T tokens, of which Tl pass the local modules; P patches, of which Pl are theirs and
Pr are read by the decoder (all are T, or P, but with ``text_path="global"``); S slots, V ids of the
vocabulary, Vs of the speech vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lst.data.batch import Batch
from lst.errors import UserError, expect_positive, run_command
from lst.model import ModelConfig, StackConfig
from lst.presets import PRESETS
from lst.train.config import TrainConfig
from lst.vocabulary import Vocabulary
from lst_kernels import KeyRanges

__all__ = [
    "Counts",
    "Mix",
    "batch_counts",
    "expected_counts",
    "forward_flops",
    "patch_counts",
    "training_flops",
]

TRAINING = 3  # forward passes that a training step is worth
TOKENS_PER_HOUR = 25 * 3600  # speech units
PARTS = ("embedding", "encoder", "global_transformer", "decoder", "head", "speech_head")

DEMO_CORPUS = "data/demo"
DEMO_VOCABULARY = Vocabulary(num_pieces=2000, num_units=501)
PAPER_VOCABULARY = Vocabulary(num_pieces=32000, num_units=501)  # Llama 2's pieces, HuBERT's units


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the compute of a stream depends on: rows of products, pairs of each attention.

    Pairs are ``KeyRanges.num_pairs``, the same in every layer and for every head. What is of the
    local modules is 0 for a token-level model.
    """

    tokens: float
    units: float  # patches
    local_tokens: float  # that pass the local modules
    local_units: float  # patches of these
    read_units: float  # patches whose keys and values the decoder makes
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
    tokens = units = read = 0
    if batch.local_layout is not None:
        layout = batch.local_layout
        tokens = layout.num_tokens - layout.num_dead_tokens
        units = read = layout.num_patches - layout.num_dead_patches
    if batch.split is not None:
        read = len(batch.split.read_patches) - batch.layout.num_dead_patches
    return Counts(
        tokens=batch.num_tokens,
        units=batch.num_units,
        local_tokens=tokens,
        local_units=units,
        read_units=read,
        local_pairs=local,
        encoder_pairs=encoder,
        global_pairs=batch.global_ranges.num_pairs,
        decoder_pairs=decoder,
    )


def patch_counts(batch: Batch) -> list[Counts]:
    """The counts of each patch of a batch without a dead tail; they add up to `batch_counts`.

    A patch has the rows of its tokens, of its slots and of its unit, and the pairs that these read.
    """
    tokens, patches = batch.layout.patch_ids, torch.arange(batch.layout.num_patches)
    local_tokens, local_patches = tokens[:0], patches[:0]  # the patches that these are of
    if batch.local_layout is not None:
        local_tokens, local_patches = tokens, patches
    read = local_patches
    if batch.split is not None and batch.local_layout is not None:
        local_tokens = tokens[batch.split.token_rows < batch.local_layout.num_tokens]
        local_patches = patches[batch.split.patch_rows < batch.local_layout.num_patches]
        read = batch.split.read_patches

    def rows(owners: Tensor) -> list[float]:
        return torch.bincount(owners, minlength=len(patches)).tolist()

    def pairs(owners: Tensor, ranges: KeyRanges | None) -> list[float]:
        if ranges is None:
            return [0.0] * len(patches)
        owners = owners.repeat_interleave(ranges.num_queries // max(len(owners), 1))  # for slots
        keys = (ranges.stop - ranges.start).double()
        return torch.bincount(owners, keys, minlength=len(patches)).tolist()

    columns = {
        "tokens": rows(tokens),
        "units": rows(patches),
        "local_tokens": rows(local_tokens),
        "local_units": rows(local_patches),
        "read_units": rows(read),
        "local_pairs": pairs(local_tokens, batch.local_ranges),
        "encoder_pairs": pairs(local_patches, batch.encoder_ranges),
        "global_pairs": pairs(patches, batch.global_ranges),
        "decoder_pairs": pairs(local_tokens, batch.decoder_ranges),
    }
    return [
        Counts(**dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]


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


def expected_counts(config: ModelConfig, mix: Mix) -> Counts:
    """The counts of an average token of ``mix``, with speech spread evenly over its documents."""
    spoken, written = _document(config, mix, mix.speech), _document(config, mix, 0)
    return (written * mix.text + spoken * (1 - mix.text)) * (1 / mix.document_tokens)


def _document(config: ModelConfig, mix: Mix, speech: float) -> Counts:
    """A document with a share of ``speech``. Up to its token i it has i · units_per_token units.
    (Up to half a patch of these is not readable yet, which is left out.)"""
    tokens: float = mix.document_tokens
    patch_size = 1 if config.architecture == "token" else mix.patch_size
    units_per_token = 1 - speech + speech / patch_size
    units = tokens * units_per_token
    counts = Counts(
        tokens=tokens,
        units=units,
        local_tokens=0,
        local_units=0,
        read_units=0,
        local_pairs=0,
        encoder_pairs=0,
        global_pairs=_causal_pairs(units, None),
        decoder_pairs=0,
    )
    if config.architecture == "token":
        return counts
    passing = speech if config.text_path == "global" else 1.0  # share of the tokens
    window = config.decoder_window  # patches; in tokens, divided by units_per_token
    read = (config.slots * units_per_token) * _causal_pairs(
        tokens, None if window is None else window / units_per_token
    )
    return replace(
        counts,
        local_tokens=tokens * passing,
        local_units=tokens * speech / patch_size if config.text_path == "global" else units,
        read_units=units if passing else 0,
        local_pairs=_causal_pairs(tokens * passing, config.local_window),
        encoder_pairs=config.slots * tokens * passing,  # by the slots of the token's own patch
        decoder_pairs=read * passing,
    )


def _causal_pairs(length: float, window: float | None) -> float:
    """Σ min(i, window) for i = 1 … length: row i reads the last ``window`` rows, its own too."""
    window = length if window is None else min(window, length)
    return window * (window + 1) / 2 + (length - window) * window


# --- the model, part by part ----------------------------------------------------------------------


def forward_flops(config: ModelConfig, vocabulary: Vocabulary, counts: Counts) -> dict[str, float]:
    """FLOPs of one forward pass of each part of the model (see above), in its order.

    Parts are named as by ``lst.model.count_parameters``; a model has only some of them.
    """
    dim = config.global_transformer.dim
    parts = {
        "embedding": 0.0,
        "global_transformer": _stack(config.global_transformer, counts.units, counts.global_pairs),
    }
    if config.architecture == "token":
        parts["head"] = _product(counts.tokens, dim, vocabulary.size)
    else:
        parts |= {"encoder": _encoder(config, counts), "decoder": _decoder(config, counts)}
        local, text = config.encoder.dim, counts.tokens - counts.local_tokens
        if config.text_path == "global":
            parts["head"] = _product(text, dim, vocabulary.size)
            parts["speech_head"] = _product(counts.local_tokens, local, vocabulary.speech_size)
        else:
            parts["head"] = _product(counts.tokens, local, vocabulary.size)
    return {part: parts[part] for part in PARTS if part in parts}


def training_flops(config: ModelConfig, vocabulary: Vocabulary, counts: Counts) -> dict[str, float]:
    """FLOPs of a forward and a backward pass: three times `forward_flops`."""
    forward = forward_flops(config, vocabulary, counts)
    return {part: TRAINING * flops for part, flops in forward.items()}


def _encoder(config: ModelConfig, counts: Counts) -> float:
    dim, slots = config.encoder.dim, config.slots
    return (
        _stack(config.encoder, counts.local_tokens, counts.local_pairs)
        + _product(counts.local_units, dim, slots * dim)  # slot queries
        + _product(counts.local_units * slots, dim, 2 * dim)  # q, output
        + _product(counts.local_tokens, dim, 2 * dim)  # k, v
        + _attention(counts.encoder_pairs, dim)
    )


def _decoder(config: ModelConfig, counts: Counts) -> float:
    dim, layers, slots = config.decoder.dim, config.decoder.layers, config.slots
    return (
        _stack(config.decoder, counts.local_tokens, counts.local_pairs)
        + _product(counts.read_units * slots, dim, layers * 2 * dim)  # k, v of all layers
        + layers * _product(counts.local_tokens, dim, 2 * dim)  # q, output
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

    preset: str  # a name of lst.presets
    document_tokens: int = Mix.document_tokens  # length of the documents that attention reads
    num_pieces: int | None = None  # of text; None: of the demo corpus, or of the paper

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"preset: expected one of {', '.join(PRESETS)}, got {self.preset!r}")
        if PRESETS[self.preset].data.patching.strategy == "speech-bpe":
            raise UserError(
                "preset: how many units a speech piece stands for depends on the corpus; expected "
                f"a preset over units, got {self.preset!r}"
            )
        expect_positive(self, "document_tokens", "num_pieces")


def report(options: FlopsConfig) -> str:
    """What the command prints."""
    preset = PRESETS[options.preset]
    vocabulary = DEMO_VOCABULARY if preset.data.corpus == DEMO_CORPUS else PAPER_VOCABULARY
    if options.num_pieces is not None:
        vocabulary = replace(vocabulary, num_pieces=options.num_pieces)
    mix = Mix(
        text=preset.data.mixture["text"] / sum(preset.data.mixture.values()),
        patch_size=preset.data.patching.size,
        document_tokens=options.document_tokens,
    )
    models = _models(preset.model)
    own = (
        [models["token-level"]] if preset.model.architecture == "token" else [*models.values()][1:]
    )
    sections = [
        _heading(preset, vocabulary, mix),
        *(_parts(model, vocabulary, mix) for model in own),
        _lengths(mix),
        _saving(models, vocabulary, mix),
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def _models(config: ModelConfig) -> dict[str, ModelConfig]:
    """The preset's model at token level, and in patches on either text path."""
    lst = replace(config, architecture="lst")
    return {
        "token-level": replace(config, architecture="token"),
        'lst, text "local"': replace(lst, text_path="local"),
        'lst, text "global"': replace(lst, text_path="global"),
    }


def _heading(preset: TrainConfig, vocabulary: Vocabulary, mix: Mix) -> Iterator[str]:
    """What is counted, and how."""
    static = f"static patches of {mix.patch_size:g} speech units"
    yield (
        f"{preset.name}: {static if preset.model.architecture == 'lst' else 'token-level'}, "
        f"a vocabulary of {vocabulary.size:,}; "
        f"{expected_counts(preset.model, mix).units:.4f} units to a token"
    )
    yield (
        f"Documents of {mix.document_tokens:,} tokens: {mix.text:.0%} of them text alone, "
        f"the others {mix.speech:.0%} speech"
    )
    yield "FLOPs = 3 (training) × 2 × multiply-adds of every matrix product and of the attention"
    yield "scores that are needed (causal and window halves not counted)"


def _parts(config: ModelConfig, vocabulary: Vocabulary, mix: Mix) -> Iterator[str]:
    """FLOPs of each part of a model in training: per token, per unit, per hour of speech."""
    counts = expected_counts(config, mix)
    flops = training_flops(config, vocabulary, counts)
    speech = expected_counts(config, replace(mix, text=0, speech=1)) * TOKENS_PER_HOUR
    of_hour = training_flops(config, vocabulary, speech)
    title = "" if config.architecture == "token" else f'text "{config.text_path}"'
    yield _row(title, "MFLOPs/token", "MFLOPs/unit", "share", "TFLOPs/hour of speech alone")
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


def _saving(models: dict[str, ModelConfig], vocabulary: Vocabulary, mix: Mix) -> Iterator[str]:
    """The saving on the same sample with everything counted."""
    yield 'MFLOPs for the same words with everything counted. With text "local", text too passes'
    yield 'encoder and decoder; with text "global" it passes the global transformer alone'
    yield ""
    yield _row("", "units", "local tokens", "global", "encoder", "decoder", "heads", "total")
    totals = {}
    for name, config in models.items():
        counts = expected_counts(config, mix) * (1 / (1 - mix.text))
        flops = training_flops(config, vocabulary, counts)
        totals[name] = sum(flops.values())
        heads = flops["head"] + flops.get("speech_head", 0)
        parts = (flops["global_transformer"], flops.get("encoder", 0), flops.get("decoder", 0))
        yield _row(
            name,
            f"{counts.units:.2f}",
            f"{counts.local_tokens:.2f}",
            *(f"{value / 1e6:,.1f}" for value in (*parts, heads, totals[name])),
        )
    yield ""
    before = totals.pop("token-level")
    for name, after in totals.items():
        saving = 1 - after / before
        yield f"{name}: saving = 1 − {after / 1e6:,.1f} / {before / 1e6:,.1f} = {saving:.1%}"
    lengths = (256, 1024, 4096)
    yield f"the same with documents of {', '.join(f'{length:,}' for length in lengths)} tokens:"
    for name in totals:
        savings = []
        for length in lengths:
            of_length = replace(mix, document_tokens=length)
            before, after = (
                sum(training_flops(each, vocabulary, expected_counts(each, of_length)).values())
                for each in (models["token-level"], models[name])
            )
            savings.append(f"{1 - after / before:.1%}")
        yield f"{name}: {', '.join(savings)}"


def _row(name: str, *cells: str) -> str:
    return f"{name:18}" + "".join(f"  {cell:>12}" for cell in cells)


def main() -> None:
    import tyro  # for the command alone: a GPU machine may have torch and little else

    options = tyro.cli(tyro.conf.PositionalRequiredArgs[FlopsConfig], prog="python -m lst.flops")
    print(report(options))


if __name__ == "__main__":
    run_command(main)
