"""Texts of every kind become records, line by line; what is no text is skipped by file and line."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.prepare import sources
from lst.prepare.outcomes import Skipped
from lst.prepare.sources import Part, Sources, list_inputs
from lst.prepare.text import lines_of, text_records, where_of


def test_text_of_every_kind(tmp_path, prepare):
    folder = tmp_path / "text"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("A line.\n\n  \nÄnother line.\r\n")
    (folder / "more" / "b.jsonl").write_text('{"text": "An\\nobject."}\n{"text": "x", "n": 1}\n')
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "Compressed."}\n')
    pq.write_table(pa.table({"text": ["A row.", "Two."], "n": [1, 2]}), folder / "d.parquet",
                   row_group_size=1)  # fmt: skip
    (folder / "notes.md").write_text("not prepared")
    records = {record.id: record.text for record in prepare(text=(folder,))}
    assert records == {
        "a.txt:0": "A line.", "a.txt:12": "Änother line.",
        "more/b.jsonl:0": "An\nobject.", "more/b.jsonl:24": "x",
        "c.jsonl.gz:0": "Compressed.", "d.parquet:0:0": "A row.", "d.parquet:1:0": "Two.",
    }  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.sampled_from(["", "a", "bc", "déf", " "]), max_size=12), st.booleans(),
       st.integers(1, 9))  # fmt: skip
def test_each_line_is_of_one_part_however_a_file_is_cut(tmp_path_factory, lines, ends, size):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(("\n".join(lines) + "\n" * ends).encode())
    parts = [
        Part(name="a.txt", path=str(path), start=start, stop=start + size)
        for start in range(0, path.stat().st_size, size)
    ]
    found = [(part, line) for part in parts for line in lines_of(part)]
    expected = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    assert [line.content.decode() for _, line in found] == [line for _, line in expected]
    numbers = [int(where_of(part, line).rpartition(" ")[2]) for part, line in found]
    assert numbers == [number for number, _ in expected]


def test_a_large_file_is_prepared_in_parts(tmp_path, monkeypatch, prepare):
    monkeypatch.setattr(sources, "PART_BYTES", 1000)
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
    assert len(list(list_inputs(Sources(text=(tmp_path / "a.txt",))))) == 9
    assert [record.text for record in prepare(text=(tmp_path / "a.txt",))] == [
        f"line {i}" for i in range(1000)
    ]


def test_bad_lines_are_skipped_with_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "good"}\n{"text"\n\n["text"]\n{"text": 3}\n{"text": "\xff"}\n{"text": " "}\n'
    )
    part = Part(name="a.jsonl", path=str(tmp_path / "a.jsonl"))
    good, *skipped = text_records(part, "s")
    assert good.text == "good"
    assert [each.where.rpartition(" ")[2] for each in skipped] == ["2", "4", "5", "6", "7"]
    assert "expected an object" in skipped[1].reason
    assert "expected a text, got '3'" in skipped[2].reason
    assert "utf-8" in skipped[3].reason


def test_a_row_that_is_not_utf_8_is_skipped_alone(tmp_path):
    texts = pa.array([b"good", b"K\xe4se", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    part = Part(name="a.parquet", path=str(tmp_path / "a.parquet"), stop=1)
    good, skipped, fine = text_records(part, "s")
    assert (good.text, fine.text) == ("good", "fine")
    assert skipped.where == f"{tmp_path / 'a.parquet'}, row group 0, row 1"
    assert "utf-8" in skipped.reason


def test_a_text_file_that_cannot_be_read_is_skipped_and_listed(tmp_path, prepare):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("A line.\n")
    pq.write_table(pa.table({"text": ["A row."]}), folder / "b.parquet")
    content = (folder / "b.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(content[: len(content) // 2])
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (folder / "gone.parquet").symlink_to(tmp_path / "nowhere.parquet")
    records = prepare(text=(folder,), max_skipped_share=0.7)
    assert [record.text for record in records] == ["A line.", "A row."]
    lines = (tmp_path / "made" / "skipped.jsonl").read_text().splitlines()
    skipped = {each["where"]: each["reason"] for each in map(json.loads, lines)}
    names = ("cut.parquet", "empty.parquet", "gone.parquet", "gone.txt")
    assert list(skipped) == [str(folder / name) for name in names]
    assert all("cannot be read" in reason for reason in skipped.values())


def test_a_damaged_compressed_file_gives_what_is_before_the_damage_and_says_so(tmp_path):
    rng = np.random.default_rng(0)
    lines = [" ".join(map(str, rng.integers(0, 99, 50))) for _ in range(400)]
    content = gzip.compress("\n".join(lines).encode())
    (tmp_path / "a.txt.gz").write_bytes(content[: len(content) // 2])
    *records, last = text_records(Part(name="a.txt.gz", path=str(tmp_path / "a.txt.gz")), "s")
    assert [record.text for record in records] == lines[: len(records)]
    assert records
    assert isinstance(last, Skipped)
    assert "cannot be read" in last.reason
    (tmp_path / "a.txt.gz").write_bytes(b"")
    (empty,) = text_records(Part(name="a.txt.gz", path=str(tmp_path / "a.txt.gz")), "s")
    assert isinstance(empty, Skipped)
    assert "cannot be read (empty" in empty.reason
