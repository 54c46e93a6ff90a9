"""The page itself, in Gradio: it is sent from here alone, and sends nothing elsewhere."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lst.data.records import FRAMES_PER_SECOND
from lst.demo.session import Order, Request, Session
from lst.errors import UserError
from lst.generate import Modality, Sampling
from lst.speech.audio import SAMPLE_RATE, AudioError

__all__ = ["Example", "import_gradio", "launch_settings", "make_page"]

THEN: dict[str, Modality] = {"speech": "speech", "text": "text", "either": "any"}
ORDERS: dict[str, Order] = {"text, then audio": "text first", "audio, then text": "audio first"}
MAX_WAITING = 16  # requests; one is worked on at a time

STYLE = """
.gradio-container .fillable { max-width: 1320px !important; }
#facts p, #ended p { opacity: 0.75; margin: 0; }
#speech { min-height: 0; }
#speech .audio-container { height: auto; min-height: 0; }
#speech .upload-container, #speech .upload-container .wrap { height: 124px; min-height: 0; }
#picture .html-container { padding: 0; }
footer { display: none !important; }
"""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt to try."""

    label: str
    text: str = ""
    audio: Path | None = None


def import_gradio() -> Any:
    """Gradio, told to keep what it does to itself.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError:
        raise UserError(
            "the page needs Gradio, which is not installed: pip install 'lst[demo]'"
        ) from None
    return gradio


def make_page(session: Session, examples: Sequence[Example] = ()) -> Any:
    """The page as ``gradio.Blocks``, to be launched with :func:`launch_settings`."""
    gr = import_gradio()
    with gr.Blocks(
        title=f"lst · {session.trained.config.name}",
        analytics_enabled=False,
        delete_cache=(600, 3600),  # seconds: every ten minutes what is older than an hour
    ) as page:
        gr.Markdown("# Continue speech and text")
        gr.Markdown(" · ".join(session.facts()), elem_id="facts")
        with gr.Row():
            with gr.Column(scale=3):
                text, audio = _prompt(gr, session, examples)
            with gr.Column(scale=2):
                settings = _settings(gr, session)
                go = gr.Button("Continue", variant="primary", elem_id="go")
        with gr.Row():
            read = gr.Textbox(
                label="Continuation", lines=5, max_lines=12, interactive=False, elem_id="read"
            )
            heard = gr.Audio(
                label="Its speech",
                interactive=False,
                visible=False,
                format="wav",
                buttons=["download"],
                elem_id="heard",
            )
        ended = gr.Markdown(elem_id="ended")
        picture = gr.HTML(elem_id="picture", apply_default_css=False, js_on_load=None)
        gr.on(
            [go.click, text.submit],
            _answer(gr, session),
            [text, audio, *settings],
            [read, heard, ended, picture],
            show_progress="full",
            show_progress_on=[read],
        )
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def _prompt(gr: Any, session: Session, examples: Sequence[Example]) -> tuple[Any, Any]:
    """Where text and audio of a prompt are given."""
    limits = session.limits
    text = gr.Textbox(
        label="Text",
        lines=3,
        max_lines=10,
        max_length=limits.characters,
        placeholder="Once upon a time",
        elem_id="text",
    )
    audio = gr.Audio(
        label=f"Speech, up to {limits.seconds:g} s",
        sources=["upload", "microphone"],
        type="filepath",
        visible=session.encoder is not None,
        buttons=[],
        elem_id="speech",
    )
    if examples:
        gr.Examples(
            [[each.text, each.audio and str(each.audio)] for each in examples],
            [text, audio],
            label="Prompts to try",
            example_labels=[each.label for each in examples],
            cache_examples=False,
            examples_per_page=len(examples),
        )
    return text, audio


def _settings(gr: Any, session: Session) -> list[Any]:
    """How to continue: modality, length, order, temperature, top-p and seed."""
    most = session.limits.tokens
    then = gr.Radio(list(THEN), value="either", label="Continue as", elem_id="then")
    length = gr.Slider(
        1,
        most,
        value=min(150, most),
        step=1,
        label="Length, tokens",
        info=f"at most; {FRAMES_PER_SECOND} units are a second of speech",
        elem_id="length",
    )
    order = gr.Radio(
        list(ORDERS),
        value=next(iter(ORDERS)),
        label="Where both are given",
        visible=session.encoder is not None,
    )
    with gr.Accordion("Sampling", open=False):
        temperature = gr.Slider(
            0, 2, value=0.8, step=0.05, label="Temperature", info="0: the likeliest"
        )
        top_p = gr.Slider(
            0.05,
            1,
            value=0.95,
            step=0.05,
            label="Top-p",
            info="the likeliest tokens of so much probability together",
        )
        seed = gr.Number(0, precision=0, label="Seed")
    return [then, length, order, temperature, top_p, seed]


def _answer(gr: Any, session: Session) -> Callable[..., tuple[Any, ...]]:
    """What the button does: values of the prompt and the settings to those of the results."""

    def continue_(
        text: str,
        audio: str | None,
        then: str,
        length: float,
        order: str,
        temperature: float,
        top_p: float,
        seed: float,
        progress: Any = gr.Progress(),  # noqa: B008  Gradio looks for it in the defaults
    ) -> tuple[Any, ...]:
        try:
            sampling = Sampling(
                temperature=temperature,
                top_p=top_p,
                modality=THEN[then],
                max_tokens=int(length),
                seed=int(seed),
            )
            request = Request(
                text=text or "",
                audio=None if audio is None else Path(audio),
                order=ORDERS[order],
                sampling=sampling,
            )
            result = session.continue_(
                request, lambda done: progress((done, sampling.max_tokens), unit="tokens")
            )
        except (UserError, AudioError) as error:
            # A file is known to the user by its name, not by where the page keeps it.
            message = str(error) if audio is None else str(error).replace(audio, Path(audio).name)
            raise gr.Error(message, duration=None, print_exception=False) from None
        sound = gr.Audio(value=_playable(result.sound), visible=len(result.sound) > 0)
        return result.text, sound, result.ended, result.picture

    return continue_


def launch_settings(gr: Any) -> dict[str, Any]:
    """How the page is launched: the reader's own fonts, nothing shared."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    theme = gr.themes.Default(primary_hue="teal", font=sans, font_mono=mono).set(
        # the theme's own colours give too little contrast to read by
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        body_text_color_subdued="*neutral_500",
    )
    return {
        "theme": theme,
        "css": STYLE,
        "share": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "run_history": False,
        "footer_links": [],
        "show_error": False,
        "quiet": True,
        "max_threads": 4,
    }


def _playable(sound: np.ndarray) -> tuple[int, np.ndarray] | None:
    """As 16 bits: floats would be made as loud as can be."""
    if not len(sound):
        return None
    return SAMPLE_RATE, np.rint(sound * 32767).astype(np.int16)
