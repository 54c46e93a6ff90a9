"""Speech pieces stand for the units that they were made of, and every unit can be written."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.errors import UserError
from lst.speech_bpe import SpeechBPE, train_speech_bpe
from lst.vocabulary import BOS, EOS, Vocabulary, train_tokenizer

NUM_UNITS = 30


def speech(rng, count=60):
    """Phones of two to five units, each of them a run or a glide: something to find."""
    phones = [rng.integers(0, 20, rng.integers(2, 6)) for _ in range(12)]
    return [
        np.concatenate([phones[i] for i in rng.integers(0, 12, 30)]).astype(np.int16)
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def bpe():
    """Units 20 … 29 do not occur in what it is trained on."""
    sequences = speech(np.random.default_rng(0))
    return train_speech_bpe(sequences, num_units=NUM_UNITS, num_pieces=80)


units = st.lists(st.integers(0, NUM_UNITS - 1), max_size=60).map(lambda u: np.array(u, np.int16))


@given(units)
@settings(deadline=None, derandomize=True, max_examples=50)
def test_pieces_give_back_their_units(bpe, units):
    pieces = bpe.encode(units)
    assert pieces.dtype == np.int32
    assert len(pieces) <= len(units)
    decoded = bpe.decode(pieces)
    assert decoded.dtype == np.int16
    assert decoded.tolist() == units.tolist()
    assert bpe.lengths[pieces].sum() == len(units)


def test_units_that_were_never_heard_are_pieces_too(bpe):
    assert (len(bpe), bpe.num_units) == (80, NUM_UNITS)
    alone = [bpe.encode(np.array([unit], np.int16)) for unit in range(NUM_UNITS)]
    assert {len(each) for each in alone} == {1}
    assert len({int(each[0]) for each in alone}) == NUM_UNITS
    assert sorted(set(bpe.lengths.tolist()))[:2] == [0, 1]  # <unk> stands for nothing


def test_pieces_are_fewer_where_speech_repeats_itself(bpe):
    sequences = speech(np.random.default_rng(0))
    units, pieces = (sum(map(len, each)) for each in (sequences, map(bpe.encode, sequences)))
    assert units / pieces > 2


def test_the_most_frequent_pair_is_the_first_merge():
    sequences = [np.array([1, 2] * 50 + [0, 3] * 10, np.int16)]
    bpe = train_speech_bpe(sequences, num_units=4, num_pieces=6)  # <unk>, one merge, four units
    assert bpe.decode(bpe.encode(np.array([1, 2]))).tolist() == [1, 2]
    assert [len(bpe.encode(np.array(pair))) for pair in ([1, 2], [2, 1], [0, 3])] == [1, 2, 2]


def test_the_same_speech_gives_the_same_pieces(bpe, tmp_path):
    again = train_speech_bpe(speech(np.random.default_rng(0)), num_units=NUM_UNITS, num_pieces=80)
    other = train_speech_bpe(speech(np.random.default_rng(1)), num_units=NUM_UNITS, num_pieces=80)
    again.save(tmp_path / "speech_bpe.model")
    assert (
        bpe
        == again
        == pickle.loads(pickle.dumps(bpe))
        == SpeechBPE.load(tmp_path / "speech_bpe.model")
    )
    assert bpe != other
    assert len({bpe, again, other}) == 2
    assert repr(bpe).startswith("SpeechBPE(80 pieces, sha256:")


def test_a_sequence_longer_than_the_trainer_takes_is_learnt_from_in_stretches():
    long = np.tile(np.array([0, 1, 2], np.int16), 40_000)  # 80 minutes
    bpe = train_speech_bpe([long], num_units=3, num_pieces=6)
    assert len(bpe.encode(long)) < len(long) / 2
    assert bpe.decode(bpe.encode(long)).tolist() == long.tolist()


def test_the_joint_vocabulary_counts_what_pieces_stand_for(bpe):
    plain = Vocabulary(num_pieces=7, num_units=NUM_UNITS)
    vocabulary = Vocabulary(num_pieces=7, num_units=NUM_UNITS, speech_bpe=bpe)
    assert (plain.size, vocabulary.size) == (5 + 7 + NUM_UNITS, 5 + 7 + 80)
    units = speech(np.random.default_rng(0))[0]
    for each in (plain, vocabulary):
        ids = each.encode_units(units)
        assert each.is_unit(ids).all()
        assert ids.max() < each.size
        assert each.decode_units(ids).tolist() == units.tolist()
        mixed = np.concatenate(([BOS, each.first_piece], ids, [EOS, -100]))
        frames = each.num_frames(mixed)
        assert frames.sum() == len(units)
        assert frames[[0, 1, -2, -1]].tolist() == [0, 0, 0, 0]
    assert len(vocabulary.encode_units(units)) < len(plain.encode_units(units))
    assert vocabulary == Vocabulary(num_pieces=7, num_units=NUM_UNITS, speech_bpe=pickle.loads(
        pickle.dumps(bpe)))  # fmt: skip
    with pytest.raises(ValueError, match=r"speech_bpe is of 30 units, got .*num_units=31"):
        Vocabulary(num_pieces=7, num_units=31, speech_bpe=bpe)


def test_mistakes_are_one_line(bpe, tmp_path):
    with pytest.raises(ValueError, match=r"expected units in \[0, 30\), got 3 to 30"):
        bpe.encode(np.array([3, 30]))
    with pytest.raises(UserError, match=r"none\.model: expected a speech BPE model, got no file"):
        SpeechBPE.load(tmp_path / "none.model")
    train_tokenizer(["some text"] * 5, tmp_path / "text.model", num_pieces=270)
    (tmp_path / "other.model").write_bytes(b"no model")
    (tmp_path / "empty.model").write_bytes(b"")
    for name in ("text", "other", "empty"):
        with pytest.raises(UserError, match=rf"{name}\.model: expected a .* model over speech"):
            SpeechBPE.load(tmp_path / f"{name}.model")
    sequences = speech(np.random.default_rng(0), count=2)
    with pytest.raises(UserError, match="expected more pieces than the codebook's 30 units"):
        train_speech_bpe(sequences, num_units=NUM_UNITS, num_pieces=30)
    with pytest.raises(UserError, match="no speech BPE of 9000 pieces from this speech"):
        train_speech_bpe(sequences, num_units=NUM_UNITS, num_pieces=9000)
