"""The video fine-tuning script as a user runs it, on small moving pictures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline

from mone import MoNEViViTConfig, MoNEViViTForVideoClassification, MoNEViViTVideoProcessor, count_macs
from mone.conversion import mone_from_vit


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import train_video_classification as script  # noqa: E402
from make_motion_clips import encode_clip  # noqa: E402
from motion import render_clip  # noqa: E402


TINY = (
    "hidden_size=32,num_hidden_layers=1,num_temporal_layers=1,num_attention_heads=2,intermediate_size=64,"
    "image_size=32,tubelet_size=(4,8,8),num_frames=8,layer_norm_eps=1e-6,initializer_range=0.1"
)
QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu"]
NO_AUGMENTATION = [
    *("--flip", "false", "--scale_jitter", "1", "1", "--color_jitter", "0", "--grayscale", "0"),
    *("--frame_sampling_rate", "1", "--num_clips", "1"),
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A photograph that moves right or left: 48 clips for training, 24 for validation, mp4 and webm."""
    root = tmp_path_factory.mktemp("clips")
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    for split, count in (("train", 24), ("validation", 12)):
        for label in ("left", "right"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([number, split == "train"])
                frames = render_clip(*photographs, label, rng, frames=8, size=32)
                encode_clip(root / split / label / f"{number}.{('mp4', 'webm')[number % 2]}", frames, fps=8)
    return root


def test_a_new_model_learns_what_only_time_tells(tmp_path, clips):
    (damaged,) = [clips / "train" / "left" / "0.mp4"]
    content = damaged.read_bytes()
    damaged.write_bytes(content[:300])
    try:
        metrics = script.main(
            [
                *("--train_dir", str(clips / "train"), "--validation_dir", str(clips / "validation")),
                *("--config_overrides", TINY, "--do_train", "--do_eval", "--output_dir", str(tmp_path / "out")),
                *("--num_train_epochs", "40", "--per_device_train_batch_size", "16", "--learning_rate", "3e-3"),
                *("--eval_capacities", "0.4", "1.0", "--capacity_schedule", "uniform", "--save_strategy", "no"),
                *("--warmup_steps", "5", *NO_AUGMENTATION, *QUIET),
            ]
        )
    finally:
        damaged.write_bytes(content)
    assert metrics["train_unreadable"] == 1
    assert "eval_unreadable" not in metrics
    assert metrics["eval_capacity_1_accuracy"] > 0.7, "chance is 0.5"
    model = MoNEViViTForVideoClassification.from_pretrained(tmp_path / "out")
    assert metrics["eval_capacity_0.4_gmacs"] == count_macs(model.config, 0.4) / 1e9
    assert model.config.id2label == {0: "left", 1: "right"}
    # What it saved is a pipeline, whose answers are those of the evaluation.
    pipe = pipeline("video-classification", model=str(tmp_path / "out"), capacity=0.4, device="cpu")
    files = sorted((clips / "validation").glob("*/*"))
    right = [pipe(str(file), num_clips=1)[0]["label"] == file.parent.name for file in files]
    assert np.mean(right) == pytest.approx(metrics["eval_capacity_0.4_accuracy"])


def test_the_named_attention_is_used_in_space_and_time(tmp_path, clips, monkeypatch):
    monkeypatch.setattr(script, "train_and_evaluate", lambda model, *args: model)
    model = script.main(
        [
            *("--validation_dir", str(clips / "validation"), "--train_dir", str(clips / "train")),
            *("--config_overrides", TINY, "--do_train", "--attn_implementation", "eager"),
            *("--output_dir", str(tmp_path / "out"), *NO_AUGMENTATION, *QUIET),
        ]
    )
    for encoder in (model.mone_vivit.spatial, model.mone_vivit.temporal):
        for layer in encoder.layers:
            assert layer.attention.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", ["vit", "mone"])
def test_it_starts_from_an_image_model(tmp_path, clips, kind):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    vit = ViTForImageClassification(config)
    (vit if kind == "vit" else mone_from_vit(vit, num_experts=3)).save_pretrained(tmp_path / "image")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "image")
    (tmp_path / "list.json").write_text(
        json.dumps(
            [
                {"id": f"{label}/{number}", "template": f"Moving [it] {label}"}
                for label in ("left", "right")
                for number in range(12)
            ]
        )
    )
    metrics = script.main(
        [
            *("--init_from", str(tmp_path / "image"), "--config_overrides", "image_size=32,num_frames=4"),
            *("--train_file", str(tmp_path / "list.json"), "--video_dir", str(clips / "validation")),
            *("--validation_split", "0.25", "--do_train", "--do_eval", "--output_dir", str(tmp_path / "out")),
            *("--max_steps", "2", "--capacity", "0.4", "--num_clips", "2", "--mixup", "0.3"),
            *("--label_smoothing_factor", "0.3", "--randaugment_layers", "2", "--dataloader_num_workers", "2", *QUIET),
        ]
    )
    assert np.isfinite(metrics["eval_loss"])
    model = MoNEViViTForVideoClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_experts == (4 if kind == "vit" else 3)
    assert (model.config.pooling, model.config.capacity) == ("cls", 0.4)
    assert model.config.id2label == {0: "Moving it left", 1: "Moving it right"}
    processor = MoNEViViTVideoProcessor.from_pretrained(tmp_path / "out")
    assert (processor.num_frames, dict(processor.crop_size)) == (4, {"height": 32, "width": 32})
    assert processor.evaluation_clips == 2, "which a pipeline averages, too"
    assert processor.num_clips == 1, "so that what a call gives fits the model"

    # Once more from what it saved, only evaluating: the same numbers, with the checkpoint's own sampling.
    split = [row["path"] for row in script_validation_rows(tmp_path, clips)]
    (tmp_path / "held_out.csv").write_text(
        "path,label\n" + "".join(f"{path},Moving it {Path(path).parent.name}\n" for path in split)
    )
    again = script.main(
        [
            *("--model_name_or_path", str(tmp_path / "out"), "--validation_file", str(tmp_path / "held_out.csv")),
            *("--video_dir", str(clips), "--do_eval", "--output_dir", str(tmp_path / "again")),
            *("--capacity", "0.4", *QUIET),
        ]
    )
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5)


