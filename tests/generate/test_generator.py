"""Requests are continued each as if alone, until something says stop."""

import numpy as np
import pytest
import torch

from lst.data.batch import pack_documents
from lst.data.interleave import Document
from lst.data.patching import PatchingConfig, patch_lengths
from lst.errors import UserError
from lst.generate import Continuation, Generator, Sampling
from lst.model import LanguageModel, ModelConfig, StackConfig, build_model
from lst.speech_bpe import train_speech_bpe
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, Vocabulary

VOCABULARY = Vocabulary(num_pieces=40, num_units=20)
NOTHING_ALIGNED = np.zeros((0, 2), np.int32)
KINDS = {
    "local": ("lst", "local", PatchingConfig(strategy="static", size=3)),
    "global": ("lst", "global", PatchingConfig(strategy="mixed", size=3)),
    "token": ("token", "local", PatchingConfig(strategy="none")),
}


def config_of(architecture: str, text_path: str) -> ModelConfig:
    local = StackConfig(layers=1, dim=16, heads=2)
    return ModelConfig(
        architecture=architecture,
        text_path=text_path,
        encoder=local,
        global_transformer=StackConfig(layers=2, dim=32, heads=2),
        decoder=local,
        local_window=7,
        decoder_window=4,
    )


def generator(kind: str, vocabulary: Vocabulary = VOCABULARY, **settings) -> Generator:
    architecture, text_path, patching = KINDS[kind]
    config = config_of(architecture, text_path)
    torch.manual_seed(0)
    model = build_model(config, vocabulary)
    with torch.no_grad():
        for parameter in model.parameters():  # scores that differ, so that no draw is a tie
            parameter.mul_(2)
    return Generator(model, vocabulary, config, patching, **settings)


def prompt(*spans: list[int]) -> np.ndarray:
    return np.array([BOS, *(id for span in spans for id in span)], np.int32)


def text(count: int) -> list[int]:
    return [VOCABULARY.first_piece + at % 40 for at in range(count)]


def speech(count: int) -> list[int]:
    return [SPEECH, *(VOCABULARY.first_unit + at % 20 for at in range(count))]


PROMPTS = [prompt(), prompt(text(4)), prompt(speech(10)), prompt(speech(5), [TEXT], text(2))]


def assert_same(ours: Continuation, theirs: Continuation) -> None:
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    assert ours.stopped == theirs.stopped
    assert ours.patch_lengths.tolist() == theirs.patch_lengths.tolist()
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_single_requests(kind):
    """Of all lengths and modalities, each with settings of its own."""
    samplings = [
        Sampling(max_tokens=30, seed=1),
        Sampling(max_tokens=9, temperature=0),
        Sampling(max_tokens=40, seed=2, modality="speech", top_p=0.9),
        Sampling(max_tokens=20, seed=1, repetition_penalty=1.3, top_k=10, stop=(SPEECH,)),
    ]
    made = generator(kind)
    together = made.generate(PROMPTS, samplings)
    assert len({len(each.tokens) for each in together}) > 2
    for each, sampling, ours in zip(PROMPTS, samplings, together, strict=True):
        assert_same(ours, *made.generate([each], sampling))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_changes_no_continuation(kind):
    sampling = Sampling(max_tokens=25, seed=5)
    ours = generator(kind).generate(PROMPTS, sampling)
    theirs = generator(kind, cached=False).generate(PROMPTS, sampling)
    for pair in zip(ours, theirs, strict=True):
        assert_same(*pair)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_the_whole_document(kind):
    """Whatever was filtered: the model's own, as its loss measures them."""
    made = generator(kind)
    for modality in ("any", "text"):
        sampling = Sampling(max_tokens=12, seed=3, temperature=0.7, top_k=5, modality=modality)
        (got,) = made.generate([PROMPTS[2]], sampling)
        tokens = np.append(PROMPTS[2], got.tokens)
        with torch.no_grad():
            scores = made.model.logits(packed([tokens], made)).log_softmax(-1)
        first = len(PROMPTS[2]) - 1
        expected = scores[
            torch.arange(first, len(tokens) - 1), torch.from_numpy(tokens[first + 1 :])
        ]
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)
        lengths, _ = patch_lengths(tokens, VOCABULARY, made.strategy, aligned=NOTHING_ALIGNED)
        assert got.patch_lengths.tolist() == lengths.tolist()


