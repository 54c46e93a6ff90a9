"""``python -m lst.prepare corpus``: audio and transcripts, or text, to a dataset of records.

::

    OUT/plan.json                  what it is made from and with; written before anything else
        work/inputs-00000.jsonl    the inputs of a shard
        work/journal-00000.jsonl   what came of those done so far, a line each
        shard-00000.parquet        their records
        work/shard-00000.json      what came of the shard; where it is, the shard is done
        skipped.jsonl              everything that is no record, and why
        dataset.json               written last; work is removed then

Shards are dealt out to ranks in turn. Whatever is stopped, and however, goes on by the same
command: shards that are done are not done again, one that was under way goes on after its last
input, and no two processes write the same shard. The content does not depend on how many ranks
there were or how often they were stopped. The rank that finds all shards done makes the dataset.
"""

import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from lst.data.records import (
    FRAMES_PER_SECOND,
    Record,
    Span,
    Word,
    join_shards,
    validate_record,
    write_shard,
)
from lst.data.shards import WrittenShard, shard_name
from lst.errors import UserError, expect_positive, expect_text
from lst.files import make_folder, write_atomically, write_json, writing
from lst.prepare.authors import AUTHORS_CODEBOOK, AUTHORS_UNITS, authors_records
from lst.prepare.outcomes import Outcome, Skipped
from lst.prepare.sources import (
    Input,
    Part,
    Sources,
    Utterance,
    fingerprint,
    from_json,
    list_inputs,
    source_kind,
    to_json,
)
from lst.prepare.speech import Studio
from lst.prepare.text import text_records
from lst.speech.units import UnitEncoder, UnitsConfig, load_units
from lst.strict_json import (
    parse_json,
    read_json,
    read_json_lines,
    read_strictly,
    seal,
    unseal,
)

if TYPE_CHECKING:
    from lst.speech.alignment import CTCAligner

__all__ = ["CorpusConfig", "Made", "describe_corpus", "is_made", "plan_corpus", "prepare_corpus"]

FORMAT = 1  # of plan.json
ENOUGH_SEEN = 1000  # records and skipped ones after which their share may stop a job under way


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(Sources):
    """What to prepare, with what, and how to share the work."""

    out: Path  # the dataset's folder, such as data/corpus/train/librispeech
    codebook: Path | None = None  # turns audio into speech units; required for audio
    hubert: str | None = None  # HuBERT that the codebook was made for: a folder or a hub name
    layer: int | None = None  # the HuBERT layer that the codebook was made for
    allow_pickle: bool = False  # read a joblib codebook, which can run code
    aligner: str | None = None  # wav2vec 2.0 CTC model to find word times with: folder or hub name
    device: str = "cpu"  # where HuBERT and the aligner run
    untranscribed: bool = False  # keep audio without a transcript, as units alone
    source: str | None = None  # name of the corpus in each record; None: the name of --out
    shard_inputs: int = 1024  # utterances per shard; texts are cut into parts of 32 MB instead
    max_skipped_share: float = 0.01  # the job stops if a larger share of the inputs is skipped
    rank: int = 0  # the number of this process
    world_size: int = 1  # number of processes that share the work

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(
                f"--rank {self.rank}: expected one in [0, {self.world_size}), the --world-size"
            )
        expect_positive(self, "shard_inputs")
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(
                f"--max-skipped-share: expected a share in [0, 1], got {self.max_skipped_share}"
            )
        kind = source_kind(self)
        if (self.codebook is None) == (kind not in ("text", "authors")):
            raise UserError(
                f"--{kind}: expected a --codebook to make units with; python -m lst.prepare units "
                "fits one"
                if self.codebook is None
                else f"--{kind}: its records need no --codebook"
            )
        if self.codebook is None and (self.hubert or self.layer is not None or self.aligner):
            raise UserError(f"--{kind}: its records need no --hubert, --layer or --aligner")
        _ = self.units  # checks that its options go together
        expect_text(self, "out", "source")

    @property
    def units(self) -> UnitsConfig | None:
        if self.codebook is None:
            return None
        return UnitsConfig(
            codebook=self.codebook,
            hubert=self.hubert,
            layer=self.layer,
            allow_pickle=self.allow_pickle,
            device=self.device,
        )


@dataclass(frozen=True)
class Plan:
    """What ``plan.json`` says.

    Attributes:
        settings: what the content depends on.
        result: counts of what came of it; None until the dataset is made.
    """

    settings: dict[str, Any]
    num_inputs: int
    num_shards: int
    result: dict[str, int] | None = None

    def inputs_of(self, index: int) -> int:
        """How many a shard has."""
        size: int = self.settings["shard_inputs"]
        return min(size, self.num_inputs - index * size)


