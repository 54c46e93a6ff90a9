"""A word's vector is what the global transformer reads of that word's patch, and the measures are
what their definitions say, pair by pair."""

import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lst.data.batch import pack_documents
from lst.data.interleave import record_document, stable_rng
from lst.data.patching import Aligned
from lst.data.records import Record, Word
from lst.errors import UserError
from lst.evaluate import word_embeddings as module
from lst.evaluate.word_embeddings import choose_words, clusters, read_categories, word_embeddings
from lst.model import ModelConfig, StackConfig, build_model
from lst.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_pieces=10, num_units=20)


class Letters:
    """A tokenizer of one piece a letter."""

    def encode(self, text):
        return [ord(letter) % 10 for letter in text.replace(" ", "")]


TOKENIZER = Letters()


def make_model(**changes):
    torch.manual_seed(0)
    config = ModelConfig(
        encoder=StackConfig(layers=1, dim=16, heads=1),
        global_transformer=StackConfig(layers=1, dim=32, heads=2),
        decoder=StackConfig(layers=1, dim=16, heads=1),
        **changes,
    )
    return build_model(config, VOCABULARY), config.plan()


def spoken(name, *words, frames=20):
    rng = np.random.default_rng(len(name))
    return Record(
        id=name,
        text=" ".join(word for word, *_ in words),
        units=rng.integers(0, 20, frames).astype(np.int16),
        words=tuple(Word(*word) for word in words),
        chars=None,
        speaker=None,
        source="test",
    )


# A silence before, none between, one frame, no frame at all, a silence after.
RECORDS = [
    spoken("one", ("The", 2, 5), ("fox,", 5, 6), ("went", 6, 6), ("home.", 8, 17)),
    spoken("two", ("fox", 0, 20)),
]


@pytest.mark.parametrize("text_path", ["local", "global"])
def test_a_vector_is_its_words_patch(text_path):
    model, plan = make_model(text_path=text_path)
    vectors, words = word_embeddings(model, RECORDS, VOCABULARY, TOKENIZER, plan)
    assert words == ["the", "fox", "home", "fox"]
    # The same patch, cut out of the encoder's own answer: patches of the document are <bos>, <s>,
    # silence, The, fox, silence, home, silence, <eos>.
    document = record_document(RECORDS[0], VOCABULARY, TOKENIZER, stable_rng(0), "speech")
    batch = pack_documents([document], VOCABULARY, Aligned(), plan)
    assert torch.diff(batch.layout.cu_patches).tolist() == [1, 1, 2, 3, 1, 2, 9, 3, 1]
    with torch.no_grad():
        if text_path == "local":
            u = model.encoder(model.embedding(batch.tokens), batch)[1][[3, 4, 6]]
        else:  # patches of units alone
            u = model.encoder(model.speech_embedding(batch.split.speech_tokens), batch)[1][
                [1, 2, 4]
            ]
    np.testing.assert_allclose(vectors[:3], u.numpy(), rtol=1e-5, atol=1e-6)


def test_records_without_aligned_words_are_left_out():
    model, plan = make_model()
    silent = spoken("silent")
    vectors, words = word_embeddings(model, [silent, RECORDS[1]], VOCABULARY, TOKENIZER, plan)
    assert (len(vectors), words) == (1, ["fox"])
    with pytest.raises(UserError, match="expected speech with aligned words, got none"):
        word_embeddings(model, [silent], VOCABULARY, TOKENIZER, plan)


def test_a_token_level_model_has_no_patches():
    model, plan = make_model(architecture="token")
    with pytest.raises(UserError, match="expected a model with patches"):
        word_embeddings(model, RECORDS, VOCABULARY, TOKENIZER, plan)


def test_the_measures_are_their_definitions():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    words = ["a"] * 3 + ["b"] * 4 + ["c"] * 2
    vectors = rng.normal(size=(9, 5)) + 3 * np.array([ord(word) - 96 for word in words])[:, None]
    found = clusters(vectors, words)

    def cosine(i, j):
        x, y = vectors[i], vectors[j]
        return x @ y / np.sqrt((x @ x) * (y @ y))

    pairs = list(itertools.combinations(range(9), 2))
    within = [cosine(i, j) for i, j in pairs if words[i] == words[j]]
    between = [cosine(i, j) for i, j in pairs if words[i] != words[j]]

    def distance(i, word):
        return np.mean([1 - cosine(i, j) for j in range(9) if words[j] == word and j != i])

    silhouettes = []
    for i in range(9):
        a = distance(i, words[i])
        b = min(distance(i, word) for word in "abc" if word != words[i])
        silhouettes.append((b - a) / max(a, b))
    assert (found.num_words, found.num_vectors) == (3, 9)
    assert found.within == pytest.approx(np.mean(within))
    assert found.between == pytest.approx(np.mean(between))
    assert found.silhouette == pytest.approx(np.mean(silhouettes))


def test_words_spoken_too_rarely_are_not_chosen():
    words = ["he"] * 4 + ["she"] * 5 + ["fox"] * 3
    assert choose_words(words, {"who": ["he", "she"], "what": ["fox"]}, least=4) == {
        "he": "who",
        "she": "who",
    }
    with pytest.raises(UserError, match=r"spoken 5 times, got 1 of 2; the most frequent: she, he"):
        choose_words(words, {"who": ["he", "she"]}, least=5)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": "b"}', '{"a": [1]}'])
def test_a_file_of_categories_that_is_none_is_told(content, tmp_path):
    path = tmp_path / "words.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"words\.json: expected"):
        read_categories(path)


def test_the_command_measures_and_draws(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    model, plan = make_model()
    monkeypatch.setattr(module, "load_model", lambda *_: (model, Trained(plan), VOCABULARY, Cut()))
    records = SimpleNamespace(read=lambda: RECORDS * 3)
    monkeypatch.setattr(module.Dataset, "open", lambda *_, **__: records)
    monkeypatch.chdir(tmp_path)
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"things": ["Fox", "home"], "none": ["whale"]}))
    command = ["", str(tmp_path), "--categories", str(words), "--least", "3"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match="corpus/valid/speech: expected a dataset of speech, got n"):
        module.main()
    (tmp_path / "corpus/valid/speech").mkdir(parents=True)
    module.main()
    assert "9 vectors of 2 words: cosine within a word" in capsys.readouterr().out
    found = json.loads((tmp_path / "word_embeddings.json").read_text())
    assert found["words"] == {"fox": "things", "home": "things"}
    assert (found["num_words"], found["num_vectors"]) == (2, 9)
    assert (tmp_path / "word_embeddings.png").read_bytes().startswith(b"\x89PNG")


class Trained:
    """As much of a run's configuration as the command asks for."""

    def __init__(self, plan):
        self.model, self.data = self, self
        self.corpus, self._plan = "corpus", plan

    def plan(self):
        return self._plan


class Cut(Letters):
    fingerprint = None
