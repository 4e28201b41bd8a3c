# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Image MoNE -> video MoNE."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from vits import make_vit

from mone import MoNEConfig, MoNEForImageClassification, MoNEViViTForVideoClassification, MoNEViViTModel
from mone.conversion import calibrate, load_video_model, mone_from_vit, mone_vivit_from_mone, set_labels
from mone.conversion.video import resize_video_model


def image_model(alpha=0.4, **config) -> MoNEForImageClassification:
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
        router.alpha.data.fill_(alpha)
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


def test_routers_that_are_still_fresh_may_be_others():
    video = mone_vivit_from_mone(image_model(alpha=0), router_layers=(0, 1), num_experts=3, num_frames=2)
    assert [router.num_experts for router in video.mone_vivit.spatial.routers] == [3, 3]
    assert all(router.alpha.item() == 0 for router in video.mone_vivit.spatial.routers)
    assert mone_vivit_from_mone(image_model(alpha=0), router_type="random", num_frames=2).mone_vivit.spatial.routers


def test_routers_of_a_saved_model_are_kept(tmp_path):
    image_model().save_pretrained(tmp_path)
    image = MoNEForImageClassification.from_pretrained(tmp_path)
    assert image.config.router_layers == [0]  # JSON has no tuples
    video = mone_vivit_from_mone(image, router_layers=(0,), num_frames=2)
    for have, want in zip(video.mone_vivit.spatial.routers.parameters(), image.mone.routers.parameters(), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("kind", ["trained", "calibrated"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"router_layers": (0, 1)}, r"router_layers=\(0, 1\); allowed .* router_layers=\(0,\)\."),
        ({"num_experts": 3}, r"num_experts=3; allowed .* num_experts=4\."),
        ({"router_type": "random"}, r"router_type='random'; allowed .* router_type='learned'\."),
    ],
)
def test_trained_and_calibrated_routers_are_not_lost_without_a_word(kind, config, message):
    image = image_model() if kind == "trained" else image_model(alpha=0)
    if kind == "calibrated":
        calibrate(image, torch.randn(4, 3, 32, 32))
    with pytest.raises(ValueError, match=message):
        mone_vivit_from_mone(image, num_frames=2, **config)


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


@pytest.mark.parametrize(("source", "pooling"), [("cls_registers", "cls"), ("cls", "cls"), ("mean", "mean")])
def test_registers_can_be_left_behind(source, pooling):
    image = image_model(pooling=source, num_register_tokens=4)
    video = mone_vivit_from_mone(image, num_register_tokens=0, pooling=pooling, num_frames=2)
    assert torch.equal(video.mone_vivit.spatial.position_embeddings, image.mone.embeddings.position_embeddings)
    with pytest.raises(ValueError, match="needs an image model that has a class token"):
        mone_vivit_from_mone(
            image_model(pooling="mean", num_register_tokens=4), num_register_tokens=0, pooling="cls", num_frames=2
        )


def test_only_an_image_model_becomes_a_video_model():
    video = mone_vivit_from_mone(image_model(), num_frames=2)
    for model in (video, video.mone_vivit):
        with pytest.raises(TypeError, match=f"{type(model).__name__} is no image model; allowed are MoNEForImage"):
            mone_vivit_from_mone(model, num_frames=2)


def test_names_that_a_video_config_does_not_have():
    with pytest.raises(TypeError, match=r"\['num_frame'\] are no fields of MoNEViViTConfig"):
        mone_vivit_from_mone(image_model(), num_frame=2)
    with pytest.raises(TypeError, match=r"\['num_frame'\] are no fields of MoNEViViTConfig"):
        load_video_model("no/such-model", num_frame=2)


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


@pytest.fixture
def video(tmp_path):
    """A video model whose weights are all set, and a checkpoint of it in `tmp_path`."""
    model = mone_vivit_from_mone(image_model(pooling="cls"), num_frames=8, num_temporal_layers=1, num_labels=3)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    return model


