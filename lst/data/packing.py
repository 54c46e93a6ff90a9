"""From patched documents to rows of exactly the same number of units.

    records -> interleave -> patching -> [packing] -> batch

Documents lie end to end with no padding. What does not fit is split at a patch boundary, and the
rest opens the next row as a document of its own, told only its modality. Rows of 6 units from one
document of nine patches, then another (a patch is written as a word, ``|`` ends a document):

    row 0   <bos> <s> 0123 4567 8901 2345
    row 1   <bos> <s> 67 <eos> | <bos> ▁Once
            ~~~~~~~~~
            what reopening costs

No token's loss is lost or counted twice: the last token of the first part has no target, and its
successor is the target of the last token before it in the next row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lst.data.interleave import Document
from lst.data.patching import Strategy, patch_lengths
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, Vocabulary

__all__ = ["IGNORE", "MIN_ROOM", "Packed", "concatenate", "patch_document", "take"]

IGNORE = -100  # the target of a token that has none; what cross-entropy functions leave out
MIN_ROOM = 3  # units in a row: reopening a document costs up to two, and it must go on


class Packed(NamedTuple):
    """Patched documents end to end: a single one, a row, or a whole stream.

    Attributes:
        tokens: (T,) int32 joint ids.
        targets: (T,) int32, the next token of the same document, or IGNORE.
        lengths: (P,) int32, tokens of each patch.
        closed_late: (P,) bool, as of ``patch_lengths``.
        patches_per_document: (N,) int32.
        record_ids: N of them.
    """

    tokens: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray
    closed_late: np.ndarray
    patches_per_document: np.ndarray
    record_ids: tuple[str, ...]


def patch_document(document: Document, vocabulary: Vocabulary, strategy: Strategy) -> Packed:
    """One whole document, cut into patches."""
    tokens = document.tokens
    lengths, closed_late = patch_lengths(
        tokens, vocabulary, strategy, aligned=document.aligned, breaks=document.breaks
    )
    targets = np.empty_like(tokens)
    targets[:-1], targets[-1] = tokens[1:], IGNORE
    if document.score_from > 1:
        targets[: document.score_from - 1] = IGNORE
    if not document.score_eos:
        targets[-2] = IGNORE
    return Packed(
        tokens=tokens,
        targets=targets,
        lengths=lengths,
        closed_late=closed_late,
        patches_per_document=np.array([len(lengths)], np.int32),
        record_ids=(document.record_id,),
    )


def concatenate(parts: Sequence[Packed]) -> Packed:
    """Documents of all parts, in order; at least one part."""
    if len(parts) == 1:
        return parts[0]
    return Packed(
        tokens=np.concatenate([part.tokens for part in parts]),
        targets=np.concatenate([part.targets for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        closed_late=np.concatenate([part.closed_late for part in parts]),
        patches_per_document=np.concatenate([part.patches_per_document for part in parts]),
        record_ids=tuple(id for part in parts for id in part.record_ids),
    )


def take(document: Packed, consumed: int, room: int) -> tuple[Packed, int]:
    """As much of the rest of one document as fits.

    Args:
        document: a single document of P patches.
        consumed: how many of its patches earlier rows took; less than P.
        room: units to fill: at least 1 for a fresh document, MIN_ROOM for one that is reopened.

    Returns:
        The part, of at most ``room`` patches and exactly that many where something is left; and
        how many of the P patches are now consumed. An ``<eos>`` never opens a row alone: it is
        left out where it would, and the document counts as consumed.
    """
    num_patches = len(document.lengths)
    if consumed == 0 and num_patches <= room:
        return document, num_patches
    offsets = np.concatenate(([0], np.cumsum(document.lengths)))
    start = int(offsets[consumed])
    opening = _reopening(document.tokens, start)
    after = min(consumed + room - len(opening), num_patches)
    stop = int(offsets[after])
    targets = np.concatenate(
        (np.full(len(opening), IGNORE, np.int32), document.targets[start:stop])
    )
    if opening:
        targets[len(opening) - 1] = document.targets[start - 1]
    if after < num_patches:
        targets[-1] = IGNORE
    part = Packed(
        tokens=np.concatenate((np.array(opening, np.int32), document.tokens[start:stop])),
        targets=targets,
        lengths=np.concatenate((np.ones(len(opening), np.int32), document.lengths[consumed:after])),
        closed_late=np.concatenate(
            (np.zeros(len(opening), bool), document.closed_late[consumed:after])
        ),
        patches_per_document=np.array([len(opening) + after - consumed], np.int32),
        record_ids=document.record_ids,
    )
    if after == num_patches - 1 and document.tokens[-1] == EOS:
        after = num_patches
    return part, after


def _reopening(tokens: np.ndarray, start: int) -> list[int]:
    """What a document that goes on at token ``start`` begins with: ``<bos>``, and the marker of its
    modality, but where it has none or goes on with a marker."""
    if start == 0:
        return []
    markers = tokens[: start + 1]
    markers = markers[(markers == TEXT) | (markers == SPEECH)]
    if len(markers) == 0 or tokens[start] in (TEXT, SPEECH):
        return [BOS]
    return [BOS, int(markers[-1])]
