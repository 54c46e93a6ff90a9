"""Units to samples: as many as there should be, the same each time, with weight norm or without."""

import numpy as np
import pytest
import torch

from lst.errors import UserError
from lst.speech.sound import load_voice, sound_of
from lst.vocoder import load_vocoder
from lst.vocoder.config import SIZES, DurationConfig, GeneratorConfig
from lst.vocoder.generator import Generator, add_weight_norm, fold_weight_norm
from lst.vocoder.vocoder import Vocoder, save_vocoder

SMALL = GeneratorConfig(
    num_embeddings=11,
    num_speakers=3,
    embedding_dim=8,
    upsample_initial_channel=16,
    upsample_rates=(10, 8, 8),
    upsample_kernel_sizes=(20, 16, 16),
    resblock_kernel_sizes=(3, 5),
    resblock_dilation_sizes=((1, 3), (1, 2)),
    dur_predictor_params=DurationConfig(encoder_embed_dim=8, var_pred_hidden_dim=8),
)
SPEAKERS = ("ada", "bob", "cleo")


def generator(seed: int = 0, config: GeneratorConfig = SMALL) -> Generator:
    torch.manual_seed(seed)
    made = Generator(config)
    for parameter in made.parameters():  # large enough that what is said is not silence
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def vocoder(seed: int = 0) -> Vocoder:
    return Vocoder(generator(seed), codebook="sha256:units", speakers=SPEAKERS)


@pytest.mark.parametrize("size", SIZES)
def test_a_unit_is_640_samples_in_every_size(size) -> None:
    config = SIZES[size].generator(num_units=501, num_speakers=0, predict_durations=False)
    assert config.samples_per_unit == 640
    assert config.upsample_initial_channel % 2 ** len(config.upsample_rates) == 0


@pytest.mark.parametrize("num_units", [0, 1, 2, 3, 50])
def test_any_number_of_units_has_its_samples(num_units) -> None:
    units = np.random.default_rng(num_units).integers(0, 11, num_units)
    samples = vocoder().speak(units)
    assert samples.shape == (640 * num_units,)
    assert samples.dtype == np.float32
    assert np.isfinite(samples).all()
    assert np.abs(samples).max(initial=0) <= 1


def test_the_same_units_sound_the_same_each_time() -> None:
    units = np.array([3, 3, 10, 0, 5])
    voice = vocoder()
    np.testing.assert_array_equal(voice.speak(units), voice.speak(units))
    np.testing.assert_array_equal(voice.speak(units), vocoder().speak(units.astype(np.int16)))
    assert np.abs(voice.speak(units) - vocoder(1).speak(units)).max() > 1e-3


def test_a_speaker_is_asked_for_by_name_and_the_first_where_none_is() -> None:
    units = np.array([3, 4])
    voice = vocoder()
    by_name = {name: voice.speak(units, speaker=name) for name in SPEAKERS}
    np.testing.assert_array_equal(voice.speak(units), by_name["ada"])
    assert np.abs(by_name["ada"] - by_name["cleo"]).max() > 1e-3
    with pytest.raises(UserError, match="a speaker of ada, bob, cleo, got 'dora'"):
        voice.speak(units, speaker="dora")


def test_a_batch_s_rows_do_not_hear_each_other() -> None:
    made = generator().eval()
    units = torch.tensor([[1, 2, 3], [4, 5, 6]])
    both = made(units, torch.tensor([0, 2]))
    for row, speaker in enumerate((0, 2)):
        alone = made(units[row : row + 1], torch.tensor([speaker]))
        torch.testing.assert_close(both[row : row + 1], alone)


def test_a_unit_far_away_is_not_heard() -> None:
    """What it is made from ends: 3 frames of the first convolution and a few by the others."""
    units = np.zeros(60, np.int64)
    other = units.copy()
    other[40] = 7
    difference = np.abs(vocoder().speak(units) - vocoder().speak(other)).reshape(60, 640).max(1)
    assert difference[40] > 1e-3
    assert difference[:30].max() < 1e-6
    assert difference[51:].max() < 1e-6


# --- durations ------------------------------------------------------------------------------------


def test_predicted_durations_do_not_depend_on_how_often_a_unit_is_repeated() -> None:
    voice = vocoder()
    once = voice.speak(np.array([3, 5, 9]), predict_durations=True)
    often = voice.speak(np.array([3, 3, 3, 5, 9, 9]), predict_durations=True)
    np.testing.assert_array_equal(once, often)
    assert len(once) % 640 == 0
    assert len(once) >= 3 * 640


