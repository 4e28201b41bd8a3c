# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""timm's ViTs -> MoNE: the same function at capacity 1.0."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, TimmWrapperConfig
from vits import randomise

from mone import MoNEConfig, MoNEForImageClassification
from mone.conversion import fit_image_processor, load_image_processor, mone_from_vit


timm = pytest.importorskip("timm")

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
VARIANTS = {
    "plain": {},
    "mean of the patches": {"global_pool": "avg"},
    "mean, normed before": {"global_pool": "avg", "fc_norm": False},
    "no class token": {"global_pool": "avg", "class_token": False},
    "registers": {"reg_tokens": 3},
    "registers without positions": {"reg_tokens": 3, "no_embed_class": True},
    "registers alone": {"reg_tokens": 4, "class_token": False, "global_pool": "avg", "no_embed_class": True},
    "layer scale": {"init_values": 0.1, "no_embed_class": True},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": "layernorm", "qkv_bias": False},
    "no final norm": {"final_norm": False},
    "oblong": {"img_size": (32, 48), "patch_size": (8, 16)},
    "as many patches as a square": {"img_size": (16, 64)},
    "features": {"num_classes": 0},
}


def make_timm(name="vit_tiny_patch16_224", **fields):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, dynamic_img_size=True, **{**TINY, **fields}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_is_the_same_at_capacity_one(variant):
    vit = make_timm(**VARIANTS[variant])
    model = mone_from_vit(vit, router_layers=(1,))
    for size in (vit.patch_embed.img_size, (48, 64)):
        pixel_values = torch.randn(2, 3, *size)
        with torch.no_grad():
            output = model(pixel_values, interpolate_pos_encoding=True)
            output = output.logits if "logits" in output else output.pooler_output
            torch.testing.assert_close(output, vit(pixel_values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", ["head", "dino_head"])
def test_a_file_of_pretraining(tmp_path, caplog, head):
    """As DINO writes them: command line, student, and teacher with its projection."""
    vit = make_timm(num_classes=0)
    networks = {f"backbone.{key}": value for key, value in vit.state_dict().items()}
    networks |= {f"{head}.mlp.0.weight": torch.zeros(3, 64), f"{head}.last_layer.weight_v": torch.zeros(9, 3)}
    student = {f"module.{key}": torch.zeros_like(value) for key, value in networks.items()}
    file = tmp_path / "checkpoint.pth"
    torch.save({"student": student, "teacher": networks, "args": argparse.Namespace(lr=1e-3), "epoch": 3}, file)
    model = mone_from_vit(file, num_attention_heads=2)
    assert f"Left behind of {file}, since a MoNE has no such part: {head}.mlp.0.weight" in caplog.text
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).pooler_output, vit(pixel_values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"mean, normed before"}))
def test_a_state_dict_is_the_same_at_capacity_one(variant):
    vit = make_timm(**VARIANTS[variant])
    size = vit.patch_embed.img_size
    options = {"image_size": size} if size[0] != size[1] else {}
    options |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-6} if variant == "clip" else {}
    model = mone_from_vit(vit.state_dict(), num_attention_heads=2, **options)
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        output = model(pixel_values)
        output = output.logits if "logits" in output else output.pooler_output
        torch.testing.assert_close(output, vit(pixel_values), atol=1e-5, rtol=0)


def test_the_pooling_of_a_state_dict(caplog):
    """Which it does not show where the tokens are normed before."""
    vit = make_timm(global_pool="avg", fc_norm=False)
    mone_from_vit(vit.state_dict(), num_attention_heads=2)
    assert "Taken: hidden_act=gelu, layer_norm_eps=1e-06, pooling=cls, pre-norm blocks." in caplog.text
    pixel_values = torch.randn(2, 3, 32, 32)
    for pooling, global_pool, fc_norm in (("mean", "avg", False), ("cls", "token", True), ("cls", "token", False)):
        vit = make_timm(global_pool=global_pool, fc_norm=fc_norm)
        model = mone_from_vit(vit.state_dict(), num_attention_heads=2, pooling=pooling)
        with torch.no_grad():
            torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values), atol=1e-5, rtol=0)


def test_the_norms_of_clip_in_a_state_dict():
    vit = make_timm("vit_base_patch16_clip_224")
    model = mone_from_vit(vit.state_dict(), num_attention_heads=2)
    assert model.config.layer_norm_eps == vit.blocks[0].norm1.eps == 1e-5


@pytest.mark.parametrize("as_state_dict", [False, True])
def test_both_heads_of_a_distilled_deit(as_state_dict):
    vit = make_timm("deit_tiny_distilled_patch16_224")
    model = mone_from_vit(vit.state_dict() if as_state_dict else vit, num_attention_heads=2)
    assert model.config.pooling == "cls_registers"
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values), atol=1e-5, rtol=0)