@dataclass(frozen=True)
class ShardReport:
    """What came of a shard: the file, unless nothing in it was fit to be a record, and the rest."""

    shard: WrittenShard | None
    num_inputs: int
    num_unaligned: int  # records with text and units and no words
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def num_records(self) -> int:
        return 0 if self.shard is None else self.shard.info.rows

    @property
    def num_frames(self) -> int:
        return 0 if self.shard is None else self.shard.num_frames


@dataclass(frozen=True)
class Made:
    """What a call has made: the records of its shards, and the dataset unless other ranks have not
    done theirs."""

    dataset: bool
    num_records: int
    num_frames: int
    num_skipped: int

    @classmethod
    def of(cls, dataset: bool, reports: "list[ShardReport]") -> "Made":
        return cls(
            dataset=dataset,
            num_records=sum(report.num_records for report in reports),
            num_frames=sum(report.num_frames for report in reports),
            num_skipped=sum(len(report.skipped) for report in reports),
        )


def prepare_corpus(config: CorpusConfig) -> Made:
    """Do this rank's share, and make the dataset where all shards are done.

    Raises:
        UserError: bad options or manifests; a folder that holds something else; more skipped than
            ``max_skipped_share``. What is prepared until then is kept.
    """
    plan = plan_corpus(config)
    if is_made(config):
        shutil.rmtree(_work(config), ignore_errors=True)  # its maker may have been killed here
        return Made.of(True, [])
    work = _work(config)
    indices = range(config.rank, plan.num_shards, config.world_size)
    todo, seen = [], _Seen(config)
    for index in indices:
        if _report_path(work, index).is_file():
            seen.add(_read_report(work, plan, index))
        else:
            todo.append(index)
    made: list[ShardReport] = []
    if todo:
        maker = _Maker.of(config)
        total = min(plan.num_inputs, len(todo) * config.shard_inputs)
        with tqdm(total=total, desc=config.out.name, unit="in", disable=None) as bar:
            for index in todo:
                seen.check_share(enough=ENOUGH_SEEN)
                made.append(_make_shard(config, maker, plan, index, bar))
                seen.add(made[-1])
    return Made.of(_join(config, plan), made)


def describe_corpus(out: Path) -> str:
    """A line on what is in a folder that :func:`prepare_corpus` has made."""
    result = _read_plan(out).result
    if result is None:
        raise UserError(f"{out / PLAN}: expected the result of a corpus that is made, got none")
    line = f"{out}: {result['records']:,} records"
    if result["frames"]:
        line += f", {result['frames'] / FRAMES_PER_SECOND / 3600:,.2f} hours"
    if result["unaligned"]:
        line += f", {result['unaligned']:,} of them without word times"
    if result["skipped"]:
        line += f"; {result['skipped']:,} skipped, listed in {out / SKIPPED}"
    return line


# The plan -----------------------------------------------------------------------------------------

PLAN, DATASET, SKIPPED = "plan.json", "dataset.json", "skipped.jsonl"
RESULT = ("inputs", "records", "frames", "unaligned", "skipped")
SKIPPED_OF_RANK = "skipped-rank-{}.jsonl"  # of one that stopped over them


def plan_corpus(config: CorpusConfig) -> Plan:
    """List the inputs of every shard, or check that the plan in the folder is the same.

    Any number of processes may plan at once: they write the same.

    Raises:
        UserError: see :func:`prepare_corpus`.
    """
    settings = _settings(config)
    if (config.out / PLAN).is_file():
        plan = _read_plan(config.out)
        changed = sorted(settings.keys() ^ plan.settings.keys()) or [
            name for name in settings if plan.settings[name] != settings[name]
        ]
        if changed:
            raise UserError(
                f"--out {config.out}: was begun with another {', '.join(changed)}; choose another "
                "--out or remove the folder"
            )
        return plan
    for name in settings[source_kind(config)]:
        if config.out.resolve().is_relative_to(Path(name).resolve()):
            raise UserError(f"--out {config.out}: expected a folder outside of the source {name}")
    known = re.compile(r"work|plan\.json.*")
    others = [path.name for path in config.out.glob("*") if not known.fullmatch(path.name)]
    if others and not (config.out / PLAN).is_file():  # another rank may have planned since
        raise UserError(
            f"--out {config.out}: expected an empty or absent folder, got {min(others)} in it"
        )
    if config.aligner is not None:
        _aligner(config.aligner, config.device)  # told before it is in the plan that it is none
    inputs = _with_unique_ids(list_inputs(config))
    num_inputs = num_shards = 0
    while lines := [seal(to_json(each)) for each in islice(inputs, _shard_inputs(config))]:
        if (config.out / PLAN).is_file():  # of a rank that was faster, and may have made it all
            return plan_corpus(config)
        make_folder(_work(config))  # once there is something to prepare
        write_atomically(_inputs_path(_work(config), num_shards), "\n".join(lines) + "\n")
        num_inputs += len(lines)
        num_shards += 1
    if not num_inputs:
        names = _sources(config, settings)
        raise UserError(f"{names}: expected something to prepare, got nothing")
    if (config.out / PLAN).is_file():
        return plan_corpus(config)
    plan = Plan(settings, num_inputs, num_shards)
    write_json(config.out / PLAN, {"format": FORMAT, **asdict(plan)})
    return plan


