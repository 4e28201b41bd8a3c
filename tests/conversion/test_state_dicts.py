# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Bare state dicts: prefixes of their keys, and what their shapes tell and do not tell."""

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTForImageClassification
from vits import PIXELS, SIZES, logits, make_vit, randomise

from mone import MoNEConfig, MoNEForImageClassification
from mone.configuration_mone import as_pair
from mone.conversion import mone_from_vit


@pytest.mark.parametrize("name", ["deit", "vit model", "dinov2", "clip", "siglip vision"])
@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone."])
def test_a_common_prefix_of_the_keys_is_left_away(name, prefix):
    weights = make_vit(name).state_dict()
    state = {f"{prefix}{key}": value for key, value in weights.items()}
    model, expected = (mone_from_vit(source, num_attention_heads=4) for source in (state, weights))
    expected = {key: value for key, value in expected.state_dict().items() if "routers." not in key}
    have = model.state_dict()
    assert expected and all(torch.equal(have[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", ["deit", "dinov2", "dinov2 with registers"])
def test_projections_without_a_bias_show_in_a_state_dict(name):
    vit = make_vit(name, SIZES | {"qkv_bias": False})
    model, expected = (mone_from_vit(source, num_attention_heads=4) for source in (vit.state_dict(), vit))
    assert model.config.qkv_bias is expected.config.qkv_bias is False
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["deit", "vit model", "dinov2", "clip", "siglip vision"])
def test_the_keys_of_a_state_dict_with_another_prefix_are_listed(name):
    state = {f"encoder_q.{key}": value for key, value in make_vit(name).state_dict().items()}
    with pytest.raises(ValueError, match=r"Missing: \[.*'embeddings\.pos.*; without counterpart: \['encoder_q\."):
        mone_from_vit(state, num_attention_heads=4)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module.model.", "module._orig_mod.backbone."])
def test_timm_weights_as_training_saves_them(tmp_path, prefix):
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=64, num_heads=1, img_size=32, num_classes=3)
    weights = {f"{prefix}{key}": value for key, value in randomise(vit).state_dict().items()}
    torch.save({"student": {}, "teacher": weights, "epoch": 3}, tmp_path / "run.pth")
    torch.testing.assert_close(logits(mone_from_vit(tmp_path / "run.pth")), vit(PIXELS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_weights_of_a_mone_without_its_config(tmp_path, pooling):
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    MoNEForImageClassification(MoNEConfig(**config, image_size=32, pooling=pooling)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mone\.embeddings\.patch_embeddings\.projection\.weight"):
        mone_from_vit(tmp_path / "model.safetensors", num_attention_heads=2)


def test_weights_alone_do_not_tell_everything(caplog):
    """Heads are guessed where all published models agree, and said; of other widths they have to be given."""
    sizes = {**SIZES, "hidden_size": 1152, "num_hidden_layers": 1, "num_attention_heads": 16}
    siglip = randomise(SiglipVisionModel(SiglipVisionConfig(**sizes)))
    with pytest.raises(ValueError, match="how many heads a width of 1152 has: give num_attention_heads"):
        mone_from_vit(siglip.state_dict())
    known = {"num_attention_heads": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    caplog.clear()
    model = mone_from_vit(siglip.state_dict(), **known)
    assert "weights only" not in caplog.text
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = siglip(pixel_values).last_hidden_state
        torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, atol=1e-4, rtol=0)
    del known["hidden_act"]
    mone_from_vit(siglip.state_dict(), **known)
    assert "has weights only, which do not show all. Taken: hidden_act=gelu_pytorch_tanh." in caplog.text


@pytest.mark.parametrize("patch_size", [(8, 8), (4, 8)])
@pytest.mark.parametrize("size", [(16, 64), (32, 16)])
def test_weights_of_oblong_images(tmp_path, patch_size, size):
    """16 patches in two rows would make a square of four rows."""
    sizes = {**SIZES, "hidden_size": 64, "num_attention_heads": 1, "image_size": size, "patch_size": patch_size}
    vit = randomise(ViTForImageClassification(ViTConfig(**sizes)))
    model = mone_from_vit(vit.state_dict(), image_size=size)
    assert as_pair(model.config.image_size) == size
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values).logits, atol=1e-5, rtol=0)


def test_positions_of_no_square_want_the_image_size():
    vit = make_vit("vit", {**SIZES, "image_size": (16, 32)})
    with pytest.raises(ValueError, match="positions for 8 patches, which are no square: give image_size"):
        mone_from_vit(vit.state_dict(), num_attention_heads=4)
