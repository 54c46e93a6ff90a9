"""Llama checkpoints in Hugging Face's format, into a global transformer and out of it again.

::

    FOLDER/config.json            widths, heads, θ, eps, scaling, tying, the ids of <bos> and <eos>
           model.safetensors      or several, with model.safetensors.index.json
           tokenizer.json         or tokenizer.model; read by lst.vocabulary

    theirs                                              ours
    model.embed_tokens.weight                           embedding.weight, by rows
    model.layers.N.input_layernorm.weight               global_transformer.layers.N.attention_norm
    model.layers.N.self_attn.{q,k,v}_proj.weight        ….attention.qkv, one below the other
    model.layers.N.self_attn.o_proj.weight              ….attention.output
    model.layers.N.post_attention_layernorm.weight      ….feed_forward_norm
    model.layers.N.mlp.{gate,up}_proj.weight            ….feed_forward.gate_up, likewise
    model.layers.N.mlp.down_proj.weight                 ….feed_forward.down
    model.norm.weight                                   norm
    lm_head.weight                                      head, by rows; neither has it where tied

Rows of embedding and head: text piece i of the joint vocabulary is the checkpoint's id i, and
``<bos>`` and ``<eos>`` are its ids of these. (They are pieces as well, which no text becomes: their
own rows stay behind when training goes on, and are left out on the way back.) Ids past the
tokenizer's last have no piece. ``<pad>``, ``<t>``, ``<s>`` and the units are new: drawn feature by
feature with the mean and deviation of the checkpoint's rows.

So a text document, ``<bos> pieces <eos>``, gets the checkpoint's logits over the text pieces.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lst.errors import UserError
from lst.model.config import ModelConfig, RopeScaling, StackConfig
from lst.strict_json import read_json, read_strictly
from lst.vocabulary import BOS, EOS, Vocabulary

__all__ = ["from_llama", "llama_config", "llama_weights", "read_llama_config"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# From Llama ---------------------------------------------------------------------------------------


def from_llama(config: ModelConfig, folder: Path) -> ModelConfig:
    """``config`` with the global transformer of the checkpoint in ``folder``, and
    ``text_path="global"``.

    Raises:
        UserError: no Llama checkpoint there, or one with what this model does not have: biases,
            heads of another size than width / heads, other rotary scaling than "linear", "llama3".
    """
    path = folder / CONFIG
    values = read_llama_config(folder)

    def value(name: str, kind: type, default: Any = None) -> Any:
        found = values.get(name)
        found = default if found is None else found
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind:
            raise UserError(f"{path}: expected {name} to be {kind.__name__}, got {found!r}")
        return found

    dim, heads = value("hidden_size", int), value("num_attention_heads", int)
    expected = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": dim // max(1, heads),
    }
    for name, only in expected.items():
        if values.get(name, only) not in (only, None):
            raise UserError(f"{path}: expected {name} = {only}, got {values[name]!r}")
    theta, scaling = _rope(values, path)
    ends = []
    for name in ("bos_token_id", "eos_token_id"):
        ids = values.get(name)
        first = ids[0] if isinstance(ids, list) and ids else ids  # of several ends, the first
        if type(first) is not int or not 0 <= first < value("vocab_size", int):
            raise UserError(f"{path}: expected {name} to be an id of the vocabulary, got {ids!r}")
        ends.append(first)
    sizes = {
        "layers": value("num_hidden_layers", int),
        "dim": dim,
        "heads": heads,
        "kv_heads": value("num_key_value_heads", int, heads),
        "hidden": value("intermediate_size", int),
    }
    rest = {
        "norm_eps": value("rms_norm_eps", float, 1e-6),
        "tied": value("tie_word_embeddings", bool, False),
    }
    try:
        return replace(
            config,
            text_path="global",
            global_transformer=StackConfig(**sizes),
            rope_theta=theta,
            rope_scaling=scaling,
            special_pieces=(ends[0], ends[1]),
            **rest,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_llama_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a Llama checkpoint. Raises UserError where there is none."""
    values = _read_json(folder / CONFIG)
    if values.get("model_type") != "llama":
        raise UserError(
            f"{folder / CONFIG}: expected model_type 'llama', got {values.get('model_type')!r}"
        )
    return values


def _rope(values: dict[str, Any], path: Path) -> tuple[float, RopeScaling]:
    """θ and scaling, which are one entry since transformers 5 and were two before."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: expected rotary scaling to be an object, got {rope!r}")
    theta = rope.get("rope_theta") or values.get("rope_theta") or 1e4
    turned = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1
    if turned != 1:
        raise UserError(f"{path}: expected heads that turn whole, got a share of {turned}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    try:
        if kind == "default":
            return float(theta), RopeScaling()
        if kind == "linear":
            return float(theta), RopeScaling(kind="linear", factor=float(rope["factor"]))
        if kind == "llama3":
            return float(theta), RopeScaling(
                kind="llama3",
                factor=float(rope["factor"]),
                low=float(rope["low_freq_factor"]),
                high=float(rope["high_freq_factor"]),
                original_length=int(rope["original_max_position_embeddings"]),
            )
    except (KeyError, TypeError, ValueError, OverflowError, UserError) as error:
        raise UserError(f"{path}: expected rotary scaling {kind!r}, got {rope} ({error})") from None
    raise UserError(f"{path}: expected rotary scaling default, linear or llama3, got {kind!r}")


def llama_weights(
    config: ModelConfig, vocabulary: Vocabulary, folder: Path, *, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's weights by our names, whole and float32, one at a time.

    Args:
        config: of :func:`from_llama`.
        vocabulary: whose pieces are those of the checkpoint's tokenizer.
        seed: of the new rows.

    Raises:
        UserError: the checkpoint is not the one of ``config``, is damaged, or has fewer ids than
            the vocabulary has pieces.
    """
    if from_llama(config, folder) != config:
        raise UserError(f"{folder}: expected the Llama of the model's configuration, got another")
    ids = read_llama_config(folder)["vocab_size"]
    pieces = vocabulary.num_pieces
    if pieces > ids or max(config.special_pieces or (0,)) >= pieces:
        raise UserError(
            f"{folder}: expected a vocabulary that the tokenizer's {pieces} pieces are the first "
            f"of, <bos> and <eos> among them; got {ids} ids, {config.special_pieces} of these two"
        )
    generator = torch.Generator().manual_seed(seed)
    files = _files(folder)
    for name, theirs in _names(config).items():
        parts = [_read_tensor(folder, files, each) for each in theirs]
        if theirs in ([EMBEDDING], [HEAD]):
            parts = [_to_joint(parts[0], config, vocabulary, generator)]
        yield name, torch.cat(parts)