def _settings(config: CorpusConfig) -> dict[str, Any]:
    return {
        **fingerprint(config),
        "codebook": None if config.units is None else _encoder(config.units).fingerprint,
        "aligner": config.aligner,
        "untranscribed": config.untranscribed,
        "source": _source(config),
        "shard_inputs": _shard_inputs(config),
    }


def _sources(config: CorpusConfig, settings: dict[str, Any]) -> str:
    """The files that the inputs are listed in."""
    return ", ".join(settings.get("supervisions") or settings[source_kind(config)])


def _source(config: CorpusConfig) -> str:
    return config.source or config.out.name


def _shard_inputs(config: CorpusConfig) -> int:
    return 1 if source_kind(config) in ("text", "authors") else config.shard_inputs


@cache
def _encoder(units: UnitsConfig) -> UnitEncoder:
    return load_units(units)


@cache
def _aligner(name: str, device: str) -> "CTCAligner":
    from lst.speech.alignment import CTCAligner

    return CTCAligner.load(name, device=device)


def _with_unique_ids(inputs: Iterator[Input]) -> Iterator[Input]:
    """Raises UserError at the second input of one id; a part of a text has name and start."""
    seen: set[int] = set()
    for each in inputs:
        if isinstance(each, Part):
            identity, where = f"{each.name}:{each.start}", each.path
        else:
            identity, where = each.id, each.where
        num_before = len(seen)
        seen.add(hash(identity))  # 64 bits: 10^7 ids collide by chance in 3 of 10^6 corpora
        if len(seen) == num_before:
            raise UserError(f"{where}: its id {identity!r} is another input's as well")
        yield each


