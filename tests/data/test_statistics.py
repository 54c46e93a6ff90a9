"""The table's figures are those of patches counted one by one."""

import numpy as np
import pytest

from lst.data.patching import PatchingConfig
from lst.data.records import Record, Span, Word
from lst.data.statistics import (
    describe_patching,
    format_table,
    patch_statistics,
    usual_strategies,
)
from lst.speech_bpe import train_speech_bpe


class Letters:
    """Every letter of a word is a piece, a blank going with the letter after it."""

    num_pieces = 300

    def encode(self, text):
        return [ord(letter) for letter in text.replace(" ", "")]

    def piece_ends(self, text):
        return np.array([place + 1 for place, letter in enumerate(text) if letter != " "])


def make_record(words, num_frames, chars=None, id="r"):
    return Record(
        id=id,
        text=" ".join(word for word, _, _ in words) or "bare",
        units=(np.arange(num_frames) % 5).astype(np.int16),
        words=tuple(Word(*word) for word in words) or None,
        chars=None if chars is None else tuple(Span(*char) for char in chars),
        speaker=None,
        source="test",
    )


# Words of the paper's example, [2, 4] and [6, 7] with silences {0, 1} and {5}, and two frames more.
PAPER = make_record([("ab", 2, 5), ("cd", 6, 8)], 10)
TEXT = Record("t", "only text", None, None, None, None, "test")


def statistics(strategies, records=(PAPER, TEXT), **options):
    return patch_statistics(records, 5, Letters(), strategies, **options)


def test_patches_of_the_example_counted_by_hand():
    separate, merged, pieces, static, none = statistics(
        [
            PatchingConfig(strategy="aligned"),
            PatchingConfig(strategy="aligned", silence="merged"),
            PatchingConfig(strategy="aligned", aligned_by="pieces"),
            PatchingConfig(strategy="static", size=4),
            PatchingConfig(strategy="none"),
        ]
    )
    # 0 1 | 2 3 4 | 5 | 6 7 | 8 9
    assert (separate.text_units, separate.text_patches) == (5, 2)
    assert (separate.silence_units, separate.silence_patches) == (5, 3)
    assert (separate.compression, separate.patches_per_hour) == (2, 45_000)
    # 0 1 2 3 4 5 | 6 7 8 9
    assert (merged.text_units, merged.text_patches, merged.silence_patches) == (10, 2, 0)
    assert (merged.compression, merged.patches_per_hour) == (5, 18_000)
    # 0 1 | 2 3 | 4 | 5 | 6 | 7 | 8 9: the three frames of "ab" are split after the second
    assert (pieces.text_units, pieces.text_patches, pieces.num_estimated) == (5, 4, 1)
    # 0 1 2 3 | 4 5 6 7 | 8 9
    assert (static.text_patches, static.silence_patches) == (0, 0)
    assert static.compression == pytest.approx(10 / 3)
    assert (none.compression, none.patches_per_hour) == (1, 90_000)
    assert {each.num_records for each in (separate, static)} == {1}  # the text is none of them


def test_aligned_characters_are_no_estimate():
    chars = [(2, 3), (3, 5), (5, 6), (6, 7), (7, 8)]
    (pieces,) = statistics(
        [PatchingConfig(strategy="aligned", aligned_by="pieces")],
        [make_record([("ab", 2, 5), ("cd", 6, 8)], 10, chars)],
    )
    assert (pieces.text_patches, pieces.num_estimated) == (4, 0)


def test_speech_pieces_compress_by_what_they_stand_for():
    bpe = train_speech_bpe([np.tile(np.arange(5), 50)], num_units=5, num_pieces=9)
    record = make_record([], 100)
    (counts,) = statistics([PatchingConfig(strategy="speech-bpe")], [record], speech_bpe=bpe)
    assert counts.num_units == 100
    assert counts.num_patches == len(bpe.encode(record.units)) < 50
    assert counts.compression == 100 / counts.num_patches


def test_mixed_patches_are_those_of_both_kinds():
    records = [make_record([("ab", 2, 5), ("cd", 6, 8)], 10, id=f"r{i}") for i in range(200)]
    separate, static, mixed = statistics(
        [PatchingConfig(strategy=name) for name in ("aligned", "static", "mixed")], records
    )
    assert mixed.num_units == separate.num_units == 2000
    share = mixed.text_patches / separate.text_patches
    assert share == pytest.approx(0.5, abs=0.1)
    expected = share * separate.num_patches + (1 - share) * static.num_patches
    assert mixed.num_patches == pytest.approx(expected)


def test_the_table_names_every_strategy_and_what_is_missing():
    bare = make_record([], 8, id="bare")
    strategies = usual_strategies(max_patch_length=25, boundary_noise_ms=20.0)
    table = format_table(statistics(strategies, [PAPER, TEXT, bare]))
    for patching in strategies:
        assert f"| {describe_patching(patching)} |" in table
    assert "| none (token by token) | – | – | 1.00 | 90,000 |  |" in table
    assert "aligned by words, silence merged, at most 25, ± 20 ms" in table
    assert table.count("| 5.8 and 3.7 |") == table.count("| 5.0 and 3.7 |") == 1
    assert "over 2 records with speech" in table
    assert "1 of them have no aligned words: their patches are static." in table
    assert "Pieces of 1 of them are estimated" in table


def test_the_usual_strategies_are_what_the_paper_compares():
    names = [describe_patching(patching) for patching in usual_strategies(speech_bpe=True)]
    assert names == [
        "none (token by token)",
        "speech BPE",
        "static, 4",
        "static, 6",
        "static, 9",
        "aligned by words, silence separate",
        "aligned by words, silence merged",
        "aligned by pieces, silence separate",
        "aligned by pieces, silence merged",
        "mixed: static, 4, or aligned by words, silence separate",
    ]
    assert len(usual_strategies(pieces=False)) == 7
