"""HuBERT's units and the aligner's words, by way of the commands that prepare a corpus."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from lst.data.loader import DataConfig
from lst.data.records import Dataset
from lst.errors import UserError
from lst.prepare.corpus import CorpusConfig, prepare_corpus
from lst.prepare.executors import ExecutorConfig, SlurmConfig, make_executor
from lst.prepare.units import CodebookConfig, fit_codebook
from lst.speech.alignment import CTCAligner
from lst.speech.hubert import HubertKMeans
from lst.train.corpus import open_corpus
from lst.vocabulary import train_tokenizer

soundfile = pytest.importorskip("soundfile")

TEXTS = {"a": "the cat sat", "b": "on a mat", "c": "1984", "d": "far too long a text for it " * 9}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, text in TEXTS.items():
        (tmp_path / "spoken").mkdir(exist_ok=True)
        samples = rng.uniform(-0.5, 0.5, 9000).astype(np.float32)
        soundfile.write(tmp_path / "spoken" / f"{name}.wav", samples, 16_000, subtype="FLOAT")
        (tmp_path / "spoken" / f"{name}.txt").write_text(text)
    return tmp_path / "spoken"


def test_records_have_the_models_units_words_and_characters(
    tmp_path, folder, save_hubert, save_ctc
):
    hubert, ctc = str(save_hubert(tmp_path / "hubert")), str(save_ctc(tmp_path / "ctc"))
    codebook = tmp_path / "codebook.safetensors"
    fit_codebook(CodebookConfig(out=codebook, folder=folder, hubert=hubert, layer=1, codes=7))
    config = CorpusConfig(
        out=tmp_path / "made", folder=folder, codebook=codebook, hubert=hubert, layer=1, aligner=ctc
    )
    prepare_corpus(config)
    encoder, aligner = HubertKMeans.load(hubert, codebook, layer=1), CTCAligner.load(ctc)
    dataset = Dataset.open(config.out, codebook=encoder.fingerprint)
    for row, (name, text) in enumerate(TEXTS.items()):
        record = dataset[row]
        waveform, _ = soundfile.read(folder / f"{name}.wav", dtype="float32")
        np.testing.assert_array_equal(record.units, encoder.encode(waveform))
        assert record.text == text.strip()
        if name in "ab":
            (expected,) = aligner.align([waveform], [text])
            assert (record.words, record.chars) == expected.frames(len(record.units))
            assert [word.word for word in record.words] == text.split()
        else:  # nothing to say, and too little time for it
            assert record.words is record.chars is None
    plan = (config.out / "plan.json").read_text()
    assert '"unaligned": 2' in plan


def test_units_of_another_layer_are_another_corpus(tmp_path, folder, save_hubert):
    hubert = str(save_hubert(tmp_path / "hubert"))
    codebook = tmp_path / "codebook.safetensors"
    fit_codebook(CodebookConfig(out=codebook, folder=folder, hubert=hubert, layer=1, codes=7))
    config = {"out": tmp_path / "made", "folder": folder, "codebook": codebook, "hubert": hubert}
    prepare_corpus(CorpusConfig(**config, layer=1))
    with pytest.raises(UserError, match="was begun with another codebook;"):
        prepare_corpus(CorpusConfig(**config, layer=0))


def test_a_wrong_aligner_is_told_before_anything_is_begun(tmp_path, folder, save_hubert):
    hubert = str(save_hubert(tmp_path / "hubert"))
    codebook = tmp_path / "codebook.safetensors"
    fit_codebook(CodebookConfig(out=codebook, folder=folder, hubert=hubert, layer=1, codes=7))
    config = CorpusConfig(
        out=tmp_path / "made", folder=folder, codebook=codebook, hubert=hubert, layer=1,
        aligner=hubert,
    )  # fmt: skip
    with pytest.raises(UserError, match="hubert: expected a wav2vec2 model, got 'hubert'"):
        prepare_corpus(config)
    assert not config.out.exists()


def test_tasks_for_a_gpu_are_submitted_from_where_there_is_none(
    tmp_path, folder, save_hubert, save_ctc, monkeypatch
):
    pytest.importorskip("datatrove")
    hubert, ctc = str(save_hubert(tmp_path / "hubert")), str(save_ctc(tmp_path / "ctc"))
    codebook = tmp_path / "codebook.safetensors"
    fit_codebook(CodebookConfig(out=codebook, folder=folder, hubert=hubert, layer=1, codes=7))
    config = CorpusConfig(
        out=tmp_path / "made", folder=folder, codebook=codebook, hubert=hubert, layer=1,
        aligner=ctc, device="cuda:99",
    )  # fmt: skip
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    slurm = SlurmConfig(partition="gpu", gpus_per_task=1)
    make_executor(config, ExecutorConfig(executor="slurm", slurm=slurm))
    assert (config.out / "plan.json").is_file()
    with pytest.raises(UserError, match="device cuda:99: expected one that is here"):
        prepare_corpus(config)
    prepare_corpus(replace(config, device="cpu"))  # the device is no part of the plan
    assert len(Dataset.open(config.out)) == len(TEXTS)


def test_a_corpus_of_huberts_units_can_be_trained_on(tmp_path, folder, save_hubert):
    """Its codebook's file alone does not say which units these are, as one of spectra does."""
    hubert = str(save_hubert(tmp_path / "hubert"))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    codebook = corpus / "codebook.safetensors"
    fit_codebook(CodebookConfig(out=codebook, folder=folder, hubert=hubert, layer=1, codes=7))
    made = {"folder": folder, "codebook": codebook, "hubert": hubert}
    prepare_corpus(CorpusConfig(out=corpus / "train" / "speech", layer=1, **made))
    train_tokenizer(TEXTS.values(), corpus / "tokenizer.model", num_pieces=290)
    config = DataConfig(corpus=str(corpus), mixture={"speech": 1.0}, rows=1, units_per_sequence=64)
    found = open_corpus(config)
    assert found.codebook == HubertKMeans.load(hubert, codebook, layer=1).fingerprint
    assert found.vocabulary.num_units == 7

    prepare_corpus(CorpusConfig(out=corpus / "valid" / "speech", layer=0, **made))
    with pytest.raises(UserError, match=r"valid/speech.*codebook"):
        open_corpus(config)
