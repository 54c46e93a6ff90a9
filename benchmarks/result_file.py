"""A file of `benchmarks/results`: what was asked, on which machine, and what came out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lst.errors import UserError

Row = dict[str, Any]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is found out of a file where its figures are used becomes a UserError that names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        got = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: expected a result file of benchmarks/, got {got}") from None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result file."""

    path: Path
    question: str
    content: dict[str, Any]

    @property
    def machine(self) -> dict[str, Any]:
        return self.content["machine"]

    @property
    def rows(self) -> list[Row]:
        return self.content.get("rows", [])

    def source(self) -> str:
        """What every figure must name."""
        about = self.machine
        threads = f", {about['threads']} threads" if "threads" in about else ""
        load = f", load {about['load']:.1f}" if "load" in about else ""
        versions = {"torch": about["torch"], "Python": about["python"], **about["libraries"]}
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        return (
            f"{about['device']}{threads}{load}, {named}, commit {about['commit']}, {about['date']}"
        )

    def facts(self, *names: str) -> list[Row]:
        """Rows that have these facts, each case's first alone."""
        found: dict[str, Row] = {}
        for row in self.rows:
            if all(row.get("facts", {}).get(name) is not None for name in names):
                found.setdefault(row["case"], row)
        return list(found.values())
