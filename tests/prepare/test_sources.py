"""Every way in gives the records that are there: texts as written, units of the very samples, words
at their times, and a bad manifest is an error that names file and record."""

import gzip
import json
import os
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.errors import UserError
from lst.prepare.corpus import CorpusConfig
from lst.prepare.speech import frame_spans, written_words
from lst.speech.audio import SAMPLE_RATE, AudioError
from lst.speech.units import LogMelKMeans

soundfile = pytest.importorskip("soundfile")

lhotse = pytest.importorskip("lhotse")


def units_of(path, codebook):
    """What a 16 kHz file's units are, by no code of the preparation."""
    waveform, rate = soundfile.read(path, dtype="float32")
    assert rate == SAMPLE_RATE
    return LogMelKMeans.load(codebook).encode(waveform)


def assert_words_are_timed(record, speech, shift=0.0):
    assert [word.word for word in record.words] == [word.label for word in speech.words]
    got = [(word.start, word.stop) for word in record.words]
    exact = [(word.start + shift, word.stop + shift) for word in speech.words]
    assert np.abs(np.array(got) * 0.04 - exact).max() <= 0.02 + 1e-6


# Corpora of other people --------------------------------------------------------------------------


def write_librispeech(root, sentences, *, alignments):
    """As LibriSpeech is unpacked, with the word alignments that are published for it."""
    chapter = root / "dev-clean-2" / "84" / "121123"
    chapter.mkdir(parents=True)
    texts, aligned = [], []
    for index, sentence in enumerate(sentences):
        name = f"84-121123-{index:04d}"
        soundfile.write(chapter / f"{name}.flac", sentence.speech.waveform, SAMPLE_RATE)
        texts.append(f"{name} {re.sub('[^A-Z ]', '', sentence.text.upper())}\n")
        labels, ends, end = [], [], 0.0
        for word in sentence.speech.words:
            if word.start > end:
                labels.append("")
                ends.append(word.start)
            labels.append(re.sub("[^A-Z]", "", word.label.upper()))
            ends.append(word.stop)
            end = word.stop
        aligned.append(f'{name} "{",".join(labels)}" "{",".join(f"{e:.3f}" for e in ends)}"\n')
    (chapter / "84-121123.trans.txt").write_text("".join(texts))
    if alignments:
        (chapter / "84-121123.alignment.txt").write_text("".join(aligned))
    return chapter


def test_librispeech_by_lhotses_recipe(tmp_path, sentences, codebook, prepare):
    from lhotse.recipes import prepare_librispeech

    chapter = write_librispeech(tmp_path / "LibriSpeech", sentences, alignments=True)
    manifests = tmp_path / "manifests"
    prepare_librispeech(tmp_path / "LibriSpeech", output_dir=manifests)
    records = prepare(
        recordings=(manifests / "librispeech_recordings_dev-clean-2.jsonl.gz",),
        supervisions=(manifests / "librispeech_supervisions_dev-clean-2.jsonl.gz",),
    )
    assert len(records) == len(sentences)
    for record in records:
        sentence = sentences[int(record.id[-4:])]
        assert record.text == re.sub("[^A-Z ]", "", sentence.text.upper())
        assert record.speaker == "84"
        assert record.source == "made"
        np.testing.assert_array_equal(
            record.units, units_of(chapter / f"{record.id}.flac", codebook)
        )
        got = [(word.start, word.stop) for word in record.words]
        exact = [(word.start, word.stop) for word in sentence.speech.words]
        assert [word.word for word in record.words] == record.text.split()
        assert np.abs(np.array(got) * 0.04 - exact).max() <= 0.0206  # recipe times: 3 digits


