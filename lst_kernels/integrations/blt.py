"""transformers' Byte Latent Transformer (`transformers.models.blt`) on these kernels.

A batch of B rows of S bytes in P patches is read as one packed stream of B documents::

    its dense (B, 1, P·k, S) and (B, 1, S, P·k) masks  →  KeyRanges      cross-attention
    its causal (B, 1, S, S) and (B, 1, P, P) masks     →  KeyRanges      self-attention
    scatter_reduce(amax)                               →  patch_pool     pooling
    a (B, S, P) comparison, summed                     →  one scan       patch ids

Results stay as they are, with three exceptions that no logit of a real byte shows: an empty patch
reads nothing, where transformers averages all bytes; of equal maxima in a patch the first takes the
gradient, where transformers splits it; attention weights are not returned.

What the kernels do not cover runs transformers' own code, call by call: a key/value cache, an
``attention_mask`` with padding, dropout in attention, ``output_attentions``.
"""

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lst_kernels.attention import (
    block_causal_attention,
    range_attention,
    sliding_window_attention,
)
from lst_kernels.layout import PatchLayout
from lst_kernels.pooling import patch_pool
from lst_kernels.ranges import KeyRanges, causal_ranges

__all__ = ["Applied", "apply_lst_kernels_to_blt"]

# tests/kernels/test_blt.py passes on them. A BLT is judged by its functions, so others serve too.
TESTED = "5.2 or 5.23"


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What of a model runs on the kernels."""

    cross_attention: bool
    self_attention: bool
    pooling: bool
    patch_ids: bool
    local_window: int | None


class Applied:
    """The kernels in place; `undo`, or the end of a ``with`` block, puts everything back."""

    def __init__(self, holders: list[Any]) -> None:
        self._holders = holders

    def undo(self) -> None:
        """Run transformers' own code again.

        Raises:
            RuntimeError: that was done already.
        """
        if not self._holders:
            raise RuntimeError("these kernels are not in place: they were undone already")
        while self._holders:
            delattr(self._holders.pop(), SWITCHES)
            _diverted.leave()

    def __enter__(self) -> "Applied":
        return self

    def __exit__(self, *_: object) -> None:
        if self._holders:  # the block may have undone it
            self.undo()


def apply_lst_kernels_to_blt(
    model: nn.Module | None = None,
    *,
    cross_attention: bool = True,
    self_attention: bool = True,
    pooling: bool = True,
    patch_ids: bool = True,
    local_window: int | None = None,
) -> Applied:
    """Run transformers' BLT on these kernels.

    Args:
        model: a `BltModel`, or one that holds some, as `BltForCausalLM` does. None: every BLT of
            this process, those that are there already too.
        cross_attention: of the patch encoder and decoder.
        self_attention: of every layer, the entropy patcher's too.
        pooling: of bytes into patches.
        patch_ids: from patch lengths.
        local_window: bytes that a layer of the local encoder and decoder reads, its own counted.
            None: what the model's configuration says. Another window than that changes results;
            the authors trained with 512.

    Returns:
        A handle that undoes it; also a context manager.

    Raises:
        ImportError: transformers is not installed, or its version has no BLT, or another one.
        ValueError: ``model`` holds no BLT, or has the kernels already; ``local_window`` below 1, or
            given without ``self_attention``.
    """
    blt = _import_blt()
    if local_window is not None and (not isinstance(local_window, int) or local_window < 1):
        raise ValueError(f"local_window must be at least 1, or None; got {local_window!r}")
    if local_window is not None and not self_attention:
        raise ValueError(f"local_window needs self_attention, which is off; got {local_window}")
    holders: list[Any] = [blt.BltModel]
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(f"model must be or hold a BltModel of transformers; got {model!r:.80}")
    if model is not None:
        holders = [module for module in model.modules() if isinstance(module, blt.BltModel)]
    if not holders:
        raise ValueError(f"model must be or hold a BltModel of transformers; got {type(model)}")
    if any(SWITCHES in vars(holder) for holder in holders):
        which = "every BLT of this process" if model is None else "model"
        raise ValueError(
            f"{which} has these kernels already; first .undo() what the earlier call returned"
        )
    switches = Switches(
        cross_attention=cross_attention,
        self_attention=self_attention,
        pooling=pooling,
        patch_ids=patch_ids,
        local_window=local_window,
    )
    for holder in holders:
        setattr(holder, SWITCHES, switches)
        _diverted.enter(blt)
    return Applied(holders)


def _import_blt() -> Any:
    """transformers' module of BLT, if it is one that the functions below can stand in for."""
    try:
        import transformers
    except ImportError:
        raise ImportError("transformers is not installed: pip install transformers") from None
    version = f"expected transformers with the BLT of {TESTED}; got {transformers.__version__}"
    try:
        from transformers.models.blt import modeling_blt as blt
    except ImportError as error:
        raise ImportError(f"{version}, which has no BLT: {error}") from None
    try:
        stand_ins = _stand_ins(blt)
    except AttributeError as error:
        raise ImportError(f"{version}: {error}") from None
    for owner, name, ours in stand_ins:
        theirs = vars(owner).get(name)
        if theirs is None:
            raise ImportError(f"{version}, whose BLT has no {name} in {owner.__name__}")
        _, *wanted = inspect.signature(ours).parameters.values()
        given = list(inspect.signature(theirs).parameters)
        in_order = [each.name for each in wanted if each.kind is each.POSITIONAL_OR_KEYWORD]
        by_name = [each.name for each in wanted if each.kind is each.KEYWORD_ONLY]
        if in_order != given[: len(in_order)] or not set(by_name) <= set(given):
            raise ImportError(f"{version}, whose {owner.__name__}.{name} takes {', '.join(given)}")
    return blt


