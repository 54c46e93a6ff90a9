"""An encoded record says what the record says, from the file as from the record itself."""

import itertools
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lst.data.encoded
from lst.data.encoded import EncodedDataset, encode_record
from lst.data.records import Dataset, Record, RecordWriter, Word
from lst.errors import UserError
from lst.vocabulary import Tokenizer, train_tokenizer

LINES = ["the cat and the hat", "3 cats, 41 hats; the cat sat", "ünder the cät", "a the an then"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(LINES * 20, path, num_pieces=300)


def spoken(words):
    spans = [Word(word, 3 * place, 3 * place + place % 3) for place, word in enumerate(words)]
    units = np.zeros(3 * len(words), np.int16)
    return Record("r", " ".join(words), units, tuple(spans), None, None, "test")


words = st.lists(
    st.text("ab the3.,\u00fc\u6f22\U0001f600'", min_size=1, max_size=6).filter(
        lambda word: word == word.strip()
    ),
    min_size=1,
    max_size=12,
)


@given(words)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_every_span_has_the_pieces_that_its_text_alone_would_have(tokenizer, words):
    """Of a tokenizer of train_tokenizer, whose pieces never go beyond a blank."""
    encoded = encode_record(spoken(words), tokenizer)
    assert encoded.text.tolist() == tokenizer.encode(" ".join(words))
    assert (encoded.cuts[0], encoded.cuts[-1]) == (0, len(encoded.pieces))
    for first, stop in itertools.combinations(range(len(words) + 1), 2):
        span = encoded.pieces[encoded.cuts[first] : encoded.cuts[stop]]
        assert span.tolist() == tokenizer.encode(" ".join(words[first:stop]))


def test_a_tokenizer_that_cuts_the_first_word_in_another_way():
    """As those of Llama 3: a blank belongs to the word after it, and the first word has none."""

    class Blank:
        def encode(self, text):
            return [len(part) for part in self.parts(text)]

        def piece_ends(self, text):
            return np.cumsum(self.encode(text)).astype(np.int32)

        def parts(self, text):
            return [word if n == 0 else " " + word for n, word in enumerate(text.split(" "))]

    encoded = encode_record(spoken(["to", "be", "or", "not"]), Blank())
    assert encoded.pieces.tolist() == [2, 3, 3, 4]
    assert encoded.cuts.tolist() == [0, 1, 2, 3, 4]


def test_bytes_of_a_character_stay_with_its_word():
    class Bytes:
        """A piece a byte; a blank is a piece with the byte after it; the first word has a mark."""

        def encode(self, text):
            return [0, *text.encode()]

        def piece_ends(self, text):
            lengths = [1 if byte & 0xC0 != 0x80 else 0 for byte in text.encode()]
            return np.cumsum([0, *lengths]).astype(np.int32)

    encoded = encode_record(spoken(["a\u6f22", "\u6f22", "b"]), Bytes())
    parts = np.split(encoded.pieces, encoded.cuts[1:-1])
    texts = [bytes(part.astype(np.uint8)).decode() for part in parts]
    assert texts == ["\0a\u6f22", " \u6f22", " b"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of this test alone."""
    monkeypatch.setenv("LST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(one, other):
    for name in one._fields:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
            assert a.shape == b.shape
        else:
            assert a == b
    assert one.units is None or one.units.dtype == np.int16


@pytest.mark.parametrize("by", ["words", "pieces"])
def test_what_is_read_from_the_file_is_the_record_encoded(corpus, cache, by):
    for name in ("text", "speech", "bare"):
        dataset = Dataset.open(corpus.folder / "train" / name)
        encoded = EncodedDataset(dataset, corpus.tokenizer, by)
        again = pickle.loads(pickle.dumps(encoded))
        assert len(encoded) == len(again) == len(dataset)
        for index in reversed(range(len(dataset))):
            expected = encode_record(dataset[index], corpus.tokenizer, by)
            same(encoded[index], expected)
            same(again[index], expected)
        with pytest.raises(IndexError):
            encoded[len(dataset)]
        where = f"{dataset.folder / 'shard-00000.parquet'}, row 2"
        assert encoded.where(2) == where
        if len(encoded) > 12:
            assert encoded.where(12) == where.replace("00000", "00001")


def test_large_vocabularies_and_small_ones(tmp_path, cache):
    class Numbers:
        """A piece is the number that a word spells."""

        fingerprint = "sha256:numbers"

        def __init__(self, num_pieces):
            self.num_pieces = num_pieces

        def encode(self, text):
            return [int(word) for word in text.split()]

    with RecordWriter(tmp_path / "d", codebook=None, tokenizer=None, num_units=1) as writer:
        writer.write(Record("r", "0 70000 65535", None, None, None, None, "test"))
        writer.write(Record("s", "", None, None, None, None, "test"))
    dataset = Dataset.open(tmp_path / "d")
    encoded = EncodedDataset(dataset, Numbers(70001))
    assert encoded[0].text.tolist() == [0, 70000, 65535]
    assert encoded[1].text.tolist() == []


def test_a_corpus_is_read_once(corpus, cache, tmp_path):
    """What is encoded is read from the cache, also where the shards are gone."""
    shutil.copytree(corpus.folder / "train" / "text", tmp_path / "text")
    dataset = Dataset.open(tmp_path / "text")
    first = EncodedDataset(dataset, corpus.tokenizer)[7]
    for path in (tmp_path / "text").glob("*.parquet"):
        path.unlink()
    same(EncodedDataset(dataset, corpus.tokenizer)[7], first)
    other = train_tokenizer(LINES * 20, tmp_path / "other.model", num_pieces=290)
    with pytest.raises(UserError, match=r"shard-00000\.parquet: expected a shard of 10 records"):
        EncodedDataset(dataset, other)


def test_processes_share_the_work(corpus, cache, monkeypatch):
    """Each file is written once, by whoever comes first; nothing else stays behind."""
    written = []
    write = lst.data.encoded._write

    def count(path, *args):
        written.append(path)
        write(path, *args)

    monkeypatch.setattr(lst.data.encoded, "_write", count)
    dataset = Dataset.open(corpus.folder / "train" / "text")
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: EncodedDataset(dataset, corpus.tokenizer), range(3)))
    assert len(written) == len(set(written)) == 5
    assert sorted(cache.iterdir()) == sorted(written)
    for each in made:
        same(each[40], encode_record(dataset[40], corpus.tokenizer))


def test_a_file_that_could_not_be_written_is_not_there(corpus, cache, monkeypatch):
    def full(_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(lst.data.encoded.os, "fsync", full)
    dataset = Dataset.open(corpus.folder / "train" / "text")
    with pytest.raises(UserError, match=r"cache: could not be written \(No space left .*LST_CACHE"):
        EncodedDataset(dataset, corpus.tokenizer)
    assert list(cache.iterdir()) == []


def test_a_record_that_the_tokenizer_changes_is_named(tmp_path, cache):
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_prefix=str(tmp_path / "nfkc"),
        model_type="bpe",
        vocab_size=60,
        minloglevel=2,
    )
    with RecordWriter(tmp_path / "speech", codebook=None, tokenizer=None, num_units=1) as writer:
        writer.write(spoken(["the"]))
        writer.write(replace(spoken(["\ufb01n"]), id="ligature"))
    dataset = Dataset.open(tmp_path / "speech")
    where = (
        r"speech/shard-00000\.parquet, row 1, record 'ligature': tokenizer: expected one that ke"
    )
    with pytest.raises(UserError, match=where):
        EncodedDataset(dataset, Tokenizer.load(tmp_path / "nfkc.model"), "pieces")
    assert list(cache.iterdir()) == []


def test_machines_that_share_a_cache_do_not_write_the_same_file(corpus, cache, monkeypatch):
    seen = set()
    monkeypatch.setattr(lst.data.encoded.os, "fsync", lambda _: seen.update(cache.glob("*.tmp")))
    dataset = Dataset.open(corpus.folder / "train" / "bare")
    for name in ("node-1.cluster", "node-2.cluster"):
        machine = SimpleNamespace(nodename=name)
        monkeypatch.setattr(lst.data.encoded.os, "uname", lambda machine=machine: machine)
        EncodedDataset(dataset, corpus.tokenizer)
        (path,) = cache.iterdir()
        path.unlink()
    assert len(seen) == 2


def test_a_cache_that_is_no_folder_is_one_line(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LST_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file: could not be written"):
        EncodedDataset(Dataset.open(corpus.folder / "train" / "text"), corpus.tokenizer)


def flip(path: Path, content: bytes) -> None:
    """Damage the only place where ``content`` stands."""
    before = path.read_bytes()
    assert before.count(content) == 1
    path.write_bytes(before.replace(content, bytes([content[0] ^ 1]) + content[1:]))


def test_a_damaged_file_is_named_with_the_record(corpus, cache):
    dataset = Dataset.open(corpus.folder / "train" / "bare")
    encoded = EncodedDataset(dataset, corpus.tokenizer)
    (path,) = cache.iterdir()
    flip(path, dataset[1].units.tobytes())
    encoded[0]
    with pytest.raises(UserError, match=rf"^{path}, row 1, record 'b1': expected the content that"):
        encoded[1]


def test_damage_anywhere_in_a_file_is_named_or_changes_nothing(corpus, cache):
    """Nor does it crash: what says where the content is has no checksum of its own."""
    dataset = Dataset.open(corpus.folder / "train" / "bare")
    EncodedDataset(dataset, corpus.tokenizer)
    (path,) = cache.iterdir()
    content = path.read_bytes()
    whole = [encode_record(dataset[row], corpus.tokenizer) for row in range(3)]
    for place in range(0, len(content), 3):
        path.unlink()  # what is mapped stays as it is
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x44]) + content[place + 1 :])
        damaged = EncodedDataset(dataset, corpus.tokenizer)
        for row in range(3):
            try:
                got = damaged[row]
            except UserError as error:
                assert str(error).startswith(str(path))  # noqa: PT017
            else:
                same(got, whole[row])


@pytest.mark.parametrize("keep", [0, 8, 0.5, 0.99])
def test_a_truncated_file_is_named(corpus, cache, keep):
    dataset = Dataset.open(corpus.folder / "train" / "bare")
    EncodedDataset(dataset, corpus.tokenizer)
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(UserError, match=rf"^{path}: expected the content .* remove it, and it is"):
        EncodedDataset(dataset, corpus.tokenizer)[0]
    path.unlink()
    same(EncodedDataset(dataset, corpus.tokenizer)[0], encode_record(dataset[0], corpus.tokenizer))


def test_a_file_that_was_removed_meanwhile_is_named(corpus, cache):
    encoded = EncodedDataset(Dataset.open(corpus.folder / "train" / "bare"), corpus.tokenizer)
    (path,) = cache.iterdir()
    path.unlink()
    with pytest.raises(UserError, match=rf"^{path}: was removed while a run reads it"):
        encoded[0]


def test_a_loaded_tokenizer_finds_the_same_files(corpus, cache):
    dataset = Dataset.open(corpus.folder / "train" / "bare")
    EncodedDataset(dataset, corpus.tokenizer)
    times = [path.stat().st_mtime_ns for path in cache.iterdir()]
    EncodedDataset(dataset, Tokenizer.load(corpus.folder))
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == times
