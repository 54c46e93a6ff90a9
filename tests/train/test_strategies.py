"""A run of every strategy trains, and one over speech pieces needs its corpus no more."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lst.data.loader import TrainLoader
from lst.data.patching import PatchingConfig
from lst.data.records import Dataset, RecordWriter
from lst.errors import UserError
from lst.evaluate.__main__ import main as evaluate
from lst.evaluate.choice import likelihoods
from lst.prepare.speech_bpe import SpeechBPEConfig, describe_speech_bpe, prepare_speech_bpe
from lst.speech_bpe import SpeechBPE
from lst.train.checkpoint import load_model
from lst.train.config import TrainConfig
from lst.train.corpus import open_corpus
from lst.train.loop import train

Tiny = Callable[..., TrainConfig]
pytestmark = pytest.mark.usefixtures("undrawn")

STRATEGIES = {
    "static": PatchingConfig(strategy="static", size=3),
    "merged": PatchingConfig(strategy="aligned", silence="merged", max_patch_length=6),
    "pieces": PatchingConfig(strategy="aligned", aligned_by="pieces", boundary_noise_ms=40.0),
    "mixed": PatchingConfig(strategy="mixed"),
}


def read_lines(run: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("patching", STRATEGIES.values(), ids=STRATEGIES)
def test_a_run_of_each_strategy(tiny: Tiny, stories: Any, patching: PatchingConfig) -> None:
    run = tiny(steps=2, validate_every=2)
    run = replace(run, data=replace(run.data, patching=patching))
    train(run)
    assert all(np.isfinite(line["loss"]) for line in read_lines(run))
    assert (run.out / "story_completion.json").exists()


def test_aligned_patches_are_scored_under_the_noise_that_is_asked_for(
    tiny: Tiny, stories: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Version 2's robustness test; a model that is evaluated without an aligner has none."""
    seen = []

    def scored(*args: Any, patching: PatchingConfig, **options: Any) -> Iterator[Any]:
        seen.append(patching)
        return likelihoods(*args, patching=patching, **options)

    monkeypatch.setattr("lst.evaluate.tasks.likelihoods", scored)
    for strategy in ("aligned", "curriculum"):
        run = tiny(strategy, steps=1, validate_every=1, evaluate=False)
        patching = PatchingConfig(strategy=strategy, max_patch_length=6)  # type: ignore[arg-type]
        run = replace(run, data=replace(run.data, patching=patching))
        train(run)
        monkeypatch.setattr("sys.argv", ["evaluate", str(run.out), "--boundary-noise-ms", "40"])
        if strategy == "aligned":
            evaluate()
            assert seen == 2 * [replace(patching, boundary_noise_ms=40.0)]
        else:
            with pytest.raises(UserError, match="expected a model of aligned patches, got one of"):
                evaluate()


@pytest.fixture
def pieces(tiny: Tiny, corpus: Path, tmp_path: Path, stories: Any) -> TrainConfig:
    """A token-level run over speech pieces, in a corpus of its own."""
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    bpe = prepare_speech_bpe(SpeechBPEConfig(corpus=folder, pieces=60))
    assert len(bpe) == 60
    run = tiny("pieces", steps=3, validate_every=3)
    data = replace(run.data, corpus=str(folder), patching=PatchingConfig(strategy="speech-bpe"))
    return replace(run, model=replace(run.model, architecture="token"), data=data)


def test_a_run_over_speech_pieces_is_whole_without_its_corpus(
    pieces: TrainConfig, tmp_path: Path
) -> None:
    train(pieces)
    lines = read_lines(pieces)
    assert len(json.loads((pieces.out / "story_completion.json").read_text())) == 8
    bpe = SpeechBPE.load(tmp_path / "corpus" / "speech_bpe.model")
    (speech,) = [line for line in lines if line["split"] == "valid/speech"]
    # A piece stands for more than one unit, so that 25 times its bits are more than a second's.
    assert 0 < speech["bits_per_second"] < 25 * speech["bits_speech"]
    shutil.rmtree(tmp_path / "corpus")
    model, config, vocabulary, _ = load_model(pieces.out, "cpu")
    assert config == pieces
    assert vocabulary.speech_bpe == bpe
    assert model.head.out_features == vocabulary.size == 5 + 300 + 60