# --- which model is meant -------------------------------------------------------------------------

# transformers makes its masks in functions of the module, which cannot tell for which model. So its
# functions are diverted, and a diverted one runs as before unless the model whose forward pass is
# under way carries this attribute, its class's or its own.
SWITCHES = "_lst_kernels"

_OFF = Switches(
    cross_attention=False, self_attention=False, pooling=False, patch_ids=False, local_window=None
)
_active: ContextVar[Switches] = ContextVar("lst_kernels.blt", default=_OFF)


def _stand_ins(blt: Any) -> list[tuple[Any, str, Callable[..., Any]]]:
    """What is diverted: whose function, its name, and the one of ours in its place."""
    masks = ["create_causal_mask"]
    if hasattr(blt, "create_sliding_window_causal_mask"):  # older versions have no window
        masks.append("create_sliding_window_causal_mask")
    return [
        (blt.BltModel, "forward", _forward),
        (blt.BltModel, "_patch_ids_from_lengths", _patch_ids),
        (blt.BltLocalEncoder, "patch_reduce", _patch_reduce),
        (blt.BltCrossAttention, "forward", _cross_attention),
        (blt.BltSelfAttention, "forward", _self_attention),
        (blt, "_prepare_patch_cross_attention_mask", _cross_ranges),
        *((blt, name, _causal) for name in masks),
    ]


class _Diverted:
    """The functions below in front of those of transformers that they stand in for, as long as
    anything carries switches."""

    def __init__(self) -> None:
        self._carriers = 0
        self._theirs: list[tuple[Any, str, Any]] = []

    def enter(self, blt: Any) -> None:
        self._carriers += 1
        if self._carriers > 1:
            return
        for owner, name, ours in _stand_ins(blt):
            theirs = vars(owner)[name]
            self._theirs.append((owner, name, theirs))
            setattr(owner, name, _instead(theirs, ours))

    def leave(self) -> None:
        self._carriers -= 1
        while self._carriers == 0 and self._theirs:
            setattr(*self._theirs.pop())


