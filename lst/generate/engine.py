"""Continue prompts token by token: requests of any lengths and modalities together.

A document of the vocabulary's ids, from ``<bos>`` on, is cut into patches as it grows: a text token
or a special is a patch at once, speech when so many units are there, or when it is cut short by a
switch or ``<eos>``. Each request ends on its own, and what is left goes on without it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lst.data.patching import (
    Aligned,
    PatchingConfig,
    Static,
    final_strategy,
    patch_lengths,
)
from lst.errors import UserError
from lst.generate.passes import NOTHING_ALIGNED, Cached, Scorer, Uncached
from lst.generate.sampling import Sampler, Sampling
from lst.model import LanguageModel, ModelConfig
from lst.vocabulary import BOS, EOS, Vocabulary

Stopped = Literal["eos", "stop", "length", "context"]
# told of each generated token: the request's number, the joint id, its log-probability in nats
OnToken = Callable[[int, int, float], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuation:
    """What a model added to a prompt."""

    tokens: np.ndarray  # (n,) int32 joint ids; ends with <eos>, or with what stopped it
    logprobs: np.ndarray  # (n,) float32 nats, under the model: before temperature and filters
    patch_lengths: np.ndarray  # (P,) int32, of prompt and continuation, as the model saw them
    stopped: Stopped  # <eos>; an id of ``stop``; ``max_tokens``; the context is full


@dataclass
class _Request:
    """A document that grows."""

    number: int
    sampling: Sampling
    tokens: list[int]
    units: int  # patches so far, an open one counted
    open_length: int  # speech units of a patch that may go on; 0 for none
    logprobs: list[float]
    stopped: Stopped | None = None


class Generator:
    """Continues prompts with one model.

    Args:
        model: as its checkpoint gives it; it is moved to ``device``.
        patching: what the model was trained with; speech is in patches of its final strategy.
        device: on a GPU products are in bfloat16, as in training.
        context: units (patches) that a document may have; None for any number.
        cached: whether what was computed of earlier tokens is kept. Without, every token costs a
            pass over all of its document, and the numbers are the same.
    Raises:
        UserError: the model's patches end where an aligner says, which no generated speech has.
    """

    def __init__(
        self,
        model: LanguageModel,
        vocabulary: Vocabulary,
        config: ModelConfig,
        patching: PatchingConfig,
        *,
        device: torch.device | str = "cpu",
        context: int | None = None,
        cached: bool = True,
    ) -> None:
        strategy = final_strategy(patching)
        if isinstance(strategy, Aligned):
            raise UserError(
                "generation: expected a model of static patches or of none, got one of aligned "
                "patches, whose ends only an aligner tells"
            )
        self.model = model.to(device).eval()
        self.vocabulary, self.config, self.strategy = vocabulary, config, strategy
        self.patch_size = strategy.size if isinstance(strategy, Static) else 1
        self.device, self.context, self.cached = torch.device(device), context, cached

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: Sampling | Sequence[Sampling],
        *,
        on_token: OnToken | None = None,
    ) -> list[Continuation]:
        """Continue every prompt.

        Args:
            prompts: (T,) integer joint ids each, from ``<bos>`` on.
            sampling: one for every prompt, where number i draws from (seed, i); or one each, where
                every prompt draws from (seed, 0), as it would alone.
            on_token: called for each token as soon as it is there.

        Raises:
            UserError: a prompt is no document of this vocabulary, or longer than the context.
        """
        shared = isinstance(sampling, Sampling)
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(prompts):
            raise UserError(
                f"generation: expected a sampling for each of {len(prompts)} prompts, "
                f"got {len(samplings)}"
            )
        requests = [
            self._request(number, prompt, sampling)
            for number, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
        ]
        if requests:
            with (
                torch.inference_mode(),
                torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"),
            ):
                self._continue(requests, shared, on_token)
        return [
            self._continuation(request, len(prompt))
            for request, prompt in zip(requests, prompts, strict=True)
        ]

    def _continue(
        self, requests: Sequence[_Request], shared: bool, on_token: OnToken | None
    ) -> None:
        live = list(requests)
        sampler = Sampler(
            [request.sampling for request in live],
            [np.array(request.tokens) for request in live],
            [request.number if shared else 0 for request in live],
            self.vocabulary,
            self.device,
        )
        kind = Cached if self.cached else Uncached
        scorer: Scorer = kind(self.model, self.vocabulary, self.strategy, self.device)
        logits = scorer.start([np.array(request.tokens) for request in live])
        while True:
            for request, token, nats in zip(live, *sampler(logits), strict=True):
                self._append(request, token, nats, on_token)
            rows = [row for row, request in enumerate(live) if request.stopped is None]
            if not rows:
                return
            if len(rows) < len(live):
                live = [live[row] for row in rows]
                sampler.keep(rows)
                scorer.keep(rows)
            logits = scorer.step([request.tokens[-1] for request in live])

    def _request(self, number: int, prompt: np.ndarray, sampling: Sampling) -> _Request:
        where, size = f"prompt {number}", self.vocabulary.size
        prompt = np.asarray(prompt)
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu" or len(prompt) == 0:
            raise UserError(
                f"{where}: expected token ids (T,) from <bos> on, got {prompt.dtype} of shape "
                f"{prompt.shape}"
            )
        if prompt[0] != BOS:
            raise UserError(f"{where}: expected <bos> ({BOS}) first, got {prompt[0]}")
        for ids, what in ((prompt, where), (np.array(sampling.stop, int), f"{where}, stop")):
            if ((ids < 0) | (ids >= size)).any():
                wrong = ids[(ids < 0) | (ids >= size)][0]
                raise UserError(f"{what}: expected ids below {size}, got {wrong}")
        lengths, late = self._patches(prompt)
        if self.context is not None and len(lengths) > self.context:
            raise UserError(
                f"{where}: expected at most {self.context} patches, the context, got {len(lengths)}"
            )
        return _Request(
            number=number,
            sampling=sampling,
            tokens=prompt.tolist(),
            units=len(lengths),
            open_length=int(lengths[-1]) if late[-1] else 0,
            logprobs=[],
        )

    def _patches(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return patch_lengths(tokens, self.vocabulary, self.strategy, aligned=NOTHING_ALIGNED)

    def _append(self, request: _Request, token: int, nats: float, on_token: OnToken | None) -> None:
        """Put a token at the end of a document, unless it needs a patch more than there may be."""
        is_unit = self.vocabulary.is_unit(token)
        goes_on = is_unit and request.open_length > 0
        units = request.units + (not goes_on)
        if self.context is not None and units > self.context:
            request.stopped = "context"
            return
        request.units = units
        request.open_length = (request.open_length + 1) % self.patch_size if is_unit else 0
        request.tokens.append(token)
        request.logprobs.append(nats)
        if token == EOS:
            request.stopped = "eos"
        elif token in request.sampling.stop:
            request.stopped = "stop"
        elif len(request.logprobs) == request.sampling.max_tokens:
            request.stopped = "length"
        if on_token is not None:
            on_token(request.number, token, nats)

    def _continuation(self, request: _Request, prompt_length: int) -> Continuation:
        assert request.stopped is not None
        tokens = np.array(request.tokens, np.int32)
        return Continuation(
            tokens=tokens[prompt_length:],
            logprobs=np.array(request.logprobs, np.float32),
            patch_lengths=self._patches(tokens)[0],
            stopped=request.stopped,
        )