def _read_plan(out: Path) -> Plan:
    path = out / PLAN
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
        raise UserError(f"{path}: expected the plan of a corpus in format {FORMAT}")
    plan = read_strictly(Plan, facts, str(path))
    made = dict.fromkeys(RESULT, 0) if plan.result is None else plan.result
    counts = [plan.num_inputs, plan.num_shards, *made.values()]
    if made.keys() != set(RESULT) or min(counts) < 0:
        raise UserError(f"{path}: expected counts of {', '.join(RESULT)}, got {made}")
    size = plan.settings.get("shard_inputs")
    if type(size) is not int or size < 1 or plan.num_shards != -(-plan.num_inputs // size):
        raise UserError(
            f"{path}: expected inputs in shards of shard_inputs, got {plan.num_inputs} in "
            f"{plan.num_shards} of {size!r}"
        )
    return plan


def _work(config: CorpusConfig) -> Path:
    return config.out / "work"


def _inputs_path(work: Path, index: int) -> Path:
    return work / f"inputs-{index:05d}.jsonl"


def _report_path(work: Path, index: int) -> Path:
    return work / f"shard-{index:05d}.json"


# A shard ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Maker:
    """Makes records of inputs."""

    kind: str
    source: str
    num_units: int
    studio: Studio | None

    @classmethod
    def of(cls, config: CorpusConfig) -> "_Maker":
        kind, source = source_kind(config), _source(config)
        studio = None
        if config.units is not None:
            aligner = None
            if config.aligner is not None:
                aligner = _aligner(config.aligner, config.device)
            studio = Studio(_encoder(config.units), aligner, config.untranscribed, source)
        return cls(kind, source, _num_units(config), studio)

    def make(self, each: Input) -> list[Outcome]:
        if isinstance(each, Utterance):
            assert self.studio is not None
            return [self._checked(self.studio.prepare(each), each.where)]
        read = text_records if self.kind == "text" else authors_records
        return [self._checked(outcome, each.path) for outcome in read(each, self.source)]

    def _checked(self, outcome: Outcome, where: str) -> Outcome:
        if isinstance(outcome, Skipped):
            return outcome
        try:
            validate_record(outcome, self.num_units, where)
            words = [word.word for word in outcome.words or ()]
            for text in (outcome.id, outcome.text or "", outcome.speaker or "", *words):
                text.encode()  # half a surrogate pair, which JSON can hold and Parquet cannot
        except (UserError, UnicodeEncodeError) as error:
            return Skipped(where, f"record {outcome.id!r}: {error}")
        return outcome


def _num_units(config: CorpusConfig) -> int:
    if config.units is not None:
        return _encoder(config.units).num_units
    return AUTHORS_UNITS if source_kind(config) == "authors" else 0


def _make_shard(
    config: CorpusConfig, maker: _Maker, plan: Plan, index: int, bar: Any
) -> ShardReport:
    work = _work(config)
    inputs = _read_inputs(_inputs_path(work, index), maker.kind, plan.inputs_of(index))
    journal_path = work / f"journal-{index:05d}.jsonl"
    with _journal(journal_path) as (outcomes, file):
        bar.update(len(outcomes))
        for each in inputs[len(outcomes) :]:
            outcomes.append(maker.make(each))
            if len(outcomes) < len(inputs):  # the shard itself follows the last one
                with writing(journal_path):
                    file.write(_entry(outcomes[-1]))
                    file.flush()
            bar.update()
        found = [each for outcome in outcomes for each in outcome]
        records = [each for each in found if isinstance(each, Record)]
        with writing(config.out):
            shard = write_shard(config.out, index, records, num_units=maker.num_units)
        report = ShardReport(
            shard=shard if records else None,
            num_inputs=len(inputs),
            num_unaligned=sum(
                each.words is None and each.text is not None and each.units is not None
                for each in records
            ),
            skipped=[each for each in found if isinstance(each, Skipped)],
        )
        write_atomically(_report_path(work, index), seal(json.dumps(asdict(report))) + "\n")
        journal_path.unlink()
    return report


def _read_inputs(path: Path, kind: str, number: int) -> list[Input]:
    """Raises UserError where they are not the ones that were planned, as far as it shows."""
    lines = read_json_lines(path)
    inputs = [from_json(kind, unseal(values, where), where) for _, where, values in lines]
    if len(inputs) != number:
        raise UserError(f"{path}: expected {number} inputs, got {len(inputs)}")
    return inputs


@contextmanager
def _journal(path: Path) -> Iterator[tuple[list[list[Outcome]], BinaryIO]]:
    """(what came of the inputs so far, a file to add to), locked against other processes.

    From the first line on that is not whole, as where a process was killed, it is dropped.
    """
    with writing(path):
        file = path.open("a+b")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path}: another process is at this shard; start each rank once"
            ) from None
        except OSError:  # a file system without locks
            pass
        outcomes: list[list[Outcome]] = []
        file.seek(0)
        num_whole = 0
        for line in file.readlines():
            found = _outcomes_of(line)
            if found is None:
                break
            outcomes.append(found)
            num_whole += len(line)
        with writing(path):
            file.truncate(num_whole)
        yield outcomes, file


def _entry(outcomes: list[Outcome]) -> bytes:
    """A line of the journal: what came of an input."""
    return f"{seal(json.dumps([_outcome_json(each) for each in outcomes]))}\n".encode()


def _outcomes_of(line: bytes) -> list[Outcome] | None:
    """What :func:`_entry` was given; None of a line that is not whole."""
    try:
        return [_outcome_of(each) for each in unseal(parse_json(line, ""), "")]
    except UserError:
        return None


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    fields = asdict(outcome)
    if isinstance(outcome, Record) and outcome.units is not None:
        fields["units"] = outcome.units.tolist()
    return fields


def _outcome_of(fields: dict[str, Any]) -> Outcome:
    if "reason" in fields:
        return Skipped(**fields)
    units, words, chars = fields["units"], fields["words"], fields["chars"]
    return Record(
        **{name: fields[name] for name in ("id", "text", "speaker", "source")},
        units=None if units is None else np.array(units, np.int16),
        words=None if words is None else tuple(Word(**word) for word in words),
        chars=None if chars is None else tuple(Span(**span) for span in chars),
    )


def _read_report(work: Path, plan: Plan, index: int) -> ShardReport:
    """Raises UserError where it is damaged, FileNotFoundError where it is not there."""
    path = _report_path(work, index)
    values = unseal(parse_json(path.read_bytes(), str(path)), str(path))
    report = read_strictly(ShardReport, values, str(path))
    got = (None if report.shard is None else report.shard.info.name, report.num_inputs)
    if got[0] not in (None, shard_name(index)) or got[1] != plan.inputs_of(index):
        raise UserError(
            f"{path}: expected {shard_name(index)} of {plan.inputs_of(index)} inputs, "
            f"got {got[0]} of {got[1]}; without this file the shard is made again"
        )
    return report


