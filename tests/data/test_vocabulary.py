"""Every id means one thing, and a tokenizer gives back the text it was given."""

import pickle

import numpy as np
import pytest
import torch

from lst.errors import UserError
from lst.vocabulary import (
    BOS,
    SPEECH,
    JsonTokenizer,
    Tokenizer,
    Vocabulary,
    fingerprint,
    train_tokenizer,
)

LINES = ["Once upon a time, there was a girl named Lily."] * 20 + ["The cat sat on 12 mats."] * 20


def library_tokenizer():
    """Byte-level BPE of the tokenizers library, with every setting that could lose or add text."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    return tokenizer


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / request.param
    if path.suffix == ".json":
        library_tokenizer().save(str(path))
    else:
        train_tokenizer(LINES, path, num_pieces=300)
    return Tokenizer.load(path)


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


TEXTS = ["The cat sat.", "two  blanks", "zażółć 日本 ✓", "a\nb", "", "<|end|>"]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_back_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_are_those_of_the_tokenizers_library():
    library = library_tokenizer()
    tokenizer = JsonTokenizer(library.to_str().encode())
    assert tokenizer.num_pieces == library.get_vocab_size()
    library.no_truncation()
    library.no_padding()
    for text in TEXTS[:-1]:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert library.encode("<|end|>", add_special_tokens=False).ids == [1]
    assert 1 not in tokenizer.encode("<|end|>")  # a text that spells a special is text


def test_same_lines_give_the_same_file(tmp_path):
    first, again = (
        train_tokenizer(LINES, tmp_path / name, num_pieces=300) for name in ("a.model", "b.model")
    )
    assert again.fingerprint == first.fingerprint == fingerprint(tmp_path / "b.model")
    assert again.num_pieces == 300


def test_tokenizer_survives_pickling_and_saving(tokenizer, tmp_path):
    tokenizer.save(tmp_path / tokenizer.file_name)
    for other in (
        pickle.loads(pickle.dumps(tokenizer)),
        Tokenizer.load(tmp_path / tokenizer.file_name),
        Tokenizer.load(tmp_path),
    ):
        assert other.fingerprint == tokenizer.fingerprint
        assert other.encode("The cat") == tokenizer.encode("The cat")


def test_long_lines_are_learnt_from(tmp_path):
    # SentencePiece leaves out lines of more than 4,192 bytes unless told otherwise.
    train_tokenizer(["abc " * 5000] * 2, tmp_path / "long.model", num_pieces=262)


def test_user_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.model: expected a tokenizer, got no file"):
        Tokenizer.load(tmp_path / "none.model")
    (tmp_path / "other").write_bytes(b"not a model")
    with pytest.raises(UserError, match="expected a SentencePiece model"):
        Tokenizer.load(tmp_path / "other")
    with pytest.raises(UserError, match=r"expected tokenizer\.model or .*, got no tokenizer"):
        Tokenizer.load(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="got both"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no tokenizer of 9000 pieces"):
        train_tokenizer(LINES, tmp_path / "d.model", num_pieces=9000)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_another_file_of_a_tokenizers_name_is_named(tmp_path, name):
    if name.endswith(".json"):
        pytest.importorskip("tokenizers")
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=rf"{name}: expected a .*, got another file"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_with_a_piece_that_is_no_text_is_another_file(tmp_path):
    path = tmp_path / "tokenizer.model"
    train_tokenizer(LINES, path, num_pieces=300)
    content = path.read_bytes()
    blank = content.index("▁".encode())
    path.write_bytes(content[:blank] + b"\xff" + content[blank + 1 :])
    with pytest.raises(UserError, match=r"tokenizer\.model: expected a .*, got another file"):
        Tokenizer.load(path)


@pytest.mark.parametrize("text", ["The cat sat.", " two  blanks ", "zażółć 日本 ✓!", "a\nb\tc", ""])
def test_pieces_end_where_their_text_ends(tokenizer, text):
    ends = tokenizer.piece_ends(text)
    pieces = tokenizer.encode(text)
    assert len(ends) == len(pieces)
    assert (np.diff(ends, prepend=0) >= 0).all()
    # Where no character is cut, the pieces up to a place are the text up to there.
    for place, end in enumerate(ends, start=1):
        decoded = tokenizer.decode(pieces[:place])
        if "\ufffd" not in decoded:
            assert decoded == text[:end]


def test_pieces_of_a_tokenizer_that_changes_the_text_are_refused(tmp_path):
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(tmp_path / "nfkc"),
        model_type="bpe",
        vocab_size=60,
        minloglevel=2,
    )
    changing = Tokenizer.load(tmp_path / "nfkc.model")
    with pytest.raises(
        UserError, match=r"expected one that keeps every character.* '\s+The   cat'"
    ):
        changing.piece_ends("   The   cat")
