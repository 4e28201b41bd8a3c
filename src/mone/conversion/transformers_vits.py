# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""The ViTs of transformers as towers: names of config fields and state-dict keys of each `model_type`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from ..configuration_mone import MoNEConfig
from .folding import cls_token_to_register, fold_layer_scale, join_heads, num_registers, token_to_register
from .tower import LABEL_FIELDS, Tower


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` differ from ViT.

    Args:
        prefix: of the keys of the tower in models that hold more than it.
        head_pooling: what the classifier of `...ForImageClassification` reads.
        fields: of [`MoNEConfig`] that all its models have.
        head_fields: the same, for models with a classifier.
        vision_config: whether the tower's config is the `vision_config` of the model's.
        patch_bias: whether the patch embedding has a bias.
    """

    prefix: str
    head_pooling: str = "cls"
    fields: dict = field(default_factory=dict)
    head_fields: dict = field(default_factory=dict)
    vision_config: bool = False
    patch_bias: bool = True


CLIP = {
    "fields": {"embedding_norm": True, "final_norm": "pooled"},
    "patch_bias": False,
    # The classifier reads the mean of the patch tokens as the last layer leaves them.
    "head_pooling": "mean",
    "head_fields": {"final_norm": "none"},
}
FAMILIES = {
    "vit": Family("vit."),
    "deit": Family("deit."),
    "vit_msn": Family("vit."),
    "vit_mae": Family("vit."),
    "ijepa": Family("ijepa.", head_pooling="mean"),
    "dinov2": Family("dinov2.", head_pooling="cls_mean"),
    "dinov2_with_registers": Family(
        "dinov2_with_registers.", head_pooling="cls_mean", fields={"position_antialias": True}
    ),
    "clip": Family("vision_model.", vision_config=True, **CLIP),
    "clip_vision_model": Family("vision_model.", **CLIP),
    "siglip": Family("vision_model.", head_pooling="mean", vision_config=True),
    "siglip_vision_model": Family("vision_model.", head_pooling="mean"),
}

NOT_MAPPED = {
    "beit": "its attention has relative position biases",
    "data2vec-vision": "its attention has relative position biases",
    "dinov3_vit": "its positions are rotary, inside the attention",
    "siglip2": "its images are patched beforehand and differ in shape (NaFlex). The checkpoints of SigLIP 2 with a "
    "fixed resolution are of type 'siglip', and can be converted",
    "siglip2_vision_model": "its images are patched beforehand and differ in shape (NaFlex)",
    "swin": "its attention works in windows, and its width grows",
    "mone": "it is one",
    "mone_vivit": "it is one, for video",
    "videomae": "its tokens attend to one another across space and time, and MoNE's video model is factorised",
    "vivit": "its tokens attend to one another across space and time (Model 1 of the ViViT paper), and MoNE's video "
    "model is the factorised Model 2",
}

# Both what transformers 5 calls the weights and what earlier versions did, as files have them.
RENAMES = [
    (r"^encoder\.layers?\.", "layers."),
    (r"\.attention\.attention\.", ".attention."),
    (r"\.self_attn\.", ".attention."),
    (r"\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.(output\.dense|out_proj)\.", ".attention.o_proj."),
    (r"^(layers\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^(layers\.\d+)\.(norm|layer_norm)1\.", r"\1.layernorm_before."),
    (r"^(layers\.\d+)\.(norm|layer_norm)2\.", r"\1.layernorm_after."),
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^embeddings\.position_embedding\.weight$", "embeddings.position_embeddings"),
    (r"^pre_layrnorm\.", "embeddings.norm."),
    (r"^post_layernorm\.", "layernorm."),
]
# Poolers, masks and decoders of pretraining, attention pooling, text towers.
LEFT = re.compile(
    r"pooler\.|embeddings\.(mask_token|position_ids)$|decoder\.|head\.|text_model\.|logit_(scale|bias)$|"
    r"(visual|text)_projection\."
)


def check_family(config: PreTrainedConfig) -> None:
    """Raise ValueError for the config of an architecture that cannot be mapped, and say why."""
    kind = config.model_type
    if kind not in FAMILIES and kind != "timm_wrapper":
        why = NOT_MAPPED.get(kind, "it is not among the plain pre-norm ViTs known here")
        raise ValueError(f"A {kind!r} model cannot become a MoNE: {why}. Allowed are {sorted(FAMILIES)}, and timm's.")
    if getattr(config, "use_swiglu_ffn", False):
        raise ValueError(f"This {kind!r} model cannot become a MoNE: its MLPs are gated (SwiGLU).")


def from_transformers(config: PreTrainedConfig, state: Mapping[str, torch.Tensor], name: str) -> Tower:
    """A tower from the config and the state dict of a ViT of transformers.

    Raises:
        ValueError: names an architecture that cannot be mapped and says why.
    """
    check_family(config)
    kind = config.model_type
    family = FAMILIES[kind]
    tower = getattr(config, "vision_config", config) if family.vision_config else config

    weights, left = {}, []
    for key, value in state.items():
        target = key.removeprefix(family.prefix)
        if LEFT.match(target):
            left.append(key)
            continue
        for pattern, replacement in RENAMES:
            target = re.sub(pattern, replacement, target)
        weights[target] = value
    _reshape_embeddings(weights, family.patch_bias)
    fold_layer_scale(weights, "layer_scale1.lambda1", "layer_scale2.lambda1")

    fields = {**_fields(tower), **family.fields, "pooling": "cls" if "embeddings.cls_token" in weights else "mean"}
    if kind == "deit" and {"embeddings.distillation_token", "embeddings.position_embeddings"} <= set(weights):
        token_to_register(weights, "embeddings.distillation_token", 1)
    if any("classifier." in key for key in weights):
        fields.update({key: getattr(config, key) for key in LABEL_FIELDS if key != "num_labels"})
        fields.update(family.head_fields)
        if family.head_fields.get("final_norm") == "none":
            left += [key for key in state if key.startswith(f"{family.prefix}post_layernorm.")]
            weights = {key: value for key, value in weights.items() if not key.startswith("layernorm.")}
        pooling = family.head_pooling
        if "distillation_classifier.weight" in weights:
            join_heads(weights, "cls_classifier", "distillation_classifier")
            pooling = "cls_registers"
        if pooling == "mean" and fields["pooling"] == "cls":
            cls_token_to_register(weights)
        fields["pooling"] = pooling
    fields["num_register_tokens"] = num_registers(weights)
    return Tower(name, fields, weights, left)


def _fields(config: PreTrainedConfig) -> dict:
    """Fields of [`MoNEConfig`] from those of a ViT's config, most of the same name."""
    fields = {key: getattr(config, key) for key in MoNEConfig.__annotations__ if hasattr(config, key)}
    if hasattr(config, "mlp_ratio") and not hasattr(config, "intermediate_size"):
        fields["intermediate_size"] = int(config.hidden_size * config.mlp_ratio)
    if hasattr(config, "attention_dropout"):
        fields["attention_probs_dropout_prob"] = config.attention_dropout
    return fields


def _reshape_embeddings(weights: dict[str, torch.Tensor], patch_bias: bool) -> None:
    """Give class token and positions three axes, and a patch embedding without a bias one of 0."""
    for key in ("embeddings.cls_token", "embeddings.position_embeddings"):
        if key in weights:
            weights[key] = weights[key][(None,) * (3 - weights[key].dim())]
    patches = weights.get("embeddings.patch_embeddings.projection.weight")
    if patches is not None and not patch_bias:
        weights["embeddings.patch_embeddings.projection.bias"] = patches.new_zeros(patches.shape[0])
