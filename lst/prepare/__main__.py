"""``python -m lst.prepare COMMAND``: make corpora, and look at them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import tyro

from lst.errors import run_command
from lst.prepare.corpus import CorpusConfig, describe_corpus, is_made, prepare_corpus
from lst.prepare.demo import DemoConfig, describe, prepare_demo
from lst.prepare.executors import ExecutorConfig, make_executor
from lst.prepare.speech_bpe import SpeechBPEConfig, describe_speech_bpe, prepare_speech_bpe
from lst.prepare.stats import StatsConfig, describe_dataset
from lst.prepare.tokenizer import TokenizerConfig, describe_tokenizer, prepare_tokenizer
from lst.prepare.units import CodebookConfig, fit_codebook

app = tyro.extras.SubcommandApp()
Options = tyro.conf.arg(name="")


@app.command
def demo(config: Annotated[DemoConfig, Options]) -> None:
    """Make the demo corpus: stories in text and in synthesised speech. No download, no GPU.

    It goes on where it was stopped, and does nothing where the corpus is there already.
    """
    with interruptible():
        print(f"{prepare_demo(config)}\n{describe(config.out)}")


@app.command
def corpus(
    config: Annotated[CorpusConfig, Options], by: Annotated[ExecutorConfig, Options]
) -> None:
    """Make a dataset of records, from any one source.

    Sources are lhotse manifests (cuts, or recordings and supervisions), a folder of audio with
    transcripts, a CSV or JSONL manifest, text files, and the JSONL of the paper's code.

    It goes on where it was stopped, and does nothing where the dataset is there already.
    """
    with interruptible():
        if by.executor == "none":
            made = prepare_corpus(config)
            if not made.dataset:
                print(f"{config.out}: rank {config.rank} is done, others are not")
        else:
            make_executor(config, by).run()
    if is_made(config):
        print(describe_corpus(config.out))


@app.command
def units(config: Annotated[CodebookConfig, Options]) -> None:
    """Fit a codebook of speech units to a sample of any source of audio."""
    print(fit_codebook(config))


@app.command
def stats(config: Annotated[StatsConfig, Options]) -> None:
    """Print what a dataset holds, and how long its patches are, by strategy, beside the paper's."""
    print(describe_dataset(config))


@app.command
def tokenizer(config: Annotated[TokenizerConfig, Options]) -> None:
    """Make a corpus's tokenizer: train SentencePiece on text, or import a tokenizer."""
    print(describe_tokenizer(config.out, prepare_tokenizer(config)))


@app.command
def speech_bpe(config: Annotated[SpeechBPEConfig, Options]) -> None:
    """Train a byte-pair encoding of a corpus's speech, for the BPE baseline (preset demo-bpe)."""
    print(describe_speech_bpe(config.corpus, prepare_speech_bpe(config)))


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends a command without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here")
        raise SystemExit(130) from None


def main() -> None:
    app.cli(prog="python -m lst.prepare", description="Make corpora, and look at them.")


if __name__ == "__main__":
    run_command(main)