def test_mls_by_lhotses_recipe(tmp_path, sentences, codebook, prepare):
    from lhotse.recipes import prepare_mls

    root = tmp_path / "mls_polish"
    for index, split in enumerate(("train", "dev", "test")):
        lines = []
        for place, sentence in enumerate(sentences[2 * index : 2 * index + 2]):
            name = f"{6892 + index}_10049_{place:06d}"
            path = root / split / "audio" / f"{6892 + index}" / "10049" / f"{name}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, sentence.speech.waveform, SAMPLE_RATE)
            lines.append(f"{name}\t{sentence.text.lower()}\n")
        (root / split / "transcripts.txt").write_text("".join(lines))
    (root / "metainfo.txt").write_text(
        "".join(f" {6892 + i} | F | train | 1.0 | 10049 | x\n" for i in range(3))
    )
    prepare_mls(tmp_path, output_dir=tmp_path / "manifests", opus=False)
    manifests = [tmp_path / "manifests" / f"mls-polish_{{}}_{split}.jsonl.gz"
                 for split in ("train", "test")]  # fmt: skip
    records = prepare(
        recordings=tuple(path.with_name(path.name.format("recordings")) for path in manifests),
        supervisions=tuple(path.with_name(path.name.format("supervisions")) for path in manifests),
    )
    expected = {
        "6892_10049_000000": 0, "6892_10049_000001": 1,
        "6894_10049_000000": 4, "6894_10049_000001": 5,
    }  # fmt: skip
    assert {record.id for record in records} == set(expected)
    for record in records:
        assert record.text == sentences[expected[record.id]].text.lower()
        assert record.speaker == record.id[:4]
        assert record.words is None
        path = next(root.rglob(f"{record.id}.flac"))
        np.testing.assert_array_equal(record.units, units_of(path, codebook))


