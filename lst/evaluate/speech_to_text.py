"""Transcribe and speak with a model that was trained to (``python -m lst.train --task asr|tts``).

    asr    <bos> <s> units <t>   → text <eos>
    tts    <bos> <t> text <s>    → units <eos>

A transcription is the likeliest token after token. Both end with ``<eos>``, or where they are
longer than anybody speaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lst.data.records import FRAMES_PER_SECOND, Dataset, Record
from lst.errors import UserError
from lst.files import Location
from lst.generate import Generator, Sampling
from lst.pretrained import Pretrained
from lst.vocabulary import BOS, SPEECH, TEXT, Tokenizer, Vocabulary

__all__ = ["Answer", "generator_of", "open_records", "same_units", "speak", "transcribe"]

# An answer may be so long. Fast speech has 8 syllables a second, so fewer than 12.5 pieces or 25
# characters; slow speech has 6 characters.
FRAMES_PER_PIECE = 2
FRAMES_PER_CHARACTER = FRAMES_PER_SECOND / 6
MORE = 16  # tokens, for what is very short


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What a model made of one prompt."""

    text: str
    units: np.ndarray  # (F,) int16
    num_units: int  # positions of the global transformer, prompt and answer together
    stopped: str  # as of lst.generate.Continuation


def transcribe(
    generator: Generator,
    tokenizer: Tokenizer,
    clips: Sequence[np.ndarray],
    *,
    tokens_per_batch: int = 16384,
) -> list[Answer]:
    """The likeliest token after token.

    Args:
        clips: (F,) speech units of the model's codebook each.
        tokens_per_batch: prompts of up to so many tokens are answered together.

    Raises:
        UserError: a clip is empty.
    """
    vocabulary = generator.vocabulary
    for number, units in enumerate(clips):
        if not len(units):
            raise UserError(f"clip {number}: expected speech units, got none")
    prompts = [
        np.concatenate(([BOS, SPEECH], vocabulary.encode_units(units), [TEXT])) for units in clips
    ]
    samplings = [
        Sampling(temperature=0.0, modality="text", max_tokens=len(u) // FRAMES_PER_PIECE + MORE)
        for u in clips
    ]
    return _answers(generator, tokenizer, prompts, samplings, tokens_per_batch)


def speak(
    generator: Generator,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    sampling: Sampling,
    tokens_per_batch: int = 16384,
) -> list[Answer]:
    """Speech units that say each text.

    Args:
        sampling: how; its modality and number of tokens are set here.

    Raises:
        UserError: a text is empty.
    """
    vocabulary = generator.vocabulary
    for number, text in enumerate(texts):
        if not text.strip():
            raise UserError(f"text {number}: expected something to say, got {text!r}")
    prompts = [
        np.concatenate(
            ([BOS, TEXT], vocabulary.piece_to_id(np.array(tokenizer.encode(text))), [SPEECH])
        )
        for text in texts
    ]
    samplings = [
        replace(
            sampling,
            modality="speech",
            max_tokens=int(len(text) * FRAMES_PER_CHARACTER) + MORE,
            seed=sampling.seed + number,
        )
        for number, text in enumerate(texts)
    ]
    return _answers(generator, tokenizer, prompts, samplings, tokens_per_batch)


def _answers(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    samplings: Sequence[Sampling],
    tokens_per_batch: int,
) -> list[Answer]:
    """In the order of the prompts; those of about the same length are answered together."""
    vocabulary = generator.vocabulary
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    while order:
        longest = len(prompts[order[-1]])
        batch = order[-max(1, tokens_per_batch // longest) :]
        del order[-len(batch) :]
        found = generator.generate([prompts[n] for n in batch], [samplings[n] for n in batch])
        for number, each in zip(batch, found, strict=True):
            pieces = each.tokens[vocabulary.is_piece(each.tokens)]
            units = each.tokens[vocabulary.is_unit(each.tokens)]
            answers[number] = Answer(
                text=tokenizer.decode(vocabulary.id_to_piece(pieces).tolist()),
                units=vocabulary.decode_units(units),
                num_units=len(each.patch_lengths),
                stopped=each.stopped,
            )
    return [answers[number] for number in range(len(prompts))]


# Datasets -----------------------------------------------------------------------------------------


def open_records(folder: Location, codebook: str | None, vocabulary: Vocabulary) -> list[Record]:
    """The records of a dataset, every one with text and speech of the model's units.

    Args:
        codebook: fingerprint of the one that made the model's units; None where it is not known.

    Raises:
        UserError: no dataset, units of another codebook, or a record without text or units.
    """
    if not folder.exists():
        raise UserError(f"{folder}: expected a dataset of speech and its text, got no folder")
    dataset = Dataset.open(folder, codebook=codebook)
    if dataset.info.num_units != vocabulary.num_units:
        raise UserError(
            f"{folder}: expected units of the model's codebook of {vocabulary.num_units}, "
            f"got one of {dataset.info.num_units}"
        )
    records = list(dataset.read())
    for record in records:
        lacking = "units" if record.units is None or not len(record.units) else "text"
        if lacking == "units" or record.text is None:
            raise UserError(
                f"{folder}, record {record.id!r}: expected text and speech units, got no {lacking}"
            )
    return records


def generator_of(trained: Pretrained, device: str) -> Generator:
    config = trained.config
    return Generator(
        trained.model, trained.vocabulary, config.model, config.data.patching, device=device
    )


def same_units(trained: Pretrained, recogniser: Pretrained, where: str) -> None:
    """Raise UserError where a recogniser was trained on units of another codebook."""
    for name, ours, theirs in (
        ("codebook", trained.codebook, recogniser.codebook),
        ("codebook of size", trained.vocabulary.num_units, recogniser.vocabulary.num_units),
    ):
        if None not in (ours, theirs) and ours != theirs:
            raise UserError(
                f"{where}: expected a recogniser of the {name} {ours} of what it is to read, "
                f"got {theirs}"
            )
