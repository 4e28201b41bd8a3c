# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Another basis of the residual stream: the same model at capacity 1.0, and what matters comes first."""

import copy

import pytest
import scipy.linalg
import torch
from torch import nn
from vits import make_vit, randomise

from mone import MoNEConfig, MoNEForImageClassification, MoNEViViTConfig, MoNEViViTForVideoClassification
from mone.conversion import mone_from_vit, mone_vivit_from_mone, order_channels
from mone.conversion.channel_order import principal_rotation, read_moments, rotate_channels


WIDTH = 32


def make_model(**fields) -> MoNEForImageClassification:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32}
    fields = {"hidden_size": WIDTH, **sizes, "patch_size": 8, "num_labels": 5, "router_layers": (0, 1), **fields}
    return randomise(MoNEForImageClassification(MoNEConfig(**fields)))


MODELS = {
    "mean": make_model,
    "class token": lambda: make_model(pooling="cls"),
    "random router": lambda: make_model(router_type="random"),
    "everything": lambda: make_model(
        pooling="cls_registers", num_register_tokens=2, final_norm="pooled", qkv_bias=False
    ),
    "cls_mean": lambda: make_model(pooling="cls_mean", final_norm="none"),
    "dinov2": lambda: mone_from_vit(make_vit("dinov2 with registers")),
    "dinov2 without a head": lambda: mone_from_vit(make_vit("dinov2 with registers model")),
}


def make_pixels(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def any_rotation() -> torch.Tensor:
    """An orthogonal matrix that maps the ones to themselves."""
    generator = torch.Generator().manual_seed(1)
    inner = torch.linalg.qr(torch.randn(WIDTH - 1, WIDTH - 1, generator=generator, dtype=torch.float64)).Q
    basis = torch.from_numpy(scipy.linalg.helmert(WIDTH).T)
    return basis @ inner @ basis.T + 1 / WIDTH


def any_permutation() -> torch.Tensor:
    return torch.eye(WIDTH)[torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("make_rotation", [any_rotation, any_permutation])
@pytest.mark.parametrize("name", MODELS)
def test_a_rotation_changes_nothing_at_capacity_one(name, make_rotation):
    model, rotation = MODELS[name](), make_rotation()
    pixel_values = make_pixels()
    norm = model.base_model.layernorm
    scale, shift = (1.0, 0.0) if name == "cls_mean" else (norm.weight.clone(), norm.bias.clone())
    with torch.no_grad():
        before = model(pixel_values, output_hidden_states=True, output_router_logits=True)
        smaller = model(pixel_values, capacity=0.4)[0]
        rotate_channels(model, rotation)
        after = model(pixel_values, output_hidden_states=True, output_router_logits=True)
        assert not torch.allclose(model(pixel_values, capacity=0.4)[0], smaller, atol=1e-3)
    if "logits" in before:
        torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=1e-5)
    else:
        rotated_back = (after.last_hidden_state.double() @ rotation.double()).float() * scale + shift
        torch.testing.assert_close(rotated_back, before.last_hidden_state, atol=1e-5, rtol=1e-5)
    for have, want in zip(after.hidden_states, before.hidden_states, strict=True):
        torch.testing.assert_close(have, (want.double() @ rotation.double().T).float(), atol=1e-5, rtol=1e-5)
    if name != "random router":
        for have, want in zip(after.router_logits, before.router_logits, strict=True):
            torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_and_at_another_image_size(tmp_path):
    model, pixel_values = make_model(qkv_bias=False), torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        expected = model(pixel_values, interpolate_pos_encoding=True).logits
        order_channels(model, make_pixels())
        model.save_pretrained(tmp_path)
        loaded = MoNEForImageClassification.from_pretrained(tmp_path)
        assert loaded.config.qkv_bias
        logits = loaded(pixel_values, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_loses_no_more_than_its_rounding():
    model, pixel_values = make_model().bfloat16(), make_pixels().bfloat16()
    with torch.no_grad():
        expected = copy.deepcopy(model).float()(pixel_values.float()).logits
        plain = model(pixel_values).logits
        order_channels(model, pixel_values)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        error = (model(pixel_values).logits - expected).abs().max()
    assert error < 4 * (plain - expected).abs().max()


@pytest.mark.parametrize(
    "rotation",
    [torch.eye(31), torch.zeros(32, 32), 2 * torch.eye(32), -torch.eye(32), torch.eye(32)[:, :31], torch.ones(32)],
)
def test_what_is_no_rotation(rotation):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="orthogonal 32x32 matrix whose rows sum to 1"):
        rotate_channels(model, rotation)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_models_whose_channels_cannot_be_mixed():
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 1}
    video = MoNEViViTForVideoClassification(
        MoNEViViTConfig(**sizes, image_size=32, tubelet_size=(2, 8, 8), num_frames=4, num_temporal_layers=1)
    )
    with pytest.raises(TypeError, match="MoNEViViTForVideoClassification is no image model"):
        order_channels(video, make_pixels())
    with pytest.raises(ValueError, match="embedding_norm=True"):
        order_channels(mone_from_vit(make_vit("clip")), make_pixels())


