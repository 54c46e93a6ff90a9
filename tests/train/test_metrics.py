"""Losses in nats and bits, lines cut back to a checkpoint, and a drawing of them."""

import json
import math
from pathlib import Path

import pytest

from lst.train.metrics import Loss, drop_lines_after, plot_losses


def test_a_loss_is_a_mean_over_targets_in_nats_and_in_bits() -> None:
    loss = Loss(text=6 * math.log(2), speech=2 * math.log(2), text_targets=3, speech_targets=1)
    got = loss.per_token()
    assert [got[name] for name in ("bits", "bits_text", "bits_speech")] == pytest.approx([2, 2, 2])
    assert got["loss"] == pytest.approx(2 * math.log(2))


def test_a_modality_without_targets_has_no_loss() -> None:
    got = Loss(text=3.0, speech=0.0, text_targets=2, speech_targets=0).per_token()
    assert (got["loss"], got["loss_text"], got["loss_speech"], got["bits_speech"]) == (
        1.5,
        1.5,
        None,
        None,
    )


def test_lines_after_the_checkpoint_and_a_torn_one_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = [{"step": 1, "split": "train"}, {"step": 2, "split": "valid/text"}]
    texts = [json.dumps(line) for line in [*kept, {"step": 3, "split": "train"}]]
    path.write_text("\n".join([*texts, '{"step": 1, "spl']))
    assert drop_lines_after(path, 2) == kept
    assert [json.loads(text) for text in path.read_text().splitlines()] == kept
    assert drop_lines_after(tmp_path / "none.jsonl", 2) == []


def test_losses_are_drawn_also_where_a_modality_is_missing(tmp_path: Path) -> None:
    lines = [
        {"step": step, "split": split, "loss_text": 3.0 / step, "loss_speech": None}
        for step in (1, 2)
        for split in ("train", "valid/text")
    ]
    plot_losses(lines, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