# The dataset --------------------------------------------------------------------------------------


def is_made(config: CorpusConfig) -> bool:
    """Whether the dataset is there."""
    return (config.out / DATASET).is_file()


def _join(config: CorpusConfig, plan: Plan) -> bool:
    """Make the dataset of all shards; False where some are not done."""
    work = _work(config)
    try:
        if not all(_report_path(work, index).is_file() for index in range(plan.num_shards)):
            return is_made(config)
        reports = [_read_report(work, plan, index) for index in range(plan.num_shards)]
    except FileNotFoundError:  # another rank has made it since
        return is_made(config)
    seen = _Seen(config)
    for report in reports:
        seen.add(report)
    seen.check_share(enough=0)
    shards = [report.shard for report in reports if report.shard is not None]
    if not shards:
        problem = f"{_sources(config, plan.settings)}: expected something to prepare, got nothing"
        raise seen.failure(problem) if seen.skipped else UserError(problem)
    if source_kind(config) == "authors":  # other ids are those of the inputs, or places in them
        _check_unique_ids(config, shards)
    for path in config.out.glob("shard-*.parquet.*.tmp"):  # of a process that was killed
        path.unlink(missing_ok=True)
    result = {
        "inputs": plan.num_inputs,
        "records": sum(report.num_records for report in reports),
        "frames": sum(report.num_frames for report in reports),
        "unaligned": sum(report.num_unaligned for report in reports),
        "skipped": len(seen.skipped),
    }
    seen.list_skipped(config.out / SKIPPED)
    for path in config.out.glob(SKIPPED_OF_RANK.format("*")):
        path.unlink(missing_ok=True)
    write_json(config.out / PLAN, {"format": FORMAT, **asdict(plan), "result": result})
    codebook = plan.settings["codebook"]
    if source_kind(config) == "authors":
        codebook = AUTHORS_CODEBOOK
    with writing(config.out):
        join_shards(
            config.out, shards, codebook=codebook, tokenizer=None, num_units=_num_units(config)
        )
    shutil.rmtree(work, ignore_errors=True)
    return True


class _Seen:
    """Records and skipped ones of the shards so far."""

    def __init__(self, config: CorpusConfig) -> None:
        self._config = config
        self._num_records = 0
        self.skipped: list[Skipped] = []

    def add(self, report: ShardReport) -> None:
        self._num_records += report.num_records
        self.skipped += report.skipped

    def list_skipped(self, path: Path) -> None:
        write_atomically(path, "".join(json.dumps(asdict(each)) + "\n" for each in self.skipped))

    def check_share(self, *, enough: int) -> None:
        """Raise UserError where too much of what was seen is skipped, once ``enough`` was."""
        config, num_skipped = self._config, len(self.skipped)
        num_seen = self._num_records + num_skipped
        if num_seen < enough or num_skipped <= config.max_skipped_share * num_seen:
            return
        raise self.failure(
            f"{num_skipped:,} of {num_seen:,} skipped, more than --max-skipped-share "
            f"{config.max_skipped_share:g}",
            " (what is prepared is kept: the same command with a larger share goes on)",
        )

    def failure(self, problem: str, advice: str = "") -> UserError:
        """An error to raise; what was skipped is listed for it."""
        config, first = self._config, self.skipped[0]
        name = SKIPPED if config.world_size == 1 else SKIPPED_OF_RANK.format(config.rank)
        self.list_skipped(config.out / name)
        return UserError(
            f"{problem}; all are listed in {config.out / name}, the first: "
            f"{first.where}: {first.reason}{advice}"
        )


def _check_unique_ids(config: CorpusConfig, shards: list[WrittenShard]) -> None:
    """The authors' lines bring ids of their own, which only their records tell."""
    hashes = (hash(identity) for shard in shards for identity in _ids(config, shard))
    ordered = np.sort(np.fromiter(hashes, np.int64))
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    for shard in shards if twice else []:
        for identity in _ids(config, shard):
            if hash(identity) in twice:
                path = config.out / shard.info.name
                raise UserError(f"{path}: the id {identity!r} is that of another record as well")


def _ids(config: CorpusConfig, shard: WrittenShard) -> list[str]:
    file = pq.ParquetFile(config.out / shard.info.name)
    return file.read(columns=["id"], use_threads=False).column("id").to_pylist()
