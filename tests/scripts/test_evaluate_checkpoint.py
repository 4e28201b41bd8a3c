# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Evaluation of a saved model as a user runs it, images and videos."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List
from PIL import Image as PILImage
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from mone import (
    MoNEConfig,
    MoNEForImageClassification,
    MoNEViViTConfig,
    MoNEViViTForVideoClassification,
    MoNEViViTVideoProcessor,
    count_macs,
)
from mone.model_card import make_model_card
from mone.video_encoding import write_video


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import evaluate_checkpoint as script  # noqa: E402


QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu"]
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "initializer_range": 0.5,
    "id2label": {0: "a", 1: "b", 2: "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
}


def picture(seed: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    MoNEForImageClassification(MoNEConfig(**TINY, patch_size=4)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(12):
        path = root / "abc"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        picture(number).save(path)
    return root


def test_images_as_a_process_into_json_plot_and_card(tmp_path, image_model, image_folder):
    options = [
        *("--model_name_or_path", str(image_model), "--validation_dir", str(image_folder), "--calibration"),
        *("--eval_capacities", "0.2", "1.0", "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path)),
    ]
    command = [sys.executable, str(ROOT / "scripts" / "evaluate_checkpoint.py"), *options, *QUIET]
    subprocess.run(command, check=True, capture_output=True, text=True)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    model = MoNEForImageClassification.from_pretrained(image_model)
    processor = ViTImageProcessor.from_pretrained(image_model)
    pixel_values = processor(images=[picture(number) for number in range(12)], return_tensors="pt").pixel_values
    labels = torch.arange(12) % 3
    for row, capacity in zip(results["rows"], (0.2, 1.0), strict=True):
        with torch.no_grad():
            logits = model(pixel_values, capacity=capacity).logits
        assert row["capacity"] == capacity
        assert row["accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
        assert row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)
        assert row["gmacs"] == count_macs(model.config, capacity) / 1e9
        assert 0 <= row["calibration_error"] <= 1
    assert results["dataset"]["size"] == 12
    assert (tmp_path / "out" / "accuracy_against_compute.png").stat().st_size > 0
    assert "| 0.2 |" in str(make_model_card("card", {**results, "license": "apache-2.0"}))


def test_a_vit_is_not_called_a_trained_mone(tmp_path, image_folder, caplog):
    ViTForImageClassification(ViTConfig(**TINY, patch_size=4)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    results = script.main(
        [
            *("--model_name_or_path", str(tmp_path / "vit"), "--validation_dir", str(image_folder)),
            *("--eval_capacities", "0.5", "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path), *QUIET),
        ]
    )
    assert results["rows"][0]["model"] == "MoNE, converted and not trained"
    assert "vit is no MoNE and is converted: below capacity 1.0, nothing of it has been trained." in caplog.text


def test_several_labels(tmp_path, image_model):
    features = Features({"image": Image(), "label": List(ClassLabel(names=["a", "b", "c"]))})
    labels = [[0, 1], [], [2], [1, 2]]
    rows = {"image": [picture(i) for i in range(4)], "label": labels}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data.parquet"))
    results = script.main(
        [
            *("--model_name_or_path", str(image_model), "--validation_file", str(tmp_path / "data.parquet")),
            *("--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), *QUIET),
        ]
    )
    (row,) = results["rows"]
    model = MoNEForImageClassification.from_pretrained(image_model)
    processor = ViTImageProcessor.from_pretrained(image_model)
    with torch.no_grad():
        logits = model(**processor(images=[picture(i) for i in range(4)], return_tensors="pt")).logits
    hits = [int(p) in positive for p, positive in zip(logits.argmax(-1), labels, strict=True) if positive]
    assert row["precision_at_1"] == row["accuracy"] == pytest.approx(sum(hits) / 3)
    assert "among the labels (precision at 1)" in str(make_model_card("card", {**results, "license": "apache-2.0"}))
    assert row["capacity"] == model.config.capacity


def test_videos_with_several_numbers_of_clips(tmp_path):
    torch.manual_seed(0)
    config = MoNEViViTConfig(**TINY, num_frames=4, tubelet_size=(2, 8, 8), num_temporal_layers=1)
    model = MoNEViViTForVideoClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    processor = MoNEViViTVideoProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, num_frames=4, frame_sampling_rate=1
    )
    processor.save_pretrained(tmp_path / "model")
    for number in range(4):
        path = tmp_path / "videos" / "abc"[number % 3] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, np.random.default_rng(number).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8), 10)
    results = script.main(
        [
            *("--model_name_or_path", str(tmp_path / "model"), "--validation_dir", str(tmp_path / "videos")),
            *("--clips", "1", "3", "--eval_capacities", "0.3", "1", "--output_dir", str(tmp_path / "out"), *QUIET),
        ]
    )
    assert [row["model"] for row in results["rows"]] == ["MoNE, 1x1"] * 2 + ["MoNE, 3x1"] * 2
    for row in results["rows"]:
        clips = int(row["model"][6])
        losses = []
        for number in range(4):
            video = str(tmp_path / "videos" / "abc"[number % 3] / f"{number}.mp4")
            pixel_values = processor(video, num_clips=clips, return_tensors="pt").pixel_values
            pixel_values = pixel_values.reshape(clips, *pixel_values.shape[-4:])
            with torch.no_grad():
                logits = model(pixel_values, capacity=row["capacity"]).logits.mean(0)
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(number % 3)).item())
        assert row["loss"] == pytest.approx(sum(losses) / 4, abs=1e-4)
        assert row["gmacs"] == clips * count_macs(config, row["capacity"]) / 1e9
    assert results["gmacs"] == "one video, all its clips"

    alone = script.main(
        [
            *("--model_name_or_path", str(tmp_path / "model"), "--validation_dir", str(tmp_path / "videos")),
            *("--num_clips", "3", "--capacity", "0.3", "--output_dir", str(tmp_path / "out"), *QUIET),
        ]
    )
    assert alone["gmacs"] == "one video, 3 clips of it"
    (row,) = alone["rows"]
    assert row | {"model": "MoNE, 3x1"} == next(r for r in results["rows"] if r["model"] == "MoNE, 3x1")


def test_a_model_has_to_be_named(tmp_path):
    with pytest.raises(ValueError, match="Give --model_name_or_path"):
        script.main(["--validation_dir", "x", "--output_dir", str(tmp_path), *QUIET])
