"""What a file of JSON should not hold is one line that names the file, the line and the key."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from lst.errors import UserError
from lst.strict_json import (
    expect_unicode,
    parse_json,
    read_json,
    read_json_lines,
    read_strictly,
    seal,
    unseal,
)


@dataclass(frozen=True)
class Inner:
    name: str
    place: Path | None


@dataclass(frozen=True)
class Outer:
    number: int
    share: float
    kind: Literal["a", "b"]
    words: list[tuple[str, float]]
    either: str | dict[str, Any]
    parts: tuple[Inner, ...]
    by_name: dict[str, Inner]


VALUES: dict[str, Any] = {
    "number": 3,
    "share": 1,
    "kind": "a",
    "words": [["one", 0.5], ["two", 2]],
    "either": {"any": [None]},
    "parts": [{"name": "x", "place": None}],
    "by_name": {"n": {"name": "y", "place": "folder/file"}},
}


def test_values_become_what_the_fields_say() -> None:
    assert read_strictly(Outer, VALUES, "f") == Outer(
        number=3,
        share=1.0,
        kind="a",
        words=[("one", 0.5), ("two", 2.0)],
        either={"any": [None]},
        parts=(Inner("x", None),),
        by_name={"n": Inner("y", Path("folder/file"))},
    )
    assert read_strictly(Outer, VALUES | {"either": "text"}, "f").either == "text"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": True}, "expected number to be int, got true"),
        ({"number": 3.0}, "expected number to be int, got 3.0"),
        ({"share": "1"}, 'expected share to be float, got "1"'),
        ({"share": 10**400}, "expected share to be float, got 1000"),
        ({"kind": []}, "expected kind to be"),
        ({"words": [["one", 0.5], ["two"]]}, r"expected words\[1\] to be tuple"),
        ({"words": {}}, r"expected words to be list"),
        ({"either": 3}, "expected either to be"),
        ({"parts": [{"name": "x"}]}, r"missing key parts\[0\]\.place"),
        ({"parts": [3]}, r"expected parts\[0\] to be Inner, got 3"),
        ({"by_name": {"n": {"name": "y", "place": 3}}}, r"expected by_name\.n\.place to be"),
        ({"more": 1}, "unknown key more"),
    ],
)
def test_another_type_is_named_by_its_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^f: {message}"):
        read_strictly(Outer, VALUES | change, "f")
    with pytest.raises(UserError, match=r"^f: expected Outer, got null$"):
        read_strictly(Outer, None, "f")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value at character 1"),
        (b'{"a": 1', "Expecting ',' delimiter at character 8"),
        (b'{"a": 1}x', "Extra data at character 9"),
        (b'{"a": "\xff"}', "bytes that are not UTF-8 from byte 8 on"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (b"[" * 100_000, "lists or objects within each other, too many of them"),
        (b"1" * 10_000, "Exceeds the limit"),
        (b"\0" * 64, "Expecting value at character 1"),
    ],
    ids=["empty", "cut", "more", "bytes", "twice", "deep", "long number", "zeros"],
)
def test_what_is_no_json_is_one_line_of_its_file(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "v.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"v\.json: expected JSON, got {message}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
    if content:
        path.write_bytes(b'{"a": 1}\n\n' + content + b"\n{}\n")
        with pytest.raises(UserError, match=rf"v\.json, line 3: expected JSON, got {message}"):
            list(read_json_lines(path))


def test_a_file_that_is_not_there_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"v\.json: cannot be read \(No such file"):
        read_json(tmp_path / "v.json")
    with pytest.raises(UserError, match=r": cannot be read \(Is a directory"):
        list(read_json_lines(tmp_path))


def test_marks_and_ends_of_lines_of_other_systems_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n\r\n[2]\r\n')
    read = [(number, values) for number, _, values in read_json_lines(path)]
    assert read == [(1, {"a": "\u2028"}), (3, [2])]
    assert parse_json(b'\xef\xbb\xbf"x"', "here") == "x"


def test_half_a_surrogate_pair_is_no_text() -> None:
    expect_unicode(parse_json(r'"\ud83e\udd8a"', "f"), "f")
    with pytest.raises(
        UserError, match=r"^f: expected text, got half a surrogate pair at character 2$"
    ):
        expect_unicode(parse_json(r'"x\ud83e"', "f"), "f")


def test_sealed_values_are_those_that_were_sealed_or_refused() -> None:
    values = {"text": "é \ud800 \u2028", "numbers": [1, -0.0, 1e308, float("inf")], "none": None}
    content = seal(json.dumps(values))
    assert unseal(parse_json(content, "f"), "f") == values
    for place in range(len(content)):
        for other in ("1", "x", ""):
            altered = content[:place] + other + content[place + 1 :]
            with suppress(UserError):
                assert unseal(parse_json(altered, "f"), "f") == values  # a blank more or less
