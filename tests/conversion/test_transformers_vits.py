# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""ViTs of transformers -> MoNE: the same function at capacity 1.0."""

import re

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForImageClassification, Dinov2Config, Dinov2Model, ViTModel
from vits import BASE_SIZES, FAMILIES, LABELS, SIZES, dense_output, make_vit

from mone import MoNEForImageClassification, MoNEModel
from mone.conversion import mone_from_vit
from mone.conversion.transformers_vits import FAMILIES as KNOWN


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
            unit = max(1.0, expected.std().item())  # tokens without a final norm are large
            torch.testing.assert_close(converted_output(model, pixel_values), expected, atol=1e-5 * unit, rtol=0)


def test_every_family_is_tested():
    assert {make_vit(name).config.model_type for name in FAMILIES} == set(KNOWN)


OLD_NAMES = [
    (r"\blayers\.(\d+)\.attention\.o_proj", r"encoder.layer.\1.attention.output.dense"),
    (r"\blayers\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense"),
    (r"\blayers\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense"),
    (r"\.attention\.o_proj", ".attention.output.dense"),
    (r"^((?:\w+\.)?)layers\.", r"\1encoder.layer."),
    *((rf"\.attention\.{name[0]}_proj", f".attention.attention.{name}") for name in ("query", "key", "value")),
]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"vit", "msn", "mae", "ijepa", "ijepa model"}))
def test_a_bare_state_dict_with_names_of_either_time(name, old):
    """A state dict shows neither heads nor epsilons; those of these models are the defaults."""
    vit = make_vit(name)
    state = vit.state_dict()
    if old and not name.startswith(("clip", "siglip")):  # their names stayed
        for pattern, replacement in OLD_NAMES:
            state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
        assert any(key.endswith("layer.0.attention.attention.key.weight") for key in state)
    model = mone_from_vit(state, num_attention_heads=4)
    pixel_values = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        output = converted_output(model, pixel_values)
        torch.testing.assert_close(output, dense_output(vit, pixel_values), atol=1e-5, rtol=0)


def tiny_config(name, **fields):
    return getattr(transformers, name)(**{**SIZES, **fields})


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Beit", {}, "'beit' .* relative position"),
        ("DINOv3ViT", {}, "'dinov3_vit' .* rotary"),
        ("VideoMAE", {}, "'videomae' .* across space and time"),
        ("Vivit", {"image_size": 32}, r"'vivit' .*Model 1"),
        ("Siglip2Vision", {"num_patches": 16}, "'siglip2_vision_model' .*NaFlex"),
        ("ViTHybrid" if hasattr(transformers, "ViTHybridConfig") else "Yolos", {"image_size": [32, 32]}, "known here"),
        ("Dinov2", {"use_swiglu_ffn": True}, "SwiGLU"),
    ],
)
def test_architectures_that_cannot_be_mapped(name, fields, message):
    config = tiny_config(f"{name}Config", **fields)
    model = getattr(transformers, f"{name}Model")(config)
    with pytest.raises(ValueError, match=message):
        mone_from_vit(model)


def test_what_is_left_behind_is_said(caplog):
    mone_from_vit(make_vit("clip model"))
    assert "text_model.embeddings" in caplog.text and "visual_projection.weight" in caplog.text
    assert "vision_model" not in caplog.text


