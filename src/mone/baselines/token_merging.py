# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Token merging: "Token Merging: Your ViT But Faster" (Bolya et al., ICLR 2023), sections 3 and 3.1.

Every layer merges its r most similar pairs of tokens between attention and MLP, so that later layers see fewer.

Axis letters: B batch, N tokens, K features of a key, D width, H heads; A and M the two halves of the tokens.
"""

import torch
from torch import nn
from transformers.models.vit.modeling_vit import ViTLayer

from ..configuration_mone import MoNEConfig
from ..flops import num_patches
from .dense import DenseModel, check_image_config, embedding_and_head_macs


def merge_tokens(
    tokens: torch.Tensor, sizes: torch.Tensor, keys: torch.Tensor, merged: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bipartite soft matching: average the most similar pairs of an even and an odd token.

    Args:
        tokens: (B, N, D).
        sizes: (B, N, 1), how many patches each token stands for; averages are weighted by it.
        keys: (B, N, K), by whose cosine similarity tokens are compared.
        merged: r, how many of the even tokens (at most N // 2) go into their most similar odd one.

    Returns:
        The remaining tokens (B, N - r, D), in another order, and their sizes (B, N - r, 1).
    """
    keys = nn.functional.normalize(keys, dim=-1)
    similarity, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(-1)  # (B, A)
    order = similarity.argsort(dim=1, descending=True).unsqueeze(-1)
    gone, kept = order[:, :merged], order[:, merged:]
    target = partner.unsqueeze(-1).gather(1, gone)

    def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.gather(1, index.expand(-1, -1, x.shape[-1]))

    def add(x: torch.Tensor) -> torch.Tensor:
        even, odd = x[:, ::2], x[:, 1::2]
        odd = odd.scatter_add(1, target.expand(-1, -1, x.shape[-1]), take(even, gone))
        return torch.cat([take(even, kept), odd], dim=1)

    sums, sizes = add(tokens * sizes), add(sizes)
    return sums / sizes, sizes


class TokenMergingModel(DenseModel):
    """A dense classifier whose layers merge tokens; with r = 0 it is the dense model.

    Args:
        config: of an image model with mean pooling.
        merged_per_layer: r.
    """

    def __init__(self, config: MoNEConfig, merged_per_layer: int):
        check_image_config(config)
        super().__init__(config)
        self.merged_per_layer = merged_per_layer

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) -> logits (B, num_labels)."""
        tokens = self.embed(pixel_values)
        sizes = tokens.new_ones(*tokens.shape[:2], 1)
        for index, layer in enumerate(self.layers):
            tokens, sizes = self._layer(layer, tokens, sizes, is_first=index == 0)
        # Every patch counts once, also in the average.
        return self.classifier((self.layernorm(tokens) * sizes).sum(1) / sizes.sum(1))

    def _layer(self, layer: ViTLayer, tokens: torch.Tensor, sizes: torch.Tensor, is_first: bool):
        attention = layer.attention
        x = layer.layernorm_before(tokens)
        query, key, value = (
            proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )  # (B, H, N, D / H)
        # Proportional attention (section 3): a token counts as often as the patches that it stands for.
        mask = None if is_first or not self.merged_per_layer else sizes.log().transpose(1, 2).unsqueeze(1)
        context = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tokens = tokens + attention.o_proj(context.transpose(1, 2).flatten(2))
        if self.merged_per_layer:
            merged = min(self.merged_per_layer, tokens.shape[1] // 2)
            tokens, sizes = merge_tokens(tokens, sizes, key.mean(1), merged)
        return tokens + layer.mlp(layer.layernorm_after(tokens)), sizes


def merged_per_layer_for_macs(config: MoNEConfig, gmacs: float) -> int:
    """The least r with which one image costs at most `gmacs` times 10^9 multiply-accumulates.

    Raises:
        ValueError: if no r does; the message gives the least budget that works.
    """
    for merged in range(num_patches(config) // 2 + 1):
        macs = token_merging_macs(config, merged)
        if macs <= gmacs * 1e9:
            return merged
    raise ValueError(f"A budget of {gmacs} GMACs cannot be met: merging half of the tokens needs {macs / 1e9:.6g}.")


def token_merging_macs(config: MoNEConfig, merged_per_layer: int) -> int:
    """Multiply-accumulates of a [`TokenMergingModel`] on one image, counted as in `mone.flops`."""
    d, tokens, macs = config.hidden_size, num_patches(config), embedding_and_head_macs(config)
    for _ in range(config.num_hidden_layers):
        macs += 4 * tokens * d * d + 2 * tokens * tokens * d
        left = tokens - min(merged_per_layer, tokens // 2)
        if merged_per_layer:
            macs += (tokens + 1) // 2 * (tokens // 2) * d // config.num_attention_heads  # similarities of keys
        tokens = left
        macs += 2 * tokens * d * config.intermediate_size
    return macs
