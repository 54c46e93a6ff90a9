"""A corpus is a function of its inputs: however it was stopped, shared out or damaged on the way,
nothing is done twice, nothing is lost, and what is no record is listed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from lst.data.records import Dataset
from lst.errors import UserError
from lst.prepare import corpus
from lst.prepare.corpus import CorpusConfig, describe_corpus, plan_corpus, prepare_corpus
from lst.prepare.executors import ExecutorConfig, SlurmConfig, make_executor
from lst.prepare.sources import Utterance
from lst.prepare.speech import Studio
from lst.speech import units
from lst.strict_json import seal

soundfile = pytest.importorskip("soundfile")

ROOT_COMMAND = [sys.executable, "-m", "lst.prepare", "corpus"]


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def skipped_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def config(tmp_path, spoken_folder, codebook):
    """Six inputs in three shards."""
    return CorpusConfig(
        out=tmp_path / "made", folder=spoken_folder, codebook=codebook, source="s", shard_inputs=2
    )


@pytest.fixture
def made(config):
    """What comes of them in one go."""
    config = replace(config, out=config.out.with_name("in-one-go"))
    assert prepare_corpus(config).dataset
    return content_of(config.out)


class Killed(BaseException):
    """As a kill: nothing here is meant to catch it."""


@pytest.fixture
def prepared(monkeypatch):
    """The ids of the utterances that are prepared; kill_after(n) ends the process after n."""
    done = []
    original = Studio.prepare
    done_at_most = [None]

    def counting(self, utterance):
        if len(done) == done_at_most[0]:
            raise Killed
        done.append(utterance.id)
        return original(self, utterance)

    monkeypatch.setattr(Studio, "prepare", counting)
    counting.done, counting.done_at_most = done, done_at_most
    return counting


def test_a_dataset_is_its_shards_in_the_order_of_the_inputs(config, made):
    assert set(made) == {
        "plan.json", "skipped.jsonl", "dataset.json",
        "shard-00000.parquet", "shard-00001.parquet", "shard-00002.parquet",
    }  # fmt: skip
    dataset = Dataset.open(config.out.with_name("in-one-go"))
    assert [dataset[row].id for row in range(6)] == [
        "book0/0", "book0/2", "book0/4", "book1/1", "book1/3", "book1/5"
    ]  # fmt: skip
    assert made["skipped.jsonl"] == b""
    plan = json.loads(made["plan.json"])
    assert plan["result"] == {
        "inputs": 6, "records": 6, "frames": dataset.info.num_frames, "unaligned": 6, "skipped": 0
    }  # fmt: skip


@pytest.mark.parametrize("stops", [(1,), (2,), (3, 1), (0, 1, 1, 5)])
def test_a_run_that_is_killed_anywhere_goes_on_after_its_last_file(config, made, prepared, stops):
    for stop in stops:
        prepared.done_at_most[0] = len(prepared.done) + stop
        if prepared.done_at_most[0] < 6:
            with pytest.raises(Killed):
                prepare_corpus(config)
            assert not (config.out / "dataset.json").exists()
    prepared.done_at_most[0] = None
    assert prepare_corpus(config).dataset
    assert content_of(config.out) == made
    assert len(prepared.done) == 6
    assert not (config.out / "work").exists()


def test_a_line_of_the_journal_that_is_torn_is_prepared_again(config, made, prepared):
    prepared.done_at_most[0] = len(prepared.done) + 3
    with pytest.raises(Killed):
        prepare_corpus(config)
    journal = config.out / "work" / "journal-00001.jsonl"
    content = journal.read_bytes()
    altered = content.replace(b'"id": "', b'"id": "x')  # JSON still
    for torn in (content[:-20], b"\0" * 30, content[: len(content) // 2] + b"\n", altered):
        journal.write_bytes(torn)
        before = len(prepared.done)
        prepared.done_at_most[0] = before + 1
        with pytest.raises(Killed):
            prepare_corpus(config)
        assert prepared.done[before:] == ["book0/4"]
    prepared.done_at_most[0] = None
    prepare_corpus(config)
    assert content_of(config.out) == made


def sealed(text, change=None):
    """Other content with the checksum that it should have, on a line."""
    if change is not None:
        text = json.dumps(json.loads(text)["of"]).replace(*change)
    return seal(text.rstrip("\n")) + "\n"


INPUTS, SHARD, REPORT = "inputs-00001.jsonl", "shard-00000.parquet", "shard-00000.json"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (INPUTS, lambda text: "", "expected 2 inputs, got 0"),
        (INPUTS, lambda text: text[: text.index("\n") + 1], "expected 2 inputs, got 1"),
        (INPUTS, lambda text: text[:-9], "line 2: expected JSON"),
        (INPUTS, lambda text: text.replace("start", "Start"), "line 1: damaged"),
        (INPUTS, lambda text: text.replace(": 0.0", ": 0.5"), "line 1: damaged"),
        (INPUTS, lambda text: "null\n" + text, "line 1: damaged"),
        (INPUTS, lambda text: sealed("null\n") + text, "line 1: expected Utterance, got null"),
        (REPORT, lambda text: text[:-9], "expected JSON"),
        (REPORT, lambda text: "[]", "damaged"),
        (REPORT, lambda text: sealed("[]"), r"expected ShardReport, got \[\]"),
        (REPORT, lambda text: text.replace('"num_frames": ', '"num_frames": 1'), "damaged"),
        (
            REPORT,
            lambda text: sealed(text, ('"num_inputs": 2', '"num_inputs": 1')),
            f"expected {SHARD} of 2 inputs, got {SHARD} of 1",
        ),
        (
            REPORT,
            lambda text: sealed(text, (SHARD, "shard-00001.parquet")),
            f"expected {SHARD} of 2 inputs, got shard-00001.parquet of 2",
        ),
    ],
)
def test_what_is_damaged_of_a_corpus_begun_is_named_and_mended_it_goes_on(
    config, made, prepared, name, change, message
):
    prepared.done_at_most[0] = len(prepared.done) + 3
    with pytest.raises(Killed):
        prepare_corpus(config)
    prepared.done_at_most[0] = None
    path = config.out / "work" / name
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    before = content_of(config.out)
    with pytest.raises(UserError, match=rf"{name}(, |: ){message}"):
        prepare_corpus(config)
    assert content_of(config.out) == before
    path.write_text(text)
    prepare_corpus(config)
    assert content_of(config.out) == made


def test_a_finished_dataset_is_left_as_it_is(config, prepared):
    prepare_corpus(config)
    before = {path: path.stat().st_mtime_ns for path in config.out.iterdir()}
    del prepared.done[:]
    assert prepare_corpus(config).dataset
    assert {path: path.stat().st_mtime_ns for path in config.out.iterdir()} == before
    assert prepared.done == []


@pytest.mark.parametrize(
    ("order", "last"), [((0, 1, 2, 3), [False, False, True, True]), ((3, 1, 0, 2), [False] * 3)]
)
def test_any_number_of_ranks_makes_the_same_dataset(config, made, order, last):
    results = [prepare_corpus(replace(config, rank=rank, world_size=4)) for rank in order]
    assert [result.dataset for result in results][: len(last)] == last
    assert results[-1].dataset
    assert sum(result.num_records for result in results) == 6
    assert content_of(config.out) == made


def test_a_rank_that_lists_slowly_leaves_what_the_others_have_made(config, made, monkeypatch):
    """Three shards for four ranks: the fourth is still listing when the dataset is there."""
    original = corpus.list_inputs

    def slowly(sources):
        inputs = list(original(sources))
        yield inputs[0]
        monkeypatch.setattr(corpus, "list_inputs", original)
        for rank in range(3):
            prepare_corpus(replace(config, rank=rank, world_size=4))
        yield from inputs[1:]

    monkeypatch.setattr(corpus, "list_inputs", slowly)
    assert prepare_corpus(replace(config, rank=3, world_size=4)).dataset
    assert content_of(config.out) == made
    assert not (config.out / "work").exists()
    assert "6 records" in describe_corpus(config.out)


def test_no_two_processes_are_at_one_shard(config):
    plan_corpus(config)
    journal = config.out / "work" / "journal-00000.jsonl"
    with corpus._journal(journal), pytest.raises(UserError, match="another process is at this sh"):
        prepare_corpus(config)
    prepare_corpus(config)


def test_a_folder_begun_with_other_options_is_refused(config, sentences, tmp_path):
    from lst.speech.units import LogMelKMeans

    prepare_corpus(config)
    before = content_of(config.out)
    other = tmp_path / "other.safetensors"
    LogMelKMeans.fit([sentences[0].speech.waveform], num_units=4).save(other)
    changes = {
        "codebook": {"codebook": other},
        "untranscribed": {"untranscribed": True},
        "source": {"source": "t"},
        "shard_inputs": {"shard_inputs": 3},
    }
    for name, change in changes.items():
        with pytest.raises(UserError, match=rf"was begun with another {name};"):
            prepare_corpus(replace(config, **change))
    shutil.copy(config.folder / "book0" / "0.flac", config.folder / "one-more.flac")
    with pytest.raises(UserError, match=r"was begun with another folder;"):
        prepare_corpus(config)
    assert content_of(config.out) == before


def test_a_folder_with_other_things_in_it_is_refused(config):
    config.out.mkdir()
    (config.out / "thesis.doc").write_text("precious")
    with pytest.raises(UserError, match=r"expected an empty or absent folder, got thesis\.doc"):
        prepare_corpus(config)
    (config.out / "thesis.doc").unlink()
    (config.out / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: expected JSON, got"):
        prepare_corpus(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "the plan of a corpus in format 1"),
        ({"num_shards": 10**30}, r"inputs in shards of shard_inputs, got 6 in 1\d+ of 2"),
        ({"num_shards": 2}, "inputs in shards of shard_inputs, got 6 in 2 of 2"),
        ({"num_inputs": "6"}, 'num_inputs to be int, got "6"'),
        ({"settings": []}, "settings to be dict"),
        ({"result": {"records": 6}}, "counts of inputs, records"),
        ({"result": {"inputs": 6, "records": []}}, r"result\.records to be int"),
    ],
    ids=str,
)
def test_a_plan_that_was_altered_is_refused(config, change, message):
    plan_corpus(config)
    path = config.out / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"plan\.json: expected {message}"):
        prepare_corpus(config)


@pytest.mark.parametrize("name", ["aligner", "codebook", "shard_inputs"])
def test_a_plan_whose_settings_have_another_name_is_refused(config, name):
    plan_corpus(config)
    path = config.out / "plan.json"
    plan = json.loads(path.read_text())
    plan["settings"]["renamed"] = plan["settings"].pop(name)
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"was begun with another|expected inputs in shards"):
        prepare_corpus(config)


def test_a_dataset_inside_its_own_source_is_refused(config):
    with pytest.raises(UserError, match="expected a folder outside of the source"):
        prepare_corpus(replace(config, out=config.folder / "made"))
    assert not (config.folder / "made").exists()


def test_a_folder_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/made.*cannot be written \(Not a directory\)"):
        prepare_corpus(replace(config, out=tmp_path / "file" / "made"))


# What is no record --------------------------------------------------------------------------------


@pytest.fixture
def damaged(spoken_folder, sentences):
    """Six good files and one of each kind of damage; what is wrong with each."""
    flac = (spoken_folder / "book0" / "0.flac").read_bytes()
    (spoken_folder / "cut.flac").write_bytes(flac[: len(flac) // 2])
    (spoken_folder / "empty.flac").write_bytes(b"")
    (spoken_folder / "html.mp3").write_text("<html>404</html>" * 50)
    samples = sentences[0].speech.waveform.copy()
    samples[500] = np.inf
    soundfile.write(spoken_folder / "inf.wav", samples, 16_000, subtype="FLOAT")
    soundfile.write(spoken_folder / "silent.wav", np.zeros(0), 16_000)
    for name in ("cut", "empty", "html", "inf", "silent"):
        (spoken_folder / f"{name}.txt").write_text("hello")
    (spoken_folder / "mute.flac").write_bytes(flac)
    (spoken_folder / "blank.flac").write_bytes(flac)
    (spoken_folder / "blank.txt").write_text(" \n")
    (spoken_folder / "latin.flac").write_bytes(flac)
    (spoken_folder / "latin.txt").write_bytes("Käse".encode("latin-1"))
    return {
        "cut.flac": "damaged",
        "empty.flac": "not readable as audio",
        "html.mp3": "not readable as audio",
        "inf.wav": "inf for a sample",
        "silent.wav": "expected audio, got 0 samples",
        "mute.flac": "no transcript",
        "blank.flac": "no transcript",
        "latin.flac": "not readable as text",
    }


def test_what_is_unfit_is_skipped_counted_and_listed(config, damaged):
    config = replace(config, max_skipped_share=0.6)
    made = prepare_corpus(config)
    assert (made.num_records, made.num_skipped) == (6, 8)
    listed = {
        each["where"].rpartition("/")[2]: each["reason"]
        for each in skipped_in(config.out / "skipped.jsonl")
    }
    assert set(listed) == set(damaged)
    for name, reason in damaged.items():
        assert reason in listed[name]
    assert len(Dataset.open(config.out)) == 6
    assert describe_corpus(config.out).endswith(
        f"6 of them without word times; 8 skipped, listed in {config.out / 'skipped.jsonl'}"
    )


def test_audio_without_a_transcript_is_kept_where_asked_for(config, damaged):
    made = prepare_corpus(replace(config, max_skipped_share=0.6, untranscribed=True))
    assert (made.num_records, made.num_skipped) == (8, 6)
    dataset = Dataset.open(config.out)
    assert {dataset[row].id for row in range(8) if dataset[row].text is None} == {"mute", "blank"}


def test_more_of_it_than_its_share_stops_the_job_and_keeps_what_is_prepared(
    config, damaged, prepared
):
    for world_size, name in ((1, "skipped.jsonl"), (2, "skipped-rank-1.jsonl")):
        config = replace(config, rank=world_size - 1, world_size=world_size, max_skipped_share=0.5)
        if world_size == 2:
            shutil.rmtree(config.out)
            prepare_corpus(replace(config, rank=0, max_skipped_share=1.0))
        with pytest.raises(UserError, match=r"8 of 14 skipped, more than --max-skipped-share 0\.5"):
            prepare_corpus(config)
        assert not (config.out / "dataset.json").exists()
        assert len(skipped_in(config.out / name)) == 8
        del prepared.done[:]
        with pytest.raises(UserError, match=rf"listed in .*{name}, the first: .*: .*larger share"):
            prepare_corpus(config)
        assert prepared.done == []
    assert prepare_corpus(replace(config, max_skipped_share=0.6)).dataset
    assert prepared.done == []
    assert len(skipped_in(config.out / "skipped.jsonl")) == 8
    assert not list(config.out.glob("skipped-rank-*"))


def test_a_source_of_which_nothing_is_fit_is_told_with_the_first_reason(tmp_path):
    text = tmp_path / "a.jsonl"
    text.write_text("{\n")
    config = CorpusConfig(out=tmp_path / "made", text=(text,), max_skipped_share=1.0)
    for _ in range(2):
        with pytest.raises(UserError, match=r"a\.jsonl: expected something .* first: .*, line 1: "):
            prepare_corpus(config)
        assert len(skipped_in(config.out / "skipped.jsonl")) == 1
    text.write_text("\n\n")
    with pytest.raises(UserError, match=r"a\.jsonl: expected something to prepare, got nothing$"):
        prepare_corpus(replace(config, out=tmp_path / "blank"))


def test_a_made_corpus_without_its_result_is_named(config, made):
    out = config.out.with_name("in-one-go")
    plan = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps(plan | {"result": None}))
    with pytest.raises(UserError, match=r"plan\.json: expected the result of a corpus"):
        corpus.describe_corpus(out)


def test_a_job_that_finds_nothing_fit_stops_early(config, prepared, monkeypatch):
    monkeypatch.setattr(corpus, "ENOUGH_SEEN", 2)
    for path in config.folder.rglob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match="2 of 2 skipped"):
        prepare_corpus(config)
    assert len(prepared.done) == 2


def test_a_missing_library_is_no_fault_of_the_files(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match=r"needs soundfile.*: pip install 'lst\[speech\]'"):
        prepare_corpus(config)
    monkeypatch.undo()
    assert prepare_corpus(config).num_records == 6


def test_records_that_parquet_cannot_hold_are_skipped(tmp_path, prepare):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "\\ud800"}\n')
    (record,) = prepare(text=(tmp_path / "a.jsonl",), max_skipped_share=0.5)
    assert record.text == "good"
    (skipped,) = skipped_in(tmp_path / "made" / "skipped.jsonl")
    assert "record 'a.jsonl:17'" in skipped["reason"]
    assert "surrogates not allowed" in skipped["reason"]


# Long audio and aligners --------------------------------------------------------------------------


class FrameByFrame:
    """An encoder whose units depend on their own frame alone."""

    num_units, frame_rate, fingerprint = 32_000, 25, "sha256:00"

    def encode(self, waveform):
        frames = np.zeros(-(-len(waveform) // 640) * 640)
        frames[: len(waveform)] = waveform
        return (np.abs(frames.reshape(-1, 640)).mean(1) * 30_000).astype(np.int16)


def studio(**options):
    defaults = {"encoder": FrameByFrame(), "aligner": None, "untranscribed": False, "source": "s"}
    return Studio(**(defaults | options))


@pytest.mark.parametrize("num_samples", [640 * 100, 640 * 100 + 1, 640 * 109 - 1])
def test_long_audio_is_encoded_in_stretches_as_if_at_once(tmp_path, monkeypatch, num_samples):
    path = tmp_path / "long.wav"
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, num_samples).astype(np.float32)
    soundfile.write(path, samples, 16_000, subtype="FLOAT")
    monkeypatch.setattr(units, "STRETCH", 640 * 10)
    monkeypatch.setattr(units, "CONTEXT", 640 * 3)
    utterance = Utterance(id="a", where="a", audio=str(path), text="hi", start=0.08)
    record = studio().prepare(utterance)
    np.testing.assert_array_equal(record.units, FrameByFrame().encode(samples[1280:]))


class Halves:
    """An aligner that gives the first word the first half, and knows no digits."""

    def __init__(self):
        self.heard = []

    def reason_against(self, num_samples, text):
        return "digits" if text.isdigit() else None

    def align(self, waveforms, texts):
        from lst.speech.alignment import Alignment
        from lst.speech.audio import Timed

        ((waveform,), (text,)) = waveforms, texts
        self.heard.append(text)
        if text == "Another text.":
            raise UserError("no path")
        end = len(waveform) / 16_000
        chars = tuple(Timed(char, 0.0, 0.0) for char in text)
        first, last = text.split()
        words = (Timed(first, 0.0, end / 2), Timed(last, end / 2, end))
        return [Alignment(words=words, chars=chars, score=0.0)]


def test_an_aligner_finds_the_words_that_no_manifest_has_times_of(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.full(16_000, 0.1), 16_000)
    aligner = Halves()
    prepare = studio(aligner=aligner).prepare
    utterance = Utterance(id="a", where="a", audio=str(path), text=" Hello \n there. ")
    record = prepare(utterance)
    assert record.text == "Hello there."
    assert [(w.word, w.start, w.stop) for w in record.words] == [
        ("Hello", 0, 12), ("there.", 12, 25)
    ]  # fmt: skip
    assert len(record.chars) == len("Hello there.")
    timed = prepare(replace(utterance, words=[("hello", 0.0, 0.2), ("there", 0.3, 0.4)]))
    assert [(w.word, w.start, w.stop) for w in timed.words] == [("Hello", 0, 5), ("there.", 8, 10)]
    assert prepare(replace(utterance, text="1984")).words is None
    assert aligner.heard == ["Hello there."]
    unaligned = prepare(replace(utterance, text="Another text."))
    assert (unaligned.text, unaligned.words) == ("Another text.", None)


# The command --------------------------------------------------------------------------------------


def command(config, *more):
    return [
        *ROOT_COMMAND, "--out", config.out, "--folder", config.folder,
        "--codebook", config.codebook, "--source", config.source, *more,
    ]  # fmt: skip


def test_kill_9_in_the_middle_costs_one_file_at_most(config, prepared, tmp_path):
    for copy in range(40):
        for path in (config.folder / "book0").glob("*"):
            if not path.stem.count("-"):
                shutil.copy(path, path.with_stem(f"{path.stem}-{copy}"))
    config = replace(config, shard_inputs=50)
    process = subprocess.Popen(command(config, "--shard-inputs", "50"), stderr=subprocess.DEVNULL)
    journal = config.out / "work" / "journal-00001.jsonl"
    for _ in range(6000):
        if journal.is_file() and journal.read_bytes().count(b"\n") >= 5:
            break
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    kept = 50 + journal.read_bytes().count(b"\n")
    assert 55 <= kept < 126
    prepare_corpus(config)
    assert len(prepared.done) == 126 - kept
    interrupted = content_of(config.out)
    other = replace(config, out=tmp_path / "other")
    prepare_corpus(other)
    assert content_of(other.out) == interrupted


def run(arguments, **options):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, **options)


def test_the_command_says_what_it_made_and_what_is_wrong(config, damaged):
    wrong = run(command(config, "--shard-inputs", "2"))
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: 8 of 14 skipped, more than --max-skip")
    made = run(command(config, "--shard-inputs", "2", "--max-skipped-share", "1"))
    assert made.returncode == 0
    assert made.stdout.startswith(f"{config.out}: 6 records, 0.00 hours, 6 of them without word t")


def test_datatrove_runs_ranks_on_this_machine(config, made):
    pytest.importorskip("datatrove")
    by = ("--shard-inputs", "2", "--executor", "local", "--tasks", "2")
    done = run(command(config, *by))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{config.out}: 6 records")
    assert content_of(config.out) == made
    stats = json.loads((config.out / "logs" / "stats.json").read_text())
    (step,) = [each for each in stats if "records" in each["name"]]
    assert step["stats"]["records"]["total"] == 6
    again = run(command(config, *by))
    assert again.returncode == 0, again.stderr
    assert content_of(config.out) == made


def test_datatrove_passes_on_what_is_wrong(config, damaged):
    pytest.importorskip("datatrove")
    done = run(command(config, "--executor", "local", "--tasks", "1"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: 8 of 14 skipped")


SBATCH = """#!/bin/bash
n=$(ls "$FAKE" | grep -c script)
cp "${@: -1}" "$FAKE/script-$n.sh"
echo "$@" > "$FAKE/arguments-$n"
echo Submitted batch job $((100 + n))
"""
SRUN = '#!/bin/bash\nshift 3\nexec "$@"\n'
SCONTROL = "#!/bin/bash\necho localhost\n"


def test_datatrove_submits_a_slurm_array_whose_tasks_make_the_dataset(config, made, tmp_path):
    pytest.importorskip("datatrove")
    fake = tmp_path / "fake"
    fake.mkdir()
    for name, content in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (fake / name).write_text(content)
        (fake / name).chmod(0o755)
    scripts = os.path.dirname(sys.executable)
    environment = os.environ | {
        "FAKE": str(fake), "PATH": f"{fake}:{scripts}:{os.environ['PATH']}"
    }  # fmt: skip
    submitted = run(
        command(
            config, "--shard-inputs", "2", "--executor", "slurm", "--tasks", "2",
            "--slurm.partition", "cpu", "--slurm.time", "1:00:00", "--slurm.gpus-per-task", "1",
            "--slurm.setup", "export LST_WAS_SET_UP=1",
        ),
        env=environment,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    assert not (config.out / "dataset.json").exists()
    script = (fake / "script-0.sh").read_text()
    for line in ("--partition=cpu", "--time=1:00:00", "--array=0-1", "--gpus=1",
                 "--job-name=prepare-made", "--cpus-per-task=1", "--mem-per-cpu=8G"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "export LST_WAS_SET_UP=1\n" in script
    assert (fake / "arguments-0").read_text().startswith("--export=ALL,RUN_OFFSET=0")
    for task in ("1", "0"):
        as_slurm = environment | {"SLURM_ARRAY_TASK_ID": task, "SLURM_NODELIST": "localhost"}
        done = run(["bash", fake / "script-0.sh"], env=as_slurm)
        assert done.returncode == 0, done.stderr
    assert content_of(config.out) == made


BAD_EXECUTORS = [
    ({"executor": "slurm"}, {}, "--slurm.partition: expected the partition to run on, got none"),
    ({"executor": "local", "tasks": 0}, {}, "--tasks: expected 1 or more, got 0"),
    ({"executor": "local", "tasks": 2**63}, {}, "--tasks: expected 1 or more, below 2.63"),
    ({"executor": "local", "workers": 0}, {}, "--workers: expected 1 or more, or -1 for all, got"),
    ({"executor": "local"}, {"world_size": 2}, "--world-size: expected no ranks beside --executor"),
]


@pytest.mark.parametrize(("options", "ranks", "message"), BAD_EXECUTORS)
def test_an_executor_needs_its_options(config, options, ranks, message):
    pytest.importorskip("datatrove")
    with pytest.raises(UserError, match=message):
        make_executor(replace(config, **ranks), ExecutorConfig(**options))
    assert not config.out.exists()


def test_without_slurm_its_executor_says_so(config, monkeypatch, tmp_path):
    pytest.importorskip("datatrove")
    monkeypatch.setenv("PATH", str(tmp_path))
    executor = ExecutorConfig(executor="slurm", slurm=SlurmConfig(partition="cpu"))
    with pytest.raises(UserError, match="--executor slurm: expected SLURM's sbatch"):
        make_executor(config, executor)
    assert not config.out.exists()


def test_without_datatrove_an_executor_names_the_extra(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    with pytest.raises(UserError, match=r"--executor local needs datatrove.*'lst\[scale\]'"):
        make_executor(config, ExecutorConfig(executor="local"))


def test_a_name_of_a_source_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--source: expected a name in UTF-8, got '\\udcff'"):
        CorpusConfig(text=(tmp_path,), out=tmp_path / "out", source="\udcff")


def test_a_source_of_nothing_leaves_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected text files"):
        prepare_corpus(CorpusConfig(text=(tmp_path / "empty",), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cpus_per_task", "mem_per_cpu_gb", "gpus_per_task"])
def test_slurm_is_asked_for_no_less_than_nothing(name):
    option = f"--slurm.{name.replace('_', '-')}"
    with pytest.raises(UserError, match=f"{option}: expected . or more, got -1"):
        SlurmConfig(**{name: -1})


def test_more_tasks_than_shards_are_not_started(tmp_path):
    pytest.importorskip("datatrove")
    (tmp_path / "a.txt").write_text("one line\n")
    corpus = CorpusConfig(text=(tmp_path / "a.txt",), out=tmp_path / "out")
    many = ExecutorConfig(executor="local", tasks=2**62, workers=2**62)
    executor = make_executor(corpus, many)
    assert (executor.tasks, executor.workers) == (1, 1)
