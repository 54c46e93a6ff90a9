"""From scores to a token: what may follow, and which of it does.

::

    scores → repetition penalty → forbidden ids out → temperature → top-k → top-p → draw

V ids of the joint vocabulary, B requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lst.data.interleave import stable_rng
from lst.errors import UserError, expect_not_negative, expect_option, expect_positive
from lst.vocabulary import BOS, PAD, SPEECH, TEXT, Vocabulary

Modality = Literal["any", "text", "speech"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a prompt is continued.

    The penalty is that of CTRL (Keskar et al. 2019): the score of an id that the prompt or the
    continuation holds is divided by it where positive, else multiplied. Top-k keeps the k likeliest
    ids; top-p of those the fewest that have a probability of p together (Holtzman et al. 2020).
    """

    temperature: float = 1.0  # of the distribution drawn from; 0: the likeliest id
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    modality: Modality = "any"  # of what is generated; the other's ids and marker are forbidden
    max_tokens: int = 256  # generated ones, markers counted
    stop: tuple[int, ...] = ()  # joint ids that end a continuation besides <eos>
    seed: int = 0

    def __post_init__(self) -> None:
        expect_not_negative(self, "temperature")
        expect_positive(self, "top_k", "repetition_penalty", "max_tokens")
        share = self.top_p is None or 0 < self.top_p <= 1
        expect_option(share, "top_p", "a share in (0, 1]", self.top_p)
        known = self.modality in ("any", "text", "speech")
        expect_option(known, "modality", "any, text or speech", self.modality)


class Sampler:
    """Draws the next id of each of B requests; a request's draws depend on itself alone."""

    def __init__(
        self,
        samplings: Sequence[Sampling],
        prompts: Sequence[np.ndarray],
        numbers: Sequence[int],
        vocabulary: Vocabulary,
        device: torch.device,
    ) -> None:
        """``numbers`` tell requests of one seed apart."""
        self._rngs = [
            stable_rng("generate", sampling.seed, number)
            for sampling, number in zip(samplings, numbers, strict=True)
        ]
        self._samplings = list(samplings)
        self._forbidden = torch.from_numpy(
            np.stack([forbidden(vocabulary, sampling.modality) for sampling in samplings])
        ).to(device)
        seen = torch.zeros(len(prompts), vocabulary.size, dtype=torch.bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[torch.from_numpy(prompt).long()] = True
        self._seen = seen.to(device)
        self._plan()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the requests, in their order."""
        self._rngs = [self._rngs[row] for row in rows]
        self._samplings = [self._samplings[row] for row in rows]
        index = torch.tensor(rows, device=self._seen.device)
        self._seen, self._forbidden = self._seen[index], self._forbidden[index]
        self._plan()

    def _plan(self) -> None:
        """The settings as columns (B, 1), and which of them change anything."""
        each, size = self._samplings, self._seen.shape[1]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=self._seen.device)[:, None]

        self._greedy = column([float(s.temperature == 0) for s in each]).bool()
        self._temperature = column([s.temperature or 1.0 for s in each])
        self._penalty = column([s.repetition_penalty for s in each])
        self._top_k = column([s.top_k or size for s in each])
        self._top_p = column([1.0 if s.top_p is None else s.top_p for s in each])
        self._penalises = any(s.repetition_penalty != 1 for s in each)
        self._filters = any(s.top_k is not None or s.top_p is not None for s in each)
        self._draws = any(s.temperature > 0 for s in each)

    def __call__(self, logits: Tensor) -> tuple[list[int], list[float]]:
        """From the scores (B, V) of the next id: each request's id, and its log-probability in nats
        under the model itself.

        Raises:
            UserError: the scores of the model are not numbers.
        """
        logits = logits.double()
        scores = logits
        if self._penalises:
            penalised = torch.where(scores > 0, scores / self._penalty, scores * self._penalty)
            scores = torch.where(self._seen, penalised, scores)
        scores = scores.masked_fill(self._forbidden, -torch.inf)
        chosen = scores.argmax(-1, keepdim=True)
        if self._draws:
            chosen = torch.where(self._greedy, chosen, self._draw(scores / self._temperature))
        self._seen.scatter_(1, chosen, True)
        logprobs = logits.gather(1, chosen) - logits.logsumexp(-1, keepdim=True)
        ids, nats = torch.cat((chosen.double(), logprobs), 1).T.tolist()
        if not np.isfinite(nats).all():
            raise UserError("the model's scores of the next token are not finite numbers")
        return [int(id) for id in ids], nats

    def _draw(self, scores: Tensor) -> Tensor:
        """(B, 1): where a uniform number falls among the probabilities, laid end to end by id."""
        probabilities = scores.softmax(-1)
        if self._filters:
            probabilities = probabilities * self._likeliest(probabilities)
        uniform = torch.tensor([rng.random() for rng in self._rngs], dtype=torch.float64)
        ends = probabilities.cumsum(-1)
        total = ends[:, -1:]
        place = uniform[:, None].to(scores.device) * total
        place = place.minimum(torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(ends, place, right=True).clamp(max=scores.shape[-1] - 1)

    def _likeliest(self, probabilities: Tensor) -> Tensor:
        """(B, V) bool, what top-k and then top-p leave."""
        values, order = probabilities.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(values.shape[-1], device=values.device)
        values = values * (rank < self._top_k)
        before = values.cumsum(-1) - values
        kept = (rank < self._top_k) & (before < self._top_p * values.sum(-1, keepdim=True))
        return torch.zeros_like(kept).scatter(1, order, kept)


def forbidden(vocabulary: Vocabulary, modality: Modality) -> np.ndarray:
    """(V,) bool, ids that never follow: ``<pad>``, ``<bos>``, a piece of a speech BPE that stands
    for no unit, and where a modality is forced, the other's ids and its marker."""
    ids = np.arange(vocabulary.size)
    is_unit = vocabulary.is_unit(ids)
    out = (ids == PAD) | (ids == BOS) | (is_unit & (vocabulary.num_frames(ids) == 0))
    if modality == "text":
        out |= is_unit | (ids == SPEECH)
    elif modality == "speech":
        out |= vocabulary.is_piece(ids) | (ids == TEXT)
    return out
