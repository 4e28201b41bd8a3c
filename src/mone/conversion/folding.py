# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Parts of other ViTs that MoNE lacks, expressed exactly in parts that it has. All work in place on state dicts."""

import re

import torch


Weights = dict[str, torch.Tensor]


def fold_layer_scale(weights: Weights, after_attention: str, after_mlp: str) -> None:
    """Fold LayerScale, one factor for each channel of a block's output, into the projection that it follows.

    Args:
        after_attention, after_mlp: names of the factors within a layer, such as "layer_scale1.lambda1".
    """
    for name, projection in ((after_attention, "attention.o_proj"), (after_mlp, "mlp.fc2")):
        pattern = re.compile(rf"(layers\.\d+\.){re.escape(name)}")
        for key in [key for key in weights if pattern.fullmatch(key)]:
            target = pattern.fullmatch(key)[1] + projection
            weight, bias = weights.get(f"{target}.weight"), weights.get(f"{target}.bias")
            # Else the key stays, and is reported with the missing projection.
            if weight is not None and bias is not None and weights[key].shape == bias.shape == weight.shape[:1]:
                scale = weights.pop(key)
                weights[f"{target}.weight"] = weight * scale.unsqueeze(1)
                weights[f"{target}.bias"] = bias * scale


def token_to_register(weights: Weights, key: str, index: int | None) -> None:
    """Make a leading token a register, after those that there are.

    A register has no position. One of a leading token is constant, and so it can be added once.

    Args:
        key: of the token or tokens, (1, R, D).
        index: where their positions stand among `embeddings.position_embeddings`; None if they have none.
    """
    token = weights.pop(key)
    if index is not None:
        position = weights["embeddings.position_embeddings"]
        before, own, after = position.tensor_split([index, index + token.shape[1]], dim=1)
        token = token + own
        weights["embeddings.position_embeddings"] = torch.cat([before, after], dim=1)
    registers = [weights[k] for k in ["embeddings.register_tokens"] if k in weights]
    weights["embeddings.register_tokens"] = torch.cat([*registers, token], dim=1)


def cls_token_to_register(weights: Weights) -> None:
    """Make the class token the first register, for a model that does not read it."""
    registers = weights.pop("embeddings.register_tokens", None)
    token_to_register(weights, "embeddings.cls_token", 0)
    if registers is not None:
        weights["_others"] = registers
        token_to_register(weights, "_others", None)


def join_heads(weights: Weights, first: str, second: str) -> None:
    """Make two classifiers whose logits are averaged, each on a token of its own, one classifier on both tokens."""
    heads = [
        {name: weights.pop(f"{prefix}.{name}", None) for name in ("weight", "bias")} for prefix in (first, second)
    ]
    for name, dim in (("weight", 1), ("bias", None)):
        halves = [head[name] / 2 for head in heads if head[name] is not None]
        if len(halves) == 2:  # else the classifier is reported as missing
            weights[f"classifier.{name}"] = halves[0] + halves[1] if dim is None else torch.cat(halves, dim=dim)


def num_registers(weights: Weights) -> int:
    """Registers of a state dict."""
    return weights["embeddings.register_tokens"].shape[1] if "embeddings.register_tokens" in weights else 0
