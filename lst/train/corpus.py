"""What a run reads from its corpus folder, opened and checked before the first step."""

from dataclasses import dataclass
from pathlib import Path

from lst.data.loader import DataConfig
from lst.data.records import Dataset, StoryItem, read_items
from lst.errors import UserError
from lst.files import Location
from lst.speech_bpe import read_speech_bpe
from lst.train.checkpoint import State
from lst.vocabulary import Tokenizer, Vocabulary, fingerprint

HEADER = 4096  # bytes in which a safetensors file of few tensors has their names


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus as training sees it; the training records themselves belong to the loader."""

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    codebook: str | None  # fingerprint of what made the units; None where there are none
    fingerprints: dict[str, str]  # of the datasets trained on, by name
    valid: dict[str, Dataset]  # by name
    items: list[StoryItem]  # stories to complete; none where the corpus has none


def open_corpus(config: DataConfig) -> Corpus:
    """Open tokenizer, datasets and stories.

    Raises:
        UserError: one is missing, damaged, or made with another tokenizer, codebook or speech BPE.
    """
    folder = Location(config.corpus)
    if not folder.exists():
        raise UserError(
            f"{folder}: expected a corpus folder, got none; "
            f"make one by python -m lst.prepare demo --out {folder}"
        )
    if Path(folder.url).is_file():
        raise UserError(f"{folder}: expected a corpus folder, got a file")
    tokenizer = Tokenizer.load(folder)
    files = made_with(folder, tokenizer)
    there = (folder / "train").folders()
    for name in config.datasets:
        if name not in there:
            raise UserError(
                f"{folder}: expected a mixture of its datasets in train/, "
                f"{', '.join(there) or 'which has none'}; got {name!r}"
            )
    train = {name: Dataset.open(folder / "train" / name, **files) for name in config.datasets}
    codebooks = {data.info.codebook for data in train.values() if data.info.codebook is not None}
    if len(codebooks) > 1:
        raise UserError(f"{folder}: expected units of one codebook, got {sorted(codebooks)}")
    codebook = next(iter(codebooks), None)
    files["codebook"] = codebook or files["codebook"]
    speech_bpe = None
    if config.patching.strategy == "speech-bpe":
        speech_bpe = read_speech_bpe(folder, codebook)
    valid = folder / "valid"
    names = [name for name in valid.folders() if (valid / name / "dataset.json").exists()]
    items = folder / "items"
    return Corpus(
        tokenizer=tokenizer,
        vocabulary=Vocabulary(
            num_pieces=tokenizer.num_pieces,
            num_units=max(data.info.num_units for data in train.values()),
            speech_bpe=speech_bpe,
        ),
        codebook=codebook,
        fingerprints={name: data.fingerprint for name, data in train.items()},
        valid={name: Dataset.open(valid / name, **files) for name in names},
        items=read_items(items, **files) if items.exists() else [],
    )


def made_with(corpus: Location, tokenizer: Tokenizer) -> dict[str, str | None]:
    """Fingerprints of what the corpus is made with, as ``Dataset.open`` and ``read_items`` check
    them."""
    # A codebook of spectra says which units these are. One of HuBERT does so together with its
    # model, which is not here; and a corpus of text alone has none.
    codebook = corpus / "codebook.safetensors"
    of_spectra = codebook.exists() and b'"log_mels"' in codebook.read_bytes()[:HEADER]
    return {
        "tokenizer": tokenizer.fingerprint,
        "codebook": fingerprint(codebook) if of_spectra else None,
    }


def check_same_data(corpus: Corpus, state: State, where: str) -> None:
    """Raise UserError where a run is resumed on other data than it was trained on."""
    for name, expected in state.datasets.items():
        got = corpus.fingerprints.get(name)
        if got != expected:
            raise UserError(f"{where}: was trained on dataset {name!r} {expected}, got {got}")
    if corpus.vocabulary != state.vocabulary:
        raise UserError(f"{where}: expected {state.vocabulary}, got {corpus.vocabulary}")
