"""A Llama checkpoint and our model give the same logits on text, into our weights and out again.

The oracle is ``transformers.LlamaForCausalLM``, made small and at random.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lst.data.batch import pack_documents
from lst.data.interleave import record_document
from lst.data.patching import Static
from lst.data.records import Record, RecordWriter, Word
from lst.errors import UserError
from lst.export import ExportConfig, export_llama
from lst.model import ModelConfig, StackConfig, build_model
from lst.model.llama import from_llama, llama_weights
from lst.train.__main__ import parse
from lst.train.config import TrainConfig
from lst.train.loop import train
from lst.train.parallel import fill_weights
from lst.vocabulary import EOS, Tokenizer, Vocabulary

tokenizers = pytest.importorskip("tokenizers")

NUM_UNITS = 20
TEXT = "a story of the small red fox who went over hills and came back to his den"
WORDS = TEXT.split()
LOCAL = StackConfig(layers=1, dim=16, heads=2)
OURS = ModelConfig(encoder=LOCAL, decoder=LOCAL)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "heads of keys apart": {},
    "heads of keys shared": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama3 scaling": {
        "rope_parameters": {
            **LLAMA3,
            "rope_theta": 5e5,
            # within a document, some frequencies turn less than once, some more than four times
            "original_max_position_embeddings": 16,
        },
        "num_key_value_heads": 2,
    },
    "linear scaling, tied": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        "tie_word_embeddings": True,
    },
    "another eps and θ, several ends": {
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 123.0},
        "eos_token_id": [1, 7],
    },
}


def library_tokenizer(vocab_size: int = 300) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    return tokenizer


def make_llama(folder: Path, *, shard_size: str = "1GB", **changes: Any) -> Any:
    """A random Llama with its tokenizer in ``folder``; its weights are large enough to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": 304,  # a few rows more than the tokenizer has pieces
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        | changes
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder, max_shard_size=shard_size)
    library_tokenizer().save(str(folder / "tokenizer.json"))
    return model


def started(folder: Path) -> tuple[Any, Vocabulary, Tokenizer]:
    """Our model of the checkpoint in ``folder``."""
    tokenizer = Tokenizer.load(folder)
    vocabulary = Vocabulary(num_pieces=tokenizer.num_pieces, num_units=NUM_UNITS)
    config = from_llama(OURS, folder)
    model = build_model(config, vocabulary)
    fill_weights(model, llama_weights(config, vocabulary, folder, seed=0))
    return model, vocabulary, tokenizer


def record(words: int, seed: int = 0) -> Record:
    text = " ".join(np.random.default_rng(seed).choice(WORDS, words))
    return Record(
        id=f"r{seed}", text=text, units=None, words=None, chars=None, speaker=None, source="test"
    )


def text_logits(model: Any, vocabulary: Vocabulary, tokenizer: Tokenizer, texts: list[Record]):
    """Our logits of text documents over the text pieces, packed; and the ids that Llama reads."""
    rng = np.random.default_rng(0)
    documents = [record_document(each, vocabulary, tokenizer, rng) for each in texts]
    batch = pack_documents(documents, vocabulary, Static(size=4), model.config.plan())
    with torch.no_grad():
        logits = model.logits(batch)
    bos, eos = model.config.special_pieces
    ids = [[bos, *tokenizer.encode(each.text), eos] for each in texts]
    rows = logits.split([len(each) for each in ids])
    return rows, ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_gets_the_logits_of_the_checkpoint(tmp_path: Path, variant: str) -> None:
    llama = make_llama(tmp_path, **VARIANTS[variant])
    model, vocabulary, tokenizer = started(tmp_path)
    rows, ids = text_logits(model, vocabulary, tokenizer, [record(9), record(30, seed=1)])
    assert len(ids[1]) > 40
    for ours, theirs in zip(rows, ids, strict=True):
        with torch.no_grad():
            expected = llama(torch.tensor([theirs])).logits[0]
        pieces = ours[:, vocabulary.first_piece : vocabulary.first_unit]
        torch.testing.assert_close(pieces, expected[:, : vocabulary.num_pieces], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours[:, EOS], expected[:, 1], atol=1e-5, rtol=0)
        assert expected.abs().max() > 1


def test_a_checkpoint_in_several_files_is_the_same(tmp_path: Path) -> None:
    make_llama(tmp_path / "one")
    make_llama(tmp_path / "several", shard_size="40KB")
    assert (tmp_path / "several" / "model.safetensors.index.json").exists()
    one, several = (started(tmp_path / name)[0].weights() for name in ("one", "several"))
    for name, tensor in one.items():
        if name.startswith(("global", "norm", "embedding", "head")):
            assert torch.equal(tensor, several[name]), name