def _instead(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """``ours``, which is told of ``theirs``; a plain function, so that it binds to an instance."""

    @functools.wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> Any:
        return ours(theirs, *args, **kwargs)

    return function


def _forward(theirs: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """BltModel.forward, with the model's switches on for as long as it takes."""
    switches = getattr(self, SWITCHES, _OFF)
    config = self.config
    parts = (config.encoder_config, config.decoder_config, config.global_config)
    drops = self.training and any(part.dropout for part in parts)
    weights = kwargs.get("output_attentions", config.output_attentions)
    if drops or weights:
        switches = replace(switches, cross_attention=False, self_attention=False)
    if kwargs.get("position_ids") is not None:  # transformers reads documents out of them
        switches = replace(switches, self_attention=False)
    token = _active.set(switches)
    try:
        return theirs(self, *args, **kwargs)
    finally:
        _active.reset(token)


_diverted = _Diverted()


# --- patches --------------------------------------------------------------------------------------


def _patch_ids(
    theirs: Callable[..., Tensor], self: Any, patch_lengths: Tensor, seq_len: int
) -> Tensor:
    """(B, S) int64: how many patches start at or before each byte, less one."""
    if not _active.get().patch_ids:
        return theirs(self, patch_lengths, seq_len)
    starts = torch.nn.functional.pad(patch_lengths.long().cumsum(-1)[:, :-1], (1, 0))
    at = starts.new_zeros(len(starts), seq_len + 1)
    # A start past the end counts nowhere: padding patches have it.
    at.scatter_add_(1, starts.clamp(0, seq_len), torch.ones_like(starts))
    return at[:, :seq_len].cumsum(-1) - 1


def _layout(patch_ids: Tensor, num_patches: int) -> PatchLayout:
    """The rows of a batch as documents of ``num_patches`` patches, empty ones among them."""
    lengths = patch_ids.new_zeros(len(patch_ids), num_patches)
    lengths.scatter_add_(1, patch_ids, torch.ones_like(patch_ids))
    return PatchLayout.from_lengths(lengths.flatten(), [num_patches] * len(patch_ids))


def _patch_reduce(
    theirs: Callable[..., Tensor],
    self: Any,
    hidden_states: Tensor,
    max_num_patches: int,
    patch_ids: Tensor,
) -> Tensor:
    """(B, P, d) from (B, S, d): the maximum of each patch, 0 for an empty one."""
    if not _active.get().pooling:
        return theirs(self, hidden_states, max_num_patches, patch_ids)
    if len(patch_ids) != len(hidden_states):
        raise ValueError(
            f"patch_lengths has {len(patch_ids)} rows, but there are {len(hidden_states)} of bytes"
        )
    pooled = patch_pool(hidden_states.flatten(0, 1), _layout(patch_ids, max_num_patches), "max")
    return pooled.unflatten(0, (len(patch_ids), max_num_patches))


# --- cross-attention ------------------------------------------------------------------------------


def _cross_ranges(
    theirs: Callable[..., Tensor],
    patch_ids: Tensor,
    num_patches: int,
    sequence_length: int,
    patches_as_queries: bool = False,
    cross_attn_k: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor | KeyRanges:
    """What stands in for the mask: a patch's k slots read its bytes, a byte its patch's k slots."""
    if not _active.get().cross_attention:
        return theirs(
            patch_ids=patch_ids,
            num_patches=num_patches,
            sequence_length=sequence_length,
            patches_as_queries=patches_as_queries,
            cross_attn_k=cross_attn_k,
            dtype=dtype,
        )
    ranges = _layout(patch_ids, num_patches).patches_read_tokens(slots=cross_attn_k)
    return ranges if patches_as_queries else ranges.transpose()


def _cross_attention(
    theirs: Callable[..., Any],
    self: Any,
    hidden_states: Tensor,
    cross_attention_states: Tensor | None = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    """(B, Q, d) from (B, Q, d) and (B, K, d). Its residual is added here and by the caller."""
    if not isinstance(attention_mask, KeyRanges):
        return theirs(self, hidden_states, cross_attention_states, attention_mask, **kwargs)
    states = self.k_norm(cross_attention_states)
    q = self.q_proj(self.q_norm(hidden_states)).view(-1, self.num_heads, self.head_dim)
    k = self.k_proj(states).view(-1, self.num_key_value_heads, self.head_dim)
    v = self.v_proj(states).view(-1, self.num_key_value_heads, self.head_dim)
    read = range_attention(q, k, v, attention_mask, scale=self.scaling)
    return self.o_proj(read.reshape(hidden_states.shape)) + hidden_states, None


# --- self-attention -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Causal:
    """What stands in for a causal mask over B rows of S."""

    cu: Tensor  # (B+1,) int32
    ranges: KeyRanges
    window: int | None
    max_length: int  # S


def _causal(
    theirs: Callable[..., Any],
    *,
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Any,
    **kwargs: Any,
) -> Any:
    """The causal masks of transformers, with a window where the configuration has one."""
    switches = _active.get()
    if (
        not switches.self_attention
        or past_key_values is not None
        or (attention_mask is not None and not bool(attention_mask.all()))
    ):
        return theirs(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    window = getattr(config, "sliding_window", None)
    if config.model_type == "blt_local_encoder" and switches.local_window is not None:
        window = switches.local_window
    num_rows, length = inputs_embeds.shape[:2]
    cu = torch.arange(num_rows + 1, dtype=torch.int32) * length
    ranges = causal_ranges(
        cu, num_rows=num_rows * length, window=window, max_length=length, num_live=num_rows * length
    )
    device = inputs_embeds.device
    return Causal(cu=cu.to(device), ranges=ranges.to(device), window=window, max_length=length)


def _self_attention(
    theirs: Callable[..., Any],
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any,
    position_embeddings: tuple[Tensor, Tensor],
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """(B, S, d) from (B, S, d)."""
    if not isinstance(attention_mask, Causal):
        return theirs(
            self, hidden_states, attention_mask, position_embeddings, past_key_values, **kwargs
        )
    from transformers.models.blt.modeling_blt import apply_rotary_pos_emb

    rows, plan = hidden_states.shape[:2], attention_mask
    q = self.q_proj(hidden_states).view(*rows, self.num_heads, self.head_dim)
    k = self.k_proj(hidden_states).view(*rows, self.num_key_value_heads, self.head_dim)
    v = self.v_proj(hidden_states).view(-1, self.num_key_value_heads, self.head_dim)
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    options = {"max_length": plan.max_length, "ranges": plan.ranges, "scale": self.scaling}
    if plan.window is None:
        read = block_causal_attention(q, k, v, plan.cu, **options)
    else:
        read = sliding_window_attention(q, k, v, plan.cu, window=plan.window, **options)
    return self.o_proj(read.reshape(hidden_states.shape)), None
