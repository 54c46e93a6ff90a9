"""What is drawn is what the settings allow, with the probabilities that they say."""

import numpy as np
import pytest
import torch

from lst.errors import UserError
from lst.generate.sampling import Sampler, Sampling, forbidden
from lst.vocabulary import BOS, EOS, PAD, SPEECH, TEXT, Vocabulary

VOCABULARY = Vocabulary(num_pieces=6, num_units=4)
SIZE = VOCABULARY.size
PIECE, UNIT = VOCABULARY.first_piece, VOCABULARY.first_unit


def sampler(*samplings: Sampling, prompt=(BOS,)) -> Sampler:
    return Sampler(
        samplings,
        [np.array(prompt)] * len(samplings),
        range(len(samplings)),
        VOCABULARY,
        torch.device("cpu"),
    )


def scores(**probabilities) -> torch.Tensor:
    """(1, V): ids named p0 … (pieces) and u0 … (units) with these probabilities, others with 0."""
    row = torch.zeros(SIZE)
    for name, probability in probabilities.items():
        row[(PIECE if name[0] == "p" else UNIT) + int(name[1:])] = probability
    return row.log()[None]


def drawn(sampling: Sampling, logits: torch.Tensor, count: int = 2000) -> np.ndarray:
    """How often each id is drawn."""
    draw = sampler(*[sampling] * count)
    ids, _ = draw(logits.expand(count, -1))
    return np.bincount(ids, minlength=SIZE) / count


def test_ids_are_drawn_with_their_probabilities():
    shares = drawn(Sampling(), scores(p0=0.5, p3=0.3, u1=0.2))
    np.testing.assert_allclose(shares[[PIECE, PIECE + 3, UNIT + 1]], [0.5, 0.3, 0.2], atol=0.05)
    assert shares.sum() == pytest.approx(1)


def test_temperature_sharpens_the_distribution():
    shares = drawn(Sampling(temperature=0.5), scores(p0=0.6, p1=0.4))
    expected = 0.6**2 / (0.6**2 + 0.4**2)
    assert shares[PIECE] == pytest.approx(expected, abs=0.05)


def test_no_temperature_takes_the_likeliest():
    shares = drawn(Sampling(temperature=0), scores(p0=0.3, p1=0.4, u2=0.3), count=10)
    assert shares[PIECE + 1] == 1


def test_top_k_and_top_p_keep_the_likeliest():
    logits = scores(p0=0.4, p1=0.3, p2=0.2, p3=0.1)
    kept = {
        "top-k": Sampling(top_k=2),
        "top-p, the id that reaches it counted": Sampling(top_p=0.6),
        "top-p of what top-k leaves": Sampling(top_k=3, top_p=0.7),  # 0.4 / 0.9 + 0.3 / 0.9 > 0.7
    }
    for name, sampling in kept.items():
        shares = drawn(sampling, logits)
        assert np.flatnonzero(shares).tolist() == [PIECE, PIECE + 1], name
        assert shares[PIECE] == pytest.approx(4 / 7, abs=0.05), name


def test_one_id_stays_however_small_top_p_is():
    assert drawn(Sampling(top_p=1e-9), scores(p0=0.4, p1=0.6), count=10)[PIECE + 1] == 1


def test_the_penalty_moves_scores_of_ids_seen_before():
    logits = torch.full((1, SIZE), -1.0)
    logits[0, PIECE], logits[0, PIECE + 1] = 2.0, 1.5
    draw = sampler(Sampling(temperature=0, repetition_penalty=1.5), prompt=(BOS, PIECE))
    assert draw(logits)[0] == [PIECE + 1]  # 2 / 1.5 < 1.5
    assert draw(logits)[0] == [PIECE]  # now both are seen
    negative = torch.full((1, SIZE), -1.0)
    draw = sampler(Sampling(temperature=0, repetition_penalty=1.5), prompt=range(PIECE + 3))
    assert draw(negative)[0] == [PIECE + 3]  # −1 · 1.5 < −1


def test_log_probabilities_are_the_models():
    logits = scores(p0=0.25, p1=0.75)
    settings = Sampling(temperature=0, repetition_penalty=2.0, modality="text", top_k=1)
    ids, nats = sampler(settings)(logits)
    assert (ids, nats) == ([PIECE + 1], [pytest.approx(np.log(0.75))])
    ids, nats = sampler(Sampling(modality="speech", temperature=0))(scores(p0=0.9, u1=0.1))
    assert (ids, nats) == ([UNIT + 1], [pytest.approx(np.log(0.1))])


@pytest.mark.parametrize(
    ("modality", "allowed"),
    [
        ("any", [EOS, TEXT, SPEECH, *range(PIECE, SIZE)]),
        ("text", [EOS, TEXT, *range(PIECE, UNIT)]),
        ("speech", [EOS, SPEECH, *range(UNIT, SIZE)]),
    ],
)
def test_a_forced_modality_forbids_the_others_ids_and_marker(modality, allowed):
    assert np.flatnonzero(~forbidden(VOCABULARY, modality)).tolist() == allowed
    draw = drawn(Sampling(modality=modality), torch.zeros(1, SIZE), count=3000)
    assert np.flatnonzero(draw).tolist() == allowed
    assert draw[PAD] == draw[BOS] == 0


def test_draws_depend_on_seed_and_number_and_not_on_company():
    logits = torch.zeros(4, SIZE)
    plain, other = Sampling(seed=3), Sampling(seed=4)
    filtered = Sampling(seed=3, top_p=0.5, repetition_penalty=2.0)

    def run(samplings, rows, steps=6):
        draw = Sampler(
            [samplings[row] for row in rows],
            [np.array([BOS])] * len(rows),
            rows,
            VOCABULARY,
            torch.device("cpu"),
        )
        return np.array([draw(logits[: len(rows)])[0] for _ in range(steps)]).T.tolist()

    samplings = [plain, filtered, plain, other]
    together = run(samplings, [0, 1, 2, 3])
    assert together == [run(samplings, [row])[0] for row in range(4)]
    assert together[0] != together[2]
    assert run([plain], [0]) != run([other], [0])


def test_requests_that_stay_go_on_with_their_own_draws():
    logits = torch.zeros(3, SIZE)
    every = sampler(*[Sampling()] * 3)
    some = sampler(*[Sampling()] * 3)
    assert every(logits) == some(logits)
    some.keep([0, 2])
    expected, got = every(logits), some(logits[:2])
    assert [got[0], got[1]] == [[part[0], part[2]] for part in expected]


def test_scores_that_are_no_numbers_are_told():
    with pytest.raises(UserError, match="not finite"):
        sampler(Sampling())(torch.full((1, SIZE), torch.nan))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "--temperature: expected 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "--temperature: expected 0 or more"),
        ({"top_k": 0}, "--top-k: expected 1 or more, got 0"),
        ({"top_p": 0.0}, r"--top-p: expected a share in \(0, 1\], got 0.0"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty: expected more than 0"),
        ({"modality": "song"}, "any, text or speech, got song"),
        ({"max_tokens": 0}, "--max-tokens: expected 1 or more"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Sampling(**changes)
