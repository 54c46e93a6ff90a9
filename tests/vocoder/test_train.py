"""Training: it learns, it is the same however often it is stopped, and nothing is half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file

from lst.errors import UserError
from lst.speech.sound import load_voice, sound_of
from lst.speech.units import LogMelKMeans
from lst.vocoder import config as sizes
from lst.vocoder.clips import Clip, draw, make_clips, read_clips, samples_of, write_clips
from lst.vocoder.config import DiscriminatorConfig, GeneratorConfig
from lst.vocoder.discriminators import Discriminators
from lst.vocoder.generator import Generator
from lst.vocoder.losses import (
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    log_mel_spectrogram,
)
from lst.vocoder.train import TrainVocoderConfig, duration_loss, train_vocoder

pytest.importorskip("soundfile")

SMALL = replace(
    sizes.SIZES["tiny"],
    embedding_dim=16,
    upsample_initial_channel=32,
    discriminator=DiscriminatorConfig(periods=(2, 3), num_scales=2, channels=16),
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(sizes.SIZES, "small", SMALL)


def configured(recordings, out, **values):
    given = {
        "manifest": (recordings / "manifest.csv",),
        "codebook": recordings / "codebook.safetensors",
        "out": out,
        "size": "small",
        "by_speaker": True,
        "batch": 2,
        "stretch_units": 8,
        "learning_rate": 2e-3,
        "held_out": 1,
        "report_every": 1,
        "save_every": 2,
    }
    return TrainVocoderConfig(**{**given, **values})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "generator.safetensors")


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_stopped_anywhere_ends_with_the_bits_of_one_that_was_not(recordings, tmp_path):
    settings = {"predict_durations": True, "alone_steps": 1}
    whole = configured(recordings, tmp_path / "whole", steps=5, **settings)
    train_vocoder(whole)
    for steps in (1, 3, 5):  # the first of them before the discriminators take part
        train_vocoder(configured(recordings, tmp_path / "parts", steps=steps, **settings))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    for name in ("discriminators", "discriminators-optimizer", "generator-optimizer"):
        file = f"checkpoints/step-00000005/{name}.safetensors"
        one, other = load_file(tmp_path / "whole" / file), load_file(tmp_path / "parts" / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)

    def losses(out):
        return [
            {name: value for name, value in line.items() if name != "seconds"}
            for line in lines(out)
            if line["split"] == "train"
        ]

    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert "durations" in losses(tmp_path / "whole")[0]
    assert "adversarial" not in losses(tmp_path / "whole")[0]
    assert "adversarial" in losses(tmp_path / "whole")[1]


def test_hums_are_learnt(recordings, tmp_path):
    """A few voices of one hum each: the mel loss falls by 40 % and more in 60 steps."""
    config = configured(
        recordings, tmp_path, steps=60, alone_steps=60, batch=4, save_every=60, report_every=20,
        learning_rate=5e-3,
    )  # fmt: skip
    train_vocoder(config)
    found = [line["mel"] for line in lines(tmp_path) if line["split"] == "train"]
    assert found[-1] < 0.6 * found[0]


def test_a_trained_folder_speaks(recordings, tmp_path):
    train_vocoder(configured(recordings, tmp_path, steps=2))
    voice = load_voice(tmp_path)
    codebook = LogMelKMeans.load(recordings / "codebook.safetensors")
    assert (voice.codebook, voice.num_units) == (codebook.fingerprint, 20)
    assert voice.speakers == ("high", "low")
    samples = sound_of(np.arange(20), voice, codebook=codebook.fingerprint, speaker="low")
    assert samples.shape == (20 * 640,)
    with pytest.raises(UserError, match="expected a voice for units of codebook"):
        sound_of(np.arange(20), voice, codebook="sha256:another")
    import soundfile

    heard = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in heard] == ["00000002.wav", "original.wav"]
    for path in heard:
        samples, rate = soundfile.read(path)
        assert rate == 16_000
        assert len(samples) % 640 == 0
        assert 0 < np.abs(samples).max() < 1


def test_the_last_two_checkpoints_are_kept(recordings, tmp_path):
    train_vocoder(configured(recordings, tmp_path, steps=5, save_every=1))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005"]
    train_vocoder(configured(recordings, tmp_path, steps=5, save_every=1))  # nothing left to do
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept


def test_a_held_out_recording_is_never_learnt_from(recordings, tmp_path):
    from lst.speech.units import load_units
    from lst.vocoder.train import _Run

    config = configured(recordings, tmp_path, held_out=2)
    tmp_path.mkdir(exist_ok=True)
    run = _Run.of(config, load_units(config.units))
    held_out = {clip.utterance.audio for clip in run._held_out}
    learnt = {clip.utterance.audio for clip in run._clips}
    assert (len(held_out), len(learnt)) == (2, 4)
    assert not held_out & learnt


# --- stopped --------------------------------------------------------------------------------------


COMMAND = """
import sys
from dataclasses import replace
from lst.vocoder import config as sizes
from lst.vocoder.config import DiscriminatorConfig
sizes.SIZES["small"] = replace(
    sizes.SIZES["tiny"], embedding_dim=16, upsample_initial_channel=32,
    discriminator=DiscriminatorConfig(periods=(2, 3), num_scales=2, channels=16),
)
from lst.errors import run_command
from lst.vocoder.__main__ import main
run_command(main)
"""


def started(recordings, out, save_every):
    words = [
        "train", "--manifest", recordings / "manifest.csv", "--codebook",
        recordings / "codebook.safetensors", "--out", out, "--size", "small", "--by-speaker",
        "--batch", 2, "--stretch-units", 8, "--learning-rate", 2e-3, "--held-out", 1,
        "--report-every", 1, "--save-every", save_every,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def wait_for_step(process, out, step):
    for _ in range(1200):
        if (out / "metrics.jsonl").is_file() and any(
            line["step"] >= step for line in lines(out) if line["split"] == "train"
        ):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError("no step in a minute")


def test_ctrl_c_loses_nothing_and_a_kill_no_more_than_the_last_save(recordings, tmp_path):
    interrupted = started(recordings, tmp_path, 100_000)
    wait_for_step(interrupted, tmp_path, 2)
    interrupted.send_signal(signal.SIGINT)
    said, _ = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 0, said
    assert "SIGINT: stopped after step" in said
    (folder,) = (tmp_path / "checkpoints").iterdir()
    stopped = json.loads((folder / "state.json").read_text())["step"]
    assert stopped == max(line["step"] for line in lines(tmp_path))
    killed = started(recordings, tmp_path, 1)
    wait_for_step(killed, tmp_path, stopped + 2)
    killed.kill()
    killed.communicate(timeout=60)
    steps = [int(each.name[5:]) for each in (tmp_path / "checkpoints").glob("step-*")]
    assert max(steps) > stopped
    end = max(steps) + 1
    train_vocoder(configured(recordings, tmp_path, steps=end))
    straight = tmp_path / "straight"
    train_vocoder(configured(recordings, straight, steps=end))
    found, expected = weights(tmp_path), weights(straight)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_damaged_checkpoint_is_told_of(recordings, tmp_path):
    train_vocoder(configured(recordings, tmp_path, steps=1))
    path = tmp_path / "checkpoints/step-00000001/generator.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step-00000001: damaged \(generator.safetensors: expec"):
        train_vocoder(configured(recordings, tmp_path, steps=2))


def test_other_settings_or_another_folder_are_refused(recordings, tmp_path):
    train_vocoder(configured(recordings, tmp_path / "run", steps=1))
    with pytest.raises(UserError, match=r"run of batch 2, not 3, seed 0, not 1; choose another"):
        train_vocoder(configured(recordings, tmp_path / "run", steps=2, batch=3, seed=1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="expected an empty or absent folder, got files"):
        train_vocoder(configured(recordings, tmp_path / "other"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "huge"}, r"--size: expected one of hifigan, tiny.*got 'huge'"),
        ({"steps": 0}, "--steps: expected 1 or more, got 0"),
        ({"stretch_units": -1}, "--stretch-units: expected 1 or more"),
        ({"alone_steps": -1}, "--alone-steps: expected 0 or more"),
        ({"seed": -1}, "--seed: expected 0 or more"),
        ({"learning_rate": float("nan")}, "--learning-rate: expected more than 0, got nan"),
        ({"manifest": (), "text": ("a.txt",)}, "--text: expected a source of audio"),
        ({"hubert": "somewhere"}, "--hubert and --layer together"),
    ],
)
def test_bad_options_are_told_of(recordings, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        configured(recordings, tmp_path, **values)


def test_too_few_recordings_are_told_of(recordings, tmp_path):
    with pytest.raises(UserError, match="more than the 6 recordings that are held out, of at leas"):
        train_vocoder(configured(recordings, tmp_path / "one", held_out=6))
    with pytest.raises(UserError, match="at least 900 units each, got 0"):
        train_vocoder(configured(recordings, tmp_path / "two", stretch_units=900))
    with pytest.raises(UserError, match=r"--by-speaker: .*\.wav: expected a speaker, got none"):
        train_vocoder(configured(recordings, tmp_path / "three", manifest=(), folder=recordings))


def test_what_fails_before_the_first_clip_takes_no_folder(recordings, tmp_path):
    with pytest.raises(UserError, match="device tpu: expected one that is here"):
        train_vocoder(configured(recordings, tmp_path / "none", device="tpu"))
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="nowhere: no codebook could be read"):
        train_vocoder(configured(recordings, tmp_path / "run", codebook=Path("nowhere")))
    with pytest.raises(UserError, match="--by-speaker: "):
        train_vocoder(configured(recordings, tmp_path / "run", manifest=(), folder=recordings))
    assert "1 steps" in train_vocoder(configured(recordings, tmp_path / "run", steps=1))


# --- clips ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(recordings):
    from lst.prepare.sources import Sources

    encoder = LogMelKMeans.load(recordings / "codebook.safetensors")
    found, passed_over = make_clips(Sources(manifest=(recordings / "manifest.csv",)), encoder)
    assert passed_over == []
    return found


def test_stretches_are_units_and_the_samples_they_are_of(recordings, clips):
    import soundfile

    found = draw(clips, ["high", "low"], batch=64, num_units=8, seed=1, step=2)
    assert found.samples.shape == (64, 8 * 640)
    whole = {index: soundfile.read(recordings / f"{index}.wav")[0] for index in range(6)}
    for units, samples, speaker in zip(found.units, found.samples, found.speakers, strict=True):
        places = [
            (index, start)
            for index, clip in enumerate(clips)
            for start in range(len(clip.units) - 7)
            if np.array_equal(clip.units[start : start + 8], units)
        ]
        matches = []
        for index, start in places:
            expected = whole[index][640 * start : 640 * (start + 8)]
            expected = np.pad(expected, (0, 8 * 640 - len(expected)))
            if np.abs(expected - samples).max() < 1e-4:
                matches.append(index)
        assert matches
        assert speaker == ("low", "high").index(("low", "high")[matches[0] % 2]) ^ 1


def test_a_step_s_stretches_depend_on_its_number_and_seed_alone(clips):
    def units(seed, step):
        return draw(clips, [], batch=8, num_units=8, seed=seed, step=step).units

    np.testing.assert_array_equal(units(1, 5), units(1, 5))
    assert (units(1, 5) != units(1, 6)).any()
    assert (units(1, 5) != units(2, 5)).any()


def test_every_start_is_drawn_as_often(clips):
    short = [
        Clip(clip.utterance, clip.units[: 8 + number]) for number, clip in enumerate(clips[:3])
    ]
    draws = draw(short, [], batch=1200, num_units=8, seed=0, step=0)
    expected = np.concatenate(
        [np.lib.stride_tricks.sliding_window_view(clip.units, 8) for clip in short]
    )
    counts = [int((draws.units == each).all(1).sum()) for each in expected]
    assert len(counts) == 6
    assert min(counts) > 140


def test_clips_are_read_as_they_were_written(clips, tmp_path):
    assert read_clips(tmp_path) is None
    write_clips(tmp_path, clips)
    found = read_clips(tmp_path)
    assert [clip.utterance for clip in found] == [clip.utterance for clip in clips]
    for one, other in zip(found, clips, strict=True):
        np.testing.assert_array_equal(one.units, other.units)
    path = tmp_path / "clips.safetensors"
    tensors, whole = load_arrays(path), path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"clips\.safetensors: expected the units of clips\.jsonl"):
        read_clips(tmp_path)
    tensors["units"][3] ^= 1
    save_arrays(tensors, path)
    with pytest.raises(UserError, match=r"clips\.safetensors: damaged: expected the units of"):
        read_clips(tmp_path)
    path.write_bytes(whole)
    lines = (tmp_path / "clips.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "clips.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=rf"clips\.safetensors: .* {len(lines) - 1} clips of"):
        read_clips(tmp_path)
    (tmp_path / "clips.jsonl").write_text("".join([lines[0], "{}\n", *lines[2:]]))
    with pytest.raises(UserError, match=r"clips\.jsonl, line 2: missing key"):
        read_clips(tmp_path)


def test_a_recording_that_cannot_be_read_is_passed_over(recordings, tmp_path):
    from lst.prepare.sources import Sources

    (tmp_path / "noise.wav").write_bytes(b"no audio")
    (tmp_path / "good.wav").write_bytes((recordings / "0.wav").read_bytes())
    encoder = LogMelKMeans.load(recordings / "codebook.safetensors")
    found, passed_over = make_clips(Sources(folder=tmp_path), encoder)
    assert len(found) == 1
    assert len(passed_over) == 1
    assert "noise.wav" in passed_over[0]
    (tmp_path / "good.wav").unlink()
    with pytest.raises(UserError, match=r"good.wav: expected an audio file, got none"):
        samples_of(found[0], 0, 3)


# --- discriminators and losses --------------------------------------------------------------------


def test_each_discriminator_judges_samples_of_any_length():
    made = Discriminators(DiscriminatorConfig(channels=64))
    for samples in (640, 641, 8960):
        outputs = made(torch.randn(2, samples))
        assert len(outputs) == 5 + 3
        assert all(layer.shape[0] == 2 for each in outputs for layer in each)
        assert [len(each) for each in outputs] == [6] * 5 + [8] * 3


def test_a_discriminator_learns_to_tell_noise_from_a_tone():
    torch.manual_seed(0)
    made = Discriminators(SMALL.discriminator)
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
    tone = torch.sin(torch.arange(1280) * 0.3)[None].repeat(4, 1)
    for _ in range(40):
        loss = discriminator_loss(made(tone), made(0.5 * torch.randn(4, 1280)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * 4  # of four discriminators; 4 · (1 + 0) where nothing is learnt


def test_losses_are_what_their_formulas_say():
    real = [[torch.tensor([1.0, 2.0]), torch.tensor([0.5])], [torch.tensor([3.0]), torch.ones(2)]]
    made = [[torch.tensor([0.0, 4.0]), torch.tensor([0.2])], [torch.tensor([1.0]), torch.zeros(2)]]
    assert discriminator_loss(real, made) == pytest.approx(0.25 + 0.04 + 0 + 0)
    assert adversarial_loss(made) == pytest.approx(0.64 + 1)
    assert feature_loss(real, made) == pytest.approx(1.5 + 2)


def test_a_tone_is_loudest_in_the_band_at_its_pitch():
    top = 2595 * np.log10(1 + 8000 / 700)
    for hertz in (300, 1000, 4000):
        samples = torch.sin(2 * torch.pi * hertz * torch.arange(4096) / 16_000)[None]
        mels = log_mel_spectrogram(samples)
        assert mels.shape == (1, 80, 16)
        place = 2595 * np.log10(1 + hertz / 700) / top * 81 - 1
        assert abs(int(mels[0, :, 8].argmax()) - place) <= 1
    silence = log_mel_spectrogram(torch.zeros(1, 1024))
    assert torch.equal(silence, torch.full_like(silence, float(np.log(np.float32(1e-5)))))


def test_durations_that_are_cut_off_at_a_stretch_s_ends_do_not_count():
    config = sizes.SIZES["small"].generator(num_units=9, num_speakers=0, predict_durations=True)
    assert isinstance(config, GeneratorConfig)
    made = Generator(config).eval()
    torch.nn.init.zeros_(made.dur_predictor.proj.weight)
    torch.nn.init.constant_(made.dur_predictor.proj.bias, np.log(4.0))
    units = torch.tensor([[1, 1, 1, 2, 2, 2, 5, 5], [3, 3, 3, 3, 3, 3, 3, 3]])
    assert duration_loss(made, units).item() == pytest.approx(0, abs=1e-12)
    units = torch.tensor([[1, 2, 2, 2, 2, 2, 2, 2, 3]])
    assert duration_loss(made, units).item() == pytest.approx(np.log(2) ** 2, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"manifest": (), "folder": Path("none")}, "--folder none: expected a folder, got none"),
        ({"codebook": Path("none")}, "none: no codebook could be read here"),
    ],
)
def test_a_source_and_a_codebook_that_are_none_leave_no_folder(
    recordings, tmp_path, values, message
):
    with pytest.raises(UserError, match=message):
        train_vocoder(configured(recordings, tmp_path / "run", **values))
    assert not (tmp_path / "run").exists()
