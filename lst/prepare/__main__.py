"""``python -m lst.prepare demo``: make a corpus."""

from typing import Annotated

import tyro

from lst.errors import run_command
from lst.prepare.demo import DemoConfig, describe, prepare_demo
from lst.prepare.speech_bpe import SpeechBPEConfig, describe_speech_bpe, prepare_speech_bpe

app = tyro.extras.SubcommandApp()


@app.command
def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")]) -> None:
    """Make the demo corpus: stories in text and in synthesised speech. No download, no GPU.

    It goes on where it was stopped, and does nothing where the corpus is there already.
    """
    try:
        print(f"{prepare_demo(config)}\n{describe(config.out)}")
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here")
        raise SystemExit(130) from None


@app.command
def speech_bpe(config: Annotated[SpeechBPEConfig, tyro.conf.arg(name="")]) -> None:
    """Train a byte-pair encoding of a corpus's speech, for the BPE baseline (preset demo-bpe)."""
    print(describe_speech_bpe(config.corpus, prepare_speech_bpe(config)))


def main() -> None:
    app.cli(prog="python -m lst.prepare", description="Make corpora from raw sources.")


if __name__ == "__main__":
    run_command(main)
