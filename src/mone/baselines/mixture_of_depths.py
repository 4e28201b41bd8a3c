# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Mixture of Depths: tokens that a layer's router does not choose skip it (Raposo et al., arXiv 2404.02258).

As MoNE's authors compare with it (section 5): every other layer takes `SHARE` of the tokens, the others all of them.

Axis letters: B batch, N tokens, K chosen tokens, D width.
"""

import torch
from torch import nn

from ..configuration_mone import MoNEConfig
from ..flops import layer_macs, num_patches
from .dense import DenseModel, check_image_config, embedding_and_head_macs


SHARE = 0.125  # of the tokens, for the layers with a router


class MixtureOfDepthsModel(DenseModel):
    """A dense classifier whose second, fourth, ... layer takes only the tokens that its router scores highest.

    Attention there is among the chosen tokens. What the layer adds to them is multiplied by their score (Eq. 1), from
    which the router learns.

    Args:
        config: of an image model with mean pooling.
    """

    def __init__(self, config: MoNEConfig):
        check_image_config(config)
        super().__init__(config)
        self.chosen = chosen_tokens(config)
        self.routers = nn.ModuleList([nn.Linear(config.hidden_size, 1, bias=False) for _ in self.layers[1::2]])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, height, width) -> logits (B, num_labels)."""
        tokens = self.embed(pixel_values)
        for index, layer in enumerate(self.layers):
            if index % 2 == 0:
                tokens = layer(tokens)
                continue
            scores, chosen = self.routers[index // 2](tokens).topk(self.chosen, dim=1)  # (B, K, 1)
            chosen = chosen.expand(-1, -1, tokens.shape[-1])
            taken = tokens.gather(1, chosen)
            tokens = tokens.scatter_add(1, chosen, scores * (layer(taken) - taken))
        return self.classifier(self.layernorm(tokens).mean(1))


def chosen_tokens(config: MoNEConfig) -> int:
    """K, the tokens of an image that a routed layer takes; at least one."""
    return max(1, int(SHARE * num_patches(config)))


def mixture_of_depths_macs(config: MoNEConfig) -> int:
    """Multiply-accumulates of a [`MixtureOfDepthsModel`] on one image, counted as in `mone.flops`."""
    patches, chosen = num_patches(config), chosen_tokens(config)
    macs = embedding_and_head_macs(config)
    for index in range(config.num_hidden_layers):
        routed = index % 2 == 1
        tokens = chosen if routed else patches
        macs += layer_macs(config, tokens, tokens)
        macs += patches * config.hidden_size * routed  # the router
    return macs
