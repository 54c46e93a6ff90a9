"""What does a second of generated speech cost, patched and token by token, and what do caches save?

::

    weights read for     a unit of speech              a piece of text
    token-level          global                        global
    static 4, text local encoder, decoder, global / 4  encoder, decoder, global
    static 4, text global       "                      global

A token of few requests reads every weight that it passes once, and that is what it costs: a
processor multiplies faster than it reads. So the models are those of ``lst-1b`` at a quarter of its
width, 80 M weights in the global transformer, where Python between the operations is no longer most
of the time; or with ``-m gpu`` the model itself in bfloat16. A second of speech is 25 units.

Requests go on from a prompt of four seconds of speech. Scores are drawn from, as in generation, but
what follows is given, so that all models say the same and none says ``<eos>``. All run in turn, in
one process; a figure is the least of its rounds, each of which goes on where the last one ended.

    pytest benchmarks/test_decode.py --benchmark-only
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.mix import Shape
from benchmarks.reduced import ARMS, LST_1B, REDUCED, Arm, Size, make_model, stack
from lst.data.patching import NoPatching, Static
from lst.generate.passes import Cached, Scorer, Uncached
from lst.generate.sampling import Sampler, Sampling
from lst.model import LanguageModel, ModelConfig, build_model
from lst.presets import PRESETS
from lst.vocabulary import BOS, SPEECH, TEXT, Vocabulary
from lst_kernels import native

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and native.unavailable_reason() is not None,
    reason=str(native.unavailable_reason()),
)

QUARTER = Size(
    name="lst-1b / 4",
    config=ModelConfig(
        encoder=stack(1, 256, 4),
        global_transformer=stack(25, 512, 4),
        decoder=stack(9, 256, 4),
        local_window=128,
        decoder_window=128,
    ),
    shape=Shape(
        vocabulary=Vocabulary(num_pieces=8000, num_units=125),
        text_pieces=(50, 500),
        spans=2,
        speech_words=40,
    ),
    num_tokens=0,
)
UNITS_PER_SECOND = 25
PROMPT_SECONDS = 4
ROUNDS = 2
BASELINE = "token-level"
PATCHED = ("static 4, text local", "static 4, text global")
# How many times cheaper a second of speech must be with text="global" on a GPU.
CHEAPER = 2.0
TOKENS, FURTHER = 500, 4  # of a document that goes on, with the cache and without
FASTER = 5.0  # with it, at least

SIZES = [
    *(pytest.param(QUARTER, batch, id=f"quarter-{batch}") for batch in (1, 8)),
    *(pytest.param(LST_1B, n, id=f"lst-1b-{n}", marks=pytest.mark.gpu) for n in (1, 64)),
]


class Decoding:
    """Requests that go on together by given tokens."""

    def __init__(
        self,
        scorer: Scorer,
        vocabulary: Vocabulary,
        prompt: Sequence[int],
        *,
        requests: int,
        device: torch.device,
    ) -> None:
        self.scorer, self.vocabulary, self.device = scorer, vocabulary, device
        self.prompts = [np.array(prompt)] * requests
        self.rng = np.random.default_rng(0)
        self.sampler = Sampler(
            [Sampling(seed=number) for number in range(requests)],
            self.prompts,
            [0] * requests,
            vocabulary,
            device,
        )

    def start(self) -> torch.Tensor:
        with torch.inference_mode(), self._precision():
            return self.scorer.start(self.prompts)

    def go_on(self, modality: str, count: int) -> None:
        """``count`` more tokens of each request. Weights are brought to the precision of products
        once, before the first of them, as in generation."""
        first, size = self.vocabulary.first_piece, self.vocabulary.num_pieces
        if modality == "speech":
            first, size = self.vocabulary.first_unit, self.vocabulary.num_units
        with torch.inference_mode(), self._precision():
            for _ in range(count):
                given = first + self.rng.integers(0, size, len(self.prompts))
                self.sampler(self.scorer.step(given.tolist()))

    def _precision(self) -> torch.autocast:
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")


def scorer_of(kind: type[Scorer], model: LanguageModel, vocabulary: Vocabulary) -> Scorer:
    strategy = NoPatching() if model.config.architecture == "token" else Static(size=4)
    return kind(model, vocabulary, strategy, next(model.parameters()).device)


def spoken(vocabulary: Vocabulary, count: int) -> list[int]:
    rng = np.random.default_rng(1)
    return [
        SPEECH,
        *(vocabulary.first_unit + rng.integers(0, vocabulary.num_units, count)).tolist(),
    ]


def decoding_of(arm: Arm, size: Size, requests: int) -> Decoding:
    """Checked against whole passes, and at the end of its prompt."""
    device = torch.device("cuda" if size is LST_1B else "cpu")
    vocabulary = size.shape.vocabulary
    model = make_model(arm, size, device).eval()
    assert_right(model, vocabulary)
    prompt = [BOS, *spoken(vocabulary, PROMPT_SECONDS * UNITS_PER_SECOND)]
    scorer = scorer_of(Cached, model, vocabulary)
    decoding = Decoding(scorer, vocabulary, prompt, requests=requests, device=device)
    decoding.start()
    return decoding


def assert_right(model: LanguageModel, vocabulary: Vocabulary) -> None:
    ours, theirs = (scorer_of(kind, model, vocabulary) for kind in (Cached, Uncached))
    prompt = [np.array([BOS, *spoken(vocabulary, 6)])]
    device = next(model.parameters()).device
    tolerance = 0.1 if device.type == "cuda" else 1e-3
    with (
        torch.inference_mode(),
        torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"),
    ):
        pairs = [(ours.start(prompt), theirs.start(prompt))]
        for token in (vocabulary.first_unit, TEXT, vocabulary.first_piece):
            pairs.append((ours.step([token]), theirs.step([token])))
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("size", "requests"), SIZES)
@pytest.mark.parametrize("modality", ["speech", "text"])
def test_generation_beside_the_token_level_model(
    add_row, take_turns, modality: str, size: Size, requests: int
):
    names = (BASELINE, *PATCHED)
    each = {name: decoding_of(ARMS[name], size, requests) for name in names}
    count = UNITS_PER_SECOND
    if modality == "text":
        for decoding in each.values():
            with torch.inference_mode(), decoding._precision():
                decoding.scorer.step([TEXT] * requests)
        count = 10
    calls = {
        name: lambda decoding=decoding: decoding.go_on(modality, count)
        for name, decoding in each.items()
    }
    times = take_turns(calls, ROUNDS, slow_rounds=ROUNDS)
    if not times[BASELINE]:
        return
    least = {name: min(taken) / count for name, taken in times.items()}  # of a token
    judged = size is LST_1B and modality == "speech"
    rows = []
    for name in PATCHED:
        seconds, theirs = least[name], least[BASELINE]
        if modality == "speech":  # of compute for a second of it
            shown = [f"{UNITS_PER_SECOND * each * 1e3:.0f} ms" for each in (seconds, theirs)]
            what = "a second of speech"
        else:
            shown = [f"{each * 1e3:.1f} ms" for each in (seconds, theirs)]
            what = "a piece of text"
        rates = {model: requests / least[model] for model in (name, BASELINE)}
        facts = {
            "model": name,
            "modality": modality,
            "requests": requests,
            "seconds": seconds,
            "peer_seconds": theirs,
            "tokens_per_second": rates[name],
            "peer_tokens_per_second": rates[BASELINE],
            "seconds_per_second_of_speech": UNITS_PER_SECOND * seconds,
        }
        if size is LST_1B:
            facts["device"] = torch.cuda.get_device_name()
        rows.append(
            add_row(
                case=f"{size.name}, {what}, batch {requests}: {name}",
                peer=BASELINE,
                ours=shown[0],
                theirs=shown[1],
                ratio=theirs / seconds,
                floor=CHEAPER if judged and name == PATCHED[-1] else None,
                note=f"{rates[name]:,.0f} tokens/s against {rates[BASELINE]:,.0f}",
                facts=facts,
            )
        )
    low = [f"{row.case}: {row.ratio:.2f} < {row.floor:g}" for row in rows if not row.passed]
    assert not low, "; ".join(low)


CACHED = {  # the model, and how many times faster it must be with a cache
    "lst-1b / 8": (replace(REDUCED.config, text_path="local"), REDUCED.shape.vocabulary, FASTER),
    "demo": (PRESETS["demo"].model, Vocabulary(num_pieces=2000, num_units=501), None),
}


@pytest.mark.parametrize("name", CACHED)
def test_generation_with_a_cache_and_without(race, name: str):
    """A unit of speech after 500 tokens. The demo's model is so small that most of a
    token's time passes between operations; it is only reported."""
    config, vocabulary, floor = CACHED[name]
    torch.manual_seed(0)
    model = build_model(config, vocabulary).eval()
    assert_right(model, vocabulary)

    def decoding(kind: type[Scorer]) -> Decoding:
        prompt, cpu = [BOS, *spoken(vocabulary, TOKENS - 2)], torch.device("cpu")
        return Decoding(
            scorer_of(kind, model, vocabulary), vocabulary, prompt, requests=1, device=cpu
        )

    ours, theirs = decoding(Cached), decoding(Uncached)
    ours.start()
    theirs.start()
    race(
        f"{name}, {TOKENS} tokens and {FURTHER} units more",
        lambda: ours.go_on("speech", FURTHER),
        {"without a cache": lambda: theirs.go_on("speech", FURTHER)},
        floors={} if floor is None else {"without a cache": floor},
        rounds=ROUNDS,
        facts={"tokens": TOKENS, "further": FURTHER},
    )
