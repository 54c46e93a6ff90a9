"""Steps that go wrong: updates that are skipped, losses that jump, and the records behind them."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import lst.train.loop as loop
from lst.data.batch import IGNORE, Batch
from lst.errors import UserError
from lst.train.anomalies import ENOUGH, WINDOW, find_spike
from lst.train.checkpoint import load_model, newest_checkpoint, read_state
from lst.train.config import TrainConfig
from lst.train.loop import train
from lst.train.metrics import Loss

Tiny = Callable[..., TrainConfig]
Batches = tuple[Batch, ...]
pytestmark = pytest.mark.usefixtures("undrawn")


def read(config: TrainConfig, name: str) -> list[dict[str, Any]]:
    path = config.out / name
    texts = path.read_text().splitlines() if path.exists() else []
    return [json.loads(text, parse_constant=pytest.fail) for text in texts]


def change_batches(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Batches], Batches]
) -> dict[int, Batches]:
    """Train on ``change(step, micro-batches)``; the micro-batches by step come back."""
    real, seen = loop.backward, {}

    def backward(model: Any, micro_batches: Batches, **options: Any) -> Any:
        step = micro_batches[0].step + 1
        seen[step] = micro_batches
        return real(model, change(step, micro_batches), **options)

    monkeypatch.setattr(loop, "backward", backward)
    return seen


def poison(monkeypatch: pytest.MonkeyPatch, steps: Sequence[int]) -> None:
    """A gradient with NaN in it, of a finite loss, at the steps of these numbers."""
    real = loop.backward

    def backward(model: Any, micro_batches: Batches, **options: Any) -> Any:
        sums = real(model, micro_batches, **options)
        if micro_batches[0].step + 1 in steps:
            next(p.grad for p in model.parameters() if p.grad is not None)[0] = torch.nan
        return sums

    monkeypatch.setattr(loop, "backward", backward)


def test_a_gradient_that_is_not_finite_is_skipped_and_the_run_goes_on(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(checkpoint_every=1, validate_every=6, keep=9)
    poison(monkeypatch, [3, 4])
    train(config)
    weights = [
        load_model(config.out / "checkpoints" / f"step-{step:08d}", "cpu")[0].state_dict()
        for step in (2, 3, 4, 5)
    ]

    def same(a: int, b: int) -> bool:
        return all(torch.equal(weights[a][name], weights[b][name]) for name in weights[a])

    assert [same(0, 1), same(1, 2), same(2, 3)] == [True, True, False]
    lines = [line for line in read(config, "metrics.jsonl") if line["split"] == "train"]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 2, 2]
    assert [line["grad_norm"] is None for line in lines] == [False, False, True, True, False, False]
    assert all(line["loss"] > 0 for line in lines)
    events = read(config, "events.jsonl")
    assert [(e["step"], e["event"], e["in_a_row"]) for e in events] == [
        (3, "skipped", 1),
        (4, "skipped", 2),
    ]
    assert all(event["records"] for event in events)
    assert "step 3: expected a finite loss and gradient, got loss " in capsys.readouterr().out


def test_a_resumed_run_goes_on_counting_the_updates_skipped_in_a_row(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two before the checkpoint at step 4, and the third after it."""
    config = tiny(max_skipped=3, steps=8)
    stops = change_batches(monkeypatch, lambda _, batches: batches)
    poison(monkeypatch, [3, 4, 5])
    with pytest.raises(UserError, match=r"^step 5: .* 3 updates in a row were skipped"):
        train(config)
    state = read_state(newest_checkpoint(config.out))
    assert (state.step, state.skipped, state.skipped_in_a_row) == (4, 2, 2)
    stops.clear()
    with pytest.raises(UserError, match=r"^step 5: .* 3 updates in a row were skipped"):
        train(config, resume=True)
    assert list(stops) == [5]
    assert [event["step"] for event in read(config, "events.jsonl")] == [3, 4, 5]


def scramble_at(scrambled: int) -> Callable[[int, Batches], Batches]:
    """Targets drawn at random, in one step."""

    def scramble(step: int, batches: Batches) -> Batches:
        if step != scrambled:
            return batches
        draw = torch.Generator().manual_seed(0)
        ids = [torch.randint(5, 300, b.targets.shape, generator=draw) for b in batches]
        return tuple(
            replace(b, targets=torch.where(b.targets == IGNORE, b.targets, i))
            for b, i in zip(batches, ids, strict=True)
        )

    return scramble


def text_loss(mean: float) -> Loss:
    return Loss(text=mean, speech=0.0, text_targets=1, speech_targets=0, units_to_predict=0)


def test_targets_that_make_no_sense_are_a_spike_that_names_its_records(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(steps=50, checkpoint_every=50, validate_every=50)
    batches = change_batches(monkeypatch, scramble_at(45))
    train(config)
    (event,) = read(config, "events.jsonl")
    assert (event["step"], event["event"], event["modality"]) == (45, "spike", "text")
    assert event["loss"] > event["usual"] + 0.5
    assert event["records"] == list(dict.fromkeys(batches[45][0].record_ids))
    assert (
        f"step 45: the text loss jumped from about {event['usual']:.4f}" in capsys.readouterr().out
    )


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_a_falling_loss_are_no_spikes(seed: int) -> None:
    rng, recent = random.Random(seed), {}
    for n in range(1000):
        spike, recent = find_spike(recent, text_loss(4 + 6 / (1 + n / 20) + rng.gauss(0, 0.1)))
        assert spike is None
    assert list(recent) == ["text"]
    assert len(recent["text"]) == WINDOW


def test_a_spike_is_seen_after_enough_losses_and_twice_in_a_row() -> None:
    losses = [*[2.0] * (ENOUGH - 1), 10.0, 3.0, 3.0, 2.1]
    spikes, recent = [], {}
    for loss in losses:
        spike, recent = find_spike(recent, text_loss(loss))
        spikes.append(spike and (spike.modality, spike.loss, spike.usual))
    assert spikes == [*[None] * ENOUGH, ("text", 3.0, 2.0), ("text", 3.0, 2.0), None]


def test_a_loss_that_jumps_right_after_a_resumption_is_told(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses before it are those of the run that was stopped."""
    config = tiny(steps=46, checkpoint_every=44, validate_every=100)
    change_batches(monkeypatch, scramble_at(45))
    train(config)
    expected = read(config, "events.jsonl")
    assert [event["step"] for event in expected] == [45]
    shutil.rmtree(config.out / "checkpoints" / "step-00000046")
    train(config, resume=True)
    assert read(config, "events.jsonl") == expected
