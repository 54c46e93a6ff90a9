"""Prompts to try, from the corpus that a model was trained on."""

from dataclasses import replace
from pathlib import Path

from lst.data.records import FRAMES_PER_SECOND, Record, read_items
from lst.demo.page import Example
from lst.demo.session import Session
from lst.files import Location
from lst.speech.audio import write_wav
from lst.train.corpus import made_with

__all__ = ["corpus_examples"]

EACH = 2  # examples of text, and of speech
LABEL_WORDS = 6
SPOKEN_FRAMES = 6 * FRAMES_PER_SECOND  # about as long as a spoken one is


def corpus_examples(session: Session, folder: Path) -> list[Example]:
    """Beginnings of the corpus's stories, written and spoken; none where there are no stories.

    Args:
        folder: where the audio of the spoken ones is written.

    Raises:
        UserError: the stories are damaged, or made for another tokenizer or codebook.
    """
    corpus = Location(session.trained.config.data.corpus)
    if not (corpus / "items").exists():
        return []
    items = read_items(corpus / "items", **made_with(corpus, session.trained.tokenizer))
    prompts = [items[place].prompt for place in range(0, len(items), -(-len(items) // (2 * EACH)))]
    written = [
        Example(label=_label(each.text), text=each.text) for each in prompts[:EACH] if each.text
    ]
    if session.encoder is None or not session.speaks:
        return written
    spoken = []
    for number, each in enumerate(prompts[EACH:], 1):
        record = _beginning(each)
        if record is not None and record.units is not None:
            path = folder / f"story-{number}.wav"
            write_wav(path, session.sound(record.units))
            session.know(path, record)
            label = _label(" ".join(word.word for word in record.words or ()))
            spoken.append(Example(label=f"spoken: {label}", audio=path))
    return written + spoken


def _beginning(record: Record) -> Record | None:
    """The first words of a spoken record, with the units up to their end."""
    if record.units is None or not record.words:
        return None
    words = tuple(word for word in record.words if word.stop <= SPOKEN_FRAMES) or record.words[:1]
    return replace(record, units=record.units[: words[-1].stop], words=words)


def _label(text: str) -> str:
    """How it begins."""
    words = text.split()
    return " ".join(words[:LABEL_WORDS]) + (" …" if len(words) > LABEL_WORDS else "")
