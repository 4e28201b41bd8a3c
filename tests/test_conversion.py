"""ViT -> MoNE."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from mone.conversion import mone_from_vit


def tiny_vit(**config) -> ViTForImageClassification:
    torch.manual_seed(0)
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "id2label": {0: "cat", 1: "dog", 2: "emu"},
        "label2id": {"cat": 0, "dog": 1, "emu": 2},
        "initializer_range": 0.2,
    }
    return ViTForImageClassification(ViTConfig(**{**fields, **config})).eval()


@pytest.mark.parametrize("config", [{}, {"qkv_bias": False, "hidden_act": "relu", "layer_norm_eps": 1e-3}])
def test_the_same_at_capacity_one(config):
    vit = tiny_vit(**config)
    model = mone_from_vit(vit, num_experts=3, router_layers=(1,)).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vit(pixel_values).logits
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=0)
        assert not torch.allclose(model(pixel_values, capacity=0.3).logits, expected, atol=1e-3)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    assert model.config.label2id == {"cat": 0, "dog": 1, "emu": 2}
    assert (model.config.num_experts, model.config.pooling) == (3, "cls")


def test_the_weights_are_copies_in_the_same_dtype():
    vit = tiny_vit().to(torch.bfloat16)
    model = mone_from_vit(vit)
    assert model.dtype == torch.bfloat16
    model.classifier.weight.data.zero_()
    assert vit.classifier.weight.any()


def test_a_width_that_cannot_be_nested():
    with pytest.raises(ValueError, match=r"hidden_size=36 .* 8"):
        mone_from_vit(tiny_vit(hidden_size=36))


def test_a_weight_without_counterpart_is_named():
    vit = tiny_vit()
    vit.vit.layers[0].layer_scale = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"mone\.layers\.0\.layer_scale\.weight"):
        mone_from_vit(vit)


def test_names_and_poolings_that_a_vit_does_not_have():
    with pytest.raises(TypeError, match=r"\['router_layer'\] are no fields of MoNEConfig"):
        mone_from_vit(tiny_vit(), router_layer=(1,))
    with pytest.raises(ValueError, match="pooling='mean'"):
        mone_from_vit(tiny_vit(), pooling="mean")


def test_mode_and_attention_implementation_stay():
    vit = tiny_vit()
    vit.set_attn_implementation("eager")
    model = mone_from_vit(vit)
    assert not model.training
    assert model.config._attn_implementation == "eager"
