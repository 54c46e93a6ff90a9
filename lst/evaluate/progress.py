"""What has been answered so far, on disk: an evaluation that was stopped goes on where it was.

    scores.json                what the command writes at its end
    scores.json.answers.jsonl  a line for what the answers depend on, then one for each question

A line counts once it is whole; the rest of one that was being written is cut off.
"""

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lst.errors import UserError
from lst.evaluate.choice import Likelihood
from lst.files import writing
from lst.strict_json import read_json_lines, read_strictly, seal, unseal

__all__ = ["Progress"]

SUFFIX = ".answers.jsonl"


@dataclass(frozen=True)
class _Begun:
    """The first line: what the answers depend on."""

    of: dict[str, Any]


@dataclass(frozen=True)
class _Answer:
    """A line after the first."""

    mode: str
    question: int
    endings: list[Likelihood]


class Progress:
    """Answers by mode and by the question's place; a context that holds its file.

    Args:
        result: the result file that the answers are for; None keeps them in memory alone.
        of: what the answers depend on; JSON values.

    Raises:
        UserError: the file cannot be written, is another command's at the moment, or holds answers
            that depend on something else.
    """

    def __init__(self, result: Path | None, of: dict[str, Any]) -> None:
        self._answers: dict[tuple[str, int], list[Likelihood]] = {}
        self._file = None
        if result is None:
            return
        self.path = result.with_name(result.name + SUFFIX)
        with writing(self.path):
            self._file = self.path.open("a+b")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another command writes here") from None
            self._read(json.loads(json.dumps(of)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._answers

    def __getitem__(self, key: tuple[str, int]) -> list[Likelihood]:
        return self._answers[key]

    def add(self, mode: str, place: int, endings: Sequence[Likelihood]) -> None:
        self._answers[mode, place] = list(endings)
        values = [asdict(ending) for ending in endings]
        self._write({"mode": mode, "question": place, "endings": values})

    def _write(self, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        with writing(self.path):
            self._file.write(f"{seal(json.dumps(values))}\n".encode())
            self._file.flush()

    def _read(self, of: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        os.truncate(self._file.fileno(), whole)
        lines = list(read_json_lines(self.path))
        if not lines:
            self._write({"of": of})
            return
        (_, where, first), *answers = lines
        before = read_strictly(_Begun, unseal(first, where), where).of
        for _, where, values in answers:
            answer = read_strictly(_Answer, unseal(values, where), where)
            self._answers[answer.mode, answer.question] = answer.endings
        for name in of.keys() | before.keys():
            if of.get(name) != before.get(name):
                raise UserError(
                    f"{self.path}: holds answers for another {name}, {before.get(name)!r} instead "
                    f"of {of.get(name)!r}; remove it, or choose another --json"
                )
