"""How near do forced alignments come to the truth, and how fast are they?

    python -m lst.prepare demo
    python -m benchmarks.alignment --out benchmarks/results

A small wav2vec 2.0 with a CTC head is trained on the demo corpus, of which it sees sentences and
what is written, never when a word is spoken. It is saved as transformers saves any such model, and
aligns the held-out stories, by known voices and by one that was not heard in training, whose true
word times the synthesiser knows. Reported are the shares of word starts and stops within 20, 40 and
80 ms of the truth, in seconds as the model has them and in the 40 ms frames of a record; and how
late they are in the median, with the shares about it: a model of CTC may be late all along, which
no search can know.

The same model tells how far windows change what a trained network says of a long waveform, and how
many times real time aligning takes.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lst.data.records import FRAMES_PER_SECOND, Dataset
from lst.errors import UserError, expect_positive, run_command
from lst.files import make_folder, write_json
from lst.machine import describe_machine, file_stem
from lst.speech.alignment import CTCAligner
from lst.speech.audio import SAMPLE_RATE, Timed
from lst.speech.synthesis import HELD_OUT_VOICE, TRAINING_VOICES, Speech, synthesize
from lst.speech.units import FRAME_SAMPLES
from lst.speech.wav2vec2 import FrameModel

CHARACTERS = "|ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
VOCABULARY = {token: number for number, token in enumerate(["<pad>", "<unk>", *CHARACTERS])}
NETWORK: dict[str, Any] = {
    "conv_dim": [64, 96, 128, 128],
    "conv_kernel": [20, 8, 4, 8],
    "conv_stride": [10, 4, 4, 2],
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    # Little context, 100 ms on either side: CTC is content with labels that all come late, and a
    # network that sees far learns to be late.
    "num_conv_pos_embeddings": 7,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
BATCH_SECONDS = 12.0
PEAK_RATE = 2e-3
LIMITS = (20, 40, 80)  # ms
PADDING = 40  # zeros before and after a sentence in training


@dataclass(frozen=True, slots=True)
class Utterance:
    text: str
    speech: Speech
    speaker: str


def spoken(folder: Path, seconds: float) -> Iterator[Utterance]:
    """The records of a demo dataset, spoken again: the same samples, as the units are checked for
    by the tests of the synthesiser."""
    voices = {voice.name: voice for voice in (*TRAINING_VOICES, HELD_OUT_VOICE)}
    for record in Dataset.open(folder):
        if seconds <= 0:
            return
        assert record.text is not None
        assert record.speaker is not None
        speech = synthesize(record.text, voices[record.speaker])
        seconds -= len(speech.waveform) / SAMPLE_RATE
        yield Utterance(record.text, speech, record.speaker)


def sentences(utterance: Utterance) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Waveforms and labels, cut in the middle of the pauses after full stops."""
    words = utterance.speech.words
    begin = first = 0
    for index, word in enumerate(words):
        if word.label[-1] not in ".!?":
            continue
        last = index + 1 == len(words)
        end = len(utterance.speech.waveform)
        if not last:
            end = round((word.stop + words[index + 1].start) / 2 * SAMPLE_RATE)
        text = "|".join(word.label.upper() for word in words[first : index + 1])
        labels = [VOCABULARY[character] for character in text if character in VOCABULARY]
        yield utterance.speech.waveform[begin:end], labels
        begin, first = end, index + 1


def batches(examples: Sequence[tuple[np.ndarray, list[int]]], rng: random.Random) -> Iterator[Any]:
    """Without end: padded waveforms, their mask, labels; sentences of like length together."""
    while True:
        order = sorted(examples, key=lambda example: len(example[0]) * rng.uniform(0.8, 1.25))
        size, cut = 0.0, [[order[0]]]
        for example in order:
            seconds = len(example[0]) / SAMPLE_RATE
            if size + seconds > BATCH_SECONDS:
                cut.append([])
                size = 0.0
            cut[-1].append(example)
            size += seconds
        rng.shuffle(cut)
        for batch in cut:
            waveforms = [np.pad(waveform, PADDING) for waveform, _ in batch]
            longest = max(map(len, waveforms))
            inputs = np.stack([np.pad(each, (0, longest - len(each))) for each in waveforms])
            mask = np.arange(longest) < np.array([[len(each)] for each in waveforms])
            most = max(len(labels) for _, labels in batch)
            targets = [labels + [-100] * (most - len(labels)) for _, labels in batch]
            yield torch.from_numpy(inputs), torch.from_numpy(mask).long(), torch.tensor(targets)