@pytest.fixture
def session(tmp_path, sentences):
    """Three sentences in one recording of two channels at 48 kHz, of which the second is noise, as
    lhotse recordings and supervisions with alignments."""
    from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet
    from lhotse.supervision import AlignmentItem

    gap = np.zeros(SAMPLE_RATE // 2, np.float32)
    waveform = np.concatenate(
        [part for each in sentences[:3] for part in (gap, each.speech.waveform)]
    )
    left = np.repeat(waveform, 3)
    right = 0.1 * np.random.default_rng(0).standard_normal(len(left))
    soundfile.write(tmp_path / "session.flac", np.stack([left, right], 1), 48_000)
    recording = Recording.from_file(tmp_path / "session.flac", recording_id="session")
    segments, start = [], 0.0
    for index, each in enumerate(sentences[:3]):
        start += 0.5
        items = [
            AlignmentItem(
                word.label.strip(".,").lower(), start + word.start, word.stop - word.start
            )
            for word in each.speech.words
        ]
        duration = len(each.speech.waveform) / SAMPLE_RATE
        segments.append(
            SupervisionSegment(
                id=f"part{index}", recording_id="session", start=start, duration=duration,
                channel=0, text=each.text, speaker="ann", alignment={"word": items},
            )
        )  # fmt: skip
        start += duration
    recordings = RecordingSet.from_recordings([recording])
    supervisions = SupervisionSet.from_segments(segments)
    recordings.to_file(tmp_path / "recordings.jsonl.gz")
    supervisions.to_file(tmp_path / "supervisions.jsonl.gz")
    return recordings, supervisions


@pytest.mark.parametrize("by", ["cuts", "supervisions"])
def test_utterances_of_a_session_are_cut_out_with_their_words(
    tmp_path, session, sentences, prepare, by
):
    if by == "cuts":
        from lhotse import CutSet

        recordings, supervisions = session
        cuts = CutSet.from_manifests(recordings, supervisions).trim_to_supervisions()
        cuts.to_file(tmp_path / "cuts.jsonl.gz")
        records = prepare(cuts=(tmp_path / "cuts.jsonl.gz",))
    else:
        records = prepare(
            recordings=(tmp_path / "recordings.jsonl.gz",),
            supervisions=(tmp_path / "supervisions.jsonl.gz",),
        )
    assert [record.text for record in records] == [each.text for each in sentences[:3]]
    for record, sentence in zip(records, sentences, strict=False):
        assert record.speaker == "ann"
        assert len(record.units) == -(-len(sentence.speech.waveform) // 640)
        assert_words_are_timed(record, sentence.speech)  # and written as in the text


def test_a_cut_with_several_supervisions_is_one_record(tmp_path, session, sentences, prepare):
    from lhotse import CutSet

    CutSet.from_manifests(*session).to_file(tmp_path / "cuts.jsonl.gz")
    (record,) = prepare(cuts=(tmp_path / "cuts.jsonl.gz",))
    assert record.text == " ".join(each.text for each in sentences[:3])
    assert [word.word for word in record.words] == record.text.split()


@pytest.mark.parametrize("kind", ["cuts", "recordings", "supervisions"])
def test_commands_of_a_manifest_run_only_where_they_are_allowed(tmp_path, session, prepare, kind):
    from lhotse import CutSet

    ran, audio = tmp_path / "ran", tmp_path / "session.flac"
    recordings, supervisions = session
    (recording,) = recordings
    (source,) = recording.sources
    source.type, source.source = "command", f"touch {ran}; cat {audio}"
    recordings.to_file(tmp_path / "commands.jsonl")
    CutSet.from_manifests(recordings, supervisions).to_file(tmp_path / "cuts.jsonl")
    manifests = {"recordings": (tmp_path / "commands.jsonl",), "untranscribed": True}
    if kind == "cuts":
        manifests = {"cuts": (tmp_path / "cuts.jsonl",)}
    if kind == "supervisions":
        manifests["supervisions"] = (tmp_path / "supervisions.jsonl.gz",)
    with pytest.raises(UserError, match=r"jsonl.*, line 1, .*a shell command prints; .*--allow-c"):
        prepare(**manifests)
    assert not ran.exists()
    assert not (tmp_path / "made" / "dataset.json").exists()
    (first, *_) = prepare(**manifests, allow_commands=True)
    assert ran.exists()
    assert len(first.units)


def test_a_channel_is_heard_alone(tmp_path, session, codebook, prepare):
    prepare_all = {"recordings": (tmp_path / "recordings.jsonl.gz",), "untranscribed": True}
    (mixed,) = prepare(tmp_path / "mixed", **prepare_all)
    (tmp_path / "m.csv").write_text("id,audio,channel\na,session.flac,0\nb,session.flac,1\n")
    left, right = prepare(tmp_path / "apart", manifest=(tmp_path / "m.csv",), untranscribed=True)
    assert len({each.units.tobytes() for each in (mixed, left, right)}) == 3
    # 48 kHz by repetition and back is nearly the 16 kHz original
    waveform, _ = soundfile.read(tmp_path / "session.flac", dtype="float32")
    same = LogMelKMeans.load(codebook).encode(waveform[1::3, 0].copy()) == left.units
    assert same.mean() > 0.8


SEGMENT = '{"id": "a", "recording_id": "r", "start": 0, "duration": 1}\n'
BAD_MANIFESTS = {
    "not JSON": ("cuts", "{\n", "line 1: not a lhotse manifest"),
    "another kind": ("cuts", SEGMENT, "line 1: expected MonoCut or MultiCut, got SupervisionSegm"),
    "no recording": (
        "supervisions", SEGMENT, "line 1, supervision 'a': its recording 'r' is in no --recordings"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_bad_lhotse_manifest_is_named_with_its_line(tmp_path, session, prepare, name):
    kind, content, message = BAD_MANIFESTS[name]
    (tmp_path / "m.jsonl").write_text(content)
    sources = {kind: (tmp_path / "m.jsonl",)}
    if kind == "supervisions":
        sources["recordings"] = (tmp_path / "recordings.jsonl.gz",)
    with pytest.raises(UserError, match=rf"m\.jsonl, {message}"):
        prepare(**sources)
    assert not (tmp_path / "made" / "plan.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"start": None},
        {"duration": "long"},
        {"text": ["hi"]},
        {"speaker": {}},
        {"channel": None},
        {"id": None},
        {"alignment": {"word": [["hi", None, 0.5]]}},
        {"alignment": {"word": [[None, 0.0, 0.5]]}},
        {"alignment": {"word": "hi"}},
        {"recording_id": ["session"]},
    ],
    ids=str,
)
def test_what_lhotse_reads_and_nobody_understands_is_named_with_its_line(
    tmp_path, session, prepare, change
):
    good = {"id": "a", "recording_id": "session", "start": 0, "duration": 1, "text": "hi"}
    (tmp_path / "m.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(good | change)}\n")
    with pytest.raises(UserError, match=r"m\.jsonl, line 2.*: not (as lhotse|a lhotse)"):
        prepare(
            recordings=(tmp_path / "recordings.jsonl.gz",), supervisions=(tmp_path / "m.jsonl",)
        )
    assert not (tmp_path / "made" / "plan.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"sampling_rate": "fast"},
        {"num_samples": None},
        {"duration": None},
        {"sources": [{"type": "file", "channels": [0], "source": 3}]},
        {"sources": [{"type": None, "channels": [0], "source": "a.wav"}]},
    ],
    ids=str,
)
def test_a_recording_that_nobody_can_read_is_named_with_its_line(
    tmp_path, session, prepare, change
):
    rows = [next(iter(session[0])).to_dict() | each for each in ({}, {"id": "b"} | change)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(UserError, match=r"m\.jsonl, line 2, recording 'b': not as lhotse writes"):
        prepare(recordings=(tmp_path / "m.jsonl",), untranscribed=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.jsonl.gz", gzip.compress(SEGMENT.encode())[:40]),
        ("m.jsonl.gz", SEGMENT.encode()),
        ("m.jsonl", gzip.compress(SEGMENT.encode())),
    ],
    ids=["cut short", "not compressed", "compressed"],
)
def test_a_lhotse_manifest_that_is_damaged_is_told_in_one_short_line(
    tmp_path, prepare, name, content
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}, line 1: (cannot be read|not a lh)") as raised:
        prepare(cuts=(tmp_path / name,))
    assert len(str(raised.value).removeprefix(str(tmp_path))) < 150
    assert str(raised.value).isprintable()


def test_an_absent_manifest_is_named(tmp_path, prepare):
    with pytest.raises(UserError, match=r"cuts\.jsonl\.gz: expected a file or a folder"):
        prepare(cuts=(tmp_path / "cuts.jsonl.gz",))


def test_without_lhotse_its_manifests_name_the_extra(tmp_path, session, prepare, monkeypatch):
    monkeypatch.setitem(sys.modules, "lhotse.serialization", None)
    with pytest.raises(UserError, match=r"need lhotse.*: pip install 'lst\[speech\]'"):
        prepare(cuts=(tmp_path / "recordings.jsonl.gz",))


# Folders and manifests ----------------------------------------------------------------------------


def test_a_folder_of_audio_with_texts_beside(spoken_folder, sentences, codebook, prepare):
    records = prepare(folder=spoken_folder)
    assert [record.id for record in records] == [
        "book0/0", "book0/2", "book0/4", "book1/1", "book1/3", "book1/5"
    ]  # fmt: skip
    for record in records:
        assert record.text == sentences[int(record.id[-1])].text
        assert record.words is None
        path = spoken_folder / f"{record.id}.flac"
        np.testing.assert_array_equal(record.units, units_of(path, codebook))


def test_audio_of_any_rate_and_channel_count_has_25_units_a_second(tmp_path, sentences, prepare):
    folder = tmp_path / "spoken"
    folder.mkdir()
    waveform = sentences[0].speech.waveform
    seconds = np.arange(len(waveform)) / SAMPLE_RATE
    for rate in (8_000, 22_050, 44_100):
        there = np.arange(int(len(waveform) * rate / SAMPLE_RATE)) / rate
        mono = np.interp(there, seconds, waveform)
        for channels in (1, 2, 6):
            soundfile.write(folder / f"{rate}-{channels}.wav", np.stack([mono] * channels, 1), rate)
    records = prepare(folder=folder, untranscribed=True)
    assert len(records) == 9
    for record in records:
        assert abs(len(record.units) - len(waveform) / 640) <= 1


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_manifests_of_ones_own(tmp_path, spoken_folder, sentences, codebook, prepare, suffix):
    words = [
        {"word": word.label, "start": word.start, "stop": word.stop}
        for word in sentences[0].speech.words
    ]
    rows = [
        {"audio": "spoken/book0/0.flac", "text": sentences[0].text, "id": "a", "speaker": "ann"},
        {"audio": str(spoken_folder / "book1/1.flac"), "text": 'Well, "quoted",\nand more',
         "start": 0.2, "duration": 0.4},
    ]  # fmt: skip
    path = tmp_path / f"m{suffix}"
    if suffix == ".csv":
        import csv

        with path.open("w", newline="") as file:
            names = ["audio", "text", "id", "speaker", "start", "duration"]
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
    else:
        rows[0]["words"] = words
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, part = prepare(manifest=(path,))
    assert (whole.id, whole.speaker, whole.text) == ("a", "ann", sentences[0].text)
    np.testing.assert_array_equal(whole.units, units_of(spoken_folder / "book0/0.flac", codebook))
    if suffix == ".jsonl":
        assert_words_are_timed(whole, sentences[0].speech)
    assert part.text == 'Well, "quoted", and more'
    assert len(part.units) == 10


BAD_ROWS = {
    "a.csv": ("audio,words,text\nx.wav,[],a,b\n", r"a\.csv, line 2: expected 3 columns"),
    "b.csv": ("audio,text,colour\nx.wav,hi,red\n", r"b\.csv, line 1: .*; got audio, text, colour$"),
    "c.csv": ("file,text\n", r"c\.csv, line 1: expected audio .*; got file, text$"),
    "d.csv": ("audio,start\nx.wav,soon\n", r"d\.csv, line 2: expected numbers for start"),
    "e.jsonl": (
        '{"audio": "x.wav"}\n{"audio"\n',
        r"e\.jsonl, line 2: expected JSON, got Expecting ':' delimiter at character \d+$",
    ),
    "f.jsonl": ("[1]\n", r"f\.jsonl, line 1: expected an object, got list"),
    "g.jsonl": ('{"text": "hi"}\n', r"g\.jsonl, line 1: expected audio .*; got text$"),
    "h.jsonl": ('{"audio": "x.wav", "words": [["hi", 0, 1]]}\n', r"h\.jsonl, line 1: .*for words"),
    "i.tsv": ("audio\n", r"i\.tsv: expected a \.csv or \.jsonl file"),
    "k.csv": ("", r"k\.csv, line 1: expected audio .*; got nothing$"),
    "l.csv": ("audio,text,audio\nx.wav,hi,y.wav\n", r"l\.csv, line 1: .* each once; got"),
    "m.csv": ("audio,text\n", r"m\.csv: expected something to prepare, got nothing$"),
    "n.csv": ("audio,text\n,hi\n", r"n\.csv, line 2: expected audio, got none$"),
    "j.csv": (b"audio,text\nx.wav,\xff\n", r"j\.csv: cannot be read"),
    "o.csv": ("audio,text\n\nx.wav,'a\n\nb'\n\nx.wav,hi,ho\n".replace("'", '"'),
              r"o\.csv, line 7: expected 2 columns, got 3$"),
    "p.csv": ('audio,"text\n', r"p\.csv, line 1: not CSV \(unexpected end of data\)$"),
    "q.jsonl": ('{"audio": ' + "[" * 10_000, r"q\.jsonl, line 1: expected JSON, got lists or"),
    "r.jsonl": ('{"audio": ["x.wav"]}\n', r"r\.jsonl, line 1: .* for audio, got \['x\.wav'\]$"),
    "s.jsonl": ('{"audio": "."}\n', r"s\.jsonl, line 1: .* for audio, got '\.'$"),
    "t.jsonl": ('{"audio": "x.wav", "text": ["hi"]}\n', r"line 1: .*texts for id, .*'hi'\] is no"),
    "u.jsonl": ('{"audio": "x.wav", "text": NaN}\n', r"line 1: .*texts for id, .*nan is no text"),
    "v.jsonl": ('{"audio": "x.wav", "id": {}}\n', r"line 1: .*texts for id, .*\{\} is no text"),
    "w.jsonl": ('{"audio": "x.wav", "speaker": true}\n', r"line 1: .*speaker, .*True is no text"),
    "x.jsonl": ('{"audio": "x.wav", "channel": 0.5}\n', r"line 1: .*0\.5 is no whole number"),
    "y.jsonl": ('{"audio": "x.wav", "channel": 1e999}\n', r"line 1: .*inf is no whole number"),
    "z.jsonl": ('{"audio": "x.wav", "words": [{"word": null, "start": 0, "stop": 1}]}\n',
                r"line 1: .*None is no text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_manifest_is_named_with_its_line_and_nothing_is_begun(tmp_path, prepare, name):
    content, message = BAD_ROWS[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        prepare(manifest=(tmp_path / name,))
    assert not (tmp_path / "made" / "plan.json").exists()


def test_numbers_are_read_however_a_table_writes_them(tmp_path, spoken_folder, sentences, prepare):
    row = {"audio": "spoken/book0/0.flac", "id": 7, "text": 1984, "speaker": 12, "channel": 0.0}
    silences = [{"word": word, "start": 0.5, "stop": 0.6} for word in ("", " ", "<eps>")]
    rows = [row | {"words": silences}, row | {"id": 8, "words": [], "start": "0.1"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    whole, part = prepare(manifest=(tmp_path / "m.jsonl",))
    assert (whole.id, whole.text, whole.speaker) == ("7", "1984", "12")
    assert (whole.words, part.words) == (None, None)  # silences alone: an aligner may find words
    assert len(whole.units) - len(part.units) in (2, 3)


def test_hours_of_transcript_fit_a_field(tmp_path, spoken_folder, prepare):
    text = "word " * 40_000
    (tmp_path / "m.csv").write_text(f"audio,text\nspoken/book0/0.flac,{text}\n")
    (record,) = prepare(manifest=(tmp_path / "m.csv",))
    assert record.text == text.strip()


def test_what_no_recording_can_be_is_skipped_with_its_line(tmp_path, spoken_folder, prepare):
    good = {"audio": "spoken/book0/0.flac", "text": "It rained.", "id": "good"}
    bad = [
        {"start": 1e308},
        {"duration": 1e300},
        {"audio": "x" * 5000},
        {"words": [{"word": "half \ud83d", "start": 0.1, "stop": 0.2}]},
    ]
    rows = [good, *(good | each | {"id": f"bad{row}"} for row, each in enumerate(bad))]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (record,) = prepare(manifest=(tmp_path / "m.jsonl",), max_skipped_share=0.8)
    assert record.id == "good"
    skipped = map(json.loads, (tmp_path / "made" / "skipped.jsonl").read_text().splitlines())
    told = {each["where"].rpartition(" ")[2]: each["reason"] for each in skipped}
    assert list(told) == ["2", "3", "4", "5"]
    for line, reason in zip(told, ["expected seconds", "expected seconds", "not readable as audio",
                                   "surrogates not allowed"], strict=True):  # fmt: skip
        assert reason in told[line]


def test_links_that_lead_nowhere_are_skipped_and_rings_of_folders_refused(
    tmp_path, spoken_folder, prepare
):
    (spoken_folder / "gone.flac").symlink_to(tmp_path / "nowhere.flac")
    (spoken_folder / "round.flac").symlink_to("round.flac")
    assert len(prepare(folder=spoken_folder, max_skipped_share=0.3)) == 6
    skipped = (tmp_path / "made" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(each)["where"].rpartition("/")[2] for each in skipped] == [
        "gone.flac", "round.flac"
    ]  # fmt: skip
    (spoken_folder / "book1" / "again").symlink_to("..")
    with pytest.raises(UserError, match=r"book1/again: is a link to a folder that it is in"):
        prepare(tmp_path / "other", folder=spoken_folder)


def test_two_inputs_of_one_name_are_refused(tmp_path, spoken_folder, prepare):
    (spoken_folder / "book0" / "0.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.wav: its id 'book0/0' is another input's as well"):
        prepare(folder=spoken_folder)


def test_a_transcript_without_audio_is_listed_not_lost(tmp_path, spoken_folder, prepare):
    (spoken_folder / "book1" / "7.txt").write_text("Nobody speaks this.\n")
    assert len(prepare(folder=spoken_folder, max_skipped_share=0.2)) == 6
    (line,) = (tmp_path / "made" / "skipped.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert skipped["where"] == str(spoken_folder / "book1" / "7.txt")
    assert "expected an audio file, got none" in skipped["reason"]


def test_a_reason_names_its_file_once(tmp_path, spoken_folder, prepare):
    damaged = spoken_folder / "book0" / "0.flac"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    prepare(folder=spoken_folder, max_skipped_share=0.2)
    (line,) = (tmp_path / "made" / "skipped.jsonl").read_text().splitlines()
    assert line.count("0.flac") == 1


def test_texts_with_ends_of_lines_of_unicode_are_whole(tmp_path, spoken_folder, prepare):
    rows = [
        {"audio": "spoken/book0/0.flac", "text": "one\u2028two\x85three", "id": "a\x85b"},
        {"audio": "spoken/book1/1.flac", "text": "half \ud83d"},  # JSON may hold half a pair
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (record,) = prepare(manifest=(path,), max_skipped_share=0.5)
    assert (record.id, record.text) == ("a\x85b", "one two three")


def test_file_names_that_are_no_unicode_are_skipped_by_name(tmp_path, spoken_folder, prepare):
    name = os.fsencode(spoken_folder / "book0" / "0.flac").replace(b"0.flac", b"\xff.flac")
    os.rename(spoken_folder / "book0" / "0.flac", name)
    assert len(prepare(folder=spoken_folder, max_skipped_share=0.5, untranscribed=True)) == 5
    lines = (tmp_path / "made" / "skipped.jsonl").read_text().splitlines()
    assert any("\\udcff" in line for line in lines)


BAD_OPTIONS = [
    ({}, "expected one source: .*; got none"),
    ({"text": ("a",), "folder": "b"}, "got --folder, --text"),
    ({"supervisions": ("a",)}, "got --supervisions"),
    ({"folder": "b"}, "--folder: expected a --codebook"),
    ({"text": ("a",), "codebook": "c"}, "--text: its records need no --codebook"),
    ({"text": ("a",), "aligner": "c"}, "--text: its records need no --hubert, --layer or --al"),
    ({"folder": "b", "codebook": "c", "layer": 3}, "expected --hubert and --layer together"),
    ({"text": ("a",), "rank": 2, "world_size": 2}, r"--rank 2: expected one in \[0, 2\)"),
    ({"text": ("a",), "shard_inputs": 0}, "--shard-inputs: expected 1 or more, got 0"),
    ({"text": ("a",), "max_skipped_share": 1.5}, r"expected a share in \[0, 1\], got 1.5"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_options_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        CorpusConfig(out=tmp_path, **options)


# Times --------------------------------------------------------------------------------------------

TIMES = st.lists(st.tuples(st.floats(0, 4), st.floats(0, 1)), max_size=8)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(TIMES)
def test_frames_of_words_are_ordered_disjoint_and_near_their_times(times):
    times = sorted((start, min(4.0, start + length)) for start, length in times)
    spans = frame_spans(times, 100)
    end = 0
    for (first, last), (start, stop) in zip(spans, times, strict=True):
        assert end <= first <= last <= 100
        assert last >= round(25 * stop) or last == end
        if 25 * start >= end:
            assert abs(first - 25 * start) <= 0.5 + 1e-9
        end = last


def test_times_of_another_utterance_are_refused_and_not_squeezed_into_this_one():
    assert frame_spans([(-0.05, 0.3), (0.3, 1.08)], 25) == [(0, 8), (8, 25)]
    for times in ([(-0.2, 0.3)], [(0.5, 1.2)], [(0.5, 0.3)], [(float("nan"), 0.3)]):
        with pytest.raises(AudioError, match=r"alignment \[.*\) s is not in its utterance \[0, 1"):
            frame_spans(times, 25)


def test_words_are_written_as_in_the_text_where_they_are_its_words():
    assert written_words("Don't go, Tom!", ["DONT", "GO", "TOM"]) == ["Don't", "go,", "Tom!"]
    assert written_words("in 1984", ["IN", "NINETEEN", "EIGHTYFOUR"])[1] == "NINETEEN"
    assert written_words("he goes", ["she", "goes"]) == ["she", "goes"]
    assert written_words(None, ["GO"]) == ["GO"]