def test_predicted_durations_are_the_predictor_s_rounded_and_one_at_least() -> None:
    made = generator().eval()
    units = torch.tensor([[1, 2, 3, 4]])
    for value, frames in ((np.log1p(3.4), 3), (np.log1p(2.6), 3), (-5.0, 1)):
        torch.nn.init.zeros_(made.dur_predictor.proj.weight)
        torch.nn.init.constant_(made.dur_predictor.proj.bias, value)
        assert made.durations(units).tolist() == [[frames] * 4]
        voice = Vocoder(made, codebook=None, speakers=SPEAKERS)
        samples = voice.speak(np.array([1, 1, 2]), predict_durations=True)
        np.testing.assert_array_equal(samples, voice.speak(np.repeat([1, 2], frames)))


def test_durations_are_not_asked_of_a_vocoder_that_predicts_none() -> None:
    config = GeneratorConfig(num_embeddings=4, upsample_initial_channel=32)
    voice = Vocoder(Generator(config), codebook=None, speakers=())
    with pytest.raises(UserError, match="predicts durations, got one without"):
        voice.speak(np.array([1]), predict_durations=True)
    with pytest.raises(UserError, match="one voice, got 'ada'"):
        voice.speak(np.array([1]), speaker="ada")


# --- weight norm ----------------------------------------------------------------------------------


def test_folded_weight_norm_says_the_same() -> None:
    plain = generator()
    normed = add_weight_norm(generator())
    units, speakers = torch.tensor([[1, 2, 3]]), torch.tensor([1])
    torch.testing.assert_close(normed(units, speakers), plain(units, speakers))
    with torch.no_grad():  # as training moves lengths and directions
        for parameter in normed.parameters():
            parameter.mul_(1.3)
    plain.load_state_dict(fold_weight_norm(normed.state_dict()))
    torch.testing.assert_close(plain(units, speakers), normed(units, speakers))


def test_what_has_no_weight_norm_is_left_as_it_is_by_folding() -> None:
    tensors = generator().state_dict()
    folded = fold_weight_norm(tensors)
    assert folded.keys() == tensors.keys()
    assert all(folded[name] is tensors[name] for name in tensors)


# --- as a folder ----------------------------------------------------------------------------------


def test_a_saved_vocoder_says_the_same(tmp_path) -> None:
    weights = add_weight_norm(generator()).state_dict()
    save_vocoder(tmp_path, SMALL, weights, codebook="sha256:units", speakers=SPEAKERS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generator.safetensors",
    ]
    found = load_vocoder(tmp_path)
    assert (found.config, found.codebook, found.speakers) == (SMALL, "sha256:units", SPEAKERS)
    units = np.array([0, 10, 4])
    np.testing.assert_allclose(
        found.speak(units, speaker="bob"), vocoder().speak(units, speaker="bob"), atol=1e-5
    )
    voice = load_voice(tmp_path)
    np.testing.assert_array_equal(sound_of(units, voice), found.speak(units))
    with pytest.raises(UserError, match="codebook sha256:others, got one of sha256:units"):
        sound_of(units, voice, codebook="sha256:others")
    for bad in ([11], [-1, 2]):
        with pytest.raises(UserError, match=r"units in \[0, 11\)"):
            found.speak(np.array(bad))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"upsample_kernel_sizes": (20, 16)}, "a kernel size"),
        ({"upsample_kernel_sizes": (20, 16, 15)}, "as even or odd"),
        ({"upsample_kernel_sizes": (20, 16, 6)}, "as large"),
        ({"resblock_kernel_sizes": (3, 4)}, "odd resblock_kernel_sizes"),
        ({"resblock_dilation_sizes": ((1, 3),)}, "dilations for each"),
        ({"upsample_initial_channel": 20}, "halved 3 times, got 20"),
        ({"embedding_dim": 9}, "encoder_embed_dim 9, the embedding_dim, got 8"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(sizes, message) -> None:
    from dataclasses import asdict

    given = {**asdict(SMALL), "dur_predictor_params": SMALL.dur_predictor_params, **sizes}
    with pytest.raises(UserError, match=message):
        GeneratorConfig(**given)