def test_attention_pooling_is_left_behind(caplog):
    vit = make_timm(global_pool="map", class_token=False)
    model = mone_from_vit(vit)
    assert not isinstance(model, MoNEForImageClassification)
    assert "attn_pool.latent" in caplog.text and "head.weight" in caplog.text
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit.forward_features(pixel_values)
        torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_registers_without_positions_beside_a_class_token_with_one():
    """DINOv2's own state dicts."""
    vit = make_timm(reg_tokens=3)
    state = vit.state_dict()
    state["register_tokens"] = state.pop("reg_token")
    positions = state["pos_embed"]
    state["pos_embed"] = torch.cat([positions[:, :1], positions[:, 4:]], dim=1)
    state["mask_token"] = torch.zeros(1, 64)
    vit.pos_embed.data[:, 1:4] = 0
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output = mone_from_vit(state, num_attention_heads=2)(pixel_values).logits
        torch.testing.assert_close(output, vit(pixel_values), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_norm": True}, r"without counterpart: .*q_norm\.weight"),
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"pos_embed": "none"}, r"has no \['pos_embed'\]"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "ResPostBlock"),
        ({"act_layer": "elu"}, "activation ELU"),
        ({"mlp_layer": timm.layers.SwiGLU, "act_layer": "silu"}, r"has no \['blocks\.0\.mlp\.fc1\.weight'\]"),
    ],
)
def test_what_cannot_be_mapped(fields, message):
    with pytest.raises(ValueError, match=message):
        mone_from_vit(make_timm(**fields))


def test_a_state_dict_does_not_show_its_heads():
    state = make_timm(embed_dim=48, num_heads=3).state_dict()
    with pytest.raises(ValueError, match="width of 48 has: give num_attention_heads"):
        mone_from_vit(state)
    assert mone_from_vit(state, num_attention_heads=3).config.num_attention_heads == 3


def test_a_model_of_another_kind():
    with pytest.raises(ValueError, match="ResNet cannot become a MoNE"):
        mone_from_vit(timm.create_model("resnet10t"))


def test_relatives_of_a_vit():
    """Which lack some of its attributes."""
    hiera = timm.create_model("hiera_tiny_224", embed_dim=16)
    with pytest.raises(ValueError, match=r"Hiera cannot become a MoNE. It has blocks \['HieraBlock'\]"):
        mone_from_vit(hiera)
    sam = timm.create_model("samvit_base_patch16", depth=1, embed_dim=64, num_heads=1)
    with pytest.raises(
        ValueError, match=r"VisionTransformerSAM do not fit.* counterpart: \['layers\.0\.attn\.rel_pos_h"
    ):
        mone_from_vit(sam)


# --- image processors ----------------------------------------------------------------------------------------------

SETTINGS = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
RAMP = np.linspace(0, 255, 120 * 60 * 3).reshape(120, 60, 3).astype(np.uint8)


def load_timm_processor(folder, **settings):
    """The image processor of a timm checkpoint as the Hub has it."""
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224")
    config.pretrained_cfg = {"architecture": "vit_tiny_patch16_224", **SETTINGS, **settings}
    config.save_pretrained(folder)
    return load_image_processor(folder)


def assert_same_images(processor, folder, **settings):
    """The processor, also saved and loaded, against timm's own transform."""
    settings = {**SETTINGS, **settings}
    expected = timm.data.create_transform(**{**settings, "input_size": tuple(settings["input_size"])})
    processor.save_pretrained(folder)
    for own in (processor, AutoImageProcessor.from_pretrained(folder)):
        pixel_values = own(RAMP, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(pixel_values, expected(Image.fromarray(RAMP)), atol=0.05, rtol=0)


@pytest.mark.parametrize("crop_pct", [0.8, 1.0])  # an odd margin is halved another way, by a pixel
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_the_crop_modes_of_timm(tmp_path, crop_mode, crop_pct):
    settings = {"crop_mode": crop_mode, "crop_pct": crop_pct}
    processor = load_timm_processor(tmp_path, **settings)
    assert_same_images(processor, tmp_path / "saved", **settings)


@pytest.mark.parametrize("size", [(64, 64), (48, 24)])
def test_a_squashing_processor_for_another_size(tmp_path, size):
    settings = {"crop_mode": "squash", "crop_pct": 1.0}
    processor = load_timm_processor(tmp_path, **settings)
    processor = fit_image_processor(processor, tmp_path, MoNEConfig(image_size=size, patch_size=8))
    assert_same_images(processor, tmp_path / "saved", **settings, input_size=[3, *size])


def test_a_crop_mode_that_pads_becomes_a_crop_with_a_warning(tmp_path, caplog):
    processor = load_timm_processor(tmp_path, crop_mode="border", crop_pct=0.9)
    assert "timm's crop_mode='border' has no counterpart" in caplog.text
    assert_same_images(processor, tmp_path / "saved", crop_mode="center", crop_pct=0.9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "deit_base_distilled_patch16_224", "vit_base_patch32_clip_224"]
)
def test_the_same_at_base_size(name):
    vit = randomise(timm.create_model(name, dynamic_img_size=True))
    model = mone_from_vit(vit)
    for size in (224, 160):
        pixel_values = torch.randn(1, 3, size, size)
        with torch.no_grad():
            output = model(pixel_values, interpolate_pos_encoding=True).logits
            torch.testing.assert_close(output, vit(pixel_values), atol=1e-5, rtol=1e-5)
