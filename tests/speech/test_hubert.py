"""Units of HuBERT are those of transformers' own pass, in windows as in one piece."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.numpy import load_file, save_file

from lst.errors import UserError
from lst.prepare.speech import encode_audio
from lst.speech import hubert, units, wav2vec2
from lst.speech.audio import AudioReader
from lst.speech.hubert import HubertKMeans, read_centroids
from lst.speech.units import CONTEXT, STRETCH, UnitsConfig, load_units

RATE = 16_000
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "as in base": {},  # a group norm over time in the first convolution
    "as in large": LARGE,  # layer norms in the convolutions, and before attention
}
NUM_UNITS = 40


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Coloured, and louder and softer in turn, so that pieces of it differ."""
    rng = np.random.default_rng(seed)
    samples = round(seconds * RATE)
    colour = np.convolve(rng.normal(size=samples + 64), rng.normal(size=65), mode="valid")
    knots = np.arange(0, samples + RATE, RATE // 4)
    level = np.exp(np.interp(np.arange(samples), knots, rng.normal(size=len(knots))))
    return (0.01 * colour * level).astype(np.float32)


def one_pass(folder: Path, waveform: np.ndarray, layer: int) -> np.ndarray:
    """transformers' hidden states of the waveform with 40 zeros before it and 80 after."""
    from transformers import HubertModel

    num_frames = -(-len(waveform) // 640)
    padded = np.zeros(640 * num_frames + 80, np.float32)
    padded[40 : 40 + len(waveform)] = waveform
    with torch.inference_mode():
        output = HubertModel.from_pretrained(folder).eval()(
            torch.from_numpy(padded)[None], output_hidden_states=True
        )
    return output.hidden_states[layer][0].numpy()


def centroids_near(states: np.ndarray) -> np.ndarray:
    """Frames far apart from one another, so that units vary."""
    return states[np.linspace(0, len(states) - 1, NUM_UNITS).astype(int)]


def nearest(states: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    differences = states[:, None].astype(np.float64) - centroids[None].astype(np.float64)
    return np.square(differences).sum(-1).argmin(1)


def encoder(folder: Path, centroids: np.ndarray, layer: int) -> HubertKMeans:
    path = folder / f"kmeans-{layer}.safetensors"
    save_file({"centroids": np.ascontiguousarray(centroids)}, path)
    return HubertKMeans.load(str(folder), path, layer=layer)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_units_are_those_of_one_pass_of_transformers(
    tmp_path: Path, save_hubert, variant: str, layer: int
) -> None:
    """11.1 s: the convolutions see it in two pieces."""
    folder = save_hubert(tmp_path, **VARIANTS[variant])
    waveform = noise(11.1)
    states = one_pass(folder, waveform, layer)
    centroids = centroids_near(states)
    found = encoder(folder, centroids, layer).encode(waveform)
    assert found.dtype == np.int16
    assert len(np.unique(found)) > NUM_UNITS / 2
    np.testing.assert_array_equal(found, nearest(states, centroids))


@pytest.mark.parametrize("num_samples", [1, 639, 640, 641, 1280, 16_000, 16_001])
def test_every_begun_frame_has_a_unit(tmp_path: Path, save_hubert, num_samples: int) -> None:
    folder = save_hubert(tmp_path)
    found = encoder(folder, np.eye(3, 32, dtype=np.float32), 1).encode(noise(num_samples / RATE))
    assert found.shape == (-(-num_samples // 640),)


@pytest.mark.parametrize("variant", VARIANTS)
def test_overlapping_windows_are_one_pass_where_layers_reach_no_further(
    tmp_path: Path, save_hubert, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """Layer 0 reaches 8 frames to either side; the windows see 25."""
    folder = save_hubert(tmp_path, **VARIANTS[variant])
    waveform = noise(20.3)
    states = one_pass(folder, waveform, 0)
    centroids = centroids_near(states)
    in_one = encoder(folder, centroids, 0).encode(waveform)
    monkeypatch.setattr(wav2vec2, "PIECE_SECONDS", 1)
    monkeypatch.setattr(hubert, "ONE_PASS_SECONDS", 4)
    monkeypatch.setattr(wav2vec2, "CONTEXT_SECONDS", 1)
    monkeypatch.setattr(wav2vec2, "BATCH_SECONDS", 10)
    in_windows = encoder(folder, centroids, 0).encode(waveform)
    np.testing.assert_array_equal(in_windows, in_one)
    np.testing.assert_array_equal(in_windows, nearest(states, centroids))


def test_more_context_comes_nearer_to_one_pass(
    tmp_path: Path, save_hubert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention is what windows cut. That of random weights spreads over the whole window, which
    is the worst case: of a trained model, benchmarks/alignment.py measures the share."""
    folder = save_hubert(tmp_path)
    waveform = noise(40)
    centroids = centroids_near(one_pass(folder, waveform, 2))
    in_one = encoder(folder, centroids, 2).encode(waveform)
    shares = []
    for context in (0, 8, 30):
        monkeypatch.setattr(hubert, "ONE_PASS_SECONDS", 4 + 2 * context)
        monkeypatch.setattr(wav2vec2, "CONTEXT_SECONDS", context)
        shares.append(float(np.mean(encoder(folder, centroids, 2).encode(waveform) == in_one)))
    assert shares[0] < shares[1] < shares[2] == 1.0


def test_what_preparation_reads_at_once_is_one_pass(tmp_path: Path, save_hubert) -> None:
    """Ten minutes and their context, a full layer deep."""
    folder = save_hubert(tmp_path)
    waveform = noise((STRETCH + 2 * CONTEXT) / RATE)
    expected = one_pass(folder, waveform, 2)
    centroids = centroids_near(expected)
    found = encoder(folder, centroids, 2)
    (states,) = found._model.states([waveform])
    np.testing.assert_allclose(states.numpy(), expected, atol=1e-4)
    assert np.mean(found.encode(waveform) == nearest(expected, centroids)) > 0.9995  # ties


@pytest.mark.parametrize("kind", ["hubert", "log-mel"])
@pytest.mark.parametrize("seconds", [6, 6.03, 11.99, 12.5])
def test_units_are_the_same_read_bit_by_bit_and_at_once(
    tmp_path: Path, save_hubert, monkeypatch: pytest.MonkeyPatch, kind: str, seconds: float
) -> None:
    """Whoever encodes a recording, of whatever length, gets the units of its preparation."""
    monkeypatch.setattr(units, "STRETCH", 4 * RATE)
    monkeypatch.setattr(units, "CONTEXT", 1 * RATE)
    waveform = noise(seconds + 2)
    soundfile.write(tmp_path / "long.wav", waveform, RATE, subtype="FLOAT")
    audio = AudioReader.open(str(tmp_path / "long.wav"), None)
    made: units.UnitEncoder
    if kind == "hubert":
        folder = save_hubert(tmp_path)
        made = encoder(folder, centroids_near(one_pass(folder, waveform, 2)), 2)
    else:
        made = units.LogMelKMeans.fit([waveform], num_units=NUM_UNITS)
    start = 640  # as an utterance in a recording does
    at_once = made.encode(waveform[start : start + round(seconds * RATE)])
    bit_by_bit = encode_audio(made, audio, start, start + round(seconds * RATE))
    assert len(np.unique(at_once)) > NUM_UNITS / 4
    np.testing.assert_array_equal(bit_by_bit, at_once)


def test_log_mel_windows_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    waveform = noise(30)
    in_one = units.log_mels(waveform)
    monkeypatch.setattr(units, "WINDOWS_AT_ONCE", 101)
    np.testing.assert_array_equal(units.log_mels(waveform), in_one)


def test_states_of_a_batch_are_those_of_each_waveform(tmp_path: Path, save_hubert) -> None:
    model = encoder(save_hubert(tmp_path), np.eye(3, 32, dtype=np.float32), 2)._model
    waveforms = [noise(seconds, seed) for seed, seconds in enumerate([3.0, 0.01, 7.7, 3.0])]
    for together, waveform in zip(model.states(waveforms), waveforms, strict=True):
        torch.testing.assert_close(together, model.states([waveform])[0], atol=1e-4, rtol=0)


def test_waveforms_are_normalised_where_the_model_says_so(tmp_path: Path, save_hubert) -> None:
    """What preprocessor_config.json asks for; without it a constant added is heard."""
    folder = save_hubert(tmp_path, **LARGE)
    waveform = noise(5)
    centroids = centroids_near(one_pass(folder, waveform, 1))
    plain = encoder(folder, centroids, 1)
    assert np.mean(plain.encode(waveform) == plain.encode(waveform + 0.1)) < 0.9
    about = {"do_normalize": True, "feature_extractor_type": "Wav2Vec2FeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    normalising = encoder(folder, centroids, 1)
    np.testing.assert_array_equal(normalising.encode(waveform), normalising.encode(waveform + 0.1))
    level = (waveform - waveform.mean()) / waveform.std()
    np.testing.assert_array_equal(normalising.encode(waveform), plain.encode(level))
    assert normalising.fingerprint != plain.fingerprint
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"no preprocessor_config\.json could be read"):
        encoder(folder, centroids, 1)


def test_nearest_centroid_is_exact_where_float32_is_not() -> None:
    """A thousand times farther from 0 than from one another."""
    rng = np.random.default_rng(0)
    centroids = (1000 + rng.normal(size=(50, 16))).astype(np.float32)
    states = (1000 + rng.normal(size=(400, 16))).astype(np.float32)
    found = hubert._nearest(torch.from_numpy(states), torch.from_numpy(centroids))
    np.testing.assert_array_equal(found, nearest(states, centroids))


def test_of_equally_near_centroids_the_first_is_taken() -> None:
    centroids = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert hubert._nearest(torch.zeros(2, 2), centroids).tolist() == [1, 1]


def test_fingerprint_tells_apart_what_gives_other_units(tmp_path: Path, save_hubert) -> None:
    folder = save_hubert(tmp_path / "one")
    centroids = np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    other_weights = save_hubert(tmp_path / "other", conv_bias=True)
    found = [
        encoder(folder, centroids, 1).fingerprint,
        encoder(folder, centroids, 2).fingerprint,
        encoder(folder, centroids + 1, 1).fingerprint,
        encoder(other_weights, centroids, 1).fingerprint,
    ]
    assert len(set(found)) == len(found)
    assert found[0] == encoder(folder, centroids, 1).fingerprint
    assert found[0].startswith("sha256:")


def test_fitted_units_are_saved_and_opened_as_they_are(tmp_path: Path, save_hubert) -> None:
    folder = str(save_hubert(tmp_path / "hubert"))
    waveforms = [noise(6, 1), noise(7, 2)]
    found = HubertKMeans.fit(folder, iter(waveforms), layer=2, num_units=30)
    again = HubertKMeans.fit(folder, waveforms, layer=2, num_units=30)
    assert found.fingerprint == again.fingerprint
    encoded = found.encode(waveforms[0])
    assert len(np.unique(encoded)) > 15
    found.save(tmp_path / "kmeans.safetensors")
    config = UnitsConfig(codebook=tmp_path / "kmeans.safetensors", hubert=folder, layer=2)
    opened = load_units(config)
    assert opened.fingerprint == found.fingerprint
    np.testing.assert_array_equal(opened.encode(waveforms[0]), encoded)
    # Nearer to their frames than as many frames taken at random.
    model = found._model
    states = torch.cat(model.states(waveforms))
    some = states[torch.randperm(len(states), generator=torch.Generator().manual_seed(0))[:30]]
    assert torch.cdist(states, found.centroids).min(1).values.square().mean() < (
        torch.cdist(states, some).min(1).values.square().mean()
    )
    with pytest.raises(UserError, match="expected at least 326 frames to fit 326 speech units"):
        HubertKMeans.fit(folder, waveforms, layer=2, num_units=326)


# Files --------------------------------------------------------------------------------------------


def fitted() -> Any:
    KMeans = pytest.importorskip("sklearn.cluster").KMeans

    return KMeans(5, n_init=1, random_state=0).fit(np.random.default_rng(0).normal(size=(50, 32)))


def test_every_kind_of_k_means_file_gives_the_same_centroids(tmp_path: Path) -> None:
    joblib = pytest.importorskip("joblib")

    kmeans = fitted()
    expected = kmeans.cluster_centers_.astype(np.float32)
    save_file({"centroids": expected, "counts": np.ones(5)}, tmp_path / "named.safetensors")
    save_file({"anything": expected}, tmp_path / "single.safetensors")
    np.savez(tmp_path / "named.npz", centroids=expected.astype(np.float64), counts=np.ones(5))
    joblib.dump(kmeans, tmp_path / "kmeans.bin")
    for path in sorted(tmp_path.iterdir()):
        centroids = read_centroids(path, allow_pickle=True)
        assert centroids.dtype == np.float32
        np.testing.assert_array_equal(centroids, expected)


class Explosive:
    """Leaves a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_code_in_a_k_means_file_runs_only_where_that_is_asked_for(tmp_path: Path) -> None:
    joblib = pytest.importorskip("joblib")

    trace = tmp_path / "trace"
    for name in ("kmeans.joblib", "kmeans.pkl", "kmeans"):
        joblib.dump(Explosive(trace), tmp_path / name)
        with pytest.raises(UserError, match="runs the code in it, and needs --allow-pickle"):
            read_centroids(tmp_path / name)
        joblib.dump(Explosive(trace), tmp_path / "kmeans.npz")
        with pytest.raises(UserError, match="no npz file could be read here"):
            read_centroids(tmp_path / "kmeans.npz", allow_pickle=True)
    np.savez(tmp_path / "objects.npz", centroids=np.array([Explosive(trace)]))
    with pytest.raises(UserError, match="no npz file could be read here"):
        read_centroids(tmp_path / "objects.npz", allow_pickle=True)
    assert not trace.exists()
    with pytest.raises(UserError, match="expected a fitted k-means, got NoneType"):
        read_centroids(tmp_path / "kmeans.pkl", allow_pickle=True)
    assert trace.exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.ones((2, 3)), "b": np.ones((2, 3))}, "expected an array 'centroids', got ['a', "),
        ({"centroids": np.ones(3)}, "expected centroids of shape (1 to 32768, D), got (3,)"),
        ({"centroids": np.ones((0, 3))}, "expected centroids of shape (1 to 32768, D), got (0, 3)"),
        ({"centroids": np.ones((2, 3), int)}, "expected finite floating-point centroids, got int"),
        ({"centroids": np.full((2, 3), np.nan)}, "expected finite floating-point centroids"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'file.npz'}: {message}")):
        read_centroids(tmp_path / "file.npz")


@pytest.mark.parametrize("kind", ["safetensors", "npz", "joblib"])
def test_a_damaged_file_is_named(tmp_path: Path, kind: str) -> None:
    if kind == "joblib":
        pytest.importorskip("joblib")
    (tmp_path / f"damaged.{kind}").write_bytes(b"no such thing")
    with pytest.raises(UserError, match=rf"damaged\.{kind}: no .* file could be read here"):
        read_centroids(tmp_path / f"damaged.{kind}", allow_pickle=True)


def test_a_packed_file_damaged_anywhere_is_named_or_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "packed.npz"
    centroids = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    np.savez_compressed(path, centroids=centroids)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            got = read_centroids(path)
        except UserError:
            continue
        np.testing.assert_array_equal(got, centroids)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (
            "config.json",
            lambda content: content.replace(b'"hidden_size": 32', b'"hidden_size": []'),
        ),
        ("config.json", lambda content: b"true"),
        ("config.json", lambda content: b"[" * 100_000),
        ("model.safetensors", lambda content: content[:-1]),
        ("model.safetensors", lambda content: b""),
    ],
    ids=["a list for a size", "no object", "deep", "cut short", "empty"],
)
def test_a_damaged_model_is_one_line(
    save_hubert: Any, tmp_path: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    folder = save_hubert(tmp_path / "hubert")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(change(content))
    assert (folder / name).read_bytes() != content
    with pytest.raises(UserError, match="hubert: no hubert model could be read here") as caught:
        encoder(folder, np.zeros((4, 32), np.float32), 1)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).removeprefix(str(folder))) < 300


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.npz: expected a k-means file, got none"):
        read_centroids(tmp_path / "absent.npz")


def test_units_are_opened_by_what_is_asked_for(tmp_path: Path, save_hubert) -> None:
    codebook = units.LogMelKMeans.fit([noise(9)], num_units=8, max_passes=1)
    codebook.save(tmp_path / "codebook.safetensors")
    found = load_units(UnitsConfig(codebook=tmp_path / "codebook.safetensors"))
    assert (found.num_units, found.fingerprint) == (8, codebook.fingerprint)
    folder = save_hubert(tmp_path / "hubert")
    np.savez(tmp_path / "kmeans.npz", np.random.default_rng(0).normal(size=(7, 32)))
    found = load_units(UnitsConfig(codebook=tmp_path / "kmeans.npz", hubert=str(folder), layer=2))
    assert (found.num_units, found.frame_rate) == (7, 25)
    assert set(found.encode(noise(5)).tolist()) <= set(range(7))
    with pytest.raises(UserError, match="expected --hubert and --layer together"):
        UnitsConfig(codebook=tmp_path / "kmeans.npz", hubert=str(folder))


def test_models_of_another_kind_are_refused(tmp_path: Path, save_hubert, save_ctc) -> None:
    np.savez(tmp_path / "kmeans.npz", np.ones((7, 32)))
    np.savez(tmp_path / "wide.npz", np.ones((7, 33)))
    good = save_hubert(tmp_path / "good")
    slow = save_hubert(tmp_path / "slow", rate=50)
    partial = save_hubert(tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    del weights["encoder.layers.1.attention.k_proj.weight"]
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    cases = [
        (slow, "kmeans.npz", 1, "expected 25 frames a second, got 50 (a stride of 320 samples)"),
        (good, "kmeans.npz", 4, "expected a layer of 0 to 3, got 4"),
        (good, "wide.npz", 1, "expected centroids of 32 numbers"),
        (save_ctc(tmp_path / "ctc"), "kmeans.npz", 1, "expected a hubert model, got 'wav2vec2'"),
        (tmp_path / "absent", "kmeans.npz", 1, "no hubert model could be read here"),
        (partial, "kmeans.npz", 1, "got none for encoder.layers.1.attention.k_proj.weight"),
    ]
    for folder, codebook, layer, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            HubertKMeans.load(str(folder), tmp_path / codebook, layer=layer)


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=re.escape("pip install 'lst[speech]'")):
        HubertKMeans.load("any", "any.npz", layer=1)
