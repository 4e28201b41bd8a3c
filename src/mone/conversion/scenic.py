# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Scenic's and AugReg's Flax parameter trees: ViT and MatViT as image towers, ViViT-FE as the video model.

Names are those of `scenic/projects/vivit` (`SpaceTimeViViT`), `scenic/projects/matvit` (whose full width is a plain
ViT) and of the `.npz` files of "How to train your ViT?". Flax keeps a dense kernel as (in, out), a convolution's as
(space..., in, out), and the heads of an attention on an axis of their own. Its GELU is the tanh approximation.
"""

import math
import re
from collections.abc import Mapping

import numpy as np
import torch

from ..configuration_mone import MoNEViViTConfig
from ..modeling_mone_vivit import MoNEViViTForVideoClassification
from .state_dicts import count_layers
from .tower import (
    LABEL_FIELDS,
    Tower,
    check_fields,
    check_labels,
    check_stated,
    load,
    number_labels,
    start_new_classifier,
)
from .video import resize_video_model, set_labels


# Where the state of a training holds the model's parameters: of Flax's TrainState, and of its older optimisers.
OWN = ("params/", "optimizer/target/", "target/")
FIXED = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
RENAMES = [
    (r"/", "."),
    (r"\.(kernel|scale)$", ".weight"),
    (r"^(\w*Transformer)\.encoderblock_(\d+)\.", r"\1.layers.\2."),
    (r"\.MultiHeadDotProductAttention_\d\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
    (r"\.MultiHeadDotProductAttention_\d\.out\.", ".attention.o_proj."),
    (r"\.MlpBlock_\d\.Dense_0\.", ".mlp.fc1."),
    (r"\.MlpBlock_\d\.Dense_1\.", ".mlp.fc2."),
    (r"(layers\.\d+)\.LayerNorm_0\.", r"\1.layernorm_before."),
    (r"(layers\.\d+)\.LayerNorm_[12]\.", r"\1.layernorm_after."),
    (r"\.encoder_norm\.", ".layernorm."),
    (r"\.posembed_input\.pos_embedding$", ".position_embeddings"),
    (r"^cls_(\w+)$", r"\1.cls_token"),
    (r"^embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^(output_projection|head)\.", "classifier."),
    (r"^pre_logits\.", "classifier.pre_logits."),  # left out with it, for other labels
]


def parameters(source: Mapping) -> dict[str, torch.Tensor]:
    """A dict or a nested tree of arrays (NumPy's, JAX's, torch's) as one dict of tensors, names joined by "/".

    Of a training's state, which also holds steps, averages and optimisers, the model's parameters alone.

    Raises:
        ValueError: names what is no array, or one of a type that torch does not have; or there are several models.
    """
    state = _flatten(source)
    while found := {match[0] for key in state if (match := re.match(r"(.*/)?(params|target)/", key))}:
        prefix = next((own for own in OWN if any(inner.startswith(own) for inner in found)), min(found))
        if prefix not in OWN and len(found) > 1:
            raise ValueError(f"There are several models, {sorted(found)}: give the parameters of one.")
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: _as_tensor(key, value) for key, value in state.items()}


def _flatten(tree: Mapping, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _as_tensor(name: str, value) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if not hasattr(value, "__array__"):
        raise ValueError(f"{name} is a {type(value).__name__} and no array: this is no dict of weights.")
    array = np.array(value)
    if array.dtype.name == "bfloat16":  # of ml_dtypes
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} is an array of {array.dtype}: save it as float32.")
    return torch.from_numpy(array)


def rename(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Flax parameters with the names and layouts of torch's modules; the encoders keep their own names."""
    weights = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith("_proj.bias"):
            value = value.flatten()  # (heads, features)
        elif re.search(r"[qkv]_proj\.weight$", name):
            value = value.flatten(1).t()  # (in, heads, features)
        elif name.endswith("o_proj.weight"):
            value = value.flatten(0, 1).t()  # (heads, features, out)
        elif key.endswith("/kernel") and value.dim() == 2:
            value = value.t()
        elif key.endswith("/kernel") and name.startswith("embeddings.patch"):
            value = value.movedim((-1, -2), (0, 1))
        weights[name] = value.contiguous()
    return weights


def is_factorised(state: Mapping) -> bool:
    """Whether Flax parameters are those of a ViViT-FE."""
    return any("SpatialTransformer/" in key for key in state)


def from_scenic(state: Mapping[str, torch.Tensor], name: str) -> Tower:
    """An image tower from the Flax parameters of a ViT or a MatViT.

    Raises:
        ValueError: names what is missing.
    """
    weights = rename(state)
    weights["embeddings.cls_token"] = weights.pop("cls", None)
    weights["embeddings.position_embeddings"] = weights.pop("Transformer.position_embeddings", None)
    weights = {key.removeprefix("Transformer."): value for key, value in weights.items() if value is not None}
    fields = _fields(weights, state, "", name)
    if len(fields["patch_size"]) == 3:
        raise ValueError(f"{name} has tubelets and one encoder: of ViViT's models, only ViViT-FE has a counterpart.")
    if "classifier.weight" in weights:
        fields["num_labels"] = weights["classifier.weight"].shape[0]
    fields["num_register_tokens"] = 0
    return Tower(name, fields, weights)


def vivit_from_scenic(state: Mapping[str, torch.Tensor], name: str, **config) -> MoNEViViTForVideoClassification:
    """The video MoNE that is exactly a ViViT-FE at capacity 1.0, with fresh routers.

    Its frames have values in [-1, 1].

    Args:
        state: flat Flax parameters.
        config: fields of [`MoNEViViTConfig`] to set. Another `image_size` or `num_frames` than it has positions for
            resizes these; another number of labels brings a new classifier, which starts at zero.

    Raises:
        TypeError: for a name that is no field.
        ValueError: lists the keys that are missing, have no counterpart or another shape; for a size that the
            tubelets do not divide, for no labels, or for a field that Scenic's models state otherwise.
    """
    check_fields(config, MoNEViViTConfig)
    check_labels(config)
    config = number_labels(config)
    weights = rename(state)
    for encoder in ("Spatial", "Temporal"):
        weights = {key.replace(f"{encoder}Transformer.", f"{encoder.lower()}."): v for key, v in weights.items()}
    fields = _fields(weights, state, "spatial.", name)
    check_stated(config, fields, name)
    tubelet = fields.pop("patch_size")
    times = weights.get("temporal.position_embeddings")
    if times is None or len(tubelet) != 3:
        raise ValueError(f"{name} has no temporal encoder or no tubelets: it is no ViViT-FE.")
    fields["tubelet_size"] = tubelet
    fields["num_frames"] = (times.shape[1] - (fields["pooling"] == "cls")) * tubelet[0]
    fields["num_temporal_layers"] = count_layers(weights, "temporal.")
    has_head = "classifier.weight" in weights
    if has_head:
        fields["num_labels"] = weights["classifier.weight"].shape[0]
    sizes = {key: config.pop(key) for key in ("image_size", "num_frames") if key in config}
    labels = {key: config.pop(key) for key in LABEL_FIELDS if key in config}
    model = MoNEViViTForVideoClassification._from_config(MoNEViViTConfig(**{**fields, **config}))
    weights = {k if k.startswith("classifier.") else f"mone_vivit.{k}": v for k, v in weights.items()}
    load(model, weights, ("mone_vivit.spatial.routers.", *(() if has_head else ("classifier.",))), name)
    if not has_head:
        start_new_classifier(model)
    set_labels(model, **labels)
    resize_video_model(model, **sizes)
    return model


def _fields(weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], encoder: str, name: str) -> dict:
    """Config fields that the shapes show; `patch_size` has three numbers for a ViViT."""
    needed = {
        "patches": "embeddings.patch_embeddings.projection.weight",
        "positions": f"{encoder or 'embeddings.'}position_embeddings",
        "hidden": f"{encoder}layers.0.mlp.fc1.weight",
    }
    missing = [key for key in needed.values() if key not in weights]
    heads = next((v.shape[1] for k, v in state.items() if re.search(r"encoderblock_0/\w+/query/kernel$", k)), None)
    if missing or heads is None:
        raise ValueError(
            f"{name} misses {missing or 'encoderblock_0/.../query/kernel'} of a Flax ViT; its first keys are "
            f"{list(state)[:5]}."
        )
    patches, positions, hidden = (weights[key] for key in needed.values())
    pooling = "cls" if f"{encoder or 'embeddings.'}cls_token" in weights else "mean"
    side = math.isqrt(positions.shape[1] - (pooling == "cls"))
    patch_size = tuple(patches.shape[2:])
    return {
        **FIXED,
        "hidden_size": patches.shape[0],
        "num_hidden_layers": count_layers(weights, encoder),
        "num_attention_heads": heads,
        "intermediate_size": hidden.shape[0],
        "num_channels": patches.shape[1],
        "patch_size": patch_size,
        "image_size": tuple(side * size for size in patch_size[-2:]),
        "pooling": pooling,
    }