def test_a_video_model_of_an_ordered_image_model():
    """A rotated spatial encoder in a video model: the same tokens at capacity 1.0, rotated."""
    model = make_model()
    frames = make_pixels(4)[None]
    videos = []
    for ordered in (False, True):
        if ordered:
            rotation = order_channels(model, make_pixels())
        videos.append(mone_vivit_from_mone(model, num_frames=4, num_temporal_layers=1).eval())
    with torch.no_grad():
        before, after = (video(frames, output_hidden_states=True).hidden_states for video in videos)
    for have, want in list(zip(after, before, strict=True))[:3]:
        torch.testing.assert_close(have, (want.double() @ rotation.T).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [4, 8, 16])
def test_the_first_channels_hold_the_principal_components(kept):
    """Among all projections to k - 1 dimensions beside the mean, none leaves less than the first k channels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, WIDTH, generator=generator, dtype=torch.float64)
    x = nn.functional.layer_norm(x @ torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64), (WIDTH,))
    rotated = x @ principal_rotation(x.T @ x).T
    singular = torch.linalg.svdvals(x)
    assert rotated[:, kept:].square().sum() <= singular[kept - 1 :].square().sum() * (1 + 1e-9)
    assert rotated[:, kept:].square().sum() >= singular[kept:].square().sum()


@pytest.mark.parametrize("name", ["mean", "class token", "dinov2 without a head"])
def test_the_moments_of_what_layers_read_and_of_the_gradients(name):
    """Against gradients of a summand, one norm and one image at a time."""
    model, pixel_values, expected = MODELS[name]().eval(), make_pixels(9), [0.0, 0.0]
    prefix = model.config.num_prefix_tokens
    for norm in [
        norm for layer in model.base_model.layers for norm in (layer.layernorm_before, layer.layernorm_after)
    ]:
        for image in pixel_values:
            summand, seen = torch.zeros(1, prefix + 16, WIDTH, requires_grad=True), []

            def add(norm, args, output, summand=summand, seen=seen):
                plain = nn.functional.layer_norm(args[0], (WIDTH,), eps=norm.eps)
                seen.append(plain[0, prefix:].detach().double())
                return (plain + summand) * norm.weight + norm.bias

            hook = norm.register_forward_hook(add)
            outputs = model(image[None])
            hook.remove()
            value = outputs.logits.max() if "logits" in outputs else outputs.pooler_output.square().sum() / 2
            (gradient,) = torch.autograd.grad(value, summand)
            for number, x in enumerate((seen[0], gradient[0, prefix:].double())):
                expected[number] = expected[number] + x.T @ x
    inputs, gradients = (moment / moment.trace() for moment in expected)
    torch.testing.assert_close(read_moments(model, pixel_values), inputs + 0.3 * gradients, atol=1e-6, rtol=1e-4)


def test_small_experts_lose_less():
    """Tokens that lie in a few directions: after ordering the smallest expert has them all."""
    torch.manual_seed(0)  # with others, one time in a hundred, less than this is won
    model = make_model(num_experts=4, router_layers=(0,), initializer_range=0.02)
    with torch.no_grad():
        subspace = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(2))).Q
        project = subspace @ subspace.T
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "fc2.weight", "o_proj.bias", "fc2.bias", "projection.bias")):
                parameter.copy_(project @ parameter)
            elif name.endswith("position_embeddings"):
                parameter.copy_(parameter @ project)
            elif name.endswith("projection.weight"):
                parameter.copy_((project @ parameter.flatten(1)).view_as(parameter))
        model.mone.routers[0].alpha.zero_()
        pixel_values = make_pixels(8, seed=3)
        dense = model(pixel_values).logits
        before = (model(pixel_values, capacity=0.125).logits - dense).abs().mean()
        order_channels(model, make_pixels(8))
        after = (model(pixel_values, capacity=0.125).logits - dense).abs().mean()
        torch.testing.assert_close(model(pixel_values).logits, dense, atol=1e-5, rtol=1e-5)
    assert after < 0.25 * before
