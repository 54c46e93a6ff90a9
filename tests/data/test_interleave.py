"""An interleaved document holds every word of its record once, in order; text or frames."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.data.alignment import Alignment
from lst.data.interleave import (
    DOCUMENT_KINDS,
    TASKS,
    item_document,
    record_document,
    stable_rng,
)
from lst.data.packing import IGNORE, patch_document
from lst.data.patching import Aligned, NoPatching, Static
from lst.data.records import Record, Word
from lst.errors import UserError
from lst.speech_bpe import train_speech_bpe
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, Vocabulary


class WordTokenizer:
    """Word ``wN`` is pieces 2N and 2N + 1, so that pieces tell the words they come from."""

    def encode(self, text):
        return [
            piece for word in text.split() for piece in (2 * int(word[1:]), 2 * int(word[1:]) + 1)
        ]


TOKENIZER = WordTokenizer()
VOCABULARY = Vocabulary(num_pieces=1000, num_units=500)


def interleaved_document(record, vocabulary, tokenizer, rng):
    return record_document(record, vocabulary, tokenizer, rng, "interleaved")


def make_record(lengths, gaps, id="r", text=True):
    """Word i takes lengths[i] frames after gaps[i] frames of silence; gaps has one more. The unit
    of a frame is its number, modulo the codebook."""
    words, frame = [], 0
    for i, (length, gap) in enumerate(zip(lengths, gaps[:-1], strict=True)):
        words.append(Word(f"w{i}", frame + gap, frame + gap + length))
        frame += gap + length
    units = (np.arange(frame + gaps[-1]) % 500).astype(np.int16)
    spoken = " ".join(word.word for word in words) if text else None
    return Record(id, spoken, units, tuple(words), None, None, "test")


@st.composite
def records(draw):
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=120))
    gaps = draw(st.lists(st.integers(0, 5), min_size=len(lengths) + 1, max_size=len(lengths) + 1))
    return make_record(lengths, gaps)


def spans_of(document):
    """[(marker, ids, token position of the first)] of an interleaved document."""
    tokens = document.tokens
    assert tokens[0] == BOS
    assert tokens[-1] == EOS
    places = np.flatnonzero((tokens == TEXT) | (tokens == SPEECH))
    assert places[0] == 1
    stops = [*places[1:], len(tokens) - 1]
    return [(tokens[p], tokens[p + 1 : q], p + 1) for p, q in zip(places, stops, strict=True)]


@given(records(), st.integers(0, 1000))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_spans_hold_every_word_once_in_order(record, seed):
    document = interleaved_document(record, VOCABULARY, TOKENIZER, np.random.default_rng(seed))
    spans = spans_of(document)
    markers = [marker for marker, _, _ in spans]
    assert all(a != b for a, b in itertools.pairwise(markers))

    word, counts, aligned = 0, [], []
    for marker, ids, start in spans:
        if marker == TEXT:
            pieces = VOCABULARY.id_to_piece(ids)
            count = len(pieces) // 2
            np.testing.assert_array_equal(pieces, np.arange(2 * word, 2 * (word + count)))
        else:
            # The span is a range of the record's frames: the words whose middle lies in it.
            units = VOCABULARY.id_to_unit(ids)
            cuts = silence_cuts(record)
            counted = [n for n in range(len(record.words) - word + 1)
                       if cuts[word + n] - cuts[word] == len(units)]  # fmt: skip
            # Empty words may be counted or not; the next text span says which.
            count = next_text_word(spans, start, len(record.words)) - word
            assert count in counted
            first = cuts[word]
            np.testing.assert_array_equal(units, record.units[first : first + len(units)])
            for each in record.words[word : word + count]:
                if each.stop > each.start:
                    aligned.append((each.start - first + start, each.stop - first + start))
        counts.append((marker, count))
        word += count
    assert word == len(record.words)
    np.testing.assert_array_equal(document.aligned.reshape(-1, 2), np.array(aligned).reshape(-1, 2))
    for marker, count in counts[:-1]:
        low, high = (5, 30) if marker == TEXT else (3, 15)
        assert low <= count <= high
    assert counts[-1][1] <= (30 if markers[-1] == TEXT else 15)


def silence_cuts(record):
    """Frames between words: half of each silence to either side, all of it at the two ends."""
    inner = [(a.stop + b.start) // 2 for a, b in itertools.pairwise(record.words)]
    return [0, *inner, len(record.units)]


def next_text_word(spans, start, num_words):
    for marker, ids, place in spans:
        if marker == TEXT and place > start:
            return VOCABULARY.id_to_piece(int(ids[0])) // 2
    return num_words


def test_a_silence_on_a_switch_is_cut_in_half():
    # 40 words of 2 frames with silences of 6 between them, 4 before and 10 after all.
    record = make_record([2] * 40, [4] + [6] * 39 + [10])
    lengths = set()
    for seed in range(20):
        document = interleaved_document(record, VOCABULARY, TOKENIZER, np.random.default_rng(seed))
        spans = spans_of(document)
        for place, (marker, ids, _) in enumerate(spans):
            if marker == SPEECH and 0 < place < len(spans) - 1:
                lengths.add(len(ids) % 8)  # n words, n - 1 whole silences, 3 frames on either side
            if marker == SPEECH and place == 0:
                assert len(ids) % 8 == (4 + 2 + 3) % 8  # all of the silence before the first word
            if marker == SPEECH and place == len(spans) - 1:
                assert len(ids) % 8 == (3 + 2 + 10) % 8  # all of the silence after the last
    assert lengths == {0}


def test_either_modality_may_come_first():
    record = make_record([2] * 60, [1] * 61)
    first = [
        interleaved_document(record, VOCABULARY, TOKENIZER, np.random.default_rng(seed)).tokens[1]
        for seed in range(200)
    ]
    assert 70 < np.sum(np.array(first) == TEXT) < 130


def test_a_text_span_is_the_pieces_of_the_whole_that_end_in_it():
    class Merging(WordTokenizer):
        """Every third blank is in a piece with the word before it and the word after it."""

        def encode(self, text):
            return [piece for piece, _ in self.cut(text)]

        def piece_ends(self, text):
            return np.array([end for _, end in self.cut(text)], np.int32)

        def cut(self, text):
            words, pieces, end = text.split(" "), [], 0
            for place, word in enumerate(words):
                end += len(word) + (place > 0)
                if place % 3 == 0 or place == len(words) - 1:
                    pieces.append((int(word[1:]), end))
            return pieces

    record = make_record([2] * 60, [1] * 61)
    document = interleaved_document(record, VOCABULARY, Merging(), np.random.default_rng(1))
    word = 0
    for marker, ids, start in spans_of(document):
        if marker == TEXT:
            pieces = VOCABULARY.id_to_piece(ids).tolist()
            stop = word
            while silence_cuts_reach(spans_of(document), start, stop, record):
                stop += 1
            assert pieces == [each for each in range(word, stop) if each % 3 == 0 or each == 59]
            word = stop
        else:
            cuts = silence_cuts(record)
            word = cuts.index(cuts[word] + len(ids))


def silence_cuts_reach(spans, start, stop, record):
    """Whether word ``stop`` is still in the text span at ``start``: the speech after it begins
    with a later word."""
    following = [ids for marker, ids, place in spans if place > start and marker == SPEECH]
    if not following:
        return stop < len(record.words)
    return silence_cuts(record)[stop] % 500 != VOCABULARY.id_to_unit(int(following[0][0]))


def test_draws_depend_on_the_key_alone():
    numbers = {stable_rng(*key).integers(1 << 60) for key in
               [(0, 0, "a"), (0, 0, "b"), (0, 1, "a"), (1, 0, "a"), ("0", 0, "a")]}  # fmt: skip
    assert len(numbers) == 5
    # A value fixed for good: a change of hash would change every run that is resumed.
    assert stable_rng(0, 1, "a").integers(1 << 60) == 23051058612289372


def test_text_document_has_no_marker():
    record = Record("t", "w1 w2", None, None, None, None, "test")
    document = record_document(record, VOCABULARY, TOKENIZER, np.random.default_rng(0))
    assert document.tokens.tolist() == [BOS, 7, 8, 9, 10, EOS]
    assert document.aligned.shape == (0, 2)
    assert (document.score_from, document.score_eos, document.breaks) == (0, True, ())
    chosen = record_document(record, VOCABULARY, TOKENIZER, np.random.default_rng(0))
    assert chosen.tokens.tolist() == document.tokens.tolist()


def test_speech_document_aligns_its_words():
    record = make_record([3, 0, 2], [2, 1, 0, 0])
    document = record_document(record, VOCABULARY, TOKENIZER, np.random.default_rng(0), "speech")
    units = VOCABULARY.unit_to_id(np.arange(8)).tolist()
    assert document.tokens.tolist() == [BOS, SPEECH, *units, EOS]
    assert document.aligned.tolist() == [[4, 7], [8, 10]]  # the empty word is no patch


def test_speech_without_words_is_a_speech_document():
    record = Record("s", "w1", np.array([3, 4], np.int16), None, None, None, "test")
    document = record_document(record, VOCABULARY, TOKENIZER, np.random.default_rng(0))
    assert document.tokens.tolist() == [BOS, SPEECH, 1008, 1009, EOS]
    with pytest.raises(UserError, match="record 's': expected aligned words to interleave"):
        interleaved_document(record, VOCABULARY, TOKENIZER, np.random.default_rng(0))


SPOKEN = make_record([2, 1], [1, 0, 2], "s")  # w0 at [1, 3), w1 at [3, 4), 6 frames
SPOKEN_UNITS, SPOKEN_TEXT = list(range(1005, 1011)), [5, 6, 7, 8]
KINDS = {
    "speech": ([BOS, SPEECH, *SPOKEN_UNITS, EOS], [[3, 5], [5, 6]]),
    "text": ([BOS, *SPOKEN_TEXT, EOS], []),
    "speech-to-text": ([BOS, SPEECH, *SPOKEN_UNITS, TEXT, *SPOKEN_TEXT, EOS], [[3, 5], [5, 6]]),
    "text-to-speech": ([BOS, TEXT, *SPOKEN_TEXT, SPEECH, *SPOKEN_UNITS, EOS], [[8, 10], [10, 11]]),
}


@pytest.mark.parametrize(("kind", "expected"), KINDS.items(), ids=KINDS)
def test_one_record_makes_documents_of_every_kind(kind, expected):
    document = record_document(SPOKEN, VOCABULARY, TOKENIZER, np.random.default_rng(0), kind)
    assert document.tokens.tolist() == expected[0]
    assert document.aligned.tolist() == expected[1]
    # Every token is a target, <eos> too.
    assert (document.breaks, document.score_from, document.score_eos) == ((), 0, True)


@pytest.mark.parametrize(("task", "kind"), [("asr", "speech-to-text"), ("tts", "text-to-speech")])
@pytest.mark.parametrize("strategy", [NoPatching(), Static(size=4), Aligned()])
def test_of_a_task_the_answer_alone_is_learnt(task, kind, strategy):
    document = record_document(SPOKEN, VOCABULARY, TOKENIZER, np.random.default_rng(0), task)
    plain = record_document(SPOKEN, VOCABULARY, TOKENIZER, np.random.default_rng(0), kind)
    assert document.tokens.tolist() == plain.tokens.tolist()
    assert document.aligned.tolist() == plain.aligned.tolist()
    answer = SPOKEN_TEXT if task == "asr" else SPOKEN_UNITS
    packed = patch_document(document, VOCABULARY, strategy)
    targets = packed.targets[packed.targets != IGNORE].tolist()
    assert targets == [*answer, EOS]
    # The first of them is predicted from the marker that asks for it.
    asks = TEXT if task == "asr" else SPEECH
    assert document.tokens[np.flatnonzero(packed.targets != IGNORE)[0]] == asks


def test_the_answer_to_silence_is_that_nothing_was_said():
    record = Record("q", "", np.array([3, 4], np.int16), None, None, None, "test")
    document = record_document(record, VOCABULARY, TOKENIZER, np.random.default_rng(0), "asr")
    assert document.tokens.tolist() == [BOS, SPEECH, 1008, 1009, TEXT, EOS]
    targets = patch_document(document, VOCABULARY, Static(size=4)).targets
    assert targets.tolist() == [IGNORE] * 4 + [EOS, IGNORE]


def test_kind_auto_is_the_one_that_shows_most_of_a_record():
    written = Record("t", "w1 w2", None, None, None, None, "test")
    bare = Record("b", None, np.array([3, 4], np.int16), None, None, None, "test")
    for record, kind in ((SPOKEN, "interleaved"), (written, "text"), (bare, "speech")):
        auto, named = (
            record_document(record, VOCABULARY, TOKENIZER, np.random.default_rng(0), each)
            for each in ("auto", kind)
        )
        assert auto.tokens.tolist() == named.tokens.tolist()
    assert {*KINDS, *TASKS, "auto", "interleaved"} == set(DOCUMENT_KINDS)


def test_a_kind_that_a_record_cannot_be_is_refused():
    rng = np.random.default_rng(0)
    written = Record("t", "w1", None, None, None, None, "test")
    mute = make_record([2], [0, 0], "m", text=False)
    for record, kind, message in (
        (written, "speech", "record 't': expected speech units"),
        (written, "interleaved", "record 't': expected speech units"),
        (written, "speech-to-text", "record 't': expected speech units"),
        (mute, "text", "record 'm': expected text"),
        (mute, "text-to-speech", "record 'm': expected text"),
    ):
        with pytest.raises(UserError, match=message):
            record_document(record, VOCABULARY, TOKENIZER, rng, kind)
    with pytest.raises(ValueError, match=r"expected a kind of \('auto', .*got 'both'"):
        record_document(SPOKEN, VOCABULARY, TOKENIZER, rng, "both")


def test_aligned_pieces_are_placed_in_every_kind_of_document():
    class Halves(WordTokenizer):
        """Every word is two pieces, "w" and its number."""

        def piece_ends(self, text):
            ends = np.cumsum([len(word) + 1 for word in text.split()]) - 1
            starts = ends - [len(word) for word in text.split()]
            return np.stack([starts + 1, ends], 1).ravel()

    record = make_record([4] * 40, [1] * 41)
    pieces = Alignment(by="pieces")
    for kind in ("speech", "interleaved", "text-to-speech"):
        words, halves = (
            record_document(
                record, VOCABULARY, Halves(), np.random.default_rng(3), kind, alignment=alignment
            )
            for alignment in (Alignment(), pieces)
        )
        np.testing.assert_array_equal(words.tokens, halves.tokens)
        # w0 … w9 have two characters, the others three: the first letter is 2 or 1 of 4 frames.
        assert len(halves.aligned) == 2 * len(words.aligned)
        np.testing.assert_array_equal(halves.aligned[::2, 0], words.aligned[:, 0])
        np.testing.assert_array_equal(halves.aligned[1::2, 1], words.aligned[:, 1])
        assert set((halves.aligned[::2, 1] - words.aligned[:, 0]).tolist()) <= {1, 2}
    document = item_document(record, record, "S→S", VOCABULARY, Halves(), alignment=pieces)
    assert len(document.aligned) == 160


def test_noise_moves_patches_and_nothing_else():
    record = make_record([4] * 60, [2] * 61)
    quiet, noisy, again = (
        record_document(
            record,
            VOCABULARY,
            TOKENIZER,
            np.random.default_rng(3),
            alignment=Alignment(noise_ms=noise_ms),
        )
        for noise_ms in (0, 40, 40)
    )
    np.testing.assert_array_equal(quiet.tokens, noisy.tokens)
    np.testing.assert_array_equal(again.aligned, noisy.aligned)
    moved = (quiet.aligned != noisy.aligned).mean()
    assert 0.3 < moved < 0.7
    assert VOCABULARY.is_unit(noisy.tokens[noisy.aligned[:, 0]]).all()
    assert VOCABULARY.is_unit(noisy.tokens[noisy.aligned[:, 1] - 1]).all()


def test_every_ending_follows_a_prompt_of_the_same_noise():
    prompt, endings = make_record([4] * 9, [2] * 10, "p"), (ENDING, make_record([5], [3, 3], "f"))
    first, second = (
        item_document(
            prompt, ending, "S→S", VOCABULARY, TOKENIZER, alignment=Alignment(noise_ms=100)
        ).aligned
        for ending in endings
    )
    np.testing.assert_array_equal(first[:9], second[:9])
    plain = item_document(prompt, ENDING, "S→S", VOCABULARY, TOKENIZER).aligned
    assert (first[:9] != plain[:9]).any()


def test_speech_pieces_are_made_span_by_span():
    runs = [np.repeat([1, 2, 3], 4).astype(np.int16)] * 20
    bpe = train_speech_bpe(runs, num_units=500, num_pieces=510)
    vocabulary = Vocabulary(num_pieces=1000, num_units=500, speech_bpe=bpe)
    record = make_record([4] * 60, [0] * 61)
    record.units[:] = np.tile(runs[0], 20)
    plain, pieces = (
        record_document(record, each, TOKENIZER, np.random.default_rng(3))
        for each in (VOCABULARY, vocabulary)
    )
    assert pieces.aligned.shape == (0, 2)
    assert len(pieces.tokens) < len(plain.tokens)
    for (marker, ids, _), (other, expected, _) in zip(
        spans_of(pieces), spans_of(plain), strict=True
    ):
        assert marker == other
        if marker == SPEECH:
            units = VOCABULARY.id_to_unit(expected)
            assert ids.tolist() == vocabulary.encode_units(units).tolist()
    # An ending is encoded apart from its prompt, however well they would go together.
    prompt, ending = (
        Record(name, None, units, None, None, None, "test")
        for name, units in (("p", runs[0][:2]), ("e", runs[0][2:]))
    )
    document = item_document(prompt, ending, "S→S", vocabulary, TOKENIZER)
    place = document.score_from
    assert document.tokens[2:place].tolist() == vocabulary.encode_units(prompt.units).tolist()
    assert document.tokens[place:-1].tolist() == vocabulary.encode_units(ending.units).tolist()


PROMPT, ENDING = make_record([2, 1], [1, 0, 0], "p"), make_record([2], [0, 1], "e")
PROMPT_UNITS, ENDING_UNITS = [1005, 1006, 1007, 1008], [1005, 1006, 1007]
PROMPT_TEXT, ENDING_TEXT = [5, 6, 7, 8], [5, 6]
ITEMS = {
    "T→T": ([BOS, *PROMPT_TEXT, *ENDING_TEXT, EOS], 5, []),
    "S→S": ([BOS, SPEECH, *PROMPT_UNITS, *ENDING_UNITS, EOS], 6, [[3, 5], [5, 6], [6, 8]]),
    "S→T": ([BOS, SPEECH, *PROMPT_UNITS, TEXT, *ENDING_TEXT, EOS], 7, [[3, 5], [5, 6]]),
    "T→S": ([BOS, TEXT, *PROMPT_TEXT, SPEECH, *ENDING_UNITS, EOS], 7, [[7, 9]]),
}


@pytest.mark.parametrize(("mode", "expected"), ITEMS.items(), ids=ITEMS)
def test_an_ending_starts_a_patch_and_is_all_that_is_scored(mode, expected):
    tokens, start, aligned = expected
    document = item_document(PROMPT, ENDING, mode, VOCABULARY, TOKENIZER)
    assert document.tokens.tolist() == tokens
    assert document.aligned.tolist() == aligned
    assert (document.breaks, document.score_from, document.score_eos) == ((start,), start, False)


def test_items_lacking_a_modality_are_refused():
    text = Record("t", "w1", None, None, None, None, "test")
    mute = make_record([2], [0, 0], "m", text=False)
    with pytest.raises(UserError, match="record 't': expected speech units"):
        item_document(text, ENDING, "S→S", VOCABULARY, TOKENIZER)
    with pytest.raises(UserError, match="record 'm': expected text"):
        item_document(PROMPT, mute, "T→T", VOCABULARY, TOKENIZER)
    with pytest.raises(ValueError, match="expected a mode of"):
        item_document(PROMPT, ENDING, "T→X", VOCABULARY, TOKENIZER)
