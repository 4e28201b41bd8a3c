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

# Of DistributedDataParallel, of Lightning's modules, and of backbones inside other models.
PREFIXES = ("module.", "model.", "backbone.")


def strip_prefixes(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A state dict without what all its keys begin with, where that only says what the model was a part of."""
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def guess_heads(width: int) -> int:
    """Heads of a ViT of this width: all published ones that can be converted have 64 features a head.

    Raises:
        ValueError: where 64 does not divide the width.
    """
    if width % 64:
        raise ValueError(f"A state dict does not say how many heads a width of {width} has: give num_attention_heads.")
    return width // 64


def count_layers(state: Iterable[str], prefix: str = "") -> int:
    """Layers that the keys number, `layers.0. ...` or `blocks.0. ...`, after `prefix` where one is given."""
    pattern = re.compile(rf"{re.escape(prefix) or '(?:^|.*[.])'}(?:layers?|blocks)\.(\d+)\.")
    return 1 + max((int(match[1]) for key in state if (match := pattern.match(key))), default=0)


def infer_config(state: Mapping[str, torch.Tensor], num_attention_heads: int | None = None) -> PreTrainedConfig:
    """Config of the transformers ViT that has these weights. What they do not show is its architecture's default.

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
    width, patch_size = patches.shape[0], patches.shape[-1]
    prefix = {DeiTConfig: 2, SiglipVisionConfig: 0}.get(config_class, 1)
    side = math.isqrt(positions.shape[-2] - prefix)
    fields = {
        "hidden_size": width,
        "num_hidden_layers": count_layers(state),
        "num_attention_heads": num_attention_heads or guess_heads(width),
        "num_channels": patches.shape[1],
        "num_labels": next((v.shape[0] for k, v in state.items() if k.endswith("classifier.weight")), 0),
        "patch_size": patch_size,
        "image_size": side * patch_size,
    }
    if issubclass(config_class, (Dinov2Config, Dinov2WithRegistersConfig)):
        fields["mlp_ratio"] = hidden // width
        fields["use_swiglu_ffn"] = any("mlp.weights_in" in key or "mlp.gate_proj" in key for key in state)
    else:
        fields["intermediate_size"] = hidden
    if config_class is ViTConfig:
        fields["qkv_bias"] = any(key.endswith(("q_proj.bias", "query.bias")) for key in state)
    return config_class(**fields)