def script_validation_rows(tmp_path, clips):
    splits = script.load_video_datasets(
        train_file=str(tmp_path / "list.json"), video_dir=str(clips / "validation"), validation_split=0.25
    )
    return splits["validation"]["video"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --model_name_or_path, --init_from, or --config_overrides"),
        (["--init_from", "a", "--model_name_or_path", "b"], "exclude each other"),
        (["--config_overrides", TINY, "--capacity", "1.2"], r"capacity=1\.2 .*\[0\.125, 1\]"),
        (["--config_overrides", TINY, "--scale_jitter", "1.5", "1"], r"scale_jitter=\(1\.5, 1\.0\)"),
        (["--config_overrides", TINY + ",num_frames=7"], "num_frames=7 must be a positive multiple"),
        (["--config_overrides", TINY, "--video_dir", "no/such"], None),
    ],
)
def test_bad_arguments_are_found_before_training(tmp_path, clips, arguments, message):
    source = ["--train_dir", str(clips / "train")]
    error = ValueError
    if message is None:
        (tmp_path / "list.csv").write_text("path,label\na.mp4,cat\n")
        source, error, message = ["--train_file", str(tmp_path / "list.csv")], FileNotFoundError, "no/such"
    with pytest.raises(error, match=message):
        script.main([*source, *arguments, "--do_train", "--output_dir", str(tmp_path / "out"), *QUIET])
    assert not list(tmp_path.glob("out/checkpoint-*"))


def test_an_image_model_is_no_video_checkpoint(tmp_path, clips):
    ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"is a 'vit' model; allowed is 'mone_vivit'"):
        script.main(
            [
                *("--train_dir", str(clips / "train"), "--model_name_or_path", str(tmp_path), "--do_train"),
                *("--output_dir", str(tmp_path / "out"), *QUIET),
            ]
        )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A video model of three classes, with a gate that is open."""
    torch.manual_seed(0)
    fields = script.parse_overrides(TINY, MoNEViViTConfig)
    model = MoNEViViTForVideoClassification(MoNEViViTConfig(**fields, num_labels=3))
    model.mone_vivit.spatial.routers[0].alpha.data.fill_(0.3)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    MoNEViViTVideoProcessor(
        num_frames=8, size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


def test_a_checkpoint_for_other_labels_and_clips(tmp_path, clips, checkpoint):
    metrics = script.main(
        [
            *("--model_name_or_path", str(checkpoint), "--config_overrides", "image_size=48,num_frames=4"),
            *("--train_dir", str(clips / "train"), "--validation_dir", str(clips / "validation"), "--do_train"),
            *("--max_steps", "1", "--learning_rate", "0", "--output_dir", str(tmp_path / "out"), *NO_AUGMENTATION),
            *("--do_eval", "--max_train_samples", "8", "--max_eval_samples", "8", *QUIET),
        ]
    )
    assert np.isfinite(metrics["eval_loss"])
    before = MoNEViViTForVideoClassification.from_pretrained(checkpoint).state_dict()
    model = MoNEViViTForVideoClassification.from_pretrained(tmp_path / "out")
    assert (model.config.image_size, model.config.num_frames, model.config.num_labels) == (48, 4, 2)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert set(changed) <= {
        "mone_vivit.spatial.position_embeddings",
        "mone_vivit.temporal.position_embeddings",
        "classifier.weight",
        "classifier.bias",
    }
    processor = MoNEViViTVideoProcessor.from_pretrained(tmp_path / "out")
    assert (processor.num_frames, processor.size["shortest_edge"]) == (4, 60)
    assert dict(processor.crop_size) == {"height": 48, "width": 48}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("intermediate_size=32", r"fc1\.weight \(64, 32\) instead of \(32, 32\)"),
        ("num_experts=3", r"routers\.0\.proj\.weight \(4, 32\) instead of \(3, 32\)"),
        ("num_frames=6", r"num_frames=6 must be a positive multiple of tubelet_size\[0\]=4"),
    ],
)
def test_overrides_that_do_not_fit_a_checkpoint_are_found_before_the_data(tmp_path, checkpoint, overrides, message):
    with pytest.raises(ValueError, match=message):
        script.main(
            [
                *("--model_name_or_path", str(checkpoint), "--config_overrides", overrides, "--train_dir", "no/such"),
                *("--do_train", "--output_dir", str(tmp_path / "out"), *QUIET),
            ]
        )
