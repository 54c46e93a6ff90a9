"""A trained model as a folder to keep, share and load: on this machine or on the hub.

::

    config.json              what it is (Description)
    model.safetensors        the weights, whole, by the names of model.weights()
    tokenizer.model          or tokenizer.json
    codebook.safetensors     of its speech units, where that is a log-mel codebook
    speech_bpe.model         where speech is in pieces of its own

config.json holds the SHA-256 of every other file, and nothing that does not fit is read: a weight
file that was cut short, or the tokenizer of another model, is an error that names it.

    save_pretrained(load_trained("runs/demo", "cpu"), "shared/demo")
    trained = from_pretrained("shared/demo")        # or "owner/name" on the hub
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lst.errors import UserError
from lst.files import making_folder, reason, write_json
from lst.machine import find_device
from lst.model import LanguageModel, build_model
from lst.speech.units import LogMelKMeans
from lst.speech_bpe import SPEECH_BPE, SpeechBPE
from lst.strict_json import read_json, read_strictly
from lst.train.config import TrainConfig, to_json
from lst.vocabulary import JsonTokenizer, SentencePieceTokenizer, Tokenizer, Vocabulary

__all__ = ["Pretrained", "from_pretrained", "save_pretrained"]

FORMAT = 1  # of config.json; raised when an older reader would misread a newer folder
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CODEBOOK = "codebook.safetensors"
TOKENIZERS = (SentencePieceTokenizer.file_name, JsonTokenizer.file_name)
FILES = (WEIGHTS, *TOKENIZERS, CODEBOOK, SPEECH_BPE)  # whatever else lies there is not read
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # owner/name


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A trained model, and what it takes to use it."""

    model: LanguageModel
    config: TrainConfig  # as it was trained: config.model, config.data.patching and the rest
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    step: int  # optimizer steps that it was trained for
    codebook: str | None  # fingerprint of what made its units; None: no speech, or not known
    codebook_file: Path | None  # that log-mel codebook, where there is a file of it


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the vocabulary."""

    num_pieces: int
    num_units: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """What ``config.json`` says."""

    format: int
    step: int
    vocabulary: Sizes
    codebook: str | None
    files: dict[str, str]  # sha256:<hex> by name
    training: TrainConfig


# Saving -------------------------------------------------------------------------------------------


def save_pretrained(trained: Pretrained, folder: Path | str) -> None:
    """Write a folder that :func:`from_pretrained` reads. It is there whole, or not at all.

    Raises:
        UserError: something is there already, it cannot be written, or the codebook's file is not
            that of the model's units.
    """
    folder = Path(folder)
    vocabulary, codebook = trained.vocabulary, trained.codebook
    with making_folder(folder) as temporary:
        if trained.codebook_file is not None:
            codebook = _copy_codebook(trained, temporary / CODEBOOK)
        weights = {name: t.cpu().contiguous() for name, t in trained.model.weights().items()}
        try:
            save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"{folder / WEIGHTS}: cannot be written ({error})") from None
        trained.tokenizer.save(temporary / trained.tokenizer.file_name)
        if vocabulary.speech_bpe is not None:
            vocabulary.speech_bpe.save(temporary / SPEECH_BPE)
        description = Description(
            format=FORMAT,
            step=trained.step,
            vocabulary=Sizes(num_pieces=vocabulary.num_pieces, num_units=vocabulary.num_units),
            codebook=codebook,
            files={path.name: _sha256(path) for path in sorted(temporary.iterdir())},
            training=trained.config,
        )
        write_json(temporary / CONFIG, to_json(description))


def _copy_codebook(trained: Pretrained, out: Path) -> str:
    """Its fingerprint."""
    path = trained.codebook_file
    assert path is not None
    codebook = LogMelKMeans.load(path)
    if trained.codebook not in (None, codebook.fingerprint):
        raise UserError(
            f"{path}: expected the codebook of the model's units, {trained.codebook}, "
            f"got {codebook.fingerprint}"
        )
    if codebook.num_units != trained.vocabulary.num_units:
        raise UserError(
            f"{path}: expected the codebook of the model's {trained.vocabulary.num_units} units, "
            f"got one of {codebook.num_units}"
        )
    codebook.save(out)
    return codebook.fingerprint


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None


# Loading ------------------------------------------------------------------------------------------


def from_pretrained(name: Path | str, device: torch.device | str = "cpu") -> Pretrained:
    """Load a model from a folder of :func:`save_pretrained`.

    Args:
        name: the folder, or else ``owner/name`` on the hub, which is downloaded once, by
            ``huggingface_hub``. Where there is a folder ``owner``, the name is one of a folder.

    Raises:
        UserError: no such folder, name or device; a file that is missing or damaged or is not the
            one that belongs to the model; an unknown key, or a newer format.
    """
    device = find_device(device)
    folder = Path(name)
    if not folder.exists():
        folder = _download(str(name))
    path = folder / CONFIG
    description = _read_description(path)
    for file, expected in description.files.items():
        _expect_file(folder / file, expected)
    vocabulary = _read_vocabulary(folder, description)
    tokenizer = Tokenizer.load(folder / _tokenizer_of(description, path))
    if tokenizer.num_pieces != vocabulary.num_pieces:
        raise UserError(
            f"{folder / tokenizer.file_name}: expected a tokenizer of {vocabulary.num_pieces} "
            f"pieces, got {tokenizer.num_pieces}"
        )
    model = build_model(description.training.model, vocabulary)
    _load_weights(model, folder / WEIGHTS)
    return Pretrained(
        model=model.to(device),
        config=description.training,
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        step=description.step,
        codebook=description.codebook,
        codebook_file=folder / CODEBOOK if CODEBOOK in description.files else None,
    )


def is_pretrained(name: Path | str) -> bool:
    """Whether :func:`from_pretrained` is the one to read this: a folder of its kind, or, where
    nothing is, a name on the hub."""
    path = Path(name)
    if not path.exists():
        return _is_hub_name(str(name))
    try:
        return "files" in read_json(path / CONFIG)  # a run's config.json has no such key
    except (UserError, TypeError):
        return False


def _is_hub_name(name: str) -> bool:
    # runs/dmeo, mistyped, is no name on the hub.
    return HUB_NAME.fullmatch(name) is not None and not Path(name).parent.exists()


def _download(name: str) -> Path:
    if not _is_hub_name(name):
        raise UserError(f"{name}: expected the folder of a pretrained model, got none")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name}: there is no such folder, and models on the hub need huggingface_hub, which "
            "is not installed: pip install 'lst[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, *FILES]))
    except Exception as error:  # of the network, the hub, the disk: huggingface_hub has its own
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name}: expected a folder or the name of a model on the hub, got no folder, and no "
            f"such model could be had ({why})"
        ) from None


def _read_description(path: Path) -> Description:
    values = read_json(path)
    if not isinstance(values, dict) or type(values.get("format")) is not int:
        raise UserError(f"{path}: expected the description of a pretrained model, got another file")
    if values["format"] != FORMAT:
        raise UserError(
            f"{path}: expected format {FORMAT}, which this version of lst reads, "
            f"got {values['format']}"
        )
    description = read_strictly(Description, values, str(path))
    for file in description.files:
        if file not in FILES:
            raise UserError(f"{path}: unknown file {file}")
    if WEIGHTS not in description.files:
        raise UserError(f"{path}: expected {WEIGHTS} among its files, got none")
    if description.files.get(CODEBOOK, description.codebook) != description.codebook:
        raise UserError(
            f"{path}: expected {CODEBOOK} to be the codebook {description.codebook} of the "
            f"model's units, got {description.files[CODEBOOK]}"
        )
    return description


def _expect_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise UserError(f"{path}: expected a file of the pretrained model, got none")
    got = _sha256(path)
    if got != expected:
        raise UserError(
            f"{path}: expected {expected}, as {CONFIG} says, got {got}: "
            "the file is damaged, or of another model"
        )


def _tokenizer_of(description: Description, path: Path) -> str:
    found = [name for name in TOKENIZERS if name in description.files]
    if len(found) != 1:
        names = " or ".join(TOKENIZERS)
        got = "both" if found else "neither"
        raise UserError(f"{path}: expected {names} among its files, got {got}")
    return found[0]


def _read_vocabulary(folder: Path, description: Description) -> Vocabulary:
    sizes, speech_bpe = description.vocabulary, None
    if SPEECH_BPE in description.files:
        speech_bpe = SpeechBPE.load(folder / SPEECH_BPE)
    try:
        return Vocabulary(sizes.num_pieces, sizes.num_units, speech_bpe)
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def _load_weights(model: LanguageModel, path: Path) -> None:
    """Fill the weights in place, one at a time."""
    weights = model.weights()
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(weights.keys() ^ names):
                expected, got = ("", "none") if name in weights else ("no ", "one")
                raise UserError(
                    f"{path}: does not fit its model: expected {expected}weight {name}, got {got}"
                )
            for name, weight in weights.items():
                value = file.get_tensor(name)
                if value.shape != weight.shape:
                    raise UserError(
                        f"{path}: does not fit its model: {name}: expected shape "
                        f"{tuple(weight.shape)}, got {tuple(value.shape)}"
                    )
                weight.copy_(value)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
