"""``python -m lst.demo CHECKPOINT``: a page to try a trained model by.

Type, upload or record a prompt; hear and read how the model goes on; see its patches.
"""

import contextlib
import os
import signal
import socket
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lst.demo.examples import corpus_examples
from lst.demo.page import import_gradio, launch_settings, make_page
from lst.demo.session import Limits, Session
from lst.errors import UserError, expect_option, expect_positive, run_command
from lst.generate.prompt import open_units
from lst.pretrained import Pretrained
from lst.speech.sound import UnitVoice, load_voice
from lst.speech.units import LogMelKMeans, UnitEncoder
from lst.train.checkpoint import load_trained


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Serve a page to try a trained model by.

    Type, upload or record a prompt; hear and read how the model goes on; see its patches.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder, a checkpoint, a pretrained folder, or the name of one on the hub."""
    host: str = "127.0.0.1"
    """The address to serve at; 0.0.0.0: whoever reaches this machine may come."""
    port: int = 7860
    """0: any that is free."""
    codebook: Path | None = None
    """Of the model's speech units; None: the one that comes with the model or its corpus."""
    hubert: str | None = None
    """HuBERT that the codebook is of: a folder or a hub name; with --layer."""
    layer: int | None = None
    """Of HuBERT, whose states the codebook is of."""
    voice: Path | None = None
    """What speaks units: a vocoder's folder, or a log-mel codebook; None: the model's codebook."""
    speaker: str | None = None
    """One of the vocoder's speakers."""
    device: str = "cpu"
    """Where the model runs."""
    max_seconds: float = Limits.seconds
    """Of audio in a prompt."""
    max_megabytes: float = 20.0
    """Of an uploaded file."""
    max_tokens: int = Limits.tokens
    """Of a continuation."""
    time_limit: float = Limits.time
    """Seconds for a continuation."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UserError(f"--port: expected a port up to 65535, got {self.port}")
        expect_positive(self, "max_seconds", "max_megabytes", "max_tokens", "time_limit")
        most = 10**6  # a page's numbers have limits of their own
        expect_option(
            self.max_megabytes <= most, "max_megabytes", f"at most {most:,}", self.max_megabytes
        )


def open_session(config: DemoConfig) -> Session:
    trained = load_trained(config.checkpoint, config.device)
    return Session(
        trained,
        encoder=_encoder(config, trained),
        voice=_voice(config, trained),
        speaker=config.speaker,
        limits=Limits(seconds=config.max_seconds, tokens=config.max_tokens, time=config.time_limit),
        device=config.device,
    )


def _encoder(config: DemoConfig, trained: Pretrained) -> UnitEncoder | None:
    """What makes the model's units; None where nothing is known of that."""
    asked = (config.codebook, config.hubert, config.layer) != (None, None, None)
    if not asked and trained.codebook_file is None:
        return None
    return open_units(trained, codebook=config.codebook, hubert=config.hubert, layer=config.layer)


def _voice(config: DemoConfig, trained: Pretrained) -> LogMelKMeans | UnitVoice | None:
    """What speaks the model's units. A log-mel codebook does, a k-means of HuBERT's states not."""
    codebook = config.codebook if config.hubert is None else None
    path = config.voice or codebook or trained.codebook_file
    return None if path is None else load_voice(path)


def serve(config: DemoConfig) -> None:
    """Until the process is interrupted or told to end."""
    try:
        socket.getaddrinfo(config.host, None)
    except (OSError, UnicodeError):
        raise UserError(
            f"--host: expected an address of this machine, got {config.host!r}"
        ) from None
    with tempfile.TemporaryDirectory(prefix="lst-demo-") as folder:
        # Uploads and sounds go here, and go with it; Gradio reads this where it is imported.
        os.environ["GRADIO_TEMP_DIR"] = folder
        gr = import_gradio()
        session = open_session(config)
        page = make_page(session, corpus_examples(session, Path(folder)))
        try:
            page.launch(
                server_name=config.host,
                server_port=config.port or _free_port(),
                max_file_size=int(config.max_megabytes * 1e6),
                prevent_thread_lock=True,
                **launch_settings(gr),
            )
        except OSError:
            raise UserError(
                f"--host, --port: expected an address that is free here, got {config.host}:"
                f"{config.port}"
            ) from None
        print(f"{page.local_url}  (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def main() -> None:
    config = tyro.cli(DemoConfig, prog="python -m lst.demo")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        serve(config)


if __name__ == "__main__":
    run_command(main)
