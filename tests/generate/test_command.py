"""``python -m lst.generate``: what is asked for is printed and written, or a line says why not."""

import json
import sys
import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lst.errors import run_command
from lst.generate import Continuation, Generator, Sampling
from lst.generate.__main__ import main
from lst.generate.prompt import prompt_tokens, spans_of
from lst.generate.requests import stop_ids
from lst.pretrained import Pretrained, from_pretrained, save_pretrained
from lst.speech.audio import write_wav
from lst.speech.sound import load_voice, sound_of
from lst.speech.units import LogMelKMeans
from lst.vocabulary import EOS, TEXT

Run = Callable[..., str]
Make = Callable[..., Pretrained]


@pytest.fixture(scope="module")
def model(
    make_trained: Callable[..., Pretrained], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("model") / "saved"
    save_pretrained(make_trained(), folder)
    return folder


@pytest.fixture
def run(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Run:
    """``run("--prompt", "Once")``: what the command prints. ``fails=True``: its one line of why."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str, fails: bool = False, model: Path = model) -> str:
        monkeypatch.setattr(sys, "argv", ["lst.generate", str(model), *options])
        if not fails:
            run_command(main)
            return capsys.readouterr().out
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before  # nothing half-written
        return printed.err

    return run


def tone(path: Path, seconds: float = 0.4) -> Path:
    time = np.arange(round(seconds * 16_000)) / 16_000
    write_wav(path, 0.3 * np.sin(1400 * time) * (1 + np.sin(9 * time)))
    return path


def read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768


def expected(
    model: Path, spans: list[Any], sampling: Sampling
) -> tuple[Pretrained, np.ndarray, Continuation]:
    """What the engine makes of a prompt, without the command."""
    trained = from_pretrained(model)
    generator = Generator(
        trained.model,
        trained.vocabulary,
        trained.config.model,
        trained.config.data.patching,
        context=64,
    )
    prompt = prompt_tokens(spans, trained.vocabulary, trained.tokenizer, then=sampling.modality)
    return trained, prompt, generator.generate([prompt], [sampling])[0]


# Printing -----------------------------------------------------------------------------------------


def test_text_goes_on_where_the_prompt_ends(model: Path, run: Run) -> None:
    sampling = Sampling(modality="text", max_tokens=12, seed=3)
    trained, prompt, made = expected(model, ["the small"], sampling)
    printed = run(
        "--prompt", "the small", "--modality", "text", "--max-tokens", "12", "--seed", "3"
    )
    whole = np.concatenate([prompt, made.tokens])
    assert "the small" + printed == (
        "".join(spans_of(whole, trained.vocabulary, trained.tokenizer)) + "\n"
    )


def test_options_reach_the_engine(model: Path, run: Run) -> None:
    options = {
        "temperature": 0.6,
        "top_k": 40,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "modality": "text",
        "max_tokens": 15,
        "seed": 7,
    }
    trained, prompt, made = expected(model, ["fox"], Sampling(**options))
    words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    text = "".join(spans_of(made.tokens, trained.vocabulary, trained.tokenizer, after=prompt))
    assert run("--prompt", "fox", *words) == text + "\n"
    assert run("--prompt", "fox", *words, "--temperature", "0") != text + "\n"


def test_text_and_audio_follow_one_another_in_their_order(
    model: Path, run: Run, tmp_path: Path
) -> None:
    pytest.importorskip("soundfile")
    tone(tmp_path / "a.wav"), tone(tmp_path / "B.WAV", 0.2)
    parts = ["a.wav", "the fox", "B.WAV", "went over"]
    run(*[w for part in parts for w in ("--prompt", part)], "--max-tokens", "2", "--out", "o")
    told = json.loads(Path("o/units.json").read_text())
    assert [next(iter(span)) for span in told["prompt"]] == ["units", "text", "units", "text"]
    assert [span.get("text") for span in told["prompt"]] == [None, "the fox", None, "went over"]
    assert [len(span.get("units", ())) for span in told["prompt"]] == [10, 0, 5, 0]


def test_speech_is_told_of_in_the_text_as_it_comes(model: Path, run: Run) -> None:
    printed = run("--prompt", "the fox", "--modality", "speech", "--seconds", "1", "--seed", "1")
    trained, _, made = expected(
        model, ["the fox"], Sampling(modality="speech", max_tokens=25, seed=1)
    )
    spans = spans_of(made.tokens, trained.vocabulary, trained.tokenizer)
    assert printed == " ".join(f"[{len(s) / 25:.2f} s of speech]" for s in spans) + "\n"
    assert "s of speech" in printed


def test_text_is_printed_as_soon_as_it_is_there(
    model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("--prompt", "fox", "--modality", "text", "--max-tokens", "8", "--seed", "2")
    parts: list[str] = []

    def write(text: str, end: str = "\n", flush: bool = False) -> None:
        assert flush
        parts.append(text + end)

    monkeypatch.setattr("builtins.print", write)
    run("--prompt", "fox", "--modality", "text", "--max-tokens", "8", "--seed", "2")
    assert len([part for part in parts if part]) > 3
    assert "".join(parts) == whole


def test_samples_are_those_of_the_seeds_that_follow(run: Run) -> None:
    common = ("--prompt", "the small", "--modality", "text", "--max-tokens", "9")
    printed = run(*common, "--num-samples", "3", "--seed", "5", "--batch-size", "2")
    alone = [run(*common, "--seed", str(seed)) for seed in (5, 6, 7)]
    assert printed == "".join(f"--- {number}\n{text}" for number, text in enumerate(alone))
    assert len(set(alone)) == 3


def test_nothing_at_all_begins_a_document(model: Path, run: Run) -> None:
    trained, _, made = expected(model, [], Sampling(modality="text", max_tokens=6))
    text = "".join(spans_of(made.tokens, trained.vocabulary, trained.tokenizer))
    assert run("--modality", "text", "--max-tokens", "6") == text + "\n"


def test_it_stops_at_a_piece_with_the_text(model: Path, run: Run) -> None:
    run("--prompt", "fox", "--modality", "text", "--max-tokens", "60", "--stop", "e", "--out", "o")
    told = json.loads(Path("o/units.json").read_text())
    trained = from_pretrained(model)
    said = [trained.tokenizer.decode([i - 5]) for i in told["tokens"] if i != EOS]
    assert told["stopped"] == "stop"
    assert "e" in said[-1]
    assert not any("e" in piece for piece in said[:-1])


def test_texts_to_stop_at_are_pieces_and_markers(model: Path) -> None:
    trained = from_pretrained(model)
    vocabulary, tokenizer = trained.vocabulary, trained.tokenizer
    ids = stop_ids(("<t>", "fox"), vocabulary, tokenizer)
    assert ids[0] == TEXT
    assert ids[1:]
    assert all("fox" in tokenizer.decode([vocabulary.id_to_piece(id)]) for id in ids[1:])


# Files --------------------------------------------------------------------------------------------


def test_a_folder_has_text_units_and_sound(model: Path, run: Run, tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    pytest.importorskip("scipy")
    tone(tmp_path / "a.wav")
    options = ("--prompt", "a.wav", "--modality", "speech", "--max-tokens", "20", "--seed", "1")
    printed = run(*options, "--out", "deep/er/o")
    out = tmp_path / "deep" / "er" / "o"
    assert {path.name for path in out.iterdir()} == {
        "continuation.txt",
        "units.json",
        "prompt.wav",
        "continuation.wav",
    }
    assert (out / "continuation.txt").read_text() == printed
    told = json.loads((out / "units.json").read_text())
    codebook = LogMelKMeans.load(model / "codebook.safetensors")
    for part in ("prompt", "continuation"):
        units = np.concatenate([span["units"] for span in told[part]])
        sound = read_wav(out / f"{part}.wav")
        assert len(sound) == 640 * len(units)  # 40 ms each
        np.testing.assert_allclose(sound, sound_of(units, codebook), atol=1 / 32768)
    assert len(told["tokens"]) == len(told["logprobs"])
    assert sum(told["patch_lengths"]) == len(told["prompt_tokens"]) + len(told["tokens"])
    assert told["sampling"]["seed"] == 1
    assert list((tmp_path / "deep" / "er").iterdir()) == [out]


def test_text_alone_makes_no_sound(run: Run) -> None:
    run("--prompt", "fox", "--modality", "text", "--max-tokens", "3", "--out", "o")
    assert {path.name for path in Path("o").iterdir()} == {"continuation.txt", "units.json"}


def test_a_vocoder_speaks_with_the_voice_asked_for(model: Path, run: Run) -> None:
    from lst.vocoder.config import GeneratorConfig
    from lst.vocoder.generator import Generator as VocoderGenerator
    from lst.vocoder.vocoder import save_vocoder

    small = GeneratorConfig(
        num_embeddings=20,
        num_speakers=2,
        embedding_dim=8,
        upsample_initial_channel=16,
        upsample_rates=(10, 8, 8),
        upsample_kernel_sizes=(20, 16, 16),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    )
    torch.manual_seed(0)
    weights = VocoderGenerator(small).state_dict()
    codebook = from_pretrained(model).codebook
    Path("voice").mkdir()
    save_vocoder(Path("voice"), small, weights, codebook=codebook, speakers=("ada", "bob"))
    options = ("--modality", "speech", "--max-tokens", "9", "--voice", "voice")
    run(*options, "--speaker", "bob", "--out", "o")
    told = json.loads(Path("o/units.json").read_text())
    units = np.concatenate([span["units"] for span in told["continuation"]])
    said = sound_of(units, load_voice("voice"), speaker="bob")
    np.testing.assert_allclose(read_wav(Path("o/continuation.wav")), said, atol=1 / 32768)
    run(*options, "--out", "p")
    assert read_wav(Path("p/continuation.wav")).tobytes() != said.tobytes()
    assert "eve" in run(*options, "--speaker", "eve", "--out", "q", fails=True)


def test_units_that_nothing_here_speaks_are_written_without_sound(
    make_trained: Make, run: Run
) -> None:
    save_pretrained(replace(make_trained(), codebook_file=None), "bare")
    run("--modality", "speech", "--max-tokens", "9", "--out", "o", model=Path("bare"))
    assert {path.name for path in Path("o").iterdir()} == {"continuation.txt", "units.json"}


@pytest.mark.parametrize("patching", ["none", "speech-bpe"])
def test_a_token_level_model_is_continued_alike(
    make_trained: Make, run: Run, tmp_path: Path, patching: str
) -> None:
    bpe = patching == "speech-bpe"
    trained = make_trained(
        model={"architecture": "token"}, patching={"strategy": patching}, speech_bpe=bpe
    )
    pytest.importorskip("soundfile")
    tone(tmp_path / "a.wav")
    save_pretrained(trained, "baseline")
    run(
        *("--prompt", "a.wav", "--modality", "speech", "--max-tokens", "9", "--out", "o"),
        model=Path("baseline"),
    )
    told = json.loads(Path("o/units.json").read_text())
    heard = LogMelKMeans.load(trained.codebook_file).encode(read_wav(tmp_path / "a.wav"))
    assert told["prompt"] == [{"units": heard.tolist()}]
    assert set(told["patch_lengths"]) == {1}
    if bpe:
        options = ("--modality", "speech", "--seconds", "1")
        said = run(*options, model=Path("baseline"), fails=True)
        assert "--seconds: expected a model of units, each 40 ms, got one of a speech BPE" in said


def requests(path: Path, *lines: Any) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path.name


def test_a_file_of_requests_is_answered_line_by_line(run: Run, tmp_path: Path) -> None:
    """Each as if it were alone, in batches of any size."""
    pytest.importorskip("soundfile")
    (tmp_path / "sounds").mkdir()
    tone(tmp_path / "sounds" / "a.wav")
    name = requests(
        tmp_path / "sounds" / "r.jsonl",
        {"prompt": "the small", "modality": "text"},
        "",
        {"id": "b", "prompt": ["fox", {"audio": "a.wav"}], "modality": "speech", "seed": 4},
        {"prompt": [], "max_tokens": 3, "temperature": 1, "top_k": None},
    )
    printed = run("--prompts", f"sounds/{name}", "--max-tokens", "10", "--batch-size", "2")
    results = [json.loads(line) for line in printed.splitlines()]
    assert [result["id"] for result in results] == ["1", "b", "4"]
    alone = run("--prompt", "the small", "--modality", "text", "--max-tokens", "10")
    assert results[0]["text"] + "\n" == alone
    alone = run(
        *("--prompt", "fox", "--prompt", "sounds/a.wav", "--modality", "speech"),
        *("--seed", "4", "--max-tokens", "10"),
    )
    assert results[1]["text"] + "\n" == alone
    assert results[2]["tokens"] <= 3
    for result in results:
        assert result.keys() == {
            *("id", "sample", "text", "stopped", "tokens", "logprob", "spans"),
        }


def test_results_are_a_folder_each(run: Run, tmp_path: Path) -> None:
    name = requests(tmp_path / "r.jsonl", {"id": "../x", "prompt": "a"}, {"prompt": "fox"})
    options = ("--prompts", name, "--num-samples", "2", "--max-tokens", "4", "--modality", "text")
    assert run(*options, "--out", "o") == ""
    results = [json.loads(line) for line in Path("o/results.jsonl").read_text().splitlines()]
    assert [(r["id"], r["sample"]) for r in results] == [
        ("../x", 0),
        ("../x", 1),
        ("2", 0),
        ("2", 1),
    ]
    for result in results:
        folder = Path("o", result["folder"])
        assert (folder / "continuation.txt").read_text() == result["text"] + "\n"
    assert len(list(Path("o").iterdir())) == 5


# What cannot be done ------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context(run: Run) -> None:
    said = run("--prompt", "the small red fox " * 40, "--out", "o", fails=True)
    assert "--prompt: expected a prompt that leaves room in a context of 64 units" in said
    said = run("--prompt", "the small red fox", "--context", "3", fails=True)
    assert "in a context of 3 units (--context), got one of " in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "a", "--prompts", "b"), "expected --prompt or --prompts, got both"),
        (("--num-samples", "0"), "--num-samples: expected 1 or more, got 0"),
        (("--context", "0"), "--context: expected 1 or more, got 0"),
        (("--voice", "vocoder"), "--voice: expected it with --out, which sound is written to"),
        (("--speaker", "amy"), "--speaker: expected it with --out, which sound is written to"),
        (("--max-prompt-seconds", "nan"), "--max-prompt-seconds: expected more than 0, got nan"),
        (("--device", "tpu"), "device tpu: expected one that is here, such as cpu ("),
        (("--temperature", "-1"), "--temperature: expected 0 or more, got -1.0"),
        (("--top-p", "0"), "--top-p: expected a share in (0, 1], got 0.0"),
        (("--seconds", "3"), "--seconds: expected it with --modality speech, got any"),
        (("--seconds", "nan", "--modality", "speech"), "--seconds: expected more than 0, got nan"),
        (("--stop", "no such piece"), "--stop: expected <t>, <s> or text within a piece"),
        (("--stop", ""), "--stop: expected <t>, <s> or text within a piece"),
        (("--prompt", "gone.wav"), "gone.wav: expected an audio file, got none"),
        (("--prompts", "gone.jsonl"), "gone.jsonl: cannot be read (No such file or directory)"),
        (("--codebook", "gone.safetensors", "--out", "o"), "gone.safetensors: no codebook could"),
        (("--speaker", "amy", "--out", "o"), "expected no speaker, as a codebook has no voices"),
    ],
)
def test_options_that_cannot_be_met(run: Run, options: tuple[str, ...], message: str) -> None:
    if "gone.wav" in options:
        pytest.importorskip("soundfile")
    assert message in run(*options, fails=True)


def test_audio_that_is_too_long_or_silent(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    tone(tmp_path / "a.wav", 3.0)
    said = run("--prompt", "a.wav", "--max-prompt-seconds", "2", "--out", "o", fails=True)
    assert "a.wav: expected at most 2 s of audio as a prompt, got 3.0 s" in said
    write_wav(tmp_path / "b.wav", np.zeros(9000))
    assert "b.wav: expected speech, got silence" in run("--prompt", "b.wav", fails=True)


def test_seconds_beyond_measure_are_as_many_as_the_context_holds(run: Run) -> None:
    options = ("--prompt", "fox", "--modality", "speech", "--context", "8", "--seed", "1")
    assert run(*options, "--seconds", "1e308") == run(*options, "--max-tokens", "1000000")


def test_the_codebook_of_another_model(model: Path, run: Run, tmp_path: Path) -> None:
    own = LogMelKMeans.load(model / "codebook.safetensors")
    LogMelKMeans(own.centroids + 1, own.log_mels).save(tmp_path / "other.safetensors")
    tone(tmp_path / "a.wav")
    said = run("--prompt", "a.wav", "--codebook", "other.safetensors", fails=True)
    assert "other.safetensors: expected the codebook of the model's speech units" in said
    said = run("--prompt", "fox", "--voice", "other.safetensors", "--out", "o", fails=True)
    assert "expected a voice for units of codebook sha256:" in said


def test_a_model_of_aligned_patches(make_trained: Make, run: Run) -> None:
    save_pretrained(make_trained(patching={"strategy": "aligned"}), "aligned")
    said = run("--prompt", "fox", "--out", "o", model=Path("aligned"), fails=True)
    assert "expected a model of static patches or of none, got one of aligned patches" in said


def test_a_folder_that_is_there_is_not_touched(run: Run, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    said = run("--prompt", "fox", "--out", "o", fails=True)
    assert "o: expected a folder to make, got one that is there" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "r.jsonl, line 2: expected JSON, got "),
        ("[1]", "r.jsonl, line 2: expected an object with a prompt, got [1]"),
        ({}, "r.jsonl, line 2: missing key prompt"),
        ({"prompt": 3}, 'line 2: expected text or {"audio": FILE} in a prompt, got 3'),
        ({"prompt": [{"sound": "x"}]}, 'line 2: expected text or {"audio": FILE} in a prompt'),
        ({"prompt": {"audio": "x.wav"}}, "line 2: x.wav: expected an audio file, got none"),
        ({"prompt": "a", "top": 1}, "line 2: unknown key top"),
        ({"prompt": "a", "stop": [1]}, "line 2: unknown key stop"),
        ({"prompt": "a", "seed": "1"}, 'line 2: expected seed to be int, got "1"'),
        ({"prompt": "a", "max_tokens": None}, "line 2: expected max_tokens to be int, got null"),
        ({"prompt": "a", "top_k": 1.5}, "line 2: expected top_k to be int or null, got 1.5"),
        ({"prompt": "a", "top_p": 2}, "line 2: --top-p: expected a share in (0, 1], got 2"),
        ({"prompt": "a", "modality": "song"}, "line 2: --modality: expected any, text or speech"),
        ({"prompt": "a", "id": 1}, "line 2: expected an id of its own, got '1' again"),
        ({"prompt": "the small red fox " * 40}, "line 2: expected a prompt that leaves room in"),
        ({"prompt": "half \ud83d"}, "line 2: prompt: expected text, got 'half \\ud83d' with a"),
    ],
)
def test_a_line_that_is_no_request_is_told_of_before_any_is_answered(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Any, message: str
) -> None:
    if "x.wav" in message:
        pytest.importorskip("soundfile")
    monkeypatch.setattr(Generator, "generate", lambda *_: pytest.fail("answered"))
    name = requests(tmp_path / "r.jsonl", {"prompt": "a"}, line)
    assert message in run("--prompts", name, "--out", "o", fails=True)


def test_a_file_without_requests(run: Run, tmp_path: Path) -> None:
    said = run("--prompts", requests(tmp_path / "r.jsonl", "", " "), fails=True)
    assert "r.jsonl: expected requests, a line each, got none" in said


def test_a_failure_while_files_are_written_leaves_none(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lst.generate.__main__.write_json", full)
    monkeypatch.setattr(
        "builtins.print", lambda *words, file=None, **_: file and file.write(f"{' '.join(words)}\n")
    )
    said = run("--prompt", "fox", "--max-tokens", "3", "--out", "o", fails=True)
    assert "o: cannot be written (No space left on device)" in said
