"""Checkpoints as CodeHiFiGAN's public ones are named, read and said as an independent sum of
convolutions says them; and what else may lie in such a folder."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lst.errors import UserError
from lst.speech.sound import load_voice, sound_of
from lst.vocoder import load_vocoder

#: As the public ones', of 50 units a second, with smaller numbers.
CONFIG = {
    "resblock": "1",
    "learning_rate": 0.0002,
    "upsample_rates": [5, 4, 4, 2, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4, 4],
    "upsample_initial_channel": 64,
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "num_embeddings": 20,
    "embedding_dim": 12,
    "model_in_dim": 24,
    "multispkr": "from_input_file",
    "f0": False,
    "code_hop_size": 320,
    "sampling_rate": 16000,
    "dur_prediction_weight": 1.0,
    "dur_predictor_params": {
        "encoder_embed_dim": 12,
        "var_pred_hidden_dim": 16,
        "var_pred_kernel_size": 3,
        "var_pred_dropout": 0.5,
    },
    "dist_config": {"dist_backend": "nccl"},
}


def checkpoint(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors by the names of a generator that was trained with torch's old weight norm."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}

    def normal(*shape, std=0.3):
        return std * torch.randn(*shape, generator=draw)

    def normed(name, out, into, kernel, *, transposed=False):
        shape = (into, out, kernel) if transposed else (out, into, kernel)
        tensors[f"{name}.weight_v"] = normal(*shape)
        tensors[f"{name}.weight_g"] = normal(shape[0], 1, 1, std=1.0)
        tensors[f"{name}.bias"] = normal(out)

    tensors["dict.weight"], tensors["spkr.weight"] = normal(20, 12), normal(4, 12)
    normed("conv_pre", 64, 24, 7)
    channels = 64
    for stage, kernel in enumerate(CONFIG["upsample_kernel_sizes"]):
        normed(f"ups.{stage}", channels // 2, channels, kernel, transposed=True)
        channels //= 2
        for block, size in enumerate(CONFIG["resblock_kernel_sizes"]):
            for index in range(3):
                for which in ("convs1", "convs2"):
                    name = f"resblocks.{3 * stage + block}.{which}.{index}"
                    normed(name, channels, channels, size)
    normed("conv_post", 1, channels, 7)
    for name, shape in {"conv1.0": (16, 12, 3), "conv2.0": (16, 16, 3), "proj": (1, 16)}.items():
        tensors[f"dur_predictor.{name}.weight"] = normal(*shape)
        tensors[f"dur_predictor.{name}.bias"] = normal(shape[0])
    for name in ("ln1", "ln2"):
        tensors[f"dur_predictor.{name}.weight"] = normal(16) + 1
        tensors[f"dur_predictor.{name}.bias"] = normal(16)
    return tensors


def kernel_of(tensors, name) -> torch.Tensor:
    direction = tensors[f"{name}.weight_v"].double()
    norm = direction.flatten(1).square().sum(1).sqrt()[:, None, None]
    return tensors[f"{name}.weight_g"].double() * direction / norm


def spoken(tensors, units: list[int], speaker: int) -> np.ndarray:
    """The published equations, one operation at a time, in float64."""

    def convolve(x, name, dilation=1):
        kernel = kernel_of(tensors, name)
        reach = dilation * (kernel.shape[2] - 1) // 2
        bias = tensors[f"{name}.bias"].double()
        return F.conv1d(x, kernel, bias, padding=reach, dilation=dilation)

    x = tensors["dict.weight"].double()[units].T[None]
    voice = tensors["spkr.weight"].double()[speaker][None, :, None].expand(1, 12, len(units))
    x = convolve(torch.cat([x, voice], 1), "conv_pre")
    pairs = zip(CONFIG["upsample_rates"], CONFIG["upsample_kernel_sizes"], strict=True)
    for stage, (rate, size) in enumerate(pairs):
        x = F.conv_transpose1d(
            F.leaky_relu(x, 0.1),
            kernel_of(tensors, f"ups.{stage}"),
            tensors[f"ups.{stage}.bias"].double(),
            stride=rate,
            padding=(size - rate) // 2,
        )
        total = torch.zeros_like(x)
        for block in range(3):
            y = x
            for index, dilation in enumerate((1, 3, 5)):
                name = f"resblocks.{3 * stage + block}"
                z = convolve(F.leaky_relu(y, 0.1), f"{name}.convs1.{index}", dilation)
                y = y + convolve(F.leaky_relu(z, 0.1), f"{name}.convs2.{index}")
            total = total + y
        x = total / 3
    return torch.tanh(convolve(F.leaky_relu(x), "conv_post"))[0, 0].numpy()


def lasting(tensors, units: list[int]) -> list[int]:
    """Frames of units without repetitions, one unit and one channel sum at a time, in float64."""

    def layer(rows, name):
        weight = tensors[f"dur_predictor.{name}.weight"].double()
        bias = tensors[f"dur_predictor.{name}.bias"].double()
        zero = torch.zeros_like(rows[0])
        padded = [zero, *rows, zero]
        return [
            torch.relu(sum(weight[:, :, k] @ padded[at + k] for k in range(3)) + bias)
            for at in range(len(rows))
        ]

    def norm(rows, name):
        weight = tensors[f"dur_predictor.{name}.weight"].double()
        bias = tensors[f"dur_predictor.{name}.bias"].double()
        return [
            (row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt() * weight + bias
            for row in rows
        ]

    rows = list(tensors["dict.weight"].double()[units])
    rows = norm(layer(norm(layer(rows, "conv1.0"), "ln1"), "conv2.0"), "ln2")
    weight = tensors["dur_predictor.proj.weight"].double()[0]
    bias = tensors["dur_predictor.proj.bias"].double()
    return [max(1, round(float(torch.exp(weight @ row + bias) - 1))) for row in rows]


def write(folder, tensors, config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "g.safetensors")
    return folder


UNITS = [3, 3, 17, 0, 19, 5]


def test_a_public_checkpoint_says_what_the_equations_say(tmp_path) -> None:
    tensors = checkpoint()
    vocoder = load_vocoder(write(tmp_path, tensors))
    assert (vocoder.num_units, vocoder.samples_per_unit, vocoder.codebook) == (20, 320, None)
    assert vocoder.speakers == ("0", "1", "2", "3")
    expected = spoken(tensors, UNITS, 2)
    assert np.abs(expected).max() > 0.05
    found = vocoder.speak(np.array(UNITS), speaker="2")
    assert found.shape == (320 * len(UNITS),)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_its_durations_are_those_of_the_equations(tmp_path) -> None:
    tensors = checkpoint()
    tensors["dur_predictor.proj.bias"] += 1.5
    vocoder = load_vocoder(write(tmp_path, tensors))
    runs = [3, 17, 0, 19, 5]
    frames = lasting(tensors, runs)
    assert len(set(frames)) > 1
    expected = spoken(
        tensors, [unit for unit, n in zip(runs, frames, strict=True) for _ in range(n)], 0
    )
    found = vocoder.speak(np.array(UNITS), predict_durations=True)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def spelled_as_parametrizations(tensors):
    ends = {
        ".weight_g": ".parametrizations.weight.original0",
        ".weight_v": ".parametrizations.weight.original1",
    }
    spelled = {}
    for name, tensor in tensors.items():
        for end, other in ends.items():
            name = name.replace(end, other)
        spelled[name] = tensor
    return spelled


def without_weight_norm(tensors):
    plain = {n: t for n, t in tensors.items() if not n.endswith(("weight_g", "weight_v"))}
    for name in tensors:
        if name.endswith(".weight_g"):
            stem = name.removesuffix(".weight_g")
            plain[f"{stem}.weight"] = kernel_of(tensors, stem).float()
    return plain


@pytest.mark.parametrize("spell", [spelled_as_parametrizations, without_weight_norm])
def test_every_spelling_of_the_weights_says_the_same(tmp_path, spell) -> None:
    tensors = checkpoint()
    one = load_vocoder(write(tmp_path / "one", tensors)).speak(np.array(UNITS))
    other = load_vocoder(write(tmp_path / "other", spell(tensors))).speak(np.array(UNITS))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_one_voice_and_no_durations(tmp_path) -> None:
    tensors = {
        name: tensor
        for name, tensor in checkpoint().items()
        if not name.startswith(("spkr", "dur_predictor"))
    }
    tensors["conv_pre.weight_v"] = tensors["conv_pre.weight_v"][:, :12]
    config = {**CONFIG, "multispkr": None, "dur_predictor_params": None, "model_in_dim": 12}
    vocoder = load_vocoder(write(tmp_path, tensors, config))
    assert vocoder.speakers == ()
    assert vocoder.speak(np.array(UNITS)).shape == (320 * len(UNITS),)


def test_units_of_another_rate_are_not_said_at_it(tmp_path) -> None:
    voice = load_voice(write(tmp_path, checkpoint()))
    with pytest.raises(UserError, match="640 samples a unit, got one of 320"):
        sound_of(np.array(UNITS), voice)


# --- what is not a vocoder ------------------------------------------------------------------------


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, run) -> None:
    import sys

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save({"generator": checkpoint()}, tmp_path / "g_00500000")
    with pytest.raises(UserError, match=r"g_00500000: a pickle.*convert it: python -c") as refused:
        load_vocoder(tmp_path)
    assert "\n" not in str(refused.value)
    code = str(refused.value).split('python -c "')[1].removesuffix('"')
    run(sys.executable, "-c", code)
    expected = spoken(checkpoint(), UNITS, 0)
    np.testing.assert_allclose(load_vocoder(tmp_path).speak(np.array(UNITS)), expected, atol=2e-5)


def changed(name, change):
    tensors = checkpoint()
    tensors[name] = change(tensors[name])
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            changed("conv_post.bias", lambda t: t * float("nan")),
            "numbers in conv_post.bias, got NaN",
        ),
        (changed("dict.weight", lambda t: t[:10]), r"dict.weight of shape \(20, 12\), got \(10"),
        ({**checkpoint(), "f0_head.weight": torch.zeros(2)}, "expected no f0_head.weight"),
        (
            {n: t for n, t in checkpoint().items() if n != "conv_post.bias"},
            "expected conv_post.bias, got none",
        ),
        (
            {n: t for n, t in checkpoint().items() if n != "ups.0.weight_g"},
            "expected ups.0.weight, got none",
        ),
    ],
)
def test_weights_of_something_else_are_refused(tmp_path, tensors, message) -> None:
    with pytest.raises(UserError, match=message):
        load_vocoder(write(tmp_path, tensors))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampling_rate": 22050}, "16000 Hz, got one of 22050"),
        ({"f0": True}, "units and speakers, got one of f0"),
        ({"upsample_kernel_sizes": [11, 8]}, "config.json: expected for each of upsample_rates"),
        ({"dur_predictor_params": {"layers": 2}}, "configuration of a vocoder"),
        ({"speakers": ["ada"]}, "the names of 4 speakers, got 1"),
        ({"speakers": "abcd"}, 'config.json: expected speakers to be list.str., got "abcd"'),
        ({"codebook": 3}, "config.json: expected codebook to be str, got 3"),
        ({"embedding_dim": 0}, "config.json: expected sizes of 1 to 1,048,576"),
        ({"upsample_initial_channel": 10**30}, "config.json: expected sizes of 1 to 1,048,576"),
        ({"upsample_initial_channel": 2**20}, "of shape"),
        ({"upsample_rates": "85"}, "config.json: expected the configuration of a vocoder"),
        ({"num_embeddings": True}, "config.json: expected num_embeddings to be int, got true"),
    ],
)
def test_a_configuration_of_something_else_is_refused(tmp_path, values, message) -> None:
    with pytest.raises(UserError, match=message):
        load_vocoder(write(tmp_path, checkpoint(), {**CONFIG, **values}))


def test_a_folder_that_lacks_something_or_is_damaged_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="expected the configuration of a vocoder"):
        load_vocoder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="expected an object, got list"):
        load_vocoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=r"expected generator.safetensors, got 0 files"):
        load_vocoder(tmp_path)
    whole = (write(tmp_path, checkpoint()) / "g.safetensors").read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 5, 0):
        (tmp_path / "g.safetensors").write_bytes(whole[:kept])
        with pytest.raises(UserError, match=r"g.safetensors: no vocoder could be read here"):
            load_vocoder(tmp_path)
