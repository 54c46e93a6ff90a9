"""The speech pieces of a corpus: trained on a sample of its utterances (paper, section 4.2).

data/demo/speech_bpe.model      the pieces
data/demo/speech_bpe.json       fingerprints of the model and of the codebook; written last
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from lst.data.interleave import stable_rng
from lst.data.records import Dataset
from lst.errors import UserError, expect_positive
from lst.files import replacing, write_json, writing
from lst.speech_bpe import SPEECH_BPE, SPEECH_BPE_INFO, SpeechBPE, train_speech_bpe

__all__ = ["SpeechBPEConfig", "prepare_speech_bpe"]


@dataclass(frozen=True, kw_only=True)
class SpeechBPEConfig:
    """Train a byte-pair encoding of a corpus's speech units. The same corpus and settings give the
    same pieces."""

    corpus: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """A corpus folder, such as data/demo; the pieces are written there."""
    pieces: int = 1000  # <unk> and a piece for each unit among them
    sequences: int = 100_000  # utterances to learn from, drawn from those of train/; or all
    seed: int = 0

    def __post_init__(self) -> None:
        expect_positive(self, "pieces", "sequences")


def prepare_speech_bpe(config: SpeechBPEConfig) -> SpeechBPE:
    """Train the pieces and write them to the corpus folder, in place of those that are there.

    Raises:
        UserError: no speech in ``train/``, units of several codebooks, or too little speech.
    """
    train = config.corpus / "train"
    folders = sorted(path.parent for path in train.glob("*/dataset.json"))
    datasets = [each for each in map(Dataset.open, folders) if each.has_speech]
    if not datasets:
        raise UserError(f"{train}: expected a dataset of speech in it, got none")
    codebooks = {(data.info.codebook, data.info.num_units) for data in datasets}
    if len(codebooks) > 1:
        raise UserError(
            f"{train}: expected units of one codebook, got {sorted(map(str, codebooks))}"
        )
    codebook, num_units = codebooks.pop()
    rows = _sample(sum(map(len, datasets)), config)
    bpe = train_speech_bpe(
        _utterances(datasets, rows), num_units=num_units, num_pieces=config.pieces
    )
    facts = {
        "speech_bpe": bpe.fingerprint,
        "codebook": codebook,
        "num_units": num_units,
        "pieces": len(bpe),
        "sequences": len(rows),
        "seed": config.seed,
    }
    # Without its description a model is none, so that a half-written pair is never read.
    with writing(config.corpus / SPEECH_BPE_INFO):
        (config.corpus / SPEECH_BPE_INFO).unlink(missing_ok=True)
    with replacing(config.corpus / SPEECH_BPE) as temporary:
        bpe.save(temporary)
    write_json(config.corpus / SPEECH_BPE_INFO, facts)
    return bpe


def describe_speech_bpe(corpus: Path, bpe: SpeechBPE) -> str:
    """How many units a piece stands for, in the validation speech or else the training speech."""
    for split in ("valid", "train"):
        folders = sorted(path.parent for path in (corpus / split).glob("*/dataset.json"))
        datasets = [each for each in map(Dataset.open, folders) if each.has_speech]
        if datasets:
            break
    num_units = num_pieces = 0
    for units in _utterances(datasets, np.arange(sum(map(len, datasets)))):
        num_units += len(units)
        num_pieces += len(bpe.encode(units))
    return (
        f"{corpus / SPEECH_BPE}: {len(bpe):,} pieces of {bpe.num_units} units; on {split}/ a piece "
        f"stands for {num_units / max(1, num_pieces):.2f} units"
    )


def _sample(num_records: int, config: SpeechBPEConfig) -> np.ndarray:
    """(n,) rows in order: the datasets laid end to end."""
    if num_records <= config.sequences:
        return np.arange(num_records)
    rng = stable_rng("speech-bpe", config.seed)
    return np.sort(rng.choice(num_records, config.sequences, replace=False))


def _utterances(datasets: list[Dataset], rows: np.ndarray) -> Iterator[np.ndarray]:
    first = 0
    for dataset in datasets:
        for record in dataset.read(rows[(rows >= first) & (rows < first + len(dataset))] - first):
            if record.units is not None:
                yield record.units
        first += len(dataset)
