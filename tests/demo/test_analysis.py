"""A document taken apart: its patches are the model's, their compute is all of it, and what is said
of each token is what the model says."""

import numpy as np
import pytest
import torch

from lst.data.batch import pack_documents
from lst.data.interleave import Document
from lst.data.patching import final_strategy, patch_lengths
from lst.demo.analysis import analyse, token_labels
from lst.flops import batch_counts, forward_flops
from lst.generate import Generator, Sampling

KINDS = ("local", "global", "token", "bpe")
SPANS = [["the red fox", 11, "went over", 5], [9], ["far away"], [1, "a", 30], ["a", 4, 4]]
NOTHING_ALIGNED = np.zeros((0, 2), np.int32)


def take_apart(trained, tokens, prompt=1):
    return analyse(
        tokens,
        prompt,
        trained.model,
        trained.vocabulary,
        trained.tokenizer,
        trained.config.model,
        trained.config.data.patching,
    )


def batch_of(trained, tokens):
    document = Document(
        tokens=tokens,
        aligned=NOTHING_ALIGNED,
        breaks=(),
        score_from=0,
        score_eos=True,
        record_id="made",
    )
    strategy = final_strategy(trained.config.data.patching)
    return pack_documents([document], trained.vocabulary, strategy, trained.config.model.plan())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spans", SPANS)
def test_patches_are_those_of_the_model_and_share_all_of_its_compute(
    kind, spans, make_trained, story
):
    trained = make_trained(kind)
    tokens = story(trained, spans)
    analysis = take_apart(trained, tokens)
    lengths, _ = patch_lengths(
        tokens,
        trained.vocabulary,
        final_strategy(trained.config.data.patching),
        aligned=NOTHING_ALIGNED,
    )
    assert [len(patch.tokens) for patch in analysis.patches] == lengths.tolist()
    assert [patch.number for patch in analysis.patches] == list(range(len(lengths)))
    assert [token.position for token in analysis.tokens] == list(range(len(tokens)))
    assert sum(patch.share for patch in analysis.patches) == pytest.approx(1)
    counts = batch_counts(batch_of(trained, tokens))
    parts = forward_flops(trained.config.model, trained.vocabulary, counts)
    assert analysis.flops == pytest.approx(sum(parts.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_the_models_scores(kind, make_trained, story):
    trained = make_trained(kind)
    tokens = story(trained, ["the red fox", 11, "went over", 5])
    logits = trained.model.logits(batch_of(trained, tokens)).double()
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(tokens[1:, None]).long())
    first, *logprobs = [token.logprob for token in take_apart(trained, tokens).tokens]
    assert first is None
    assert logprobs == pytest.approx(expected.flatten().tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spans", [["the red fox"], ["a", 6]])
def test_a_continuation_is_seen_as_its_generator_saw_it(kind, spans, make_trained, story):
    trained = make_trained(kind)
    prompt = story(trained, spans)[:-1]  # a patch of speech may be open
    generator = Generator(
        trained.model, trained.vocabulary, trained.config.model, trained.config.data.patching
    )
    (done,) = generator.generate([prompt], Sampling(max_tokens=12, modality="speech"))
    analysis = take_apart(trained, np.concatenate((prompt, done.tokens)), len(prompt))
    assert [len(patch.tokens) for patch in analysis.patches] == done.patch_lengths.tolist()
    logprobs = [token.logprob for token in analysis.tokens[len(prompt) :]]
    assert logprobs == pytest.approx(done.logprobs.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_speech_have_their_units_and_their_times(kind, make_trained, story):
    trained = make_trained(kind)
    runs = take_apart(trained, story(trained, ["a", 11, "went", 5])).runs
    assert [run.is_speech for run in runs] == [False, True, False, True, False]
    for run, frames in ((runs[1], 11), (runs[3], 5)):
        assert len(run.units) == frames
        stops = [patch.frames[1] for patch in run.patches]
        assert [patch.frames[0] for patch in run.patches] == [0, *stops[:-1]]
        assert stops[-1] == frames
        labels = " ".join(token.label for patch in run.patches for token in patch.tokens)
        assert labels == " ".join(map(str, run.units))


def test_labels_of_pieces_are_the_text_with_its_blanks(make_trained, tokenizer):
    vocabulary = make_trained().vocabulary
    text = "the fox, Zoë & 狐 went 🦊 away"  # characters of two, three and four byte pieces
    pieces = np.array(tokenizer.encode(text))
    labels = token_labels(vocabulary.piece_to_id(pieces), vocabulary, tokenizer)
    assert "".join(labels) == f" {text}"
    assert len(labels) == len(pieces)
    (fox,) = (at for at, label in enumerate(labels) if label == "🦊")
    assert labels[fox - 3 : fox] == ("", "", "")


def test_bytes_that_are_no_text_have_labels_too(make_trained, tokenizer):
    vocabulary = make_trained().vocabulary
    first, *_ = tokenizer.encode("狐")[-3:]
    labels = token_labels(vocabulary.piece_to_id(np.array([first] * 6)), vocabulary, tokenizer)
    assert "\N{REPLACEMENT CHARACTER}" in "".join(labels)


def test_specials_have_their_names(make_trained, tokenizer):
    vocabulary = make_trained().vocabulary
    labels = token_labels(np.arange(5), vocabulary, tokenizer)
    assert labels == ("<pad>", "<bos>", "<eos>", "<t>", "<s>")
