# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Image processors of a source: found, fitted to the model, or new."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import BitImageProcessor, CLIPImageProcessor, ConvNextImageProcessor, ViTImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from vits import make_vit

from mone import MoNEConfig, MoNEViViTConfig
from mone.conversion import (
    fit_image_processor,
    load_image_model_and_processor,
    load_image_processor,
    make_video_processor,
    processors,
)


def test_a_source_without_a_processor_gets_one_and_says_so(folder, caplog):
    model, processor = load_image_model_and_processor(folder)
    assert model.config.image_size == 32
    assert "has no image processor" in caplog.text
    image = np.zeros((40, 30, 3), dtype=np.uint8)
    assert processor(image, return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


def test_a_processor_that_is_cut_short_is_no_missing_one(folder):
    BitImageProcessor().save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(file.read_text()[:40])
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(OSError, match=r"processor of .*deit.* cannot be loaded: .*preprocessor_config\.json"):
            load_image_processor(source)
    file.write_text(json.dumps({"image_processor_type": "PerceptronImageProcessor"}))
    with pytest.raises(OSError, match=r"image processor of .*deit cannot be loaded: .*image.processor"):
        load_image_processor(folder)


def test_a_processor_inside_the_config_of_another(folder):
    """As transformers 5 saves that of CLIP with its tokeniser; a config without one is no image processor."""
    file = folder / "processor_config.json"
    file.write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert load_image_processor(folder) is None
    file.write_text(json.dumps({"image_processor": BitImageProcessor(image_mean=[0.1, 0.2, 0.3]).to_dict()}))
    assert list(load_image_processor(folder).image_mean) == [0.1, 0.2, 0.3]


@pytest.fixture
def hub(monkeypatch):
    """Lets the Hub answer with an error for every file."""

    def answer(error):
        def hf_hub_download(*args, **kwargs):
            raise error

        monkeypatch.setattr(processors, "hf_hub_download", hf_hub_download)

    return answer


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("no connection"), OSError("503 Server Error"), ValueError("no id")]
)
def test_a_processor_that_cannot_be_fetched_is_no_missing_one(hub, monkeypatch, error):
    hub(error)
    monkeypatch.setattr(processors, "is_offline_mode", lambda: False)
    with pytest.raises(OSError, match=rf"The image processor of some/vit cannot be loaded: {error}"):
        load_image_processor("some/vit", revision="main")


def test_a_processor_that_the_hub_does_not_have(hub):
    hub(EntryNotFoundError("404"))
    assert load_image_processor("some/vit") is None


def test_a_processor_that_is_not_cached_counts_as_missing_offline(hub, monkeypatch):
    hub(LocalEntryNotFoundError("not cached"))
    monkeypatch.setattr(processors, "is_offline_mode", lambda: True)
    assert load_image_processor("some/vit") is None


def test_a_video_processor_normalises_as_the_new_image_processor(caplog):
    config = MoNEViViTConfig(image_size=32)
    processor = make_video_processor(config, fit_image_processor(None, "dinov2.onnx", config))
    assert list(processor.image_mean) == list(IMAGENET_DEFAULT_MEAN)
    assert list(processor.image_std) == list(IMAGENET_DEFAULT_STD)
    assert "dinov2.onnx has no image processor" in caplog.text


@pytest.mark.parametrize(
    ("settings", "black", "white"),
    [
        ({"do_normalize": False}, 0, 1),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]}, -1, 1),
        ({"do_rescale": False, "do_normalize": False}, 0, 255),
    ],
)
def test_a_video_processor_scales_pixels_as_the_image_processor(settings, black, white):
    processor = make_video_processor(MoNEViViTConfig(image_size=32), ViTImageProcessor(**settings))
    for value, expected in ((0, black), (255, white)):
        pixels = processor(np.full((32, 40, 40, 3), value, np.uint8), return_tensors="pt").pixel_values
        assert torch.allclose(pixels.float(), torch.tensor(float(expected)), atol=1e-5)


def test_the_processor_of_clip(tmp_path):
    make_vit("clip model").save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    model, processor = load_image_model_and_processor(tmp_path)
    assert processor(np.zeros((40, 30, 3), np.uint8), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    assert type(processor).__name__.startswith("CLIPImageProcessor")
    assert model.config.image_size == (32, 32)


def test_a_processor_that_does_not_resize_leaves_the_size_to_the_model(tmp_path):
    """As for small images: its default size of 224 means nothing."""
    vit = make_vit("vit")
    vit.save_pretrained(tmp_path)
    ViTImageProcessor(do_resize=False).save_pretrained(tmp_path)
    model, processor = load_image_model_and_processor(tmp_path)
    assert model.config.image_size == 32
    pixel_values = processor(np.zeros((32, 32, 3), np.uint8), return_tensors="pt").pixel_values
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values).logits, atol=1e-5, rtol=0)


def test_a_processor_that_takes_no_height_and_width_gives_way_to_a_new_one(tmp_path, caplog):
    make_vit("vit").save_pretrained(tmp_path)
    ConvNextImageProcessor(size={"shortest_edge": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    _, processor = load_image_model_and_processor(tmp_path)
    assert "a ConvNextImageProcessor, cannot make images of 32x32" in caplog.text
    assert "squashed" not in caplog.text
    assert processor(np.zeros((50, 40, 3), np.uint8), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]


def test_a_crop_with_one_edge_is_square(tmp_path):
    make_vit("vit").save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 20}, "crop_size": {"shortest_edge": 16}}
    CLIPImageProcessor(**size).save_pretrained(tmp_path)
    model, processor = load_image_model_and_processor(tmp_path)
    assert model.config.image_size == (16, 16) and dict(processor.size)["shortest_edge"] == 20
    assert processor(np.zeros((50, 40, 3), np.uint8), return_tensors="pt").pixel_values.shape == (1, 3, 16, 16)


def test_images_that_are_squashed_now(tmp_path, caplog):
    make_vit("vit").save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 40}, do_center_crop=False).save_pretrained(tmp_path)
    _, processor = load_image_model_and_processor(tmp_path)
    assert "resizes images to {'shortest_edge': 40}, in which they keep their shape" in caplog.text
    assert processor(np.zeros((50, 40, 3), np.uint8), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("channels", [1, 5])
def test_a_processor_for_other_channels_than_three_is_kept(channels, caplog):
    config = MoNEConfig(image_size=32, num_channels=channels)
    mean = [0.5] * channels
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size=32, image_mean=mean, image_std=mean)
    assert fit_image_processor(processor, "a ViT", config) is processor and not caplog.text
