"""What comes of an input: records, or a reason why there is none."""

from collections.abc import Iterator
from dataclasses import dataclass

from lst.data.records import Record

__all__ = ["Outcome", "Skipped"]


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that is not fit to be a record.

    Attributes:
        where: file and record.
        reason: what is wrong with it.
    """

    where: str
    reason: str


Outcome = Record | Skipped
Outcomes = Iterator[Outcome]
