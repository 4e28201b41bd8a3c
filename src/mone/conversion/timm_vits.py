# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""timm's `VisionTransformer` and its state dicts as towers; DINO's and DINOv2's own files have the same names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .folding import cls_token_to_register, fold_layer_scale, join_heads, num_registers, token_to_register
from .state_dicts import PROJECTIONS, count_layers, guess_heads, guess_image_size
from .tower import Tower


RENAMES = [
    (r"^blocks\.", "layers."),
    (r"^(layers\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"^(layers\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^norm_pre\.", "embeddings.norm."),
    (r"^(fc_)?norm\.", "layernorm."),
    (r"^head\.", "classifier."),
]
# Masks, decoders and projections of pretraining, attention pooling.
LEFT = re.compile(rf"mask_token$|decoder_|attn_pool\.|{PROJECTIONS.pattern}")
# Leading tokens that become registers, in the order in which they stand.
REGISTERS = ("dist_token", "reg_token", "register_tokens")
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu"}


def from_timm(
    state: Mapping[str, torch.Tensor],
    name: str,
    model: nn.Module | None = None,
    num_attention_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    pooling: str | None = None,
) -> Tower:
    """A tower from timm's state dict.

    Args:
        model: the `VisionTransformer` that it is of. Without it, what a state dict does not show is what most of
            timm's have: pre-norm blocks, exact GELU, epsilon 1e-6, square images, and the class token pooled where
            there is one and no `fc_norm`.
        num_attention_heads: where there is no model; by default 64 features a head.
        image_size: where there is no model, and the patches are no square.
        pooling: where there is no model, "cls" or "mean".

    Raises:
        ValueError: says what a MoNE cannot express.
    """
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"{name} has no {missing}: it is no plain ViT with learned positions.")
    patches, positions, hidden = (state[key] for key in needed)
    if model is None:
        facts = _guess_facts(state, name, num_attention_heads, image_size, pooling)
    else:
        facts = _read_facts(model, name)

    weights, left = _rename(state)
    fold_layer_scale(weights, "ls1.gamma", "ls2.gamma")
    if "embeddings.patch_embeddings.projection.bias" not in weights and "norm_pre.weight" in state:
        weights["embeddings.patch_embeddings.projection.bias"] = patches.new_zeros(patches.shape[0])
    has_cls, positioned = "cls_token" in state, positions.shape[1] - facts.num_patches
    if has_cls and positioned == 0:
        zero = positions.new_zeros(1, 1, patches.shape[0])
        weights["embeddings.position_embeddings"] = torch.cat([zero, positions], dim=1)
    for key in [key for key in REGISTERS if key in state]:
        token_to_register(weights, key, int(has_cls) if positioned > has_cls else None)
    pooling = facts.pooling
    if "head_dist.weight" in state:
        join_heads(weights, "classifier", "head_dist")
        pooling = "cls_registers"
    elif pooling == "mean" and has_cls:
        cls_token_to_register(weights)

    fields = {
        **facts.fields,
        "hidden_size": patches.shape[0],
        "num_hidden_layers": count_layers(state),
        "intermediate_size": hidden.shape[0],
        "patch_size": tuple(patches.shape[2:]),
        "num_channels": patches.shape[1],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "embedding_norm": "norm_pre.weight" in state,
        "final_norm": "pooled" if "fc_norm.weight" in state else "tokens" if "norm.weight" in state else "none",
        "position_antialias": True,
        "pooling": pooling,
        "num_register_tokens": num_registers(weights),
    }
    if "classifier.weight" in weights:
        fields["num_labels"] = weights["classifier.weight"].shape[0]
    return Tower(name, fields, weights, left)


def _rename(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights under MoNE's names, those of query, key and value apart, and the keys that are left behind."""
    has_pool = any(key.startswith("attn_pool.") for key in state)
    weights, left = {}, []
    for key, value in state.items():
        if LEFT.match(key) or (has_pool and key.startswith("head.")):  # which reads the attention pooling
            left.append(key)
            continue
        target = key
        for pattern, replacement in RENAMES:
            target = re.sub(pattern, replacement, target)
        if ".attn.qkv." in key and value.shape[0] % 3 == 0:  # query, key and value below one another
            for part, projection in zip(value.chunk(3), "qkv", strict=True):
                weights[target.replace("attn.qkv", f"attention.{projection}_proj")] = part
        else:
            weights[target] = value
    return weights, left


@dataclass(frozen=True)
class Facts:
    """What a state dict does not show of its `VisionTransformer`.

    Args:
        fields: of [`MoNEConfig`].
        pooling: "cls" or "mean".
        num_patches: how many of the positions are of patches; those before them are of the leading tokens.
    """

    fields: dict
    pooling: str
    num_patches: int


def _guess_facts(
    state: Mapping[str, torch.Tensor],
    name: str,
    num_attention_heads: int | None,
    image_size: int | tuple[int, int] | None,
    pooling: str | None,
) -> Facts:
    """What most of timm's models have, where nothing else is said, as [`from_timm`] explains.

    Raises:
        ValueError: asks for `num_attention_heads` or `image_size`.
    """
    width, _, *patch_size = state["patch_embed.proj.weight"].shape
    has_cls, num_positions = "cls_token" in state, state["pos_embed"].shape[1]
    fields = {
        "num_attention_heads": num_attention_heads or guess_heads(width),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5 if "norm_pre.weight" in state else 1e-6,  # CLIP's
    }
    if not has_cls or pooling not in ("cls", "mean"):
        pooling = "cls" if has_cls and "fc_norm.weight" not in state else "mean"
    # Positions of all leading tokens, of the class token alone (DINOv2's own registers have none), or of none.
    leading = has_cls + sum(state[key].shape[1] for key in REGISTERS if key in state)
    for num_patches in (num_positions - leading, num_positions - has_cls, num_positions):
        size = guess_image_size(num_patches, tuple(patch_size), image_size)
        if size is not None:
            return Facts({**fields, "image_size": size}, pooling, num_patches)
    raise ValueError(f"{name} has {num_positions} positions, which are no square: give image_size.")


def _read_facts(model: nn.Module, name: str) -> Facts:
    """What the model itself says.

    Raises:
        ValueError: says what a MoNE cannot express.
    """
    blocks = {type(block).__name__ for block in model.blocks}
    block, pooling = model.blocks[0], getattr(model, "global_pool", None)
    activation = type(block.mlp.act).__name__
    if activation == "GELU" and getattr(block.mlp.act, "approximate", "none") == "tanh":
        activation = "GELUTanh"
    has_head = isinstance(getattr(model, "head", None), nn.Linear) and getattr(model, "attn_pool", None) is None
    problems = {
        f"blocks {sorted(blocks)}, and MoNE's are pre-norm": blocks != {"Block"},
        f"activation {activation}, and known are {sorted(ACTIVATIONS)}": activation not in ACTIVATIONS,
        f"global_pool={pooling!r}, and known are 'token' and 'avg'": has_head and pooling not in ("token", "avg"),
        "a pooling over class and register tokens, too": has_head
        and pooling == "avg"
        and getattr(model, "pool_include_prefix", False)
        and model.num_prefix_tokens > 0,
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise ValueError(f"{name} cannot become a MoNE. It has {'; '.join(found)}.")
    fields = {
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": ACTIVATIONS[activation],
        "layer_norm_eps": block.norm1.eps,
        "image_size": tuple(model.patch_embed.img_size),
    }
    pooling = "cls" if getattr(model, "cls_token", None) is not None and pooling != "avg" else "mean"
    return Facts(fields, pooling, model.patch_embed.num_patches)
