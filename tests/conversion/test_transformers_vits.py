# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""ViTs of transformers -> MoNE: the same function at capacity 1.0."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BeitConfig,
    BeitModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    VideoMAEConfig,
    VideoMAEModel,
    VivitConfig,
    VivitModel,
)

from mone import MoNEForImageClassification, MoNEModel
from mone.conversion import mone_from_vit
from mone.conversion.transformers_vits import FAMILIES as KNOWN

from vits import BASE_SIZES, FAMILIES, LABELS, SIZES, dense_output, make_vit, randomise


def converted_output(model, pixel_values):
    output = model(pixel_values, interpolate_pos_encoding=True)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (24, 40), (16, 16)])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_at_capacity_one(name, size):
    vit = make_vit(name)
    model = mone_from_vit(vit, num_experts=3, router_layers=(1,))
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = dense_output(vit, pixel_values)
        torch.testing.assert_close(converted_output(model, pixel_values), expected, atol=1e-5, rtol=0)
        smaller = model(pixel_values, capacity=0.4, interpolate_pos_encoding=True)
    smaller = smaller.logits if "logits" in smaller else smaller.last_hidden_state
    assert not torch.allclose(smaller, expected, atol=1e-2)
    has_head = isinstance(model, MoNEForImageClassification)
    assert has_head == (any("classifier" in key for key in vit.state_dict()))
    if has_head:
        assert (model.config.id2label, model.config.label2id) == (LABELS["id2label"], LABELS["label2id"])


@pytest.mark.parametrize(
    "name", ["dinov2 with registers", "clip", "deit with teacher", "siglip vision", "clip vision"]
)
def test_also_through_save_and_load(tmp_path, name):
    vit = make_vit(name)
    model = mone_from_vit(vit)
    model.save_pretrained(tmp_path)
    auto = AutoModelForImageClassification if isinstance(model, MoNEForImageClassification) else AutoModel
    pixel_values = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        output = converted_output(auto.from_pretrained(tmp_path), pixel_values)
        torch.testing.assert_close(output, dense_output(vit, pixel_values), atol=1e-5, rtol=0)


def test_the_pooled_features_of_clip():
    vit = make_vit("clip vision")
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit(pixel_values).pooler_output
        torch.testing.assert_close(mone_from_vit(vit)(pixel_values).pooler_output, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_at_base_size(name):
    vit = make_vit(name, BASE_SIZES)
    model = mone_from_vit(vit)
    with torch.no_grad():
        for size in (224, 160):
            pixel_values = torch.randn(1, 3, size, size)
            if name == "mae":
                continue  # its noise in `dense_output` is for patches of 8
            expected = dense_output(vit, pixel_values)
            torch.testing.assert_close(converted_output(model, pixel_values), expected, atol=1e-5, rtol=1e-5)


def test_every_family_is_tested():
    assert {make_vit(name).config.model_type for name in FAMILIES} | {"siglip_vision_model"} == set(KNOWN)
