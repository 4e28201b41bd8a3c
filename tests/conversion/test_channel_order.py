# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Channels in another order: the same model at capacity 1.0, and the important ones first."""

import pytest
import torch
from vits import make_vit, randomise

from mone import MoNEConfig, MoNEForImageClassification, MoNEViViTConfig, MoNEViViTForVideoClassification
from mone.conversion import mone_from_vit, order_channels
from mone.conversion.channel_order import permute_channels


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
}


def make_model(**fields) -> MoNEForImageClassification:
    config = MoNEConfig(**{**SIZES, "patch_size": 8, "num_labels": 5, "router_layers": (0, 1), **fields})
    return randomise(MoNEForImageClassification(config))


def make_video(**fields) -> MoNEViViTForVideoClassification:
    config = MoNEViViTConfig(
        **{**SIZES, "tubelet_size": (2, 8, 8), "num_frames": 4, "num_temporal_layers": 1, "num_labels": 5, **fields}
    )
    return randomise(MoNEViViTForVideoClassification(config))


MODELS = {
    "mean": make_model,
    "class token": lambda: make_model(pooling="cls"),
    "random router": lambda: make_model(router_type="random"),
    "everything": lambda: make_model(
        pooling="cls_registers", num_register_tokens=2, embedding_norm=True, final_norm="pooled", qkv_bias=False
    ),
    "cls_mean": lambda: make_model(pooling="cls_mean", final_norm="none"),
    "video": lambda: make_video(pooling="cls"),
    "clip": lambda: mone_from_vit(make_vit("clip")),
    "dinov2 without a head": lambda: mone_from_vit(make_vit("dinov2 with registers model")),
}


def make_pixels(model):
    frames = (4,) if isinstance(model, MoNEViViTForVideoClassification) else ()
    return torch.randn(3, *frames, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_a_permutation_changes_nothing_at_capacity_one(name):
    model = MODELS[name]()
    pixel_values = make_pixels(model)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(pixel_values, output_hidden_states=True, output_router_logits=True)
        smaller = model(pixel_values, capacity=0.4)[0]
        permute_channels(model, order)
        after = model(pixel_values, output_hidden_states=True, output_router_logits=True)
        assert not torch.allclose(model(pixel_values, capacity=0.4)[0], smaller, atol=1e-3)
    if "logits" in before:
        torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=0)
    for have, want in zip(after.hidden_states, before.hidden_states, strict=True):
        torch.testing.assert_close(have, want[..., order], atol=1e-5, rtol=0)
    if name != "random router":
        for have, want in zip(after.router_logits, before.router_logits, strict=True):
            torch.testing.assert_close(have, want, atol=1e-5, rtol=0)


def test_back_again_is_the_model_itself():
    model = make_model(pooling="cls_mean", num_register_tokens=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    order = torch.randperm(32)
    permute_channels(model, order)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    permute_channels(model, order.argsort())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("order", [torch.arange(31), torch.arange(33), torch.zeros(32, dtype=torch.long)])
def test_what_is_no_permutation(order):
    with pytest.raises(ValueError, match="permutation of the channels 0 to 31"):
        permute_channels(make_model(), order)


@pytest.mark.parametrize("make", [make_model, make_video])
def test_the_channels_that_are_written_most_come_first(make):
    """By weights and by what these do to inputs; a constant, however large, tells nothing of the input."""
    important = [5, 17, 30, 8]
    for by_data in (False, True):
        model = make()
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "fc2.weight")):
                parameter.data[important] *= torch.tensor([[20.0], [15.0], [10.0], [5.0]])
            if name.endswith(("o_proj.bias", "fc2.bias")):
                parameter.data[3] = 1000.0
        pixel_values = make_pixels(model)
        model.train()
        with torch.no_grad():
            expected = model.eval()(pixel_values).logits
            model.train()
        order = order_channels(model, pixel_values if by_data else None)
        assert order[:4].tolist() == important
        assert model.training
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(pixel_values).logits, expected, atol=1e-4, rtol=1e-4)
