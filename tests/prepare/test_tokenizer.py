"""A tokenizer is learnt from any text, or brought along, and never put in another's place."""

import gzip
import json
from pathlib import Path

import pytest

from lst.data.records import Record, RecordWriter
from lst.errors import UserError
from lst.prepare.tokenizer import TokenizerConfig, _sample, describe_tokenizer, prepare_tokenizer
from lst.vocabulary import Tokenizer, fingerprint, train_tokenizer

LINES = [f"story number {n}: a small red fox went over the hills" for n in range(60)]
PIECES = 300


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path


def prepare(out, **options):
    return prepare_tokenizer(TokenizerConfig(out=out, **({"pieces": PIECES} | options)))


def test_a_tokenizer_is_learnt_from_every_kind_of_text_alike(tmp_path, text):
    expected = train_tokenizer(LINES, tmp_path / "expected.model", num_pieces=PIECES).fingerprint
    lines = "".join(json.dumps({"text": line}) + "\n" for line in LINES)
    (tmp_path / "lines.jsonl").write_text(lines)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with RecordWriter(
        tmp_path / "data", codebook=None, tokenizer=None, num_units=1, rows_per_shard=25
    ) as writer:
        for n, line in enumerate(LINES):
            writer.write(Record(f"r{n}", line, None, None, None, None, "test"))
    for name in ("lines.txt", "lines.jsonl", "folder", "data"):
        out = tmp_path / "out" / name
        tokenizer = prepare(out, text=(tmp_path / name,))
        assert tokenizer.fingerprint == expected == fingerprint(out / "tokenizer.model")
        assert [path.name for path in out.iterdir()] == ["tokenizer.model"]
        assert tokenizer.num_pieces == PIECES
        assert describe_tokenizer(out, tokenizer) == (
            f"{out / 'tokenizer.model'}: 300 pieces, {expected}"
        )


def test_a_tokenizer_is_imported_with_its_fingerprint(tmp_path, text):
    prepare(tmp_path / "first", text=(text,))
    for source in (tmp_path / "first", tmp_path / "first" / "tokenizer.model"):
        made = prepare(tmp_path / "second", model=source)  # twice the same: the second finds it
        assert made.fingerprint == fingerprint(tmp_path / "second" / "tokenizer.model")
    assert Tokenizer.load(tmp_path / "second").encode("fox") == made.encode("fox")


def test_another_tokenizer_is_never_replaced(tmp_path, text):
    before = prepare(tmp_path, text=(text,))
    other = train_tokenizer(LINES, tmp_path / "other.model", num_pieces=290)
    for options in ({"text": (text,), "pieces": 290}, {"model": tmp_path / "other.model"}):
        with pytest.raises(UserError, match=rf"expected no tokenizer or {other.fingerprint}, got"):
            prepare(tmp_path, **options)
    assert fingerprint(tmp_path / "tokenizer.model") == before.fingerprint


BAD = {
    "json": (b'{"text": "a"}\n{"text": \n', "lines.jsonl, line 2: "),
    "no text": (b'{"text": "a"}\n{"words": "b"}\n', "lines.jsonl, line 2: expected an object"),
    "encoding": (b'{"text": "a"}\n\xff\n', "lines.jsonl, line 2: "),
    "nothing": (b"\n", "expected texts to learn from, got none"),
    "too little": (b'{"text": "a"}\n', "no tokenizer of 300 pieces from these lines"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_text_is_named_and_leaves_nothing(tmp_path, content, message):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", text=(path,))
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_none_is_named_and_leaves_nothing(tmp_path, text):
    with pytest.raises(UserError, match=r"lines\.txt: expected a SentencePiece model"):
        prepare(tmp_path / "out", model=text)
    with pytest.raises(UserError, match=r"none\.model: expected a tokenizer, got no file"):
        prepare(tmp_path / "out", model=tmp_path / "none.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.model: expected a SentencePiece model"):
        prepare(tmp_path / "out", model=tmp_path / "empty.model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected --text to train on or a --model to import, got neither"),
        ({"text": (Path("a"),), "model": Path("b")}, "got both"),
        ({"text": (Path("a"),), "pieces": 0}, "--pieces: expected 1 or more, got 0"),
        ({"text": (Path("a"),), "texts": 0}, "--texts: expected 1 or more, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        TokenizerConfig(out=tmp_path, **options)


def test_a_sample_is_drawn_from_everywhere_and_the_same_again():
    texts = [f"{n:04}" for n in range(1000)]
    counts = dict.fromkeys(texts, 0)
    for seed in range(200):
        drawn = _sample(texts, 100, seed)
        assert drawn == sorted(set(drawn)) == _sample(iter(texts), 100, seed)
        assert len(drawn) == 100
        for text in drawn:
            counts[text] += 1
    quarters = [sum(counts[text] for text in texts[at : at + 250]) for at in range(0, 1000, 250)]
    assert all(4700 < count < 5300 for count in quarters)  # 5000 each: ± 4.5 deviations
    assert _sample(texts, 5000, 0) == texts


@pytest.mark.parametrize("pieces", [2**31, 2**62])
def test_more_pieces_than_there_can_be_leave_no_folder(tmp_path, text, pieces):
    with pytest.raises(UserError, match=f"no tokenizer of {pieces} pieces from these lines"):
        prepare(tmp_path / "out", text=(text,), pieces=pieces)
    with pytest.raises(UserError, match="expected a file or a folder, got neither"):
        prepare(tmp_path / "out", text=(tmp_path / "none",))
    assert not (tmp_path / "out").exists()