def test_the_config_of_transformers_4_is_read_alike(tmp_path: Path) -> None:
    make_llama(tmp_path, **VARIANTS["llama3 scaling"])
    config = from_llama(OURS, tmp_path)
    assert config.rope_scaling.kind == "llama3"
    values = json.loads((tmp_path / "config.json").read_text())
    scaling = values.pop("rope_parameters")
    values |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert from_llama(OURS, tmp_path) == config


def test_only_what_a_llama_has_is_taken_from_it(tmp_path: Path) -> None:
    make_llama(tmp_path)
    model, vocabulary, _ = started(tmp_path)
    fresh = build_model(model.config, vocabulary)
    torch.manual_seed(3)
    local = {n: torch.rand_like(w) for n, w in fresh.weights().items()}
    fill_weights(fresh, local.items())
    names = dict(llama_weights(model.config, vocabulary, tmp_path, seed=0))
    fill_weights(fresh, names.items())
    for name, weight in fresh.weights().items():
        expected = model.weights() if name in names else local
        assert torch.equal(weight, expected[name]), name
    assert {name.split(".")[0] for name in local} - {name.split(".")[0] for name in names} == {
        "encoder",
        "decoder",
        "speech_embedding",
        "speech_norm",
        "speech_head",
    }


def test_new_rows_are_drawn_like_the_rows_that_there_are(tmp_path: Path) -> None:
    make_llama(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    vocabulary = Vocabulary(num_pieces=tokenizer.num_pieces, num_units=2000)
    config = from_llama(OURS, tmp_path)
    first, again, other = (
        dict(llama_weights(config, vocabulary, tmp_path, seed=seed))["embedding.weight"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    new, old = first[vocabulary.first_unit :], first[vocabulary.first_piece : vocabulary.first_unit]
    assert not torch.equal(new, other[vocabulary.first_unit :])
    torch.testing.assert_close(new.mean(0), old.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(new.std(0), old.std(0), atol=0.05, rtol=0)


# --- a run ------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A corpus cut by the tokenizer of the Llama in ``tmp_path / "llama"``."""
    tokenizer = Tokenizer.load(tmp_path / "llama")
    folder = tmp_path / "corpus"
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):
        for name in ("text", "speech"):
            with RecordWriter(
                folder / split / name,
                codebook=None,
                tokenizer=tokenizer.fingerprint,
                num_units=NUM_UNITS,
            ) as writer:
                for seed in range(12):
                    each = record(20, seed)
                    if name == "speech":
                        starts = range(0, 80, 4)
                        words = zip(each.text.split(), starts, strict=True)
                        each = replace(
                            each,
                            units=rng.integers(0, NUM_UNITS, 80).astype(np.int16),
                            words=tuple(Word(word, at, at + 4) for word, at in words),
                        )
                    writer.write(each)
    tokenizer.save(folder / tokenizer.file_name)
    return folder


@pytest.fixture(params=[{}, {"num_key_value_heads": 2, "tie_word_embeddings": True}])
def llama(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return make_llama(tmp_path / "llama", **request.param)


def command(tmp_path: Path) -> TrainConfig:
    words = f"demo --warm-start {tmp_path / 'llama'} --data.corpus {tmp_path / 'corpus'}"
    words += " --model.encoder.dim 16 --model.encoder.heads 2 --model.decoder.dim 16"
    words += " --model.decoder.heads 2 --data.rows 2 --data.units-per-sequence 64 --steps 2"
    words += f" --out {tmp_path / 'run'} --no-evaluate --device cpu --validate-every 1"
    parsed = parse(words.split())
    assert parsed.resume is None
    return parsed.config


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lst.train.metrics.plot_losses", lambda *_: None)


@pytest.mark.usefixtures("undrawn")
def test_a_run_starts_from_a_llama_and_ends_as_one(
    tmp_path: Path, llama: Any, corpus: Path
) -> None:
    from transformers import LlamaForCausalLM

    from lst.train.checkpoint import load_model

    config = command(tmp_path)
    assert config.model.text_path == "global"
    train(config)
    (tmp_path / "llama").rename(tmp_path / "gone")  # a run goes on without it
    parsed = parse(["--resume", str(config.out)])
    assert parsed.config == config
    train(parsed.config, resume=True)
    model, _, vocabulary, tokenizer = load_model(config.out, "cpu")

    out = export_llama(ExportConfig(checkpoint=config.out, llama=tmp_path / "exported"))
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert Tokenizer.load(out).fingerprint == tokenizer.fingerprint
    exported = LlamaForCausalLM.from_pretrained(out).eval()
    assert exported.config.tie_word_embeddings == llama.config.tie_word_embeddings
    rows, ids = text_logits(model, vocabulary, tokenizer, [record(25, seed=50)])
    with torch.no_grad():
        theirs, before = (m(torch.tensor(ids)).logits[0] for m in (exported, llama))
    expected = rows[0][:, vocabulary.first_piece : vocabulary.first_unit].clone()
    expected[:, 1] = rows[0][:, EOS]
    expected[:, 0] = rows[0][:, 1]
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=0)
    assert (theirs - before[:, : vocabulary.num_pieces]).abs().max() > 1e-3  # it has learnt

    with pytest.raises(UserError, match="expected a folder to make, got one that is there"):
        export_llama(ExportConfig(checkpoint=config.out, llama=out))


def test_a_checkpoint_becomes_ours_and_itself_again(tmp_path: Path) -> None:
    from lst.model.llama import to_llama

    llama = make_llama(tmp_path, **VARIANTS["llama3 scaling"])
    model, vocabulary, _ = started(tmp_path)
    values, weights = to_llama(model.config, vocabulary, model.weights(), positions=64)
    theirs = llama.state_dict()
    assert weights.keys() == theirs.keys()
    for name, tensor in weights.items():
        rows = vocabulary.num_pieces if tensor.ndim == 2 and len(theirs[name]) == 304 else None
        assert torch.equal(tensor, theirs[name][:rows]), name
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert from_llama(OURS, tmp_path) == model.config


# --- what cannot be ---------------------------------------------------------------------------


def in_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def of_another_width(folder: Path) -> None:
    """The weights of a checkpoint whose config.json says otherwise."""
    make_llama(folder / "other", intermediate_size=48)
    (folder / "other" / "model.safetensors").rename(folder / "model.safetensors")


def index_of_numbers(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": 3}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


MISTAKES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("config.json"), r"config\.json: expected a Llama checkpoint"),
    "no weights": (without("model.safetensors"), r"model\.safetensors: expected safetensors"),
    "cut short": (cut_short, r"model\.safetensors: expected safetensors"),
    "not a Llama": (in_config(model_type="gpt2"), "expected model_type 'llama', got 'gpt2'"),
    "biases": (in_config(attention_bias=True), "expected attention_bias = False, got True"),
    "another act": (in_config(hidden_act="gelu"), "expected hidden_act = silu, got 'gelu'"),
    "wider heads": (in_config(head_dim=64), "expected head_dim = 8, got 64"),
    "yarn": (
        in_config(rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        "expected rotary scaling default, linear or llama3, got 'yarn'",
    ),
    "half a scaling": (
        in_config(rope_parameters={"rope_type": "llama3", "factor": 2.0}),
        "expected rotary scaling 'llama3', got .*low_freq_factor",
    ),
    "a scaling of text": (in_config(rope_parameters="yarn"), "rotary scaling to be an object, got"),
    "a factor of 0": (
        in_config(rope_parameters={"rope_type": "linear", "factor": 0.0}),
        r"config\.json: expected rotary scaling 'linear', got .*",
    ),
    "heads of keys": (in_config(num_key_value_heads=3), r"config\.json: model: 3 heads of keys"),
    "an index of numbers": (
        index_of_numbers,
        r"index\.json: expected weight_map\.model\.norm\.weight to be str, got 3",
    ),
    "turned in part": (in_config(partial_rotary_factor=0.5), "got a share of 0.5"),
    "no end": (in_config(eos_token_id=None), "expected eos_token_id to be an id"),
    "no layers": (in_config(num_hidden_layers="2"), "num_hidden_layers to be int, got '2'"),
    "few ids": (in_config(vocab_size=100), "the tokenizer's 300 pieces are the first"),
    "more layers": (in_config(num_hidden_layers=3), r"expected a weight model\.layers\.2\."),
    "other widths": (of_another_width, r"gate_up.*: expected shape \(80, 32\), got \(96, 32\)"),
    "odd local width": (
        in_config(hidden_size=24, head_dim=None),
        "global width 24 must be a multiple of 16",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, mistake: str
) -> None:
    make_llama(tmp_path)
    change, message = MISTAKES[mistake]
    change(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        started(tmp_path)
    assert "\n" not in str(error.value)


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path: Path, llama: Any, corpus: Path) -> None:
    library_tokenizer(290).save(str(tmp_path / "llama" / "tokenizer.json"))
    config = command(tmp_path)
    with pytest.raises(UserError, match=r"expected a corpus made with the tokenizer of .*llama"):
        train(config)
    assert not config.out.exists()


def test_a_model_that_was_no_llama_is_not_exported(tmp_path: Path) -> None:
    from lst.model.llama import to_llama

    vocabulary = Vocabulary(num_pieces=10, num_units=3)
    config = replace(
        OURS, text_path="global", global_transformer=StackConfig(layers=1, dim=32, heads=2)
    )
    model = build_model(config, vocabulary)
    with pytest.raises(UserError, match="expected a model that was started from a Llama"):
        to_llama(config, vocabulary, model.weights(), positions=8)
