# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Bare state dicts of transformers' ViTs: their architecture by their keys, their config by their shapes."""

import math
import re
from collections.abc import Iterable, Mapping

import torch
from transformers import (
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    ViTConfig,
)

from ..configuration_mone import as_pair
from .transformers_vits import FAMILIES, LEFT


# Architectures in the order in which a key that only they have is looked for.
SIGNS = [
    (Dinov2WithRegistersConfig, "embeddings.register_tokens"),
    (Dinov2Config, "layer_scale1.lambda1"),
    (DeiTConfig, "embeddings.distillation_token"),
    (CLIPVisionConfig, "embeddings.class_embedding"),
    (SiglipVisionConfig, "self_attn.q_proj.weight"),
    (ViTConfig, "embeddings.cls_token"),
]

# Of torch.compile, of DistributedDataParallel, of Lightning's modules, and of backbones inside other models.
PREFIXES = ("_orig_mod.", "module.", "model.", "backbone.")
# Projections of pretraining beside a backbone, DINO's and iBOT's.
PROJECTIONS = re.compile(r"(dino_|ibot_)?head\.(mlp|last_layer)\.")


def strip_prefixes(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A state dict without what all its keys begin with, where that only says what the model was a part of."""
    own = [key for key in state if not PROJECTIONS.match(key)]
    prefix = next((prefix for prefix in PREFIXES if own and all(key.startswith(prefix) for key in own)), None)
    if prefix is None:
        return state
    return strip_prefixes({key.removeprefix(prefix): value for key, value in state.items()})


def guess_heads(width: int) -> int:
    """Heads of a ViT of this width: up to ViT-L, published ones have 64 features a head (one of timm's has not).

    Raises:
        ValueError: where 64 does not divide the width, or it is larger: of width 1280 most have 16 heads, not 20.
    """
    if width % 64 or width > 1024:
        raise ValueError(f"A state dict does not say how many heads a width of {width} has: give num_attention_heads.")
    return width // 64


def count_layers(state: Iterable[str], prefix: str = "") -> int:
    """Layers that the keys number, `layers.0. ...` or `blocks.0. ...`, after `prefix` where one is given."""
    pattern = re.compile(rf"{re.escape(prefix) or '(?:^|.*[.])'}(?:layers?|blocks)\.(\d+)\.")
    return 1 + max((int(match[1]) for key in state if (match := pattern.match(key))), default=0)


def guess_image_size(
    num_patches: int, patch_size: tuple[int, int], image_size: int | tuple[int, int] | None
) -> tuple[int, int] | None:
    """(height, width) of so many patches: `image_size` where it has as many, else a square of patches, or None."""
    if image_size is not None:
        rows, columns = (pixels // step for pixels, step in zip(as_pair(image_size), patch_size, strict=True))
        if rows * columns == num_patches:
            return as_pair(image_size)
    side = math.isqrt(max(num_patches, 0))
    return (side * patch_size[0], side * patch_size[1]) if side > 0 and side * side == num_patches else None


def infer_config(
    state: Mapping[str, torch.Tensor],
    num_attention_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> PreTrainedConfig:
    """Config of the transformers ViT that has these weights. What they do not show is its architecture's default.

    Args:
        state: its weights.
        num_attention_heads: by default 64 features a head.
        image_size: where the patches are no square.

    Raises:
        ValueError: names what is missing to tell.
    """
    state = {key: value for key, value in state.items() if not LEFT.match(key)}  # a text tower looks much the same

    def find(*endings: str) -> torch.Tensor:
        for ending in endings:
            for key, value in state.items():
                if key.endswith(ending):
                    return value
        raise ValueError(f"The state dict has no weight named ...{endings[0]}; its first keys are {list(state)[:5]}.")

    config_class = next((c for c, sign in SIGNS if any(key.endswith(sign) for key in state)), None)
    if config_class is None:
        raise ValueError(
            f"These keys are of no architecture known here ({sorted(FAMILIES)}): {list(state)[:5]}, ... "
            "A folder with a config.json says what it is."
        )
    patches = find("patch_embeddings.projection.weight", "patch_embedding.weight")
    positions = find("position_embeddings", "position_embedding.weight")
    hidden = find("mlp.fc1.weight", "intermediate.dense.weight", "gate_proj.weight", "weights_in.weight").shape[0]
    width, patch_size = patches.shape[0], tuple(patches.shape[-2:])
    num_patches = positions.shape[-2] - {DeiTConfig: 2, SiglipVisionConfig: 0}.get(config_class, 1)
    size = guess_image_size(num_patches, patch_size, image_size)
    if size is None:
        raise ValueError(
            f"The state dict has positions for {num_patches} patches, which are no square: give image_size."
        )
    fields = {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state),
        "num_attention_heads": num_attention_heads or guess_heads(width),
        "num_channels": patches.shape[1],
        "num_labels": next((v.shape[0] for k, v in state.items() if k.endswith("classifier.weight")), 0),
        "patch_size": patch_size if patch_size[0] != patch_size[1] else patch_size[0],
        "image_size": size if size[0] != size[1] else size[0],
    }
    if issubclass(config_class, (Dinov2Config, Dinov2WithRegistersConfig)):
        fields["mlp_ratio"] = hidden // width
        fields["use_swiglu_ffn"] = any("mlp.weights_in" in key or "mlp.gate_proj" in key for key in state)
    else:
        fields["intermediate_size"] = hidden
    if hasattr(config_class, "qkv_bias"):
        fields["qkv_bias"] = any(key.endswith(("q_proj.bias", "query.bias")) for key in state)
    return config_class(**fields)
