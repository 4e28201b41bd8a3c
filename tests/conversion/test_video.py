# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Image MoNE -> video MoNE."""

import pytest
import torch
from vits import make_vit

from mone import MoNEConfig, MoNEForImageClassification, MoNEViViTForVideoClassification
from mone.conversion import mone_from_vit, mone_vivit_from_mone


def image_model(**config) -> MoNEForImageClassification:
    torch.manual_seed(1)
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
        "num_labels": 5,
        "initializer_range": 0.2,
        "layer_norm_eps": 1e-6,
    }
    model = MoNEForImageClassification(MoNEConfig(**{**fields, **config})).eval()
    for router in model.mone.routers:
        router.alpha.data.fill_(0.4)
    return model


@pytest.mark.parametrize(("source", "pooling"), [("mean", "mean"), ("cls", "cls"), ("cls", "mean")])
@pytest.mark.parametrize("time", [1, 2, 3])
def test_the_spatial_encoder_is_the_image_model_on_central_frames(source, pooling, time):
    image = image_model(pooling=source)
    video = mone_vivit_from_mone(
        image, tubelet_size=(time, 8, 8), num_frames=2 * time, num_temporal_layers=1, num_labels=7, pooling=pooling
    )
    assert isinstance(video, MoNEViViTForVideoClassification) and not video.training
    frames = torch.randn(3, 2 * time, 3, 32, 32)
    central = frames[:, time // 2 :: time]  # (3, 2, ...)
    with torch.no_grad():
        logits = video(frames, capacity=0.4).logits
        assert torch.equal(logits, torch.zeros(3, 7)), "the head starts at zero"
        states = video(frames, capacity=0.4, output_hidden_states=True).hidden_states
        if source == pooling:
            expected = image(central.flatten(0, 1), capacity=0.4, output_hidden_states=True).hidden_states
            for have, want in zip(states, expected, strict=True):
                torch.testing.assert_close(have.flatten(0, 1), want, atol=1e-5, rtol=0)
        else:
            embedded = image.mone.embeddings(central.flatten(0, 1), (4, 4))[:, 1:]
            torch.testing.assert_close(states[0].flatten(0, 1), embedded, atol=1e-5, rtol=0)


def test_frames_of_another_size_get_resized_positions():
    image = image_model()
    video = mone_vivit_from_mone(image, image_size=(48, 32), num_frames=2)
    with torch.no_grad():
        frame = torch.randn(1, 3, 48, 32)
        states = video(frame[:, None].expand(-1, 2, -1, -1, -1), output_hidden_states=True).hidden_states
        expected = image(frame, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[-1][:, 0], expected[-1], atol=1e-5, rtol=0)


def test_other_routers_are_new_and_the_rest_still_fits():
    video = mone_vivit_from_mone(image_model(), router_layers=(0, 1), num_experts=3, num_frames=2)
    assert [router.num_experts for router in video.mone_vivit.spatial.routers] == [3, 3]
    assert all(router.alpha.item() == 0 for router in video.mone_vivit.spatial.routers)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 3}, r"spatial\.layers\.2"),
        ({"num_hidden_layers": 1}, r"spatial\.layers\.1"),
        ({"intermediate_size": 128}, r"fc1\.weight.*128"),
        ({"tubelet_size": (2, 16, 16)}, r"projection\.weight.*16, 16"),
        ({"num_channels": 1}, r"projection\.weight"),
        ({"pooling": "cls"}, "class token"),
    ],
)
def test_an_image_model_that_does_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        mone_vivit_from_mone(image_model(), num_frames=2, **config)


def test_names_that_a_video_config_does_not_have():
    with pytest.raises(TypeError, match=r"\['num_frame'\] are no fields of MoNEViViTConfig"):
        mone_vivit_from_mone(image_model(), num_frame=2)


def test_an_image_model_without_a_head():
    image = mone_from_vit(make_vit("dinov2 model"))
    video = mone_vivit_from_mone(image, num_frames=4, num_labels=3)
    assert torch.equal(video.mone_vivit.spatial.layers[1].mlp.fc2.weight, image.layers[1].mlp.fc2.weight)
    assert (video.config.num_labels, video.config.pooling) == (3, "cls")


@pytest.mark.parametrize(
    ("name", "message"),
    [("dinov2 with registers", "num_register_tokens"), ("clip vision", "embedding_norm"), ("dinov2", "cls_mean")],
)
def test_parts_that_the_video_model_lacks(name, message):
    with pytest.raises(ValueError, match=f"The video model has no .*{message}"):
        mone_vivit_from_mone(mone_from_vit(make_vit(name)), num_frames=2)
