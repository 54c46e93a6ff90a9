"""A run that begins with what was learnt before: all weights of a checkpoint of ours, or the global
transformer, text embedding and head of a Llama checkpoint."""

from dataclasses import replace

from lst.errors import UserError
from lst.model import LanguageModel
from lst.model.llama import llama_weights
from lst.train.checkpoint import find_checkpoint, load_tensors, read_state
from lst.train.config import TrainConfig, differences, read_config
from lst.train.corpus import Corpus
from lst.train.parallel import fill_weights
from lst.train.run_folder import CONFIG
from lst.vocabulary import Tokenizer, fingerprint


def start_from_checkpoint(model: LanguageModel, config: TrainConfig, corpus: Corpus) -> None:
    """Fill all weights from ``config.init_from``, a checkpoint or a run folder for its newest.

    Raises:
        UserError: it is not one, or is of another model, tokenizer, vocabulary or codebook.
    """
    assert config.init_from is not None
    folder = find_checkpoint(config.init_from)
    theirs = replace(config, model=read_config(folder / CONFIG).model)
    for key, expected, got in differences(theirs, config):
        raise UserError(f"{folder}: expected {key} = {expected}, as it was trained, got {got}")
    state = read_state(folder)
    made_with = {
        "tokenizer": (Tokenizer.load(folder).fingerprint, corpus.tokenizer.fingerprint),
        "codebook": (state.codebook, corpus.codebook),  # None where there is none, or none is known
    }
    for name, (asked, found) in made_with.items():
        if None not in (asked, found) and asked != found:
            raise UserError(
                f"{config.data.corpus}: expected a corpus made with the {name} of {folder}, "
                f"{asked}, got {found}"
            )
    if state.vocabulary != corpus.vocabulary:
        raise UserError(
            f"{config.data.corpus}: expected the vocabulary of {folder}, {state.vocabulary}, "
            f"got {corpus.vocabulary}"
        )
    load_tensors(folder, model)


def start_from_llama(model: LanguageModel, config: TrainConfig, corpus: Corpus) -> None:
    """Fill the global transformer, embedding and head from the checkpoint ``config.warm_start``.

    Raises:
        UserError: it is not one, or the corpus was made with another tokenizer than it has.
    """
    folder, tokenizer = config.warm_start, corpus.tokenizer
    assert folder is not None
    theirs = fingerprint(folder / tokenizer.file_name)
    if theirs != tokenizer.fingerprint:
        raise UserError(
            f"{config.data.corpus}: expected a corpus made with the tokenizer of {folder}, "
            f"{theirs}, got {tokenizer.fingerprint}"
        )
    weights = llama_weights(config.model, corpus.vocabulary, folder, seed=config.seed)
    fill_weights(model, weights)