def test_units_are_counted_and_not_pieces(pieces: TrainConfig) -> None:
    run = replace(pieces, steps=1, validate_every=1)
    train(run)
    (line,) = [line for line in read_lines(run) if line["split"] == "train"]
    opened = open_corpus(run.data)
    loader = TrainLoader(
        run.data, opened.vocabulary, opened.tokenizer, run.model.plan(), seed=0, total_steps=1
    )
    ((batch,), _) = next(iter(loader))
    tokens = batch.tokens.numpy()
    speech = tokens[opened.vocabulary.is_unit(tokens)]
    assert line["seen_speech_units"] == len(opened.vocabulary.decode_units(speech)) > len(speech)
    assert line["seen_units"] == line["seen_tokens"] == batch.num_tokens


def test_a_run_goes_on_with_its_own_pieces_alone(pieces: TrainConfig, tmp_path: Path) -> None:
    train(replace(pieces, steps=2))
    prepare_speech_bpe(SpeechBPEConfig(corpus=tmp_path / "corpus", pieces=61))
    with pytest.raises(UserError, match=r"expected Vocabulary\(.*SpeechBPE\(60 pieces"):
        train(replace(pieces, steps=2), resume=True)


def test_speech_pieces_that_do_not_fit_are_refused(pieces: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    facts = json.loads((folder / "speech_bpe.json").read_text())
    assert (facts["pieces"], facts["num_units"], facts["codebook"]) == (60, 20, None)
    (folder / "speech_bpe.model").rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"speech_bpe\.model: expected a speech BPE model, got no"):
        train(pieces)
    prepare_speech_bpe(SpeechBPEConfig(corpus=folder, pieces=61))
    (tmp_path / "aside").rename(folder / "speech_bpe.model")
    with pytest.raises(UserError, match=r"speech_bpe\.model: expected sha256:\w+, got sha256:"):
        train(pieces)
    (folder / "speech_bpe.json").write_text("{}")
    with pytest.raises(UserError, match=r"speech_bpe\.json: expected a speech BPE's description"):
        train(pieces)
    (folder / "speech_bpe.json").unlink()
    with pytest.raises(UserError, match=r"make one by python -m lst\.prepare speech-bpe"):
        train(pieces)


def test_the_same_sample_gives_the_same_pieces(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    whole, few, again = (
        prepare_speech_bpe(SpeechBPEConfig(corpus=folder, pieces=60, sequences=sequences))
        for sequences in (100, 20, 20)
    )
    assert few == again != whole
    assert json.loads((folder / "speech_bpe.json").read_text())["sequences"] == 20
    assert "60 pieces of 20 units; on valid/ a piece stands for 1." in describe_speech_bpe(
        folder, few
    )


def test_pieces_of_another_codebook_are_refused(pieces: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "corpus" / "train" / "speech"
    dataset = Dataset.open(folder)
    records = [dataset[row] for row in range(len(dataset))]
    fingerprint = dataset.info.tokenizer

    def write(codebook: str) -> None:
        with RecordWriter(folder, codebook=codebook, tokenizer=fingerprint, num_units=20) as writer:
            for record in records:
                writer.write(record)

    write("sha256:aa")
    prepare_speech_bpe(SpeechBPEConfig(corpus=tmp_path / "corpus", pieces=60))
    write("sha256:bb")
    with pytest.raises(UserError, match=r"speech_bpe\.json: expected pieces of codebook sha256:bb"):
        train(pieces)


def test_a_corpus_without_speech_has_no_pieces(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "train" / "text", tmp_path / "train" / "text")
    with pytest.raises(UserError, match="train: expected a dataset of speech in it, got none"):
        prepare_speech_bpe(SpeechBPEConfig(corpus=tmp_path))
    with pytest.raises(UserError, match="--pieces: expected 1 or more, got 0"):
        SpeechBPEConfig(corpus=tmp_path, pieces=0)
