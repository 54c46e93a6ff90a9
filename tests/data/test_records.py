"""What is written is read back; what is damaged is an error that says where."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.data.records import (
    Dataset,
    Record,
    RecordWriter,
    Span,
    StoryItem,
    Word,
    join_shards,
    read_items,
    validate_record,
    write_items,
    write_shard,
)
from lst.errors import UserError

NUM_UNITS = 501


def record(id="r0", text="hi you", units=(1, 2, 3, 4), words=(("hi", 0, 1), ("you", 2, 4)), **more):
    return Record(
        id=id,
        text=text,
        units=None if units is None else np.array(units, np.int16),
        words=None if words is None else tuple(Word(*word) for word in words),
        chars=more.get("chars"),
        speaker=more.get("speaker"),
        source="test",
    )


def write(folder, records, **options):
    defaults = {"codebook": "sha256:aa", "tokenizer": None, "num_units": NUM_UNITS}
    with RecordWriter(folder, **(defaults | options)) as writer:
        for each in records:
            writer.write(each)
    return Dataset.open(folder)


def assert_same(got, expected):
    for name in ("id", "text", "words", "chars", "speaker", "source"):
        assert getattr(got, name) == getattr(expected, name)
    if expected.units is None:
        assert got.units is None
    else:
        assert got.units.dtype == np.int16
        np.testing.assert_array_equal(got.units, expected.units)


@st.composite
def records(draw):
    units = draw(st.none() | st.lists(st.integers(0, NUM_UNITS - 1), max_size=12))
    text = draw(st.text(max_size=5)) if units is None else draw(st.none() | st.text(max_size=5))
    words = chars = None
    if units is not None:
        frames = st.lists(st.integers(0, len(units)), max_size=6).map(sorted)
        ends = draw(st.none() | frames)
        if ends is not None:
            pairs = zip(ends[::2], ends[1::2], strict=False)
            words = [(draw(st.text(max_size=3)), *pair) for pair in pairs]
        if text is not None and draw(st.booleans()):
            ends = sorted(draw(st.integers(0, len(units))) for _ in range(2 * len(text)))
            chars = tuple(map(Span, ends[::2], ends[1::2]))
    speaker = draw(st.none() | st.just("f1"))
    return record(draw(st.text(min_size=1)), text, units, words, chars=chars, speaker=speaker)


def test_rows_are_read_with_one_shard_in_memory_at_a_time(tmp_path):
    dataset = write(tmp_path, [record(id=f"r{index}") for index in range(10)], rows_per_shard=3)
    rows = [0, 2, 3, 8, 9]
    assert [each.id for each in dataset.read(rows)] == [f"r{row}" for row in rows]
    assert [each.id for each in dataset.read()] == [f"r{row}" for row in range(10)]
    assert list(dataset.read(np.zeros(0, int))) == []
    assert dataset._columns == [None] * 4


@given(st.lists(records(), min_size=1, max_size=7), st.integers(1, 3), st.randoms())
@settings(deadline=None, derandomize=True, max_examples=30)
def test_records_are_read_back_in_any_order(tmp_path_factory, written, rows_per_shard, random):
    folder = tmp_path_factory.mktemp("records")
    dataset = write(folder, written, rows_per_shard=rows_per_shard)
    assert len(dataset.info.shards) == -(-len(written) // rows_per_shard)
    order = list(range(len(written)))
    random.shuffle(order)
    for index in order:
        assert_same(dataset[index], written[index])
    with pytest.raises(IndexError):
        dataset[len(written)]


def test_info_counts_and_names_fingerprints(tmp_path):
    text = record("t", "only text", None, None)
    dataset = write(tmp_path, [record(), record("r1"), text])
    info = dataset.info
    assert (info.num_records, info.num_frames, info.num_characters) == (3, 8, 6 + 6 + 9)
    assert (info.codebook, info.tokenizer, info.num_units) == ("sha256:aa", None, NUM_UNITS)
    assert info.hours == pytest.approx(8 / 25 / 3600)
    assert dataset.has_speech
    assert not write(tmp_path / "text", [text]).has_speech


def test_dataset_crosses_to_another_process_as_its_folder(tmp_path):
    dataset = write(tmp_path, [record(f"r{i}", units=[1] * 100) for i in range(100)])
    dataset[0]
    content = pickle.dumps(dataset)
    assert len(content) < 2000
    assert_same(pickle.loads(content)[7], dataset[7])


def test_fingerprint_follows_the_content(tmp_path):
    one = write(tmp_path / "1", [record()])
    same = write(tmp_path / "2", [record()])
    other = write(tmp_path / "3", [record(units=(1, 2, 3, 5))])
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_a_writer_that_failed_leaves_no_dataset(tmp_path):
    write(tmp_path, [record()])
    with pytest.raises(UserError, match="units in"):
        write(tmp_path, [record(), record(units=(1, 999, 3, 4))], rows_per_shard=1)
    with pytest.raises(UserError, match="expected a dataset folder"):
        Dataset.open(tmp_path)


def test_writing_anew_leaves_no_shard_of_before(tmp_path):
    write(tmp_path, [record(f"r{i}") for i in range(5)], rows_per_shard=1)
    write(tmp_path, [record()])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dataset.json",
        "shard-00000.parquet",
    ]


BAD_RECORDS = {
    "empty id": (record(id=""), "expected an id"),
    "nothing": (record(text=None, units=None, words=None), "expected text or units, got neither"),
    "unit": (record(units=(1, 501, 3, 4)), r"units in \[0, 501\), got 501 at frame 1"),
    "negative": (record(units=(1, 2, -1, 4)), r"got -1 at frame 2"),
    "overlap": (
        record(words=(("hi", 0, 3), ("you", 2, 4))),
        r"word 1 \[2, 4\) overlaps the word before it, which stops at frame 3",
    ),
    "past": (record(words=(("hi", 0, 1), ("you", 2, 5))), r"passes the units: .* at most 4 frames"),
    "backwards": (record(words=(("hi", 3, 1),)), "runs backwards"),
    "no units": (record(units=None), "expected units beside its words"),
    "chars": (record(chars=(Span(0, 1),)), "expected 6 characters aligned, got 1"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_bad_record_is_refused_with_file_row_and_id(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        validate_record(bad, NUM_UNITS, "somewhere")
    with pytest.raises(UserError, match=rf"shard-00000\.parquet, row 1, record '{bad.id}'"):
        write(tmp_path, [record(), bad])


# Those that Parquet can hold and a Record of numbers cannot.
NULLS = {
    "null unit": (replace(record(), units=[1, None, 3, 4]), "got -1 at frame 1"),
    "null word": (replace(record(), words=(Word(None, 0, 1),)), "words that are written, got one"),
    "null start": (replace(record(), words=(Word("hi", None, 1),)), r"word 0 \[-1, 1\) overlaps"),
}


@pytest.mark.parametrize(
    ("bad", "message"), (BAD_RECORDS | NULLS).values(), ids=BAD_RECORDS | NULLS
)
def test_bad_record_of_another_writer_is_found_when_read(tmp_path, monkeypatch, bad, message):
    monkeypatch.setattr("lst.data.records.validate_record", lambda *_: None)
    dataset = write(tmp_path, [record("r0"), record("r1"), bad])
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=rf"shard-00000\.parquet, row 2, record '{bad.id}': .*{message}"
    ):
        dataset[0]


def test_shards_written_apart_in_any_order_are_the_dataset_of_one_writer(tmp_path):
    each = [record(), record("r1", text=None), record("r2", units=None, words=None)]
    alone = write(tmp_path / "alone", each, rows_per_shard=2)
    (tmp_path / "apart").mkdir()
    written = {
        index: write_shard(tmp_path / "apart", index, rows, num_units=NUM_UNITS)
        for index, rows in ((1, each[2:]), (0, each[:2]))
    }
    join_shards(
        tmp_path / "apart",
        [written[0], written[1]],
        codebook="sha256:aa",
        tokenizer=None,
        num_units=NUM_UNITS,
    )
    assert Dataset.open(tmp_path / "apart").fingerprint == alone.fingerprint


def test_shards_are_joined_only_where_they_are_whole(tmp_path):
    shard = write_shard(tmp_path, 0, [record()], num_units=NUM_UNITS)
    (tmp_path / "shard-00000.parquet").write_bytes(b"PAR1")
    join = {"codebook": None, "tokenizer": None, "num_units": NUM_UNITS}
    with pytest.raises(UserError, match=r"shard-00000\.parquet: expected \d+ bytes, got 4"):
        join_shards(tmp_path, [shard], **join)
    with pytest.raises(UserError, match="expected records to write, got none"):
        join_shards(tmp_path, [], **join)
    assert not (tmp_path / "dataset.json").exists()


def test_a_shard_with_a_bad_record_is_not_written(tmp_path):
    with pytest.raises(UserError, match=r"shard-00003\.parquet, row 1, record 'r1'"):
        write_shard(tmp_path, 3, [record(), record("r1", units=(501,))], num_units=NUM_UNITS)
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_dataset(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: expected a dataset folder"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="expected records to write, got none"):
        write(tmp_path, [])
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json: expected JSON, got"):
        Dataset.open(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(UserError, match=r"dataset\.json: expected a dataset's description"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("what", ["codebook", "tokenizer"])
def test_another_fingerprint_is_refused(tmp_path, what):
    write(tmp_path, [record()], **{what: "sha256:aa"})
    Dataset.open(tmp_path, **{what: "sha256:aa"})
    with pytest.raises(UserError, match=rf"dataset\.json: .*{what} sha256:bb, got sha256:aa"):
        Dataset.open(tmp_path, **{what: "sha256:bb"})


def test_damaged_shards_are_named(tmp_path):
    dataset = write(tmp_path, [record("r0"), record("r1")], rows_per_shard=1)
    path = tmp_path / "shard-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"shard-00001\.parquet: expected \d+ bytes, got \d+"):
        Dataset.open(tmp_path)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(UserError, match=r"shard-00001\.parquet: expected content of SHA-256"):
        Dataset.open(tmp_path)[1]
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.parquet: expected a shard of 1 records"):
        Dataset.open(tmp_path)
    assert_same(dataset[0], record("r0"))


def test_counts_that_disagree_are_refused(tmp_path):
    write(tmp_path, [record()])
    facts = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(facts | {"num_records": 2}))
    with pytest.raises(UserError, match="got 2 records and 1 rows in 1 shards"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("name", ["num_records", "num_frames", "num_units", "rows", "bytes"])
@pytest.mark.parametrize("value", [None, "5", 1.0, -1, 10**30])
def test_what_is_no_count_is_refused(tmp_path, name, value):
    write(tmp_path, [record()])
    facts = json.loads((tmp_path / "dataset.json").read_text())
    (facts if name in facts else facts["shards"][0])[name] = value
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    got = json.dumps(value)
    with pytest.raises(UserError, match=rf"dataset\.json: expected .*(int|counts), got {got}$"):
        Dataset.open(tmp_path)


def test_more_units_than_are_kept_are_refused(tmp_path):
    write(tmp_path, [record()])
    facts = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(facts | {"num_units": 32_769}))
    with pytest.raises(UserError, match=r"dataset\.json: expected at most 32,768 units, got 32769"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("name", ["name", "sha256"])
def test_a_shard_of_no_name_is_refused(tmp_path, name):
    write(tmp_path, [record()])
    facts = json.loads((tmp_path / "dataset.json").read_text())
    facts["shards"][0][name] = []
    (tmp_path / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=rf"dataset\.json: expected .*{name} to be str, got \[\]"):
        Dataset.open(tmp_path)


def test_items_are_read_back(tmp_path):
    endings = (record("e0", speaker="f1"), record("e1", "text", None, None))
    item = StoryItem("i0", "storycloze", record("p"), endings, 1)
    options = {"codebook": "sha256:aa", "tokenizer": None}
    write_items(tmp_path, [item, item], **options, num_units=NUM_UNITS)
    got = read_items(tmp_path, codebook="sha256:aa")
    assert len(got) == 2
    assert (got[1].id, got[1].task, got[1].answer) == ("i0", "storycloze", 1)
    assert_same(got[1].prompt, item.prompt)
    for ending, expected in zip(got[1].endings, endings, strict=True):
        assert_same(ending, expected)
    with pytest.raises(UserError, match="codebook sha256:bb, got sha256:aa"):
        read_items(tmp_path, codebook="sha256:bb")
    with pytest.raises(UserError, match="expected records in format 1, got items"):
        Dataset.open(tmp_path)
    bad = StoryItem("i0", "storycloze", record("p"), endings, 2)
    with pytest.raises(UserError, match=r"row 0, item 'i0': expected an answer in \[0, 2\), got 2"):
        write_items(tmp_path, [bad], **options, num_units=NUM_UNITS)
    bad = StoryItem("i0", "cloze", record("p"), endings, 1)
    with pytest.raises(UserError, match=r"expected a task of .* got 'cloze'"):
        write_items(tmp_path, [bad], **options, num_units=NUM_UNITS)