def _to_joint(
    rows: Tensor, config: ModelConfig, vocabulary: Vocabulary, generator: torch.Generator
) -> Tensor:
    """(V, d) of the joint vocabulary from the checkpoint's rows (ids, d)."""
    assert config.special_pieces is not None
    drawn = torch.randn((vocabulary.size, rows.shape[1]), generator=generator)
    joint = rows.mean(0) + rows.std(0) * drawn
    joint[vocabulary.first_piece : vocabulary.first_unit] = rows[: vocabulary.num_pieces]
    joint[[BOS, EOS]] = rows[list(config.special_pieces)]
    return joint


def _names(config: ModelConfig) -> dict[str, list[str]]:
    """Our name of each weight, and theirs of the parts that it is made of."""
    names = {"embedding.weight": [EMBEDDING], "norm.weight": ["model.norm.weight"]}
    if not config.tied:
        names["head.weight"] = [HEAD]
    for n in range(config.global_transformer.layers):
        parts = {
            "attention_norm": ["input_layernorm"],
            "attention.qkv": [f"self_attn.{each}_proj" for each in "qkv"],
            "attention.output": ["self_attn.o_proj"],
            "feed_forward_norm": ["post_attention_layernorm"],
            "feed_forward.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "feed_forward.down": ["mlp.down_proj"],
        }
        for ours, theirs in parts.items():
            names[f"global_transformer.layers.{n}.{ours}.weight"] = [
                f"model.layers.{n}.{each}.weight" for each in theirs
            ]
    return names


@dataclass(frozen=True)
class _Index:
    """What is read of ``model.safetensors.index.json``."""

    weight_map: dict[str, str]  # the file of each weight


def _files(folder: Path) -> dict[str, str]:
    """The file of each weight."""
    if (folder / INDEX).exists():
        index = _read_json(folder / INDEX).get("weight_map")
        return read_strictly(_Index, {"weight_map": index}, str(folder / INDEX)).weight_map
    with _open(folder / WEIGHTS) as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


def _read_tensor(folder: Path, files: dict[str, str], name: str) -> Tensor:
    if name not in files:
        raise UserError(f"{folder}: expected a weight {name}, got none")
    with _open(folder / files[name]) as file:
        try:
            return file.get_tensor(name).float()
        except SafetensorError as error:
            raise UserError(f"{folder / files[name]}: {name} could not be read ({error})") from None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: expected safetensors of a Llama, got {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: expected a Llama checkpoint in Hugging Face's format, got none")
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


# To Llama -----------------------------------------------------------------------------------------


def to_llama(
    config: ModelConfig, vocabulary: Vocabulary, weights: dict[str, Tensor], *, positions: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and the weights of the Llama that a model's global transformer is.

    Args:
        weights: by our names (``LanguageModel.weights``), those of other parts are left out.
        positions: the longest sequence that the model was trained on; it changes no logit.

    Raises:
        UserError: the model was not started from a Llama, so that its vocabulary is not one.
    """
    if config.special_pieces is None:
        raise UserError("expected a model that was started from a Llama (--warm-start), got none")
    tensors: dict[str, Tensor] = {}
    for name, theirs in _names(config).items():
        whole = weights[name]
        if theirs in ([EMBEDDING], [HEAD]):
            rows = whole[vocabulary.first_piece : vocabulary.first_unit].clone()
            rows[list(config.special_pieces)] = whole[[BOS, EOS]]
            whole = rows
        sizes = _part_sizes(config.global_transformer, len(theirs), len(whole))
        parts = zip(theirs, whole.split(sizes), strict=True)
        tensors |= {each: part.contiguous() for each, part in parts}
    return llama_config(config, vocabulary, positions), tensors


def _part_sizes(stack: StackConfig, parts: int, rows: int) -> list[int]:
    if parts == 3:  # q, k, v
        return [n * stack.head_dim for n in (stack.heads, stack.num_kv_heads, stack.num_kv_heads)]
    return [rows // parts] * parts


def llama_config(config: ModelConfig, vocabulary: Vocabulary, positions: int) -> dict[str, Any]:
    """``config.json`` as every version of transformers reads it."""
    assert config.special_pieces is not None
    stack, scaling = config.global_transformer, config.rope_scaling
    rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original_length,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": vocabulary.num_pieces,
        "hidden_size": stack.dim,
        "intermediate_size": stack.hidden_width,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling.kind == "none" else rope,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": config.special_pieces[0],
        "eos_token_id": config.special_pieces[1],
    }
