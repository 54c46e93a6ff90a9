"""A corpus's tokenizer: trained on the user's own text, or brought along.

    data/corpus/tokenizer.model      SentencePiece, trained here or imported
    data/corpus/tokenizer.json       of the ``tokenizers`` library, imported

Its fingerprint, the SHA-256 of the file, is what datasets and checkpoints name it by.
"""

import random
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lst.data.records import Dataset
from lst.errors import UserError, expect_positive
from lst.files import make_folder, replacing
from lst.prepare.outcomes import Skipped
from lst.prepare.sources import Part, Sources, list_inputs
from lst.prepare.text import text_records
from lst.vocabulary import JsonTokenizer, SentencePieceTokenizer, Tokenizer, train_tokenizer

__all__ = ["TokenizerConfig", "describe_tokenizer", "prepare_tokenizer"]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Train a SentencePiece tokenizer on texts, or import one. The same texts and settings give the
    same tokenizer."""

    out: Path  # the corpus folder that it is for
    text: tuple[Path, ...] = ()  # .txt, .jsonl or .parquet files, folders of them, or datasets
    pieces: int = 32_000  # 256 bytes and <unk> among them
    texts: int = 1_000_000  # to learn from, drawn from those given; or all
    seed: int = 0
    model: Path | None = None  # a tokenizer to import: a .model, a tokenizer.json, or their folder

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.model):
            given = "both" if self.model else "neither"
            raise UserError(f"expected --text to train on or a --model to import, got {given}")
        expect_positive(self, "pieces", "texts")


def prepare_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Put the tokenizer into the corpus folder.

    The very tokenizer may be there already. Another one stays, and is an error: datasets that were
    made with it would be read wrongly.

    Raises:
        UserError: a text that cannot be read, by file and record; too little text for so many
            pieces; a model that is none; another tokenizer in the folder.
    """
    if config.model is not None:
        tokenizer = Tokenizer.load(config.model)
    else:
        texts = _sample(_texts(config.text), config.texts, config.seed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.model"
            tokenizer = train_tokenizer(texts, path, num_pieces=config.pieces)
    make_folder(config.out)
    _put(tokenizer, config.out)
    return tokenizer


def describe_tokenizer(folder: Path, tokenizer: Tokenizer) -> str:
    return (
        f"{folder / tokenizer.file_name}: {tokenizer.num_pieces:,} pieces, {tokenizer.fingerprint}"
    )


def _put(tokenizer: Tokenizer, folder: Path) -> None:
    for kind in (SentencePieceTokenizer, JsonTokenizer):
        path = folder / kind.file_name
        if path.exists():
            there = Tokenizer.load(path).fingerprint
            if there != tokenizer.fingerprint:
                raise UserError(
                    f"{path}: expected no tokenizer or {tokenizer.fingerprint}, got {there}; "
                    "choose another --out, or remove it with the datasets made with it"
                )
            return
    path = folder / tokenizer.file_name
    with replacing(path) as temporary:
        tokenizer.save(temporary)


def _texts(paths: Iterable[Path]) -> Iterator[str]:
    """Every text in order; a bad one is an error."""
    for path in paths:
        if (path / "dataset.json").is_file():
            yield from (each.text for each in Dataset.open(path).read() if each.text)
            continue
        for part in list_inputs(Sources(text=(path,))):
            assert isinstance(part, Part)
            for record in text_records(part, ""):
                if isinstance(record, Skipped):
                    raise UserError(f"{record.where}: {record.reason}")
                assert record.text is not None
                yield record.text


def _sample(texts: Iterable[str], most: int, seed: int) -> list[str]:
    """``most`` of the texts, each as likely as any other, or all of them; in order."""
    rng = random.Random(f"tokenizer/{seed}")
    kept: list[tuple[int, str]] = []
    for number, text in enumerate(texts):
        if len(kept) < most:
            kept.append((number, text))
        elif (place := rng.randrange(number + 1)) < most:
            kept[place] = (number, text)
    if not kept:
        raise UserError("--text: expected texts to learn from, got none")
    return [text for _, text in sorted(kept)]