def test_keys_that_do_not_fit_are_listed():
    state = make_vit("deit").state_dict()
    del state["deit.layers.1.layernorm_after.bias"]
    state["deit.layers.0.extra"] = torch.zeros(1)
    state["deit.layers.0.mlp.fc1.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match="Missing") as error:
        mone_from_vit(state, num_attention_heads=4)
    for part in ("layers.1.layernorm_after.bias", "layers.0.extra", "layers.0.mlp.fc1.bias (3,) instead of (64,)"):
        assert part in str(error.value)


def test_a_state_dict_of_nothing_known():
    with pytest.raises(ValueError, match=r"no architecture known here .*'conv\.weight'"):
        mone_from_vit({"conv.weight": torch.zeros(1)})


# --- what may be set ---------------------------------------------------------------------------------------------


def test_the_weights_are_copies_in_the_same_dtype():
    vit = make_vit("vit").to(torch.bfloat16)
    model = mone_from_vit(vit)
    assert model.dtype == torch.bfloat16
    model.classifier.weight.data.zero_()
    assert vit.classifier.weight.any()


def test_mode_and_attention_implementation_stay():
    vit = make_vit("vit").train()
    vit.set_attn_implementation("eager")
    model = mone_from_vit(vit)
    assert model.training
    assert model.config._attn_implementation == "eager"


def test_a_width_that_cannot_be_nested():
    vit = ViTModel(tiny_config("ViTConfig", hidden_size=36))
    with pytest.raises(ValueError, match=r"hidden_size=36 .* 8"):
        mone_from_vit(vit)


def test_names_and_poolings_that_a_vit_does_not_have():
    with pytest.raises(TypeError, match=r"\['router_layer'\] are no fields of MoNEConfig"):
        mone_from_vit(make_vit("vit"), router_layer=(1,))
    with pytest.raises(ValueError, match=r"pooling='mean': the classifier of this ViTFor.* reads pooling='cls'"):
        mone_from_vit(make_vit("vit"), pooling="mean")
    with pytest.raises(ValueError, match="pooling='cls': this IJepaModel reads no class token"):
        mone_from_vit(make_vit("ijepa model"), pooling="cls")


@pytest.mark.parametrize("name", ["dinov2 model", "dinov2 with registers model"])
def test_another_pooling_leaves_the_tokens_as_they_are(name):
    vit = make_vit(name)
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = vit(pixel_values).last_hidden_state
        patches = tokens[:, -16:].mean(dim=1)
        for pooling, expected in (("mean", patches), ("cls_mean", torch.cat([tokens[:, 0], patches], dim=1))):
            output = mone_from_vit(vit, pooling=pooling)(pixel_values)
            torch.testing.assert_close(output.last_hidden_state, tokens, atol=1e-5, rtol=0)
            torch.testing.assert_close(output.pooler_output, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "cls_registers"])
def test_leading_tokens_take_the_full_model(pooling):
    """At the smallest capacity no patch has more than d features; class token and registers have all."""
    model = mone_from_vit(make_vit("dinov2 with registers model"), pooling=pooling)
    with torch.no_grad():
        states = model(torch.randn(2, 3, 32, 32), capacity=1 / 8, output_hidden_states=True).hidden_states
    changed = (states[1] - states[0]).abs().sum(0)
    assert (changed[:5] > 0).all()
    assert (changed[5:, :4] > 0).all() and not changed[5:, 4:].any()


def test_another_number_of_labels_brings_a_new_classifier():
    vit = make_vit("dinov2")
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    model = mone_from_vit(vit, pooling="mean", **names)
    assert (model.classifier.weight.shape, model.config.id2label) == ((2, 32), names["id2label"])
    same = mone_from_vit(vit, id2label={0: "x", 1: "y", 2: "z"}, label2id={"x": 0, "y": 1, "z": 2})
    assert torch.equal(same.classifier.weight, vit.classifier.weight)
    assert same.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert isinstance(mone_from_vit(make_vit("vit model"), num_labels=7), MoNEForImageClassification)
    assert type(mone_from_vit(make_vit("vit model"))) is MoNEModel


@pytest.mark.parametrize("name", ["vit", "dinov2 with registers", "siglip"])
def test_positions_can_be_resized_for_good(name):
    vit = make_vit(name)
    model = mone_from_vit(vit, image_size=(48, 24))
    pixel_values = torch.randn(2, 3, 48, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, dense_output(vit, pixel_values), atol=1e-5, rtol=0)


def test_layer_scale_is_not_lost_where_it_cannot_be_folded():
    state = Dinov2Model(Dinov2Config(**{k: v for k, v in SIZES.items() if k != "intermediate_size"})).state_dict()
    del state["encoder.layer.0.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.fc2\.bias.*layers\.0\.layer_scale2\.lambda1"):
        mone_from_vit(state, num_attention_heads=4)
