"""Every id means one thing, and a tokenizer gives back the text it was given."""

import pickle

import numpy as np
import pytest
import torch

from lst.errors import UserError
from lst.vocabulary import BOS, SPEECH, Tokenizer, Vocabulary, fingerprint, train_tokenizer

LINES = ["Once upon a time, there was a girl named Lily."] * 20 + ["The cat sat on 12 mats."] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(LINES, tmp_path_factory.mktemp("tokenizer") / "a.model", num_pieces=300)


def test_every_id_is_a_special_a_piece_or_a_unit():
    vocabulary = Vocabulary(num_pieces=7, num_units=3)
    ids = np.arange(vocabulary.size)
    kinds = [vocabulary.is_special(ids), vocabulary.is_piece(ids), vocabulary.is_unit(ids)]
    assert [kind.sum() for kind in kinds] == [5, 7, 3]
    assert (sum(kind.astype(int) for kind in kinds) == 1).all()
    assert vocabulary.is_special(BOS)
    assert vocabulary.is_special(SPEECH)


@pytest.mark.parametrize("make", [np.arange, torch.arange])
def test_pieces_and_units_round_trip(make):
    vocabulary = Vocabulary(num_pieces=7, num_units=3)
    assert vocabulary.is_piece(vocabulary.piece_to_id(make(7))).all()
    assert vocabulary.is_unit(vocabulary.unit_to_id(make(3))).all()
    assert (vocabulary.id_to_piece(vocabulary.piece_to_id(make(7))) == make(7)).all()
    assert (vocabulary.id_to_unit(vocabulary.unit_to_id(make(3))) == make(3)).all()


@pytest.mark.parametrize("text", ["The cat sat.", "two  blanks", "zażółć 日本 ✓", "a\nb", ""])
def test_decoding_gives_back_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_same_lines_give_the_same_file(tokenizer, tmp_path):
    again = train_tokenizer(LINES, tmp_path / "b.model", num_pieces=300)
    assert again.fingerprint == tokenizer.fingerprint == fingerprint(tmp_path / "b.model")
    assert again.num_pieces == 300


def test_tokenizer_survives_pickling_and_saving(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "c.model")
    for other in (pickle.loads(pickle.dumps(tokenizer)), Tokenizer.load(tmp_path / "c.model")):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.encode("The cat") == tokenizer.encode("The cat")


def test_long_lines_are_learnt_from(tmp_path):
    # SentencePiece leaves out lines of more than 4,192 bytes unless told otherwise.
    train_tokenizer(["abc " * 5000] * 2, tmp_path / "long.model", num_pieces=262)


def test_user_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.model: no tokenizer could be read"):
        Tokenizer.load(tmp_path / "none.model")
    (tmp_path / "other").write_bytes(b"not a model")
    with pytest.raises(UserError, match="expected a SentencePiece model"):
        Tokenizer.load(tmp_path / "other")
    with pytest.raises(UserError, match="no tokenizer of 9000 pieces"):
        train_tokenizer(LINES, tmp_path / "d.model", num_pieces=9000)
