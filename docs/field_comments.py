"""An extension of Griffe, for the API reference: the comments of a class's fields are told in it.

    #: (P+1,) int32, token offset of each patch      above a field, and those right below it
    # a project to log to as well                    above a field
    steps: int  # optimizer steps                    behind it; the comment may go on below

A comment line that begins in small letters goes on with what is above it.
"""

import functools
import re
from pathlib import Path

from griffe import Class, Extension, GriffeLoader

ALONE = re.compile(r"\s*#(:?)\s*(.*)$")
SPECIAL = re.compile(r"(?<!`)<\w+>(?!`)")  # <eos>, which Markdown would take for HTML
BEHIND = re.compile(r"\s*[^\s#].*?\s\s#\s+(.*)$")


@functools.cache
def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


class FieldComments(Extension):
    def on_class(self, *, cls: Class, loader: GriffeLoader, **kwargs: object) -> None:
        told = []
        shared, below = "", 0  # a comment of several fields, and the line where the next would be
        for field in cls.attributes.values():
            if field.docstring or not (field.lineno and field.endlineno and field.annotation):
                continue
            lines, first = lines_of(Path(cls.filepath)), field.lineno - 1
            above, of_several = comment_above(lines, first)
            if above or first != below:
                shared = above if of_several else ""
            below = field.endlineno
            if text := comment_behind(lines, below) or above or shared:
                text = SPECIAL.sub(r"`\g<0>`", text.replace("``", "`"))
                told.append(f"    {field.name}: {text}\n")
        if told and cls.docstring:
            cls.docstring.value += "\n\nAttributes:\n" + "".join(told)


def comment_above(lines: list[str], first: int) -> tuple[str, bool]:
    """The comment that ends above line ``first``, and whether it is of several fields."""
    words: list[str] = []
    of_several = False
    while found := ALONE.match(lines[first - 1]):
        words.insert(0, found[2])
        of_several = bool(found[1])
        first -= 1
    if BEHIND.match(lines[first - 1]):  # whose comment goes on below it
        words = words[next((i for i, each in enumerate(words) if each[0].isupper()), len(words)) :]
    return " ".join(words), of_several


def comment_behind(lines: list[str], stop: int) -> str:
    """The comment behind the field that ends in the line before ``stop``."""
    if not (found := BEHIND.match(lines[stop - 1])):
        return ""
    words = [found[1]]
    while (found := ALONE.match(lines[stop])) and not found[1] and not found[2][0].isupper():
        words.append(found[2])
        stop += 1
    return " ".join(words)
