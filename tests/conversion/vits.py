# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Small ViTs of every family for the conversion tests, every parameter of them random."""

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    IJepaConfig,
    IJepaForImageClassification,
    IJepaModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
BASE_SIZES = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "emu"}, "label2id": {"cat": 0, "dog": 1, "emu": 2}}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 99,
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
# Name: model class, config class, other fields.
FAMILIES = {
    "vit": (ViTForImageClassification, ViTConfig, {"qkv_bias": False, "hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "vit model": (ViTModel, ViTConfig, {}),
    "deit": (DeiTForImageClassification, DeiTConfig, {}),
    "deit model": (DeiTModel, DeiTConfig, {}),
    "deit with teacher": (DeiTForImageClassificationWithTeacher, DeiTConfig, {}),
    "msn": (ViTMSNForImageClassification, ViTMSNConfig, {}),
    "mae": (ViTMAEModel, ViTMAEConfig, {"mask_ratio": 0.0}),
    "ijepa": (IJepaForImageClassification, IJepaConfig, {}),
    "ijepa model": (IJepaModel, IJepaConfig, {}),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config, {"mlp_ratio": 2}),
    "dinov2 model": (Dinov2Model, Dinov2Config, {}),
    "dinov2 with registers": (
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig,
        {"num_register_tokens": 3},
    ),
    "dinov2 with registers model": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {}),
    "clip": (CLIPForImageClassification, CLIPConfig, {}),
    "clip vision": (CLIPVisionModel, CLIPVisionConfig, {}),
    "clip vision with projection": (CLIPVisionModelWithProjection, CLIPVisionConfig, {}),
    "clip model": (CLIPModel, CLIPConfig, {}),
    "siglip": (SiglipForImageClassification, SiglipConfig, {}),
    "siglip vision": (SiglipVisionModel, SiglipVisionConfig, {}),
}

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter random: a zero or one hides a part that is not converted."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_vit(name: str, sizes: dict = SIZES) -> PreTrainedModel:
    model_class, config_class, fields = FAMILIES[name]
    if config_class in (Dinov2Config, Dinov2WithRegistersConfig):
        sizes = {key: value for key, value in sizes.items() if key != "intermediate_size"}
    if config_class in (CLIPConfig, SiglipConfig):
        config = config_class(vision_config=dict(sizes), text_config=TEXT, **LABELS)
    else:
        config = config_class(**{**sizes, **fields, **LABELS})
    return randomise(model_class(config))


def dense_output(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """What a converted model is to return: logits, or the pooled features, or the tokens where nothing is pooled."""
    tower = model.vision_model if isinstance(model, (CLIPModel, CLIPVisionModelWithProjection)) else model
    # DINOv2 always interpolates, and the classifiers of CLIP do not pass the option on.
    option = {} if "inov2" in type(model).__name__ else {"interpolate_pos_encoding": True}
    if isinstance(model, CLIPForImageClassification):
        states = model.vision_model(pixel_values, **option).last_hidden_state
        return model.classifier(states[:, 1:].mean(dim=1))
    if isinstance(model, ViTMAEModel):
        order = torch.arange(1000.0)[: (pixel_values.shape[2] // 8) * (pixel_values.shape[3] // 8)]
        option["noise"] = order.expand(len(pixel_values), -1)
    output = tower(pixel_values, **option)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def logits(model):
    with torch.no_grad():
        return model(PIXELS).logits


def change(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
