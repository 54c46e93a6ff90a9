"""The measurement of training steps does what it says, at a size that a CPU can take."""

import gc
import json
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from benchmarks import train_steps
from benchmarks.train_steps import CASES, check, measure_steps
from lst.model import StackConfig

CPU = torch.device("cpu")


def test_small_models_pass_the_check_before_anything_is_measured():
    errors = check(CPU, eager=True)
    assert {name.split()[0] for name in errors} == {"lst", "lst-global", "token"}


def test_a_wrong_result_ends_the_measurement(monkeypatch):
    monkeypatch.setattr(train_steps, "_error", lambda got, expected: float("nan"))
    with pytest.raises(SystemExit, match="nothing was measured"):
        check(CPU, eager=True)


@pytest.mark.parametrize("name", ["lst-global", "baseline-speech"])
def test_a_case_is_measured_per_step(name):
    case = CASES[name]
    config = case.config()
    local = StackConfig(layers=1, dim=16, heads=1)
    model = replace(
        config.model,
        encoder=local,
        global_transformer=StackConfig(layers=1, dim=32, heads=1),
        decoder=local,
    )
    config = replace(config, model=model, compile=False)
    result = measure_steps(case, config, CPU, rows=1, units=300, steps=2)
    median = result["seconds_per_step"]["median"]
    assert len(result["seconds_per_step"]["all"]) == 2
    assert result["units_per_second"] == pytest.approx(300 / median)
    assert result["flops_per_second"] == pytest.approx(result["flops_per_step"] / median)
    assert result["mfu"] is None  # the peak of a CPU is not known
    assert result["profile"]["milliseconds"] > 0
    if name == "baseline-speech":  # <bos>, <s> and <eos> aside, a token is a unit and is speech
        assert result["tokens_per_second"] == pytest.approx(300 / median, rel=0.02)
        speech = result["speech_hours_per_second"] * 25 * 3600
        assert speech == pytest.approx(result["tokens_per_second"], rel=0.02)


def test_a_model_is_gone_before_the_next_one_is_measured(monkeypatch):
    """A compiled block is part of a cycle; a second 1B model beside it would seem not to fit."""
    models = []

    class Model:
        def __init__(self):
            self.forward = self.__init__

    def measure_one(*args, **options):
        assert [model() for model in models] == [None] * len(models)
        models.append(weakref.ref(Model()))
        if len(models) == 1:
            raise torch.OutOfMemoryError
        return options["rows"]

    monkeypatch.setattr(train_steps, "measure_steps", measure_one)
    gc.disable()
    try:
        for rows in (2, 4):
            assert train_steps.measure(CASES["lst"], CPU, rows=4, steps=1, eager=True) == rows
    finally:
        gc.enable()


def test_a_model_that_fails_is_named_and_the_others_are_measured(monkeypatch, tmp_path, capsys):
    def measure(case, device, **options):
        if case.name == "baseline":
            raise RuntimeError("no such kernel\nand a long story")
        return {"case": case.name}

    about = {"device": "Toy GPU", "date": "2026-01-02"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train_steps, "describe_machine", lambda device: about)
    monkeypatch.setattr(train_steps, "check", lambda device, eager: {})
    monkeypatch.setattr(train_steps, "measure", measure)
    cases = ("lst", "baseline", "lst-global")
    monkeypatch.setattr(sys, "argv", ["train_steps", "--out", str(tmp_path), "--cases", *cases])
    with pytest.raises(SystemExit, match="error: not measured: baseline"):
        train_steps.main()
    result = json.loads((tmp_path / "train-steps-toy-gpu-2026-01-02.json").read_text())
    assert result["steps"] == [{"case": "lst"}, {"case": "lst-global"}]
    assert result["failed"] == {"baseline": "RuntimeError: no such kernel"}
    assert "and a long story" in capsys.readouterr().err


def test_every_case_is_a_preset_with_one_thing_changed():
    for case in CASES.values():
        config = case.config()
        assert config.name == case.preset
        assert config.model.text_path == case.text_path
        assert config.compile
