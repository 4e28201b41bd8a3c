# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""The dense model that a MoNE is compared with."""

import math

import torch
from torch import nn
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from ..configuration_mone import MoNEConfig, MoNEViViTConfig, as_pair
from ..flops import num_patches
from ..modeling_mone import MoNEEmbeddings, patch_grid
from ..modeling_mone_vivit import MoNEViViTEmbeddings


class DenseModel(nn.Module):
    """The same classifier with transformers' dense ViT layers and SDPA: what users would run instead.

    Embedding, pooling and head are those of the MoNE model, without routers; transformers has no factorised ViViT.

    Args:
        config: of the MoNE model, with mean pooling.

    Raises:
        ValueError: `pooling` other than "mean", `final_norm` other than "tokens", or register tokens.
    """

    def __init__(self, config: MoNEConfig):
        super().__init__()
        if (config.pooling, config.final_norm, config.num_register_tokens) != ("mean", "tokens", 0):
            raise ValueError(
                f"pooling={config.pooling!r}, final_norm={config.final_norm!r} and num_register_tokens="
                f"{config.num_register_tokens}: the baselines have 'mean', 'tokens' and 0 only."
            )
        self.is_video = isinstance(config, MoNEViViTConfig)
        fields = (
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "hidden_act",
            "qkv_bias",
            "layer_norm_eps",
        )
        dense = ViTConfig(**{name: getattr(config, name) for name in fields}, attn_implementation="sdpa")
        self.config = config
        self.embeddings = (MoNEViViTEmbeddings if self.is_video else MoNEEmbeddings)(config)
        self.layers = nn.ModuleList([ViTLayer(dense) for _ in range(config.num_hidden_layers)])
        temporal = config.num_temporal_layers if self.is_video else 0
        self.temporal = nn.ModuleList([ViTLayer(dense) for _ in range(temporal)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) or (B, F, C, height, width) -> logits (B, num_labels)."""
        hidden = self.embed(pixel_values)
        for layer in self.layers:
            hidden = layer(hidden)
        if self.is_video:
            hidden = self.layernorm(hidden).mean(1).unflatten(0, (len(pixel_values), -1))
            for layer in self.temporal:
                hidden = layer(hidden)
        return self.classifier(self.layernorm(hidden).mean(1))

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, D) of images, (B * T, N, D) of clips."""
        if self.is_video:
            return self.embeddings(pixel_values).flatten(0, 1)
        return self.embeddings(pixel_values, patch_grid(self.config, pixel_values.shape[-2:]))


def check_image_config(config: MoNEConfig) -> None:
    """Raise TypeError for a video model's."""
    if isinstance(config, MoNEViViTConfig):
        raise TypeError(f"{type(config).__name__} is of a video model, and this baseline is for images.")


def embedding_and_head_macs(config: MoNEConfig) -> int:
    """Multiply-accumulates of one image outside of the layers, counted as in `mone.flops`."""
    pixels = math.prod(as_pair(config.patch_size)) * config.num_channels
    return num_patches(config) * pixels * config.hidden_size + config.hidden_size * config.num_labels
