"""What is asked of a model: a prompt and how to continue it, from a command's options or a line of
a JSONL file.

::

    {"prompt": "Once upon a time"}
    {"id": "dog", "prompt": ["She said", {"audio": "dog.wav"}], "modality": "speech", "seed": 3}

A line's ``prompt`` is text or a list of texts and ``{"audio": FILE}``, files relative to the JSONL
file's folder; ``id`` names the result (by default the line's number); what else it may have are
fields of :class:`lst.generate.Sampling`, but for ``stop``, in the place of the command's own.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from lst.errors import UserError
from lst.generate.prompt import Span
from lst.generate.sampling import Sampling
from lst.speech.audio import AUDIO_SUFFIXES
from lst.strict_json import read_json_lines
from lst.vocabulary import SPEECH, TEXT, Tokenizer, Vocabulary

__all__ = ["Request", "audio_or_text", "read_requests", "stop_ids"]

LISTEN = Callable[[Path], np.ndarray]  # an audio file → (F,) units
OPTIONS = {each.name: each for each in fields(Sampling) if each.name != "stop"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue."""

    name: str  # of its result
    where: str  # it was asked, for messages
    spans: list[Span]
    sampling: Sampling


def audio_or_text(value: str, listen: LISTEN) -> Span:
    """What a prompt of the command line is: an audio file by its suffix, or else text."""
    return listen(Path(value)) if value.lower().endswith(AUDIO_SUFFIXES) else value


def read_requests(path: Path, sampling: Sampling, listen: LISTEN) -> list[Request]:
    """Read a JSONL file of requests; all of them are read before the first is answered.

    Raises:
        UserError: no such file, or a line that is no request, by its number.
    """
    requests: dict[str, Request] = {}
    for number, where, values in read_json_lines(path):
        if not isinstance(values, dict):
            got = json.dumps(values)[:40]
            raise UserError(f"{where}: expected an object with a prompt, got {got}")
        name = values.pop("id", number)
        if not isinstance(name, str | int):
            raise UserError(
                f"{where}: expected id to be a text or a number, got {json.dumps(name)}"
            )
        name = str(name)
        if name in requests:
            raise UserError(f"{where}: expected an id of its own, got {name!r} again")
        if "prompt" not in values:
            raise UserError(f"{where}: missing key prompt")
        prompt = values.pop("prompt")
        parts = prompt if isinstance(prompt, list) else [prompt]
        requests[name] = Request(
            name=name,
            where=where,
            spans=[_span(part, path.parent, where, listen) for part in parts],
            sampling=_sampling(sampling, values, where),
        )
    if not requests:
        raise UserError(f"{path}: expected requests, a line each, got none")
    return list(requests.values())


def _span(part: Any, folder: Path, where: str, listen: LISTEN) -> Span:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.keys() == {"audio"} and isinstance(part["audio"], str):
        try:
            return listen(folder / part["audio"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    raise UserError(f'{where}: expected text or {{"audio": FILE}} in a prompt, got {part!r}')


def _sampling(sampling: Sampling, values: dict[str, Any], where: str) -> Sampling:
    for name, value in values.items():
        if name not in OPTIONS:
            raise UserError(f"{where}: unknown key {name}")
        kinds: tuple[type, ...] = (int,)
        if name == "modality":
            kinds = (str,)
        elif name in ("temperature", "top_p", "repetition_penalty"):
            kinds = (int, float)
        if OPTIONS[name].default is None:
            kinds = (*kinds, type(None))
        if type(value) not in kinds:
            named = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise UserError(f"{where}: expected {name} to be {named}, got {json.dumps(value)}")
    try:
        return replace(sampling, **values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def stop_ids(stops: tuple[str, ...], vocabulary: Vocabulary, tokenizer: Tokenizer) -> list[int]:
    """The joint ids at which to stop: ``<t>`` or ``<s>``, or every piece that has the text in it.

    Raises:
        UserError: no piece has it, as of a text that is longer than a piece.
    """
    markers = {"<t>": TEXT, "<s>": SPEECH}
    ids = [markers[stop] for stop in stops if stop in markers]
    texts = [stop for stop in stops if stop not in markers]
    if not texts:
        return ids
    pieces = [tokenizer.decode([piece]) for piece in range(tokenizer.num_pieces)]
    for text in texts:
        found = [number for number, piece in enumerate(pieces) if text and text in piece]
        if not found:
            raise UserError(
                f"--stop: expected <t>, <s> or text within a piece of the tokenizer, got {text!r}"
            )
        ids += [vocabulary.piece_to_id(piece) for piece in found]
    return ids