def packed(documents: list[np.ndarray], made: Generator, *, targets: bool = False):
    return pack_documents(
        [
            Document(
                tokens=tokens.astype(np.int32),
                aligned=NOTHING_ALIGNED,
                breaks=(),
                score_from=0 if targets else len(tokens),
                score_eos=True,
                record_id="",
            )
            for tokens in documents
        ],
        made.vocabulary,
        made.strategy,
        made.config.plan(),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("modality", ["text", "speech"])
def test_a_forced_modality_is_kept_to(kind, modality):
    start = prompt(text(3), [TEXT if modality == "text" else SPEECH])
    (got,) = generator(kind).generate([start], Sampling(max_tokens=60, modality=modality, seed=2))
    theirs = VOCABULARY.is_unit if modality == "text" else VOCABULARY.is_piece
    own = VOCABULARY.is_piece if modality == "text" else VOCABULARY.is_unit
    assert not theirs(got.tokens).any()
    assert (SPEECH if modality == "text" else TEXT) not in got.tokens
    assert own(got.tokens).any()


def test_speech_can_turn_to_text_where_text_is_forced():
    """Where text belongs to the global transformer, no piece follows a unit: first the marker."""
    (got,) = generator("global").generate(
        [prompt(speech(4))], Sampling(max_tokens=30, modality="text", temperature=0)
    )
    assert got.tokens[0] in (TEXT, EOS)


# --- what ends a continuation -------------------------------------------------------------------


def favour(made: Generator, id: int) -> Generator:
    """Make an id by far the likeliest everywhere."""
    made.model.head.register_forward_hook(
        lambda _, inputs, scores: scores.index_fill(-1, torch.tensor([id]), 1e3)
    )
    return made


def test_eos_ends_a_continuation_and_is_part_of_it():
    (got,) = favour(generator("token"), EOS).generate(PROMPTS[1:2], Sampling(max_tokens=9))
    assert (got.tokens.tolist(), got.stopped) == ([EOS], "eos")


@pytest.mark.parametrize("kind", KINDS)
def test_stop_ids_end_a_continuation_and_are_part_of_it(kind):
    made = generator(kind)
    (free,) = made.generate(PROMPTS[2:3], Sampling(max_tokens=30, seed=1))
    stop = int(free.tokens[6])
    (got,) = made.generate(PROMPTS[2:3], Sampling(max_tokens=30, seed=1, stop=(stop,)))
    end = free.tokens.tolist().index(stop) + 1
    assert got.tokens.tolist() == free.tokens[:end].tolist()
    assert got.stopped == "stop"


def test_as_many_tokens_as_asked_for():
    made = generator("local")
    for each in made.generate(PROMPTS, [Sampling(max_tokens=n, seed=7) for n in (1, 2, 3, 4)]):
        assert each.stopped == "eos" or each.stopped == "length"
    counts = [len(made.generate([PROMPTS[1]], Sampling(max_tokens=n))[0].tokens) for n in (1, 5)]
    assert counts == [1, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_ends_a_continuation_where_a_patch_too_many_would_begin(kind):
    free = generator(kind).generate(PROMPTS, Sampling(max_tokens=60, seed=4))
    held = generator(kind, context=14).generate(PROMPTS, Sampling(max_tokens=60, seed=4))
    full = 0
    for ours, theirs in zip(held, free, strict=True):
        assert ours.tokens.tolist() == theirs.tokens[: len(ours.tokens)].tolist()
        assert len(ours.patch_lengths) <= 14
        if ours.stopped == "context":
            full += 1
            assert len(ours.patch_lengths) == 14
            assert len(theirs.tokens) > len(ours.tokens)
    assert full >= 2


def test_a_patch_may_be_filled_at_the_end_of_the_context():
    made = generator("local", context=4)
    (got,) = made.generate([prompt(speech(4))], Sampling(modality="speech", top_k=3, seed=0))
    assert got.stopped in ("context", "eos")
    assert len(got.patch_lengths) == 4
    (none,) = made.generate([prompt(text(3))], Sampling())
    assert (none.tokens.tolist(), none.stopped) == ([], "context")


# --- seeds, and what is told on the way ---------------------------------------------------------


def test_seeds_make_continuations_repeatable():
    made = generator("global")
    first = made.generate([PROMPTS[1]] * 3, Sampling(max_tokens=12, seed=1))
    again = made.generate([PROMPTS[1]] * 3, Sampling(max_tokens=12, seed=1))
    other = made.generate([PROMPTS[1]] * 3, Sampling(max_tokens=12, seed=2))
    for pair in zip(first, again, strict=True):
        assert_same(*pair)
    drawn = {tuple(each.tokens.tolist()) for each in (*first, *other)}
    assert len(drawn) == 6  # one sampling for three prompts: each draws for itself


def test_tokens_are_told_as_they_come():
    told: dict[int, list[tuple[int, float]]] = {0: [], 1: [], 2: [], 3: []}
    got = generator("local").generate(
        PROMPTS,
        Sampling(max_tokens=8),
        on_token=lambda number, token, nats: told[number].append((token, nats)),
    )
    for number, each in enumerate(got):
        assert [token for token, _ in told[number]] == each.tokens.tolist()
        np.testing.assert_allclose([nats for _, nats in told[number]], each.logprobs, rtol=1e-6)


def test_no_prompts_have_no_continuations():
    assert generator("local").generate([], Sampling()) == []


def test_training_state_and_gradients_stay_as_they_were():
    made = generator("local")
    made.generate(PROMPTS, Sampling(max_tokens=3))
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in made.model.parameters())
    made.model(packed(PROMPTS[1:], made, targets=True)).sum().backward()


# --- vocabularies, mistakes ---------------------------------------------------------------------


def test_speech_of_a_bpe_is_generated_in_its_pieces():
    rng = np.random.default_rng(0)
    bpe = train_speech_bpe([rng.integers(0, 4, 400) for _ in range(8)], num_units=4, num_pieces=20)
    vocabulary = Vocabulary(num_pieces=6, num_units=4, speech_bpe=bpe)
    config = config_of("token", "local")
    model: LanguageModel = build_model(config, vocabulary)
    made = Generator(model, vocabulary, config, PatchingConfig(strategy="speech-bpe"))
    (got,) = made.generate(
        [np.array([BOS, SPEECH])], Sampling(max_tokens=200, modality="speech", temperature=5.0)
    )
    spoken = got.tokens[vocabulary.is_unit(got.tokens)]
    assert len(vocabulary.decode_units(spoken)) > len(spoken)
    assert (vocabulary.num_frames(spoken) > 0).all()


@pytest.mark.parametrize(
    ("given", "sampling", "message"),
    [
        (np.array([], np.int32), Sampling(), "prompt 0: expected token ids"),
        (np.array([[BOS]]), Sampling(), "prompt 0: expected token ids"),
        (np.array([1.0]), Sampling(), "prompt 0: expected token ids"),
        (np.array([TEXT, 9]), Sampling(), r"prompt 0: expected <bos> \(1\) first, got 3"),
        (np.array([BOS, 65]), Sampling(), "prompt 0: expected ids below 65, got 65"),
        (np.array([BOS, -1]), Sampling(), "prompt 0: expected ids below 65, got -1"),
        (np.array([BOS]), Sampling(stop=(99,)), "prompt 0, stop: expected ids below 65, got 99"),
        (prompt(text(9)), Sampling(), "prompt 0: expected at most 8 patches, the context, got 10"),
    ],
)
def test_prompts_that_are_no_documents_are_told(given, sampling, message):
    with pytest.raises(UserError, match=message):
        generator("local", context=8).generate([given], sampling)


def test_a_sampling_for_each_prompt_or_one_for_all():
    with pytest.raises(UserError, match="a sampling for each of 4 prompts, got 1"):
        generator("local").generate(PROMPTS, [Sampling()])


def test_aligned_patches_cannot_be_decoded():
    config = config_of("lst", "local")
    model = build_model(config, VOCABULARY)
    with pytest.raises(UserError, match="only an aligner tells"):
        Generator(model, VOCABULARY, config, PatchingConfig(strategy="aligned"))


# --- a model that knows its documents -----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_documents_known_by_heart_are_continued_as_they_go_on(kind):
    """From any point of theirs, in one batch: greedily, to their <eos>."""
    rng = np.random.default_rng(0)
    documents = [
        np.array([BOS, *spans, EOS], np.int32)
        for spans in (
            [TEXT, *(5 + rng.permutation(40)[:6]), *[SPEECH, *(45 + rng.permutation(20)[:11])]],
            [SPEECH, *(45 + rng.permutation(20)[:8]), TEXT, *(5 + rng.permutation(40)[:7])],
            (5 + rng.permutation(40)[:12]).tolist(),
        )
    ]
    made = generator(kind)
    batch = packed(documents, made, targets=True)
    told = batch.layout.token_positions >= 3  # before, nothing tells which document it is
    optimizer = torch.optim.Adam(made.model.parameters(), lr=1e-2)
    for _ in range(400):
        losses = made.model(batch)
        if losses[told].max() < 0.3:
            break
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert losses[told].max() < 0.3
    starts = [(document, at) for document in documents for at in (4, 7, 10)]
    got = made.generate([document[:at] for document, at in starts], Sampling(temperature=0))
    for (document, at), each in zip(starts, got, strict=True):
        assert each.tokens.tolist() == document[at:].tolist()
        assert each.stopped == "eos"
