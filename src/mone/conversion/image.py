# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Any plain pre-norm ViT -> image MoNE."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..modeling_mone import MoNEForImageClassification, MoNEModel
from .onnx_dinov2 import read_onnx
from .state_dicts import infer_config
from .tower import Tower, build_image_model
from .transformers_vits import from_transformers


def mone_from_vit(
    source: PreTrainedModel | Mapping[str, torch.Tensor] | str | Path, **config
) -> MoNEForImageClassification | MoNEModel:
    model = source if isinstance(source, torch.nn.Module) else None
    attn_implementation = model.config._attn_implementation if isinstance(model, PreTrainedModel) else None
    mone = build_image_model(read_tower(source, config), attn_implementation, **config)
    return mone.eval() if model is None else mone.to(next(model.parameters()).device).train(model.training)


def read_tower(source, config: Mapping) -> Tower:
    if isinstance(source, PreTrainedModel):
        return from_transformers(source.config, source.state_dict(), type(source).__name__)
    if isinstance(source, (str, Path)):
        return from_state_dict(read_onnx(source), config, str(source))
    return from_state_dict(source, config, "the state dict")


def from_state_dict(state: Mapping[str, torch.Tensor], config: Mapping, name: str) -> Tower:
    return from_transformers(infer_config(state, config.get("num_attention_heads")), state, name)
