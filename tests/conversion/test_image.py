# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Sources made into an image MoNE, and its own checkpoints loaded: what is taken, kept and refused."""

import numpy as np
import pytest
import torch
from transformers import BitImageProcessor
from vits import PIXELS, change, dense_output, logits, make_vit, randomise

from mone import MoNEConfig, MoNEForImageClassification
from mone.conversion import load_image_model, load_image_model_and_processor, mone_from_vit


@pytest.mark.parametrize("source", [None, 3, MoNEConfig()])
def test_what_is_no_source(source):
    with pytest.raises(TypeError, match=rf"source is {type(source).__name__}; allowed are a model, a state dict"):
        mone_from_vit(source)


def test_a_model_without_its_values():
    vit = make_vit("vit")
    vit.vit.layers[1].to("meta")
    with pytest.raises(ValueError, match="Weights of this ViTForImageClassification are on the meta device"):
        mone_from_vit(vit)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_model(wrap):
    vit = make_vit("vit")
    torch.testing.assert_close(logits(mone_from_vit(wrap(vit))), dense_output(vit, PIXELS), atol=1e-5, rtol=0)


def test_a_quantised_model():
    vit = make_vit("vit")
    vit.register_buffer("scales", torch.zeros(1))
    vit._register_state_dict_hook(lambda module, state, *args: state.update(scales=(torch.qint8, None)))
    with pytest.raises(ValueError, match=r"values that are no tensors, \['scales'\]: convert it before quantisation"):
        mone_from_vit(vit)


def test_a_mone_is_loaded_and_not_converted(tmp_path):
    config = MoNEConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, num_labels=3
    )
    mone = randomise(MoNEForImageClassification(config))
    mone.save_pretrained(tmp_path)
    assert torch.equal(logits(load_image_model(tmp_path)), logits(mone))
    assert load_image_model(tmp_path, num_labels=4).classifier.weight.shape == (4, 32)
    with pytest.raises(ValueError, match="'mone' model cannot become a MoNE: it is one"):
        mone_from_vit(tmp_path)
    change(tmp_path, lambda weights: weights.pop("mone.layers.0.mlp.fc2.bias"))
    with pytest.raises(ValueError, match=r"Weights missing: mone\.layers\.0\.mlp\.fc2\.bias"):
        load_image_model(tmp_path)


def test_a_misspelt_field_is_found_before_weights_are_read(folder):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(TypeError, match="nmu_experts"):
        mone_from_vit(folder, nmu_experts=3)


def test_trained_routers_stay_in_their_layers(tmp_path):
    config = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    mone = MoNEForImageClassification(MoNEConfig(**config, image_size=32, router_layers=(0, 1)))
    mone.save_pretrained(tmp_path)
    model = load_image_model(tmp_path, router_layers=(0, 2))  # new routers may move
    assert tuple(model.config.router_layers) == (0, 2)
    mone.mone.routers[1].alpha.data.fill_(0.3)
    mone.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"router_layers=\(0, 2\): the routers .* were trained in layers \(0, 1\)"):
        load_image_model(tmp_path, router_layers=(0, 2))
    assert load_image_model(tmp_path, router_layers=[0, 1]).mone.routers[1].alpha.item() == pytest.approx(0.3)


@pytest.mark.parametrize("size", [32, 48, (24, 40)])
def test_a_mone_for_another_image_size(tmp_path, size):
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    mone = randomise(MoNEForImageClassification(MoNEConfig(**config, image_size=32, patch_size=8, pooling="cls")))
    mone.save_pretrained(tmp_path / "mone")
    model = load_image_model(tmp_path / "mone", image_size=size)
    assert model.config.image_size == size
    height, width = size if isinstance(size, tuple) else (size, size)
    pixel_values = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "resized")
    with torch.no_grad():
        expected = mone(pixel_values, capacity=0.5, interpolate_pos_encoding=True).logits
        for resized in (model, MoNEForImageClassification.from_pretrained(tmp_path / "resized")):
            torch.testing.assert_close(resized(pixel_values, capacity=0.5).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="image_size=36"):
        load_image_model(tmp_path / "mone", image_size=36)


def test_model_and_processor_get_one_size(tmp_path):
    """As DINOv2's: positions for larger images than the processor makes."""
    vit = make_vit("dinov2")
    vit.save_pretrained(tmp_path)
    processor = BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    model, loaded = load_image_model_and_processor(tmp_path)
    assert model.config.image_size == (24, 24)
    pixel_values = loaded(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values, processor(image, return_tensors="pt").pixel_values)
    with torch.no_grad():
        expected = dense_output(vit, pixel_values)
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=0)

    model, loaded = load_image_model_and_processor(tmp_path, image_size=48)
    assert (dict(loaded.crop_size)["height"], dict(loaded.size)["shortest_edge"]) == (48, 56)
    pixel_values = loaded(image, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 48, 48)
    assert list(loaded.image_mean) == [0.1, 0.2, 0.3]
