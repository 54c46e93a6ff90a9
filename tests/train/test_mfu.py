"""MFU is the needed FLOPs of what a step trained on, over what its devices could have done."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lst.train.loop as loop
import lst_kernels
from lst.train.config import TrainConfig
from lst.train.loop import train
from lst.train.mfu import Peak, describe, find_peak

Tiny = Callable[..., TrainConfig]


@pytest.mark.usefixtures("undrawn")
def test_a_line_counts_what_was_trained_on(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FlopCounterMode sees more: the dead tail, and the logits made again in the backward pass."""
    real, counted, batches = loop.backward, [], []

    def backward(model: Any, micro_batches: Any, **options: Any) -> Any:
        batches.extend(micro_batches)
        counter = FlopCounterMode(display=False)
        with lst_kernels.backend("reference"), counter:
            sums = real(model, micro_batches, **options)
        counted.append(counter.get_total_flops())
        return sums

    monkeypatch.setattr(loop, "backward", backward)
    config = tiny(accumulation=2, steps=4, log_every=2, validate_every=4, peak_tflops=0.25)
    train(config)
    lines = list(map(json.loads, (config.out / "metrics.jsonl").read_text().splitlines()))
    first, second = [line for line in lines if line["split"] == "train"]
    assert (first["step"], second["step"]) == (2, 4)
    assert sum(counted[:2]) / 2 < first["flops"] < sum(counted[:2])
    assert sum(counted) / 2 < second["flops"] < sum(counted)
    spent = second["flops"] - first["flops"]
    assert second["flops_per_second"] == pytest.approx(spent / (2 * second["step_seconds"]))
    assert second["mfu"] == pytest.approx(second["flops_per_second"] / 0.25e12)
    for key, each in {
        "seen_units": lambda b: b.num_units,
        "seen_tokens": lambda b: b.num_tokens,
        "seen_text_tokens": lambda b: b.num_text_tokens,
        "seen_speech_units": lambda b: b.num_speech_tokens,
    }.items():
        assert (first[key], second[key]) == (sum(map(each, batches[:4])), sum(map(each, batches)))
        valid = [line for line in lines if line["split"].startswith("valid")]
        assert valid
        assert all(line[key] == second[key] for line in valid)
    rate = (second["seen_tokens"] - first["seen_tokens"]) / (2 * second["step_seconds"])
    assert second["tokens_per_second"] == pytest.approx(rate)
    said = capsys.readouterr().out
    assert "MFU = FLOPs of a step / (its seconds × 1 × 0.25 TFLOP/s, by --peak-tflops)" in said
    assert f"MFU {second['mfu']:.1%}" in said


def test_the_peak_is_that_of_the_device_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for name, tflops in {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.5,
        "NVIDIA H200": 989.4,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA B200": 2250.0,
        "NVIDIA GB200": 2500.0,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert find_peak(cuda, None) == Peak(tflops, f"{name}, dense bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GeForce GTX 1080")
    assert find_peak(cuda, None) is None
    assert "MFU is not reported" in describe(None, cuda, 1)
    assert find_peak(cuda, 8.5) == Peak(8.5, "by --peak-tflops")
    assert find_peak(torch.device("cpu"), None) is None
