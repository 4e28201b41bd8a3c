# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""timm's `VisionTransformer` and its state dicts as towers; DINO's and DINOv2's own files have the same names."""

import re
from collections.abc import Mapping

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
    has_cls, has_pool = "cls_token" in state, any(key.startswith("attn_pool.") for key in state)
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
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"{name} has no {missing}: it is no plain ViT with learned positions.")
    patches, positions, hidden = (state[key] for key in needed)
    width, patch_size = patches.shape[0], tuple(patches.shape[2:])
    fold_layer_scale(weights, "ls1.gamma", "ls2.gamma")
    if "embeddings.patch_embeddings.projection.bias" not in weights and "norm_pre.weight" in state:
        weights["embeddings.patch_embeddings.projection.bias"] = patches.new_zeros(width)

    tokens = {key: weights[key].shape[1] for key in ("dist_token", "reg_token", "register_tokens") if key in weights}
    if model is None:
        facts = {"num_attention_heads": num_attention_heads or guess_heads(width), "hidden_act": "gelu"}
        facts["layer_norm_eps"] = 1e-5 if "norm_pre.weight" in state else 1e-6  # CLIP's
        if not has_cls or pooling not in ("cls", "mean"):
            pooling = "cls" if has_cls and "fc_norm.weight" not in state else "mean"
    else:
        facts, pooling = _facts(model, name)
    num_positions = positions.shape[1]
    if model is None:
        # Positions of all leading tokens, of the class token alone (DINOv2's own registers have none), or of none.
        counts = [num_positions - prefix for prefix in (has_cls + sum(tokens.values()), int(has_cls), 0)]
        sizes = {count: guess_image_size(count, patch_size, image_size) for count in counts}
        num_patches = next((count for count, size in sizes.items() if size is not None), None)
        if num_patches is None:
            raise ValueError(f"{name} has {num_positions} positions, which are no square: give image_size.")
        facts["image_size"] = sizes[num_patches]
    else:
        num_patches = model.patch_embed.num_patches
    positioned = num_positions - num_patches
    if has_cls and positioned == 0:
        zero = positions.new_zeros(1, 1, width)
        weights["embeddings.position_embeddings"] = torch.cat([zero, positions], dim=1)
    for key in tokens:
        token_to_register(weights, key, int(has_cls) if positioned > has_cls else None)

    fields = {
        **facts,
        "hidden_size": width,
        "num_hidden_layers": count_layers(state),
        "intermediate_size": hidden.shape[0],
        "patch_size": patch_size,
        "num_channels": patches.shape[1],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "embedding_norm": "norm_pre.weight" in state,
        "final_norm": "pooled" if "fc_norm.weight" in state else "tokens" if "norm.weight" in state else "none",
        "position_antialias": True,
        "pooling": pooling,
    }
    if "head_dist.weight" in state:
        join_heads(weights, "classifier", "head_dist")
        fields["pooling"] = "cls_registers"
    elif pooling == "mean" and has_cls:
        cls_token_to_register(weights)
    if "classifier.weight" in weights:
        fields["num_labels"] = weights["classifier.weight"].shape[0]
    fields["num_register_tokens"] = num_registers(weights)
    return Tower(name, fields, weights, left)


def _facts(model: nn.Module, name: str) -> tuple[dict, str]:
    """Config fields that a state dict does not show, and the pooling."""
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
    facts = {
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": ACTIVATIONS[activation],
        "layer_norm_eps": block.norm1.eps,
        "image_size": tuple(model.patch_embed.img_size),
    }
    return facts, "cls" if getattr(model, "cls_token", None) is not None and pooling != "avg" else "mean"
