"""A run whose global transformer, text embedding and head begin as those of a Llama checkpoint."""

from lst.errors import UserError
from lst.model import LanguageModel
from lst.model.llama import llama_weights
from lst.train.config import TrainConfig
from lst.train.corpus import Corpus
from lst.train.parallel import fill_weights
from lst.vocabulary import fingerprint


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
