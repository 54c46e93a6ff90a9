"""The lines of the paper's code become records; the figures of words and silences can be checked by
hand."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.data.records import Dataset, Record, RecordWriter, Word, validate_record
from lst.errors import UserError
from lst.prepare.authors import AUTHORS_UNITS, parse_line
from lst.prepare.stats import StatsConfig, describe_dataset, word_lengths


def line_of(*pairs, file_id="a"):
    """As the authors write: each pair is (word or [SIL], units)."""
    spans = [
        f"<LST MODE SEP>TEXT {text} <LST MODE SEP>HUBERT {' '.join(map(str, units))}"
        for text, units in pairs
    ]
    return json.dumps({"file_id": file_id, "interleaved": " ".join(spans)})


EXAMPLE = line_of(
    ("[SIL]", [99, 99, 7]), ("in", [117, 313]), ("the", []), ("[SIL]", [439]), ("end", [501]),
    file_id="mls/1_2_3",
)  # fmt: skip


def test_a_line_by_eye():
    record = parse_line(EXAMPLE, "mls")
    assert record.id == "mls/1_2_3"
    assert record.text == "in the end"
    assert record.units.tolist() == [99, 99, 7, 117, 313, 439, 501]
    assert record.words == (Word("in", 3, 5), Word("the", 5, 5), Word("end", 6, 7))
    assert record.source == "mls"
    validate_record(record, AUTHORS_UNITS, "here")


PAIRS = st.lists(
    st.tuples(
        st.sampled_from(["[SIL]", "a", "HUBERT", "é'", "TEXT"]),
        st.lists(st.integers(0, AUTHORS_UNITS - 1), max_size=4),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(PAIRS)
def test_no_unit_and_no_word_is_lost(pairs):
    record = parse_line(line_of(*pairs), "s")
    validate_record(record, AUTHORS_UNITS, "here")
    assert record.units.tolist() == [unit for _, units in pairs for unit in units]
    heard = [(word.word, record.units[word.start : word.stop].tolist()) for word in record.words]
    assert heard == [pair for pair in pairs if pair[0] != "[SIL]"]


BAD_LINES = {
    "not JSON": ("{", "Expecting property name"),
    "no object": ("[]", "expected an object with strings"),
    "no id": ('{"interleaved": "x"}', "expected an object with strings"),
    "no spans": ('{"file_id": "a", "interleaved": "hello"}', "got 0 spans after 'hello'"),
    "half a pair": (line_of(("a", [1]))[:-len(' <LST MODE SEP>HUBERT 1"}')] + '"}',
                    "got 1 spans"),
    "speech first": (line_of(("a", [1])).replace("TEXT", "HUBERT"), "pair 0: expected a span of T"),
    "unit": (line_of(("b", [1]), ("a", [502])), r"pair 1: expected units in \[0, 502\), got '502'"),
    "word for a unit": (line_of(("a", ["x1"])), r"got 'x1'"),
    "no word": (line_of(("", [3])), "pair 0: expected a word or"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_another_format_is_skipped_and_says_where(tmp_path, prepare, name):
    bad, message = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_text(f"{EXAMPLE}\n{bad}\n{line_of(('b', [1]), file_id='b')}\n")
    assert [record.id for record in prepare(authors=(path,), max_skipped_share=0.5)] == [
        "mls/1_2_3", "b"
    ]  # fmt: skip
    (skipped,) = map(json.loads, (tmp_path / "made/skipped.jsonl").read_text().splitlines())
    assert skipped["where"] == f"{path}, line 2"
    with pytest.raises(ValueError, match=message):
        parse_line(bad, "s")
    with pytest.raises(UserError, match=r"1 of 3 skipped.*the first: .*a\.jsonl, line 2: "):
        prepare(tmp_path / "strict", authors=(path,))


def test_a_byte_order_mark_is_no_part_of_a_line(tmp_path, prepare):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + EXAMPLE.encode() + b"\r\n")
    assert [record.id for record in prepare(authors=(tmp_path / "a.jsonl",))] == ["mls/1_2_3"]


def test_the_same_line_twice_is_refused(tmp_path, prepare):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(EXAMPLE + "\n")
    with pytest.raises(UserError, match=r"shard-00000\.parquet: the id 'mls/1_2_3' is that of ano"):
        prepare(authors=(tmp_path / "a.jsonl", tmp_path / "b.jsonl"))


def record(units, words, id="r"):
    words = None if words is None else tuple(Word("w", *word) for word in words)
    return Record(id, "w", np.zeros(units, np.int16), words, None, None, "s")


def test_lengths_of_words_and_silences_by_hand():
    lengths = word_lengths(
        [
            record(20, [(2, 6), (6, 12), (15, 15), (15, 17)]),  # silences of 2, 3 and 3
            record(4, [(0, 4)]),  # none
            record(100, None),
        ]
    )
    assert (lengths.num_records, lengths.num_words, lengths.num_empty_words) == (2, 4, 1)
    assert lengths.num_silences == 3
    assert lengths.means == {"word": 16 / 4, "silence": 8 / 3, "merged": 24 / 4}


def test_a_dataset_without_words_has_no_lengths():
    assert word_lengths([]).means == {"word": 0.0, "silence": 0.0, "merged": 0.0}


def split_cells(line):
    return [cell.strip() for cell in line.split("|")]


def test_statistics_stand_beside_the_papers(tmp_path, prepare):
    (tmp_path / "a.jsonl").write_text(EXAMPLE + "\n")
    prepare(authors=(tmp_path / "a.jsonl",))
    lines = describe_dataset(StatsConfig(dataset=tmp_path / "made")).splitlines()
    assert lines[0].endswith(": 1 records, 0.00 hours, 7 units of 502, 10 characters")
    assert "2 words, 1 without a frame of their own, 2 silences" in lines[1]
    table = {cells[1]: cells[2:-1] for cells in map(split_cells, lines) if len(cells) > 2}
    separate, merged = (
        table[f"aligned by words, silence {each}"] for each in ("separate", "merged")
    )
    assert (separate[0], separate[1], separate[-1]) == ("1.50", "2.00", "5.8 and 3.7")
    assert (merged[0], merged[-1]) == ("3.50", "9.4")
    with RecordWriter(tmp_path / "bare", codebook=None, tokenizer=None, num_units=5) as writer:
        for index in range(7):
            writer.write(record(3, None, id=f"r{index}"))
    bare = describe_dataset(StatsConfig(dataset=tmp_path / "bare", sample=3))
    assert "0 of 3 records looked at have aligned words" in bare
    assert Dataset.open(tmp_path / "made").info.codebook == "name:hubert-25hz-502"
