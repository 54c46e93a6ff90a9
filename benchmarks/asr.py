"""Does a model of patches learn to transcribe in fewer steps than one of tokens?

    python -m benchmarks.asr --out benchmarks/results [--presets demo demo-baseline] [--runs runs]

The question of the paper's fine-tuning on LibriSpeech (version 2, downstream tasks), in miniature.
Runs of ``python -m lst.train demo`` and ``demo-baseline`` in ``--runs`` are fine-tuned on the
speech of the demo corpus cut into sentences, with the same steps, learning rates and seed, and the
same number of units in a step: positions of the global transformer, of which a patched model needs
fewer for a second of speech, so that it hears more speech in a step. The file has the error rates
after each of ``--steps`` on sentences of held-out stories, by voices of the training speech
(``valid/speech``) and by one that is not among them (``valid/voice``).

``--from-scratch`` trains the presets' models without what they learnt before. A run that is
complete is not trained again.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lst.data.records import FRAMES_PER_SECOND, Dataset, Record, RecordWriter, Word
from lst.errors import UserError, expect_positive, run_command
from lst.evaluate.error_rate import error_rates, normaliser
from lst.evaluate.speech_to_text import generator_of, open_records, transcribe
from lst.files import Location, make_folder, write_json
from lst.machine import describe_machine, file_stem
from lst.presets import PRESETS, fine_tuning
from lst.train.checkpoint import load_trained
from lst.train.loop import train
from lst.train.run_folder import CHECKPOINTS

SETS = ("valid/speech", "valid/voice")
ROWS, UNITS = 4, 256  # of a step
WARMUP_STEPS = 50


def sentences(record: Record) -> Iterator[Record]:
    """A record's sentences, each with half of the silence on either side."""
    words, units = record.words, record.units
    assert words is not None
    assert units is not None
    ends = [n + 1 for n, word in enumerate(words) if word.word.endswith((".", "!", "?"))]
    first = start = 0
    for number, last in enumerate(ends):
        own = words[first:last]
        is_last = last == len(words)
        stop = len(units) if is_last else (words[last - 1].stop + words[last].start) // 2
        yield Record(
            id=f"{record.id}-{number}",
            text=" ".join(word.word for word in own),
            units=units[start:stop],
            words=tuple(Word(word.word, word.start - start, word.stop - start) for word in own),
            chars=None,
            speaker=record.speaker,
            source=record.source,
        )
        first, start = last, stop


def cut_corpus(corpus: Path, out: Path) -> Path:
    """The speech of a corpus, sentence by sentence, as a corpus in ``out``."""
    for name in ("train/speech", *SETS):
        dataset = Dataset.open(corpus / name)
        about = dataset.info
        with RecordWriter(
            out / name, codebook=about.codebook, tokenizer=None, num_units=about.num_units
        ) as writer:
            for record in dataset.read():
                for sentence in sentences(record):
                    writer.write(sentence)
    for name in ("tokenizer.model", "codebook.safetensors"):
        shutil.copy(corpus / name, out / name)
    return out


def learn(preset: str, corpus: Path, out: Path, options: argparse.Namespace) -> None:
    """Fine-tune a preset's model in the folder ``out``, unless that is done."""
    if (out / CHECKPOINTS / f"step-{options.steps[-1]:08d}").exists():
        return
    config = fine_tuning(PRESETS[preset], "asr")
    optimizer = replace(config.optimizer, lr=options.lr, warmup_steps=WARMUP_STEPS)
    train(
        replace(
            config,
            init_from=None if options.from_scratch else options.runs / preset,
            data=replace(config.data, corpus=str(corpus), rows=ROWS, units_per_sequence=UNITS),
            optimizer=optimizer,
            steps=options.steps[-1],
            out=out,
            validate_every=options.steps[0],
            checkpoint_every=options.steps[0],
            log_every=math.gcd(10, options.steps[0]),
            keep_every=options.steps[0],
        )
    )


def outcomes(run: Path, corpus: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Error rates after each of the steps, on each set."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step in options.steps:
        trained = load_trained(run / CHECKPOINTS / f"step-{step:08d}", "cpu")
        (line,) = (line for line in lines if line["split"] == "train" and line["step"] == step)
        for name in SETS:
            records = open_records(Location(corpus / name), trained.codebook, trained.vocabulary)
            records = records[:: max(1, len(records) // options.utterances)][: options.utterances]
            clips = [record.units for record in records if record.units is not None]
            started = time.perf_counter()
            answers = transcribe(generator_of(trained, "cpu"), trained.tokenizer, clips)
            seconds = time.perf_counter() - started
            rates = error_rates(
                [record.text or "" for record in records],
                [answer.text for answer in answers],
                normalise=normaliser("english"),
            )
            frames = sum(map(len, clips))
            yield {
                "step": step,
                "set": name,
                "scores": [asdict(rate) for rate in rates],
                "units_per_second_of_speech": sum(answer.num_units for answer in answers)
                / (frames / FRAMES_PER_SECOND),
                "not_ended": sum(answer.stopped != "eos" for answer in answers),
                "decoding_seconds": seconds,
                "hours_heard": line["seen_speech_units"] / FRAMES_PER_SECOND / 3600,
                "training_flops": line["flops"],
                "training_seconds": line["seconds"],
                "example": {"reference": records[0].text, "hypothesis": answers[0].text},
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the result file")
    parser.add_argument(
        "--presets", nargs="+", default=["demo", "demo-baseline"], choices=list(PRESETS)
    )
    parser.add_argument("--corpus", type=Path, default=Path("data/demo"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--lr", type=float, default=2e-3, help="of all arms")
    parser.add_argument("--utterances", type=int, default=160, help="of each set, evenly spread")
    parser.add_argument("--from-scratch", action="store_true")
    options = parser.parse_args()
    expect_positive(options, "steps", "lr", "utterances")
    if any(step % options.steps[0] for step in options.steps):
        raise UserError(f"--steps: expected multiples of the first, got {options.steps}")
    make_folder(options.out)
    about = describe_machine()
    started = time.perf_counter()
    folder = options.runs / ("asr-from-scratch" if options.from_scratch else "asr")
    corpus = cut_corpus(options.corpus, folder / "corpus")
    runs = []
    for preset in options.presets:
        learn(preset, corpus, folder / preset, options)
        runs.append({"preset": preset, "points": list(outcomes(folder / preset, corpus, options))})
    asked = {
        "lr": options.lr,
        "rows": ROWS,
        "units_per_row": UNITS,
        "warmup_steps": WARMUP_STEPS,
        "from_scratch": options.from_scratch,
        "normaliser": "english",
    }
    result = {
        "machine": about,
        "asked": asked,
        "corpus": json.loads((options.corpus / "corpus.json").read_text()),
        "seconds": time.perf_counter() - started,
        "runs": runs,
    }
    path = options.out / f"asr-{file_stem(about)}.json"
    write_json(path, result)
    print(f"written to {path}")


if __name__ == "__main__":
    run_command(main)
