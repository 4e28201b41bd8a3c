# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Pretrained vision transformers -> MoNE."""

from transformers import ViTForImageClassification

from .configuration_mone import MoNEConfig
from .modeling_mone import MoNEForImageClassification


def mone_from_vit(vit: ViTForImageClassification, **config) -> MoNEForImageClassification:
    """A MoNE that is exactly `vit` at capacity 1.0, with fresh routers.

    The weights map by prefix alone (`vit.` -> `mone.`). The class token stays, and is what the classifier reads.

    Args:
        vit: a ViT classifier of transformers.
        config: fields of [`MoNEConfig`] to set, such as `num_experts`, `router_layers` or `capacity`.

    Raises:
        TypeError: for a name that is no field.
        ValueError: if the width is not divisible by 2**(num_experts - 1), or a weight has no counterpart.
    """
    unknown = sorted(set(config) - set(MoNEConfig.__annotations__))
    if unknown:
        raise TypeError(f"{unknown} are no fields of MoNEConfig; allowed are {sorted(MoNEConfig.__annotations__)}.")
    if config.get("pooling", "cls") != "cls":
        raise ValueError(f"pooling={config['pooling']!r}: a ViT classifier reads its class token, pooling='cls'.")
    shared = {name: value for name, value in vit.config.to_dict().items() if name in MoNEConfig.__annotations__}
    names = {name: getattr(vit.config, name) for name in ("id2label", "label2id", "problem_type")}
    model = MoNEForImageClassification._from_config(
        MoNEConfig(**{**shared, **names, "pooling": "cls", **config}),
        attn_implementation=vit.config._attn_implementation,
        dtype=vit.dtype,
    )
    weights = {
        "mone." + key.removeprefix("vit.") if key.startswith("vit.") else key: value
        for key, value in vit.state_dict().items()
    }
    result = model.load_state_dict(weights, strict=False)
    missing = [key for key in result.missing_keys if ".routers." not in key]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"Weights of {type(vit).__name__} missing: {missing}; without counterpart: {result.unexpected_keys}."
        )
    return model.to(vit.device).train(vit.training)
