"""A study runs every arm at both budgets, once; goes on where it was stopped; and says of a
difference only what items and seeds bear out."""

import json
import sys
from dataclasses import replace
from math import sqrt

import pytest
import torch

from lst.compare import __main__ as command
from lst.compare.__main__ import CompareConfig, compare
from lst.compare.arms import ARMS
from lst.compare.presets import STUDIES
from lst.compare.report import Accuracy, accuracy, format_differences, format_table
from lst.compare.report import compare as told_apart
from lst.compare.study import Result, Study, plan, read_result, run_folder
from lst.data.loader import DataConfig
from lst.errors import UserError
from lst.model import ModelConfig, StackConfig
from lst.prepare.demo import DemoConfig
from lst.train.config import OptimizerConfig

TINY = STUDIES["tiny"]


def score(share, task="hellaswag", mode="S→S", items=100):
    return {
        "task": task, "mode": mode, "measure": "sum", "num_items": items,
        "accuracy": share, "low": 0.0, "high": 1.0, "chance": 0.25,
    }  # fmt: skip


def result(arm="static", *, share=0.5, seed=0, **changes):
    values = {
        "steps": 10, "units": 1000, "text_tokens": 600, "speech_units": 1400, "flops": 4e12,
        "seconds": 60.0, "valid": {}, "scores": [score(share)],
    }  # fmt: skip
    return Result(arm=arm, seed=seed, **(values | changes))


# --- which runs -----------------------------------------------------------------------------------


def test_every_arm_comes_once_before_any_comes_again_and_compute_before_data():
    study = replace(TINY, seeds={"baseline": 2})
    planned = [(p.arm.name, p.budget, p.seed) for p in plan(study, tuple(ARMS.values()))]
    names = list(ARMS)
    assert planned == [
        *((name, "compute", 0) for name in names),
        *((name, "data", 0) for name in names),
        ("baseline", "compute", 1),
        ("baseline", "data", 1),
    ]


def test_arms_differ_in_patching_and_architecture_alone():
    base = TINY.base
    for name, arm in ARMS.items():
        config = arm.configure(base)
        assert config.data.patching.strategy == arm.patching
        assert (config.model.architecture == "token") == (name in ("baseline", "bpe"))
        assert config.model.text_path == ("global" if name == "curriculum-global" else "local")
        same = replace(
            config,
            name=base.name,
            model=replace(config.model, architecture="lst", text_path="local"),
            data=replace(config.data, patching=base.data.patching),
        )
        assert same == base


@pytest.mark.parametrize("seeds", [{"transformer": 1}, {"static": 0}])
def test_seeds_of_no_arm_or_none_are_refused(seeds):
    with pytest.raises(UserError, match="seeds: expected"):
        replace(TINY, seeds=seeds)


# --- running them ---------------------------------------------------------------------------------