def train(
    folder: Path, examples: Sequence[tuple[np.ndarray, list[int]]], steps: int
) -> dict[str, Any]:
    """Train a model into ``folder``; what it took."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    sizes = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "ctc_zero_infinity": True}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**NETWORK, **sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, steps, pct_start=0.15)
    began, heard, losses = time.perf_counter(), 0.0, []
    for step, (inputs, mask, targets) in zip(
        range(steps), batches(examples, random.Random(0)), strict=False
    ):
        loss = model(inputs, attention_mask=mask, labels=targets).loss
        loss = loss / (targets >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        heard += mask.sum().item() / SAMPLE_RATE
        losses.append(loss.item())
        if step % 100 == 99:
            print(
                f"step {step + 1}: {np.mean(losses[-100:]):.3f} nats a character, "
                f"{time.perf_counter() - began:.0f} s, {heard / 60:.0f} min heard",
                flush=True,
            )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    about = {"pad_token": "<pad>", "unk_token": "<unk>", "word_delimiter_token": "|"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return {
        "steps": steps,
        "seconds": time.perf_counter() - began,
        "seconds_heard": heard,
        "loss": float(np.mean(losses[-100:])),
    }


def boundaries(
    found: Sequence[Sequence[Timed]], true: Sequence[Sequence[Timed]]
) -> dict[str, dict[str, Any]]:
    """How late words start and stop, in summary."""
    pairs = [
        pair
        for one, other in zip(found, true, strict=True)
        for pair in zip(one, other, strict=True)
    ]
    late = {
        "starts": np.array([word.start - truth.start for word, truth in pairs]),
        "stops": np.array([word.stop - truth.stop for word, truth in pairs]),
    }
    late["all"] = np.concatenate(list(late.values()))

    def shares(seconds: np.ndarray) -> dict[int, float]:
        within = {limit: np.abs(seconds) <= limit / 1000 + 1e-9 for limit in LIMITS}
        return {limit: round(float(share.mean()), 4) for limit, share in within.items()}

    return {
        name: {
            "share_within_ms": shares(seconds),
            "median_late_ms": round(1000 * float(np.median(seconds)), 1),
            "share_within_ms_of_the_median": shares(seconds - np.median(seconds)),
        }
        for name, seconds in late.items()
    }


def measure(aligner: CTCAligner, folder: Path) -> dict[str, Any]:
    """Align the stories of a dataset."""
    stories = list(spoken(folder, float("inf")))
    waveforms = [story.speech.waveform for story in stories]
    texts = [story.text for story in stories]
    seconds = sum(map(len, waveforms)) / SAMPLE_RATE
    began = time.perf_counter()
    aligner.emissions(waveforms)
    emitted = time.perf_counter()
    found = aligner.align(waveforms, texts)
    aligned = time.perf_counter()
    true = [story.speech.words for story in stories]
    in_frames = [
        [
            Timed(word.word, word.start / FRAMES_PER_SECOND, word.stop / FRAMES_PER_SECOND)
            for word in alignment.frames(-(-len(waveform) // FRAME_SAMPLES))[0]
        ]
        for alignment, waveform in zip(found, waveforms, strict=True)
    ]
    return {
        "stories": len(stories),
        "words": sum(map(len, true)),
        "seconds": round(seconds, 1),
        "in_seconds": boundaries([alignment.words for alignment in found], true),
        "in_frames_of_40_ms": boundaries(in_frames, true),
        "times_real_time": {
            "emissions": round(seconds / (emitted - began)),
            "emissions_search_and_spelling": round(seconds / (aligned - emitted)),
        },
    }


def receptive_field() -> int:
    """Samples that one frame of the network is made from."""
    samples = stride = 1
    for kernel, step in zip(NETWORK["conv_kernel"], NETWORK["conv_stride"], strict=True):
        samples += (kernel - 1) * stride
        stride *= step
    return samples


def windows_beside_one_pass(model_folder: Path, dataset: Path) -> dict[str, Any]:
    """What windows, of 60 s, change of five minutes, in a network that has learnt to listen."""
    from sklearn.cluster import KMeans
    from transformers import Wav2Vec2ForCTC

    waveform = np.concatenate([story.speech.waveform for story in spoken(dataset, 300)])
    model = Wav2Vec2ForCTC.from_pretrained(model_folder).eval()
    with torch.inference_mode():
        # As FrameModel pads, so that frames are the same.
        overhang = receptive_field() - FRAME_SAMPLES // 2
        padded = torch.from_numpy(np.pad(waveform, (overhang // 2, overhang + FRAME_SAMPLES)))
        one_pass = model.wav2vec2(padded[None]).last_hidden_state[0]
        in_windows = FrameModel(model.wav2vec2, layer=None, normalize=False).states([waveform])[0]
        one_pass = one_pass[: len(in_windows)]
        labels = [model.lm_head(states).argmax(-1) for states in (one_pass, in_windows)]
    kmeans = KMeans(100, n_init=1, random_state=0).fit(one_pass.numpy())
    units = [kmeans.predict(states.numpy()) for states in (one_pass, in_windows)]
    return {
        "seconds": round(len(waveform) / SAMPLE_RATE, 1),
        "share_of_equal_units_of_100": round(float(np.mean(units[0] == units[1])), 5),
        "share_of_equal_characters": round(float((labels[0] == labels[1]).float().mean()), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the result file")
    parser.add_argument("--corpus", type=Path, default=Path("data/demo"))
    parser.add_argument("--model", type=Path, default=Path("runs/aligner"), help="its folder")
    parser.add_argument("--minutes", type=float, default=90, help="of the corpus to train on")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    expect_positive(options, "minutes", "steps")
    about = describe_machine()
    if not (options.corpus / "corpus.json").is_file():
        raise UserError(f"{options.corpus}: no demo corpus here: python -m lst.prepare demo")
    make_folder(options.out)
    if not (options.model / "training.json").is_file():
        examples = [
            sentence
            for utterance in spoken(options.corpus / "train/speech", 60 * options.minutes)
            for sentence in sentences(utterance)
        ]
        training = train(options.model, examples, options.steps)
        (options.model / "training.json").write_text(json.dumps(training))
    aligner = CTCAligner.load(str(options.model))
    result = {
        "machine": about,
        "training": json.loads((options.model / "training.json").read_text()),
        "network": NETWORK,
        "known_voices": measure(aligner, options.corpus / "valid/speech"),
        "unknown_voice": measure(aligner, options.corpus / "valid/voice"),
        "windows": windows_beside_one_pass(options.model, options.corpus / "valid/voice"),
    }
    path = options.out / f"alignment-{file_stem(about)}.json"
    write_json(path, result)
    print(json.dumps({name: result[name] for name in list(result)[3:]}, indent=2))
    print(f"written to {path}")


if __name__ == "__main__":
    run_command(main)
