"""Text tasks of lm-eval, the harness that most published scores come from (extra ``lst[eval]``).

The model is called ``lst`` there. As a command, which takes what ``lm_eval`` takes::

    python -m lst.evaluate.harness run --model lst --model_args checkpoint=runs/demo --tasks …

or from Python, with any tasks, also of a YAML file of one's own::

    from lst.evaluate.harness import HarnessModel
    results = lm_eval.simple_evaluate(HarnessModel("runs/demo"), tasks=["hellaswag"])

A request becomes the document ``<bos>`` context continuation ``<eos>`` of text alone, and the
requests lie end to end in packed streams.
"""

from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np
import torch

from lst.data.batch import pack_documents
from lst.data.interleave import Document
from lst.data.patching import final_strategy
from lst.errors import UserError, expect_option, run_command
from lst.generate import Generator, Sampling
from lst.generate.passes import NOTHING_ALIGNED
from lst.train.checkpoint import load_trained
from lst.vocabulary import BOS, EOS

try:
    from lm_eval import utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError:

    def absent() -> NoReturn:
        raise UserError(
            "the harness needs lm-eval, which is not installed: pip install 'lst[eval]'"
        ) from None

    if __name__ == "__main__":
        run_command(absent)
    absent()

__all__ = ["HarnessModel"]

# (context, continuation) as text, and each as joint ids
Request = tuple[tuple[str, str], list[int], list[int]]


class HarnessModel(TemplateLM):
    """A trained model as lm-eval asks it. Tokens are joint ids.

    Args:
        checkpoint: as of :func:`lst.train.checkpoint.load_trained`.
        device: where it runs; the CPU where there is no GPU, as the harness asks for one unasked.
        max_length: tokens after ``<bos>`` that it reads at most; what is longer loses its start,
            and a rolling likelihood goes on in a new window. None: as it was trained.
        tokens_per_batch: documents are packed up to about so many tokens.
        batch_size, max_batch_size: of the harness; streams are packed by tokens instead.

    Raises:
        UserError: as of ``load_trained``.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        device: str = "cpu",
        max_length: int | None = None,
        tokens_per_batch: int = 4096,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("max_length", max_length), ("tokens_per_batch", tokens_per_batch)):
            whole = value is None or (isinstance(value, int) and value > 0)
            expect_option(whole, f"model_args.{name}", "1 or more", value)
        if device.startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"
        self.trained = load_trained(str(checkpoint), device)
        self.trained.model.eval()
        self._device = torch.device(device)
        self.max_length = max_length or self.trained.config.data.units_per_sequence - 2
        self._tokens_per_batch = tokens_per_batch

    @property
    def eot_token_id(self) -> int:
        return EOS

    @property
    def prefix_token_id(self) -> int:
        return BOS

    @property
    def tokenizer_name(self) -> str:
        return self.trained.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Joint ids of a text, without specials."""
        return [
            self.trained.vocabulary.piece_to_id(p) for p in self.trained.tokenizer.encode(string)
        ]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Nats of each text from ``<bos>`` on; windows of a longer one do not overlap."""
        windows: list[Request] = []
        owners = []
        for place, (text,) in enumerate(request.args for request in requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=BOS,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, predicted in map(utils.make_disjoint_window, pairs):
                windows.append((("", ""), context, predicted))
                owners.append(place)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text up to the first of a request's stop strings; greedily, unless it says otherwise."""
        trained = self.trained
        generator = Generator(
            trained.model,
            trained.vocabulary,
            trained.config.model,
            trained.config.data.patching,
            device=self._device,
        )
        prompts, samplings, stops = [], [], []
        for context, settings in (request.args for request in requests):
            asked = normalize_gen_kwargs(settings, default_max_gen_toks=256)
            room = self.max_length - asked["max_gen_toks"]
            if room < 1:
                raise UserError(
                    f"lm-eval: expected max_gen_toks below the model's {self.max_length} tokens, "
                    f"got {asked['max_gen_toks']}"
                )
            prompts.append(np.array([BOS, *self.tok_encode(context)[-room:]], np.int32))
            samplings.append(
                Sampling(
                    temperature=asked["temperature"] if asked.get("do_sample") else 0.0,
                    top_k=asked.get("top_k"),
                    top_p=asked.get("top_p"),
                    modality="text",
                    max_tokens=asked["max_gen_toks"],
                )
            )
            stops.append(asked["until"])
        texts = []
        for start in range(0, len(prompts), 64):
            chunk = slice(start, start + 64)
            found = generator.generate(prompts[chunk], samplings[chunk])
            for prompt, continuation in zip(prompts[chunk], found, strict=True):
                texts.append(self._added(prompt, continuation.tokens))
        for place, (request, stop) in enumerate(zip(requests, stops, strict=True)):
            texts[place] = min((texts[place].split(each)[0] for each in stop if each), key=len,
                               default=texts[place])  # fmt: skip
            self.cache_hook.add_partial("generate_until", request.args, texts[place])
        return texts

    def _added(self, prompt: np.ndarray, tokens: np.ndarray) -> str:
        """The text of generated tokens as it goes on after the prompt's, blanks included."""
        vocabulary, decode = self.trained.vocabulary, self.trained.tokenizer.decode
        before, after = (
            vocabulary.id_to_piece(ids[vocabulary.is_piece(ids)]).tolist()
            for ids in (prompt, tokens)
        )
        return decode([*before, *after])[len(decode(before)) :]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """(nats of the continuation, whether each of its tokens is the likeliest) of each."""
        answers: list[tuple[float, bool]] = []
        for group in self._groups(requests):
            answers += self._answer(group)
        for (texts, _context, _continuation), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[Document]]:
        group: list[Document] = []
        tokens = 0
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"lm-eval: expected continuations of 1 to {self.max_length} tokens, got "
                    f"{len(continuation)}: {texts[1][:40]!r}"
                )
            room = self.max_length + 1 - len(continuation)  # of the last token nothing is read
            before = [token for token in context if token != BOS]
            before = before[len(before) - min(room, len(before)) :]
            ids = [BOS, *before, *continuation, EOS]
            document = Document(
                tokens=np.array(ids, np.int32),
                aligned=NOTHING_ALIGNED,
                breaks=(),
                score_from=1 + len(before),
                score_eos=False,
                record_id="",
            )
            if group and tokens + len(ids) > self._tokens_per_batch:
                yield group
                group, tokens = [], 0
            group.append(document)
            tokens += len(ids)
        if group:
            yield group

    def _answer(self, documents: Sequence[Document]) -> list[tuple[float, bool]]:
        trained = self.trained
        strategy = final_strategy(trained.config.data.patching)
        batch = pack_documents(documents, trained.vocabulary, strategy, trained.config.model.plan())
        batch = batch.to(self._device)
        scored = torch.nonzero(batch.targets >= 0).squeeze(1)
        targets = batch.targets[scored]
        with torch.inference_mode():
            logits = trained.model.logits(batch)[scored].float()
            nats = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1).double().cpu()
            likeliest = (logits.argmax(-1) == targets).cpu()
        answers, start = [], 0
        for document in documents:
            stop = start + len(document.tokens) - 1 - document.score_from
            answers.append((float(nats[start:stop].sum()), bool(likeliest[start:stop].all())))
            start = stop
        return answers


if __name__ == "__main__":
    # The harness is to know the class by the name that others import it by, not as __main__'s.
    from lst.evaluate.harness import HarnessModel as _  # noqa: F401

    run_command(cli_evaluate)
else:
    register_model("lst")(HarnessModel)
