"""What is kept changes no score: the pass over new tokens gives those of a pass over everything.

The oracle is the model's own packed pass over whole documents, in float64, which
tests/model/test_model.py holds against the equations; that no later token moves a score is tested
there too. Continuations are given, so that they may switch modality wherever a patch stands.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lst.data.batch import pack_documents
from lst.data.interleave import Document
from lst.data.patching import NoPatching, Static
from lst.generate.passes import NOTHING_ALIGNED, Cached, Uncached
from lst.model import ModelConfig, StackConfig, build_model
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, Vocabulary

VOCABULARY = Vocabulary(num_pieces=40, num_units=20)
CPU = torch.device("cpu")
LOCAL_WINDOW = 7

# (architecture, text path, units of a patch)
MODELS = [("lst", path, size) for path in ("local", "global") for size in (1, 3, 4)]
MODELS += [("token", "local", 1)]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def config_of(
    architecture="lst", text_path="local", slots=2, decoder_window: int | None = 4
) -> ModelConfig:
    local = StackConfig(layers=1, dim=32 // slots, heads=2)
    return ModelConfig(
        architecture=architecture,
        text_path=text_path,
        encoder=local,
        global_transformer=StackConfig(layers=2, dim=32, heads=4, kv_heads=2),
        decoder=replace(local, layers=2),
        local_window=LOCAL_WINDOW,
        decoder_window=decoder_window,
    )


def scorers(config: ModelConfig, size: int):
    torch.manual_seed(0)
    model = build_model(config, VOCABULARY).double()
    strategy = NoPatching() if size == 1 else Static(size=size)
    return tuple(kind(model, VOCABULARY, strategy, CPU) for kind in (Cached, Uncached))


def pieces(count: int, seed: int = 0) -> list[int]:
    return (VOCABULARY.first_piece + np.random.default_rng(seed).integers(0, 40, count)).tolist()


def units(count: int, seed: int = 0) -> list[int]:
    return (VOCABULARY.first_unit + np.random.default_rng(seed).integers(0, 20, count)).tolist()


def prompts(size: int) -> dict[str, np.ndarray]:
    """Every shape, for patches of ``size`` units."""
    shapes = {
        "nothing": [],
        "text": pieces(5),
        "text after a marker": [TEXT, *pieces(2)],
        "ends at a marker": [TEXT, *pieces(3), SPEECH],
        "speech": [SPEECH, *units(2 * size)],
        "ends within a patch": [SPEECH, *units(size + 1)],
        "ends a unit before a patch does": [SPEECH, *units(2 * size - 1)],
        "a patch that text cut short": [SPEECH, *units(size + 1), TEXT, *pieces(2)],
        "a patch that a marker cut short": [SPEECH, *units(size + 1), TEXT],
        "several spans": [*pieces(2), SPEECH, *units(5), TEXT, *pieces(3), SPEECH, *units(2)],
        "longer than the local window": [SPEECH, *units(3 * LOCAL_WINDOW)],
        "text longer than the windows": pieces(3 * LOCAL_WINDOW),
        "spans longer than the windows": [*pieces(9), SPEECH, *units(25), TEXT, *pieces(9)],
    }
    return {name: np.array([BOS, *shape], np.int32) for name, shape in shapes.items()}


def continuation(number: int, size: int) -> list[int]:
    """Spans that switch after every number of units up to two patches, and of pieces; no two
    requests switch together."""
    out: list[int] = []
    for length in 4 * [*range(1, 2 * size + 2)]:
        out += [*pieces(number % 3, length), SPEECH, *units(length, length), TEXT]
    return out[number : number + STEPS]


def whole_scores(scorer: Cached, documents: list[np.ndarray]) -> list[torch.Tensor]:
    """(T, V) of every document, after each of its tokens."""
    packed = pack_documents(
        [
            Document(
                tokens=tokens.astype(np.int32),
                aligned=NOTHING_ALIGNED,
                breaks=(),
                score_from=len(tokens),  # no targets: a piece after a unit could be none
                score_eos=False,
                record_id="",
            )
            for tokens in documents
        ],
        VOCABULARY,
        scorer._strategy,
        scorer._model.config.plan(),
    )
    scores = scorer._model.logits(packed)
    return list(scores.split([len(tokens) for tokens in documents]))


def check(scorer: Cached, prompts: list[np.ndarray], following: list[list[int]], leave=None):
    """Every score of every step; ``leave``: at a step, the rows that go on."""
    documents = [np.append(*each) for each in zip(prompts, following, strict=True)]
    expected = [
        scores[len(prompt) - 1 :]
        for scores, prompt in zip(whole_scores(scorer, documents), prompts, strict=True)
    ]
    got = scorer.start(prompts)
    live = list(range(len(prompts)))
    for step in range(len(following[0])):
        torch.testing.assert_close(
            got,
            torch.stack([expected[row][step] for row in live]),
            atol=1e-10,
            rtol=0,
            msg=lambda told, step=step: f"after {step} steps: {told}",
        )
        if step in (leave or {}):
            live = [live[row] for row in leave[step]]
            scorer.keep(leave[step])
        got = scorer.step([following[row][step] for row in live])


STEPS = 36


@pytest.mark.parametrize("decoder_window", [1, 4, None])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(("architecture", "text_path", "size"), MODELS)
def test_what_is_kept_changes_no_score(architecture, text_path, size, slots, decoder_window):
    """All shapes of prompts in one batch, which some of the requests leave on the way."""
    cached, _ = scorers(config_of(architecture, text_path, slots, decoder_window), size)
    given = list(prompts(size).values())
    following = [continuation(number, size) for number in range(len(given))]
    leave = {12: [0, 1, 2, 4, 5, 7, 8, 10, 11, 12], 20: [1, 3, 5, 7]}
    check(cached, given, following, leave)


@pytest.mark.parametrize("text_path", ["local", "global"])
@pytest.mark.parametrize("name", prompts(3))
def test_a_prompt_alone_is_continued_as_in_company(name, text_path):
    """Also where no token of a pass is speech, or no patch closes."""
    cached, _ = scorers(config_of(text_path=text_path), 3)
    following = [*units(5), TEXT, *pieces(2), SPEECH, *units(1), EOS]
    check(cached, [prompts(3)[name]], [following])


def test_rooms_grow_without_losing_what_is_kept():
    config = replace(config_of(decoder_window=None), local_window=100)
    cached, _ = scorers(config, 3)
    given = [np.array([BOS, SPEECH, *units(50)]), np.array([BOS, *pieces(60), TEXT])]
    check(cached, given, [continuation(1, 3)[:30] * 3, continuation(2, 3)[:30] * 3], {60: [1]})
    rooms = cached._documents
    assert (rooms.token_room, rooms.patch_room, rooms.cross_room) == (100, 256, 256)


@pytest.mark.parametrize(
    ("architecture", "text_path", "size"),
    [("lst", "local", 3), ("lst", "global", 3), ("token", "local", 1)],
)
def test_whole_documents_give_the_same_scores(architecture, text_path, size):
    """What is used without a cache is what the cache is held against."""
    cached, whole = scorers(config_of(architecture, text_path), size)
    given = list(prompts(size).values())[-3:]
    following = [continuation(number, size)[:6] for number in range(3)]
    close = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(whole.start(given), cached.start(given), **close)
    for tokens in zip(*following, strict=True):
        torch.testing.assert_close(whole.step(tokens), cached.step(tokens), **close)
    whole.keep([0, 2])
    cached.keep([0, 2])
    torch.testing.assert_close(whole.step([TEXT, EOS]), cached.step([TEXT, EOS]), **close)


@pytest.mark.parametrize("text_path", ["local", "global"])
def test_each_patch_passes_the_global_transformer_once(text_path):
    cached, _ = scorers(config_of(text_path=text_path), 4)
    rows, passes = [], []
    layer = cached._model.global_transformer.layers[0]
    layer.register_forward_hook(lambda *_: passes.append(1))
    layer.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    cached.start([np.array([BOS, SPEECH, *units(10)]), np.array([BOS, *pieces(3), SPEECH])])
    assert rows == [2 + 2 + 5]  # the patch of two units is not complete
    for unit in units(10):
        cached.step([unit, unit])
    # one fills at the 2nd, 6th and 10th unit, the other at the 4th and 8th: five passes for twenty
    assert rows[1:] == [1] * 5
    cached.step([TEXT, TEXT])  # a patch cut short and two markers
    assert rows[6:] == [3]
    assert sum(rows) == 9 + 5 + 3


@pytest.mark.parametrize("text_path", ["local", "global"])
def test_windows_bound_what_is_kept(text_path):
    """Beside the global transformer's keys and values, nothing grows past its window."""
    config = config_of(text_path=text_path)
    cached, _ = scorers(config, 3)
    cached.start([np.array([BOS, SPEECH, *units(40)])] * 2)
    large = cached._units
    before = cached.nbytes() - large.rows.nbytes
    for unit in [*units(60), TEXT, *pieces(20)]:
        cached.step([unit, unit])
    assert cached.nbytes() - large.rows.nbytes == before
    assert cached._encoded.rows.shape[2:4] == (2, config.local_window)
    assert cached._decoded.rows.shape[2:4] == (2, config.local_window)
    assert cached._cross.rows.shape[2:4] == (2, config.slots * config.decoder_window)
    assert len(cached._open) == 2 * 3
    assert large.rows.shape[3] < 2 * (2 + 100 / 3 + 21)
    full = cached.nbytes()
    cached.keep([0])
    assert cached.nbytes() == full / 2


@pytest.mark.parametrize(
    ("architecture", "text_path", "size"),
    [("lst", "local", 4), ("lst", "global", 4), ("token", "local", 1)],
)
def test_what_is_kept_is_of_the_precision_of_products(architecture, text_path, size):
    """As on a GPU: products in bfloat16, whose scores are as near as they can be."""
    cached, whole = scorers(config_of(architecture, text_path), size)
    for scorer in (cached, whole):
        scorer._model.float()
    given = list(prompts(size).values())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(cached.start(given), whole.start(given), atol=0.1, rtol=0)
        for step in range(8):
            tokens = [continuation(number, size)[step] for number in range(len(given))]
            ours, theirs = cached.step(tokens), whole.step(tokens)
            torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0)
    assert all(cache.rows.dtype == torch.bfloat16 for cache in cached._caches())