TOKENS_PER_STEP = {"baseline": 100, "static": 125, "aligned": 126}


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Runs that leave their files at once; a list of what was trained, in order."""
    done = []

    def train(config, *, resume):
        arm = config.name.removeprefix("tiny-")
        done.append((arm, config.steps, config.seed, resume))
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "config.json").write_text("{}")
        if done[-1][:3] in unfinished:
            return
        tokens = config.steps * TOKENS_PER_STEP[arm]
        seen = {"seen_units": 10, "seen_text_tokens": tokens, "seen_speech_units": 0, "flops": 1e12}
        seen |= {"seconds": 1.0, "bits_text": 2.0, "bits_per_second": None}
        lines = [
            {"step": config.steps, "split": split, **seen}
            for split in ("train", "valid/text", "valid/speech")
        ]
        (config.out / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (config.out / "story_completion.json").write_text(json.dumps([score(0.5)]))

    unfinished = set()
    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "_corpus", lambda *_: tmp_path)
    monkeypatch.setitem(STUDIES, "tiny", replace(TINY, seeds={}))
    return done, unfinished


def options(tmp_path, **changes):
    arms = ("baseline", "static", "aligned")
    return CompareConfig(**{"out": tmp_path / "out", "arms": arms, "device": "cpu"} | changes)


def test_data_controlled_runs_take_as_many_steps_as_the_reference_data_need(trained, tmp_path):
    compare(options(tmp_path))
    steps = TINY.base.steps
    assert [run[:3] for run in trained[0]] == [
        ("baseline", steps, 0),
        ("static", steps, 0),
        ("aligned", steps, 0),
        ("baseline", round(steps * 125 / 100), 0),
    ]  # aligned reads within 1 % of the reference, so one run serves both budgets
    held = json.loads((tmp_path / "out" / "results.json").read_text())
    assert held["missing"] == []
    assert [len(held["runs"][budget]) for budget in ("compute", "data")] == [3, 3]
    assert held["runs"]["data"]["baseline"][0]["text_tokens"] == 7500


def test_a_finished_study_trains_nothing_more(trained, tmp_path):
    first = compare(options(tmp_path)).read_text()
    trained[0].clear()
    assert compare(options(tmp_path)).read_text().splitlines()[:-1] == first.splitlines()[:-1]
    assert trained[0] == []


def test_without_matplotlib_the_report_has_its_tables(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = compare(options(tmp_path)).read_text()
    assert "| Base SpeechLLM | 1 |" in page
    assert "![" not in page
    assert "no curves-data.png is drawn: pip install 'lst[plots]'" in capsys.readouterr().out


def test_a_stopped_study_reports_what_it_has_and_goes_on_with_the_run_under_way(trained, tmp_path):
    done, unfinished = trained
    unfinished.add(("static", TINY.base.steps, 0))
    page = compare(options(tmp_path)).read_text()
    assert [run[0] for run in done] == ["baseline", "static"]
    assert "Not finished.** 5 runs are missing" in page
    assert "| Base SpeechLLM | 1 |" in page
    unfinished.clear()
    done.clear()
    assert "missing" not in compare(options(tmp_path)).read_text()
    assert done[0] == ("static", TINY.base.steps, 0, True)
    assert [run[0] for run in done] == ["static", "aligned", "baseline"]


def test_no_run_starts_after_the_minutes_are_over(trained, tmp_path):
    page = compare(options(tmp_path, minutes=1e-9)).read_text()
    assert trained[0] == []
    assert "6 runs are missing" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("static", "dynamic")}, "--arms: expected some of .*, got 'dynamic'"),
        ({"arms": ("baseline",)}, "--arms: expected 'static' among them"),
        ({"minutes": 0.0}, "--minutes: expected more than 0, got 0.0"),
        ({"minutes": float("nan")}, "--minutes: expected more than 0, got nan"),
        ({"workers": 0}, "--workers: expected 1 or more, got 0"),
    ],
)
def test_bad_options_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        CompareConfig(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_here_is_told_before_a_corpus_is_made(tmp_path):
    made = tmp_path / "corpus"
    with pytest.raises(UserError, match="device cuda: expected one that is here"):
        compare(CompareConfig(device="cuda", corpus=made, out=tmp_path / "out"))
    assert not made.exists()


# --- what is said of them -------------------------------------------------------------------------


def test_an_accuracy_has_the_error_of_its_items_and_of_its_seeds():
    shares = (0.5, 0.6, 0.7)
    found = accuracy(
        [result(share=share, seed=i) for i, share in enumerate(shares)], *("hellaswag", "S→S")
    )
    assert found.mean == pytest.approx(60)
    assert found.deviation == pytest.approx(10)
    assert found.error == pytest.approx(100 * sqrt(0.6 * 0.4 / 100 + 0.1**2 / 3))
    assert str(found) == "60.0 ± 10.0"
    assert str(accuracy([result(share=0.5)], "hellaswag", "S→S")) == "50.0"
    assert accuracy([result()], "hellaswag", "T→T") is None


@pytest.mark.parametrize(
    ("ours", "verdict"), [(54.0, "not told apart"), (57.0, "better"), (43.0, "worse")]
)
def test_a_difference_counts_from_1_96_standard_errors(ours, verdict):
    def of(mean):
        return Accuracy(mean=mean, deviation=None, error=2.0, chance=25.0)

    said, difference, half = told_apart(of(ours), of(50.0))
    assert said == verdict
    assert difference == ours - 50
    assert half == pytest.approx(1.96 * sqrt(8))


def test_tables_show_what_was_read_spent_and_saved():
    runs = {
        "baseline": [result("baseline", flops=8e12, share=0.25)],
        "static": [result(flops=6e12, share=0.75, seconds=90.0), result(share=0.65, seed=1)],
    }
    baseline, static = format_table(runs).splitlines()[2:]
    assert baseline.startswith(
        "| Base SpeechLLM | 1 | 10 | 1,000 | 1,400 | 600 | 8.00 | 0.0% | 1.0 | 25.0 | – |"
    )
    assert static.startswith(
        "| LST (Static) | 2 | 10 | 1,000 | 1,400 | 600 | 5.00 | 37.5% | 1.2 | 70.0 ± 7.1 | – |"
    )
    assert "| LST (Static) | +45.0 ± 15.8, **better** | – |" in format_differences(runs)


# --- for real -------------------------------------------------------------------------------------


SEEN = {"seen_units": 3, "seen_text_tokens": 2, "seen_speech_units": 4, "flops": 1e9, "seconds": 1}
TRAINED = {"step": 10, "split": "train", **SEEN}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "{", ", line 1: expected JSON"),
        ("metrics.jsonl", '{"step": 10, "split": "valid"}', ": expected the metrics of a finished"),
        ("metrics.jsonl", json.dumps(TRAINED | {"flops": "x"}), ", line 1: expected flops to be"),
        ("metrics.jsonl", json.dumps(TRAINED | {"flops": None}), ": expected flops to be float"),
        ("metrics.jsonl", '{"step": 10, "split": "train"}', ": missing key units"),
        ("story_completion.json", "[", ": expected JSON"),
        ("story_completion.json", "{}", ": expected a list of scores, got dict"),
        ("story_completion.json", '[{"task": "x"}]', ": missing key mode"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_finished_run_is_named(tmp_path, name, content, message):
    folder = run_folder(tmp_path, ARMS["static"], 10, 0)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps(TRAINED))
    (folder / "story_completion.json").write_text(json.dumps([score(0.5)]))
    assert read_result(tmp_path, ARMS["static"], 10, 0) == result(
        units=3, text_tokens=2, speech_units=4, flops=1e9, seconds=1.0
    )
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}{message}"):
        read_result(tmp_path, ARMS["static"], 10, 0)


def test_real_arms_train_are_scored_and_drawn(tiny_corpus, tmp_path, monkeypatch):
    settings = json.loads((tiny_corpus / "corpus.json").read_text())["settings"]
    local = StackConfig(layers=1, dim=16, heads=1)
    study = Study(
        name="tiny",
        claim="A test.",
        corpus=DemoConfig(**settings),
        base=replace(
            TINY.base,
            model=ModelConfig(
                encoder=local,
                global_transformer=StackConfig(layers=1, dim=32, heads=1),
                decoder=local,
            ),
            data=DataConfig(rows=2, units_per_sequence=128),
            optimizer=OptimizerConfig(warmup_steps=1),
            steps=2,
            validate_every=1,
            checkpoint_every=2,
            log_every=1,
        ),
        speech_pieces=520,
    )
    monkeypatch.setitem(STUDIES, "tiny", study)
    arms = ("bpe", "static", "curriculum-global")
    options = CompareConfig(out=tmp_path, corpus=tiny_corpus, arms=arms, device="cpu")
    page = compare(options).read_text()
    for title in ("BPE SpeechLLM", "LST (Static)", "LST (Curriculum, text_path global)"):
        assert page.count(f"| {title} | 1 |") == 2
    for budget in ("compute", "data"):
        assert (tmp_path / f"curves-{budget}.png").read_bytes().startswith(b"\x89PNG")
    held = json.loads((tmp_path / "results.json").read_text())["runs"]["compute"]
    for name in arms:
        (run,) = held[name]
        assert run["units"] == 2 * 2 * 127
        assert run["flops"] > 0
        assert {each["mode"] for each in run["scores"]} == {"S→S", "T→T"}
    # A piece stands for several units: more speech in as many units of the transformer.
    assert held["bpe"][0]["speech_units"] > 0