def test_a_checkpoint_for_other_clips_keeps_what_it_learned(video, tmp_path):
    model = load_video_model(tmp_path, image_size=48, num_frames=12)
    assert (model.config.image_size, model.config.num_frames) == (48, 12)
    before, after = video.state_dict(), model.state_dict()
    assert {
        name for name in before if before[name].shape != after[name].shape or (before[name] != after[name]).any()
    } == {
        "mone_vivit.spatial.position_embeddings",
        "mone_vivit.temporal.position_embeddings",
    }
    expected = video.mone_vivit.spatial.interpolate_positions((6, 6))
    torch.testing.assert_close(model.mone_vivit.spatial.position_embeddings, expected)
    clips = torch.randn(2, 12, 3, 48, 48)
    logits = model(clips, capacity=0.5).logits
    # Resized once and for all: saved and loaded it is the same.
    model.save_pretrained(tmp_path / "resized")
    loaded = MoNEViViTForVideoClassification.from_pretrained(tmp_path / "resized")
    torch.testing.assert_close(loaded(clips, capacity=0.5).logits, logits)
    # Neither size changed, nothing does.
    assert all(torch.equal(value, before[name]) for name, value in load_video_model(tmp_path).state_dict().items())


def test_positions_in_time_are_interpolated_linearly(video):
    positions = video.mone_vivit.temporal.position_embeddings.detach().clone()
    video.bfloat16()
    resize_video_model(video, num_frames=4)
    assert video.mone_vivit.temporal.position_embeddings.dtype == torch.bfloat16
    halves = video.mone_vivit.temporal.position_embeddings.float()
    torch.testing.assert_close(halves[:, :1], positions[:, :1], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(halves[:, 1:], positions[:, 1:].unflatten(1, (2, 2)).mean(2), atol=1e-2, rtol=1e-2)


def test_a_size_that_is_not_allowed_changes_nothing(video):
    for sizes, message in (
        ({"image_size": 50}, "image_size=50 must be a positive multiple of patch_size"),
        ({"image_size": 48, "num_frames": 5}, r"num_frames=5 must be a positive multiple of tubelet_size\[0\]=2"),
    ):
        with pytest.raises(ValueError, match=message):
            resize_video_model(video, **sizes)
        assert (video.config.image_size, video.config.num_frames) == (32, 8)
    video(torch.randn(1, 8, 3, 32, 32))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"intermediate_size": 32}, r"fc1\.weight \(64, 32\) instead of \(32, 32\)"),
        ({"num_experts": 3}, r"routers\.0\.proj\.weight \(4, 32\) instead of \(3, 32\)"),
        ({"router_layers": (0, 1)}, r"Missing: .*routers\.1\.alpha"),
        ({"num_temporal_layers": 2}, r"temporal\.layers\.1"),
        ({"tubelet_size": (4, 8, 8), "image_size": 48}, r"projection\.weight"),
        ({"pooling": "mean"}, r"cls_token"),
    ],
)
def test_fields_that_do_not_fit_a_checkpoint(video, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        load_video_model(tmp_path, **config)


def test_other_labels(video, tmp_path):
    assert load_video_model(tmp_path, num_labels=5).classifier.weight.shape == (5, 32)
    weight = video.classifier.weight.clone()
    set_labels(video, id2label={0: "a", 1: "b", 2: "c"}, problem_type="multi_label_classification")
    assert torch.equal(video.classifier.weight, weight), "as many as before"
    assert (video.config.id2label[0], video.config.problem_type) == ("a", "multi_label_classification")
    set_labels(video, id2label={0: "c", 1: "a", 2: "b"})
    assert torch.equal(video.classifier.weight, weight[[2, 0, 1]]), "the same classes in another order"
    video.bfloat16()
    set_labels(video, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1})
    assert (video.classifier.weight.shape, video.classifier.weight.dtype) == ((2, 32), torch.bfloat16)
    assert not any(parameter.any() for parameter in video.classifier.parameters())
    assert (video.num_labels, video.config.num_labels) == (2, 2)


def test_a_video_model_without_its_classifier(video, tmp_path):
    """One that never had one gets one of zeros; one that lost it is an error."""
    MoNEViViTModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "headless")
    model = load_video_model(tmp_path / "headless")
    assert not any(parameter.any() for parameter in model.classifier.parameters())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"Missing: \['classifier\.weight'\]"):
        load_video_model(tmp_path)
