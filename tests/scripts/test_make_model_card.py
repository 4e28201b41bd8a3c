# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""The card script on a training's output folder, and on results alone."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import HubServer, card_problems
from huggingface_hub import ModelCard
from PIL import Image
from transformers import ViTImageProcessor
from videos import make

from mone import (
    MoNEConfig,
    MoNEForImageClassification,
    MoNEViViTConfig,
    MoNEViViTForVideoClassification,
    MoNEViViTVideoProcessor,
)


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import make_model_card as script


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
}
DETAILS = {"license": "mit", "dataset": {"name": "Noise", "type": "noise"}, "limits": "Everything."}


@pytest.fixture
def training(tmp_path):
    """What a training leaves, of an image and a video model."""
    torch.manual_seed(0)
    image = MoNEForImageClassification(MoNEConfig(**SIZES, patch_size=4))
    video = MoNEViViTForVideoClassification(
        MoNEViViTConfig(**SIZES, tubelet_size=(2, 4, 4), num_frames=4, num_temporal_layers=1)
    )
    processors = (
        ViTImageProcessor(size={"height": 32, "width": 32}),
        MoNEViViTVideoProcessor(num_frames=4, frame_sampling_rate=1, size={"shortest_edge": 32}, crop_size=32),
    )
    for name, model, processor in zip(("image", "video"), (image, video), processors, strict=True):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        measured = {"eval_capacity_0.5_accuracy": 0.25, "eval_capacity_1_accuracy": 0.5}
        (tmp_path / name / "eval_results.json").write_text(json.dumps(measured))
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    (tmp_path / "clip.mp4").write_bytes(make(8, "libx264", "mp4"))
    (tmp_path / "details.json").write_text(json.dumps(DETAILS))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "option", "source", "drawn"),
    [
        ("image", "--images", "picture.png", "routed_tokens.png"),
        ("video", "--video", "clip.mp4", "routed_video.png"),
    ],
)
def test_from_a_training(training, monkeypatch, name, option, source, drawn):
    card = training / "cards" / f"mone-{name}"
    arguments = [str(card), "--training", str(training / name), "--details", str(training / "details.json")]
    with HubServer({}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        script.main([*arguments, option, str(training / source), "--capacities", "0.5", "0.8", "--validate"])
        assert hub.requests[-1][1] == "/api/validate-yaml"
    assert {path.name for path in card.iterdir()} == {
        *("README.md", "results.json", "accuracy_against_compute.png", drawn),
    }
    text = (card / "README.md").read_text()
    assert card_problems(text) == []
    assert f"]({drawn})" in text and "at capacities 0.5, 0.8" in text and "## Limits\n\nEverything." in text
    assert [result.metric_value for result in ModelCard.load(card / "README.md").data.eval_results] == [0.25, 0.5]

    # Again, with nothing but the results: the same card.
    script.main([str(card)])
    assert (card / "README.md").read_text() == text
    # And with another caption than the script's, which stays.
    results = json.loads((card / "results.json").read_text())
    assert results["pictures"][0]["file"] == drawn and len(results["pictures"]) == 1
    results["pictures"][0]["caption"] = "My caption."
    results |= {"epochs": 77.5, "gmacs": "one video, 77 clips of it"}  # of a training before this one
    (card / "results.json").write_text(json.dumps(results))
    script.main([str(card), "--training", str(training / name)])
    text = (card / "README.md").read_text()
    assert "![My caption.]" in text and "77" not in text


def test_what_is_missing_is_named_before_anything_is_written(training):
    with pytest.raises(ValueError, match=r"lacks \['license', 'dataset'\]"):
        script.main([str(training / "card"), "--training", str(training / "image")])
    with pytest.raises(ValueError, match=r"lacks \['task', 'license', 'dataset', 'rows'\]"):
        script.main([str(training / "card")])
    assert not (training / "card").exists()


def test_a_mistake_leaves_everything_as_it_was(training):
    card = training / "card"
    whole = [str(card), "--training", str(training / "image"), "--details", str(training / "details.json")]
    for details, extra in (
        ({"pictures": [{"file": "nowhere.png", "caption": "No."}]}, []),
        ({"pictures": [{"file": "nowhere.png", "caption": "No."}]}, ["--images", str(training / "picture.png")]),
        ({"tags": "vision"}, []),
    ):
        (training / "wrong.json").write_text(json.dumps(DETAILS | details))
        for existed in (False, True):
            if existed:
                script.main(whole)
            before = {path: path.read_bytes() for path in card.glob("*")}
            with pytest.raises((FileNotFoundError, ValueError), match=r"nowhere\.png|tags="):
                script.main([*whole[:-1], str(training / "wrong.json"), *extra])
            assert card.exists() == existed
            assert {path: path.read_bytes() for path in card.glob("*")} == before
        script.main([str(card)])
        shutil.rmtree(card)
    with pytest.raises(FileNotFoundError, match="nothing"):
        script.main([*whole, "--images", str(training / "nothing.png")])
    assert not card.exists()


def test_pictures_need_a_model(training, capsys):
    with pytest.raises(SystemExit):
        script.main([str(training / "card"), "--images", "picture.png"])
    assert "need the model of --training" in capsys.readouterr().err
