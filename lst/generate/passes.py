"""The scores of the next token: from a pass over what is new, or over whole documents.

With what is kept (`lst.generate.state`) the pass is that of training, over fewer rows::

    h = encoder layers(embed(new tokens))            reading kept tokens
    u = patches that close, of kept and new h
    z = global layers(u)                             reading kept patches
    h = decoder layers(h)                            reading kept tokens, and kept slots of z
    scores = head(norm(h or z)) of each request's last token

B requests, V ids of the joint vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lst.data.batch import IGNORE, plan_batch
from lst.data.packing import Packed
from lst.data.patching import NoPatching, Static, patch_lengths
from lst.generate.state import Cache, Closing, Documents, LocalPass, Pass, PatchPass
from lst.model import GlobalTextTransformer, LanguageModel, TokenLevelTransformer
from lst.model.layers import rotation, stream
from lst.vocabulary import Vocabulary

NOTHING_ALIGNED = np.zeros((0, 2), np.int32)


class Scorer(ABC):
    """Scores what may follow B growing documents."""

    def __init__(
        self,
        model: LanguageModel,
        vocabulary: Vocabulary,
        strategy: Static | NoPatching,
        device: torch.device,
    ) -> None:
        self._model, self._vocabulary, self._strategy = model, vocabulary, strategy
        self._device = device

    @abstractmethod
    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """(B, V) of the token after each prompt."""

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> Tensor:
        """(B, V) of the token after the next one of each document."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the documents, in their order."""

    def _patches(self, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return patch_lengths(document, self._vocabulary, self._strategy, aligned=NOTHING_ALIGNED)


class Cached(Scorer):
    """Computes each token once, and each patch."""

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        config = self._model.config
        like = stream(self._model.embedding.weight[:0, :0])
        self._size = self._strategy.size if isinstance(self._strategy, Static) else 1
        self._documents = Documents(config, self._vocabulary, self._size, len(prompts))
        large, encoder, decoder = config.global_transformer, config.encoder, config.decoder
        self._units = Cache(large.layers, large.num_kv_heads, large.head_dim, like)
        self._cross = Cache(decoder.layers, decoder.heads, decoder.head_dim, like)
        self._encoded = Cache(encoder.layers, encoder.num_kv_heads, encoder.head_dim, like)
        self._decoded = Cache(decoder.layers, decoder.num_kv_heads, decoder.head_dim, like)
        self._open = like.new_zeros(len(prompts) * self._size, encoder.dim)
        return self._pass(self._documents.begin(prompts, [self._patches(p) for p in prompts]))

    def step(self, tokens: Sequence[int]) -> Tensor:
        return self._pass(self._documents.advance(tokens))

    def keep(self, rows: Sequence[int]) -> None:
        self._documents.keep(np.array(rows))
        requests = torch.tensor(rows, device=self._device)
        for cache in self._caches():
            cache.keep(requests)
        parts = self._open.unflatten(0, (-1, self._size))
        self._open = parts.index_select(0, requests).flatten(0, 1)

    def nbytes(self) -> int:
        """What is kept, in bytes."""
        return self._open.nbytes + sum(cache.rows.nbytes for cache in self._caches())

    def _caches(self) -> tuple[Cache, ...]:
        if isinstance(self._model, TokenLevelTransformer):
            return (self._units,)
        return self._units, self._cross, self._encoded, self._decoded

    def _pass(self, plan: Pass) -> Tensor:
        """(B, V) scores after the last of the new tokens."""
        self._make_room()
        plan = plan.to(self._device)
        model = self._model
        h = self._open[:0] if plan.local is None else self._encode(plan.local)
        units = [] if plan.closing is None else [self._close(h, plan.closing)]
        if plan.local is not None:
            plan.local.open.put(h, self._open)
        if len(plan.direct):
            units.append(stream(model.embedding(plan.direct)))
        z, slots = self._open.new_zeros(0, model.config.global_transformer.dim), None
        if plan.patches is not None:
            z = self._globally(torch.cat(units), plan.patches)
            if not isinstance(model, TokenLevelTransformer):
                slots = self._keep_slots(z, plan.patches)
        if plan.local is not None:
            h = self._decode(h, slots, plan.local)
        return self._scores(h[plan.last_tokens], z[plan.last_patches], plan.order)

    def _make_room(self) -> None:
        at = self._documents
        rooms = (
            at.patch_room, self._model.config.slots * at.cross_room, at.token_room, at.token_room,
        )  # fmt: skip
        for cache, room in zip(self._caches(), rooms, strict=False):
            cache.make_room(len(at), room)

    def _encode(self, local: LocalPass) -> Tensor:
        model = self._model
        if isinstance(model, GlobalTextTransformer):
            h = stream(model.speech_embedding(self._vocabulary.to_speech_id(local.tokens)))
        else:
            h = stream(model.embedding(local.tokens))
        by = rotation(local.reads.positions, model.config.encoder.head_dim, model.config.rope_theta)
        for number, layer in enumerate(model.encoder.layers):
            h = layer(h, by, self._encoded.attention(number, local.reads))
        return h

    def _close(self, h: Tensor, closing: Closing) -> Tensor:
        """Patches of the tokens that are kept of open ones, and of new ones ``h``."""
        tokens = torch.cat((self._open, h)).index_select(0, closing.rows)
        return self._model.encoder.patches(tokens, closing.layout, closing.ranges)

    def _globally(self, x: Tensor, patches: PatchPass) -> Tensor:
        stack = self._model.global_transformer
        x = x.index_select(0, patches.rows)
        by = stack.rotation(patches.reads.positions)
        for number, layer in enumerate(stack.layers):
            x = layer(x, by, self._units.attention(number, patches.reads))
        return x

    def _keep_slots(self, z: Tensor, patches: PatchPass) -> Tensor:
        """(P·S, layers, 2, H, D) that the decoder's layers read of patches."""
        keys_values = self._model.decoder.keys_values(z)
        self._cross.put(keys_values, patches.cross)
        return keys_values

    def _decode(self, h: Tensor, slots: Tensor | None, local: LocalPass) -> Tensor:
        decoder, config = self._model.decoder, self._model.config
        by = rotation(local.reads.positions, config.decoder.head_dim, config.rope_theta)
        for number, layer in enumerate(decoder.layers):
            if local.reads.fresh and slots is not None:
                k, v = slots[:, number].unbind(1)
            else:
                k, v = self._cross.layer(number)
            attention = self._decoded.attention(number, local.reads)
            h = layer(h, k, v, local.patches, by, attention)
        return h

    def _scores(self, h: Tensor, z: Tensor, order: Tensor) -> Tensor:
        """(B, V) from the last tokens that pass the decoder and the last that are patches."""
        model = self._model
        if isinstance(model, GlobalTextTransformer):
            return model.joint_logits(z, h).index_select(0, order)
        return model.head(model.norm(z if isinstance(model, TokenLevelTransformer) else h))


class Uncached(Scorer):
    """Computes whole documents again for every token; the numbers are the same."""

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        self._documents = [prompt.tolist() for prompt in prompts]
        return self._scores()

    def step(self, tokens: Sequence[int]) -> Tensor:
        for document, token in zip(self._documents, tokens, strict=True):
            document.append(token)
        return self._scores()

    def keep(self, rows: Sequence[int]) -> None:
        self._documents = [self._documents[row] for row in rows]

    def _scores(self) -> Tensor:
        documents = [np.array(document, np.int32) for document in self._documents]
        patches = [self._patches(document) for document in documents]
        tokens = np.concatenate(documents)
        packed = Packed(
            tokens=tokens,
            targets=np.full_like(tokens, IGNORE),
            lengths=np.concatenate([lengths for lengths, _ in patches]),
            closed_late=np.concatenate([late for _, late in patches]),
            patches_per_document=np.array([len(lengths) for lengths, _ in patches], np.int32),
            record_ids=("",) * len(documents),
        )
        batch = plan_batch(packed, self._vocabulary, self._model.config.plan())
        last = batch.layout.cu_tokens[1:].long() - 1
        return self._model.logits(batch.to(self._device))[last.to(self._device)]
