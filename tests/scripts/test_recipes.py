# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Every recipe, run for two steps on small local data with a tiny model, and its published values."""

import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List
from PIL import Image as PILImage
from transformers import AutoImageProcessor, AutoVideoProcessor, ViTConfig, ViTForImageClassification

from mone import MoNEForImageClassification, MoNEViViTForVideoClassification
from mone.training.command_line import parse_arguments
from mone.video_encoding import write_video


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import train_image_classification  # noqa: E402
import train_video_classification  # noqa: E402


RECIPES = {path.stem: path for path in sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))}
SIZES = {"ti16": (192, 12, 3, 768), "s16": (384, 12, 6, 1536), "b16": (768, 12, 12, 3072), "l16": (1024, 24, 16, 4096)}
# RandAugment's layers and magnitude, and mixup: big_vision/configs/vit_i1k.py and vit_i21k.py.
LIGHT1, MEDIUM2 = (2, 0, 0.0), (2, 15, 0.5)
AUGMENTATION = {
    "imagenet1k": {"ti16": LIGHT1, "s16": MEDIUM2, "b16": MEDIUM2, "l16": MEDIUM2},
    "imagenet21k": {"ti16": (0, 0, 0.0), "s16": LIGHT1, "b16": (2, 10, 0.2), "l16": MEDIUM2},
}
TINY = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"
QUICK = [
    *("--max_steps", "2", "--per_device_train_batch_size", "4", "--total_train_batch_size", "8", "--use_cpu"),
    *("--dataloader_num_workers", "0", "--report_to", "none", "--disable_tqdm", "true"),
]


def parse(name, *options):
    if name.startswith("vivit"):
        classes = (train_video_classification.VideoModelArguments, train_video_classification.VideoArguments)
    else:
        classes = (train_image_classification.ModelArguments, train_image_classification.ImageArguments)
    return parse_arguments([str(RECIPES[name]), *options, "--use_cpu"], *classes)


def test_there_is_a_recipe_for_every_size_and_data_set():
    images = [f"augreg_{size}_{data}" for size in SIZES for data in AUGMENTATION]
    videos = [f"vivit_fe_{size}_{data}" for size in "bl" for data in ("kinetics400", "ssv2")]
    assert sorted(RECIPES) == sorted(images + videos)


@pytest.mark.parametrize("data", AUGMENTATION)
@pytest.mark.parametrize("size", SIZES)
def test_image_recipes_have_the_published_values(size, data):
    model, examples, training = parse(f"augreg_{size}_{data}")
    width, layers, heads, mlp = SIZES[size]
    assert model.config_overrides.replace(" ", "").strip(",").split(",") == [
        *(f"hidden_size={width}", f"num_hidden_layers={layers}", f"num_attention_heads={heads}"),
        *(f"intermediate_size={mlp}", "patch_size=16", "image_size=224"),
    ]
    assert (model.loss, training.bce_sum, model.resize) == ("sigmoid", True, 256)
    assert model.head_bias == {"imagenet1k": -6.9, "imagenet21k": -10}[data]
    augmentation = (examples.randaugment_layers, examples.randaugment_magnitude, training.mixup)
    assert augmentation == AUGMENTATION[data][size]
    assert (training.learning_rate, training.weight_decay) == (1e-3, 0.1), "1e-4 of the weights a step"
    assert (training.adam_beta1, training.adam_beta2, training.max_grad_norm) == (0.9, 0.999, 1.0)
    assert (training.lr_scheduler_type, training.warmup_steps, training.num_train_epochs) == ("cosine", 10_000, 300)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 4096


@pytest.mark.parametrize("data", ["kinetics400", "ssv2"])
@pytest.mark.parametrize("size", ["b", "l"])
def test_video_recipes_have_the_published_values(size, data):
    model, examples, training = parse(f"vivit_fe_{size}_{data}")
    ssv2 = data == "ssv2"
    assert model.init_from == f"google/vit-{'base' if size == 'b' else 'large'}-patch16-224-in21k"
    fields = ["num_frames=32", "tubelet_size=(2,16,16)", "num_temporal_layers=4"]
    fields += ["image_size=256", "pooling=mean", "drop_path_rate=0.3"] if ssv2 else ["image_size=224", "pooling=mean"]
    assert model.config_overrides.replace(" ", "").strip(",") == ",".join(fields)
    assert (examples.frame_sampling_rate, model.resize) == ((1, 288) if ssv2 else (2, 256))
    assert (examples.scale_jitter, examples.num_clips) == ([0.9, 1.33], 8)
    assert (examples.color_jitter, examples.grayscale) == ((0, 0) if ssv2 else (0.8, 0.1))
    assert (examples.randaugment_layers, examples.randaugment_magnitude) == ((2, 20) if ssv2 else (0, 0))
    assert (training.mixup, training.label_smoothing_factor) == ((0.3, 0.3) if ssv2 else (0, 0))
    assert (training.optim, training.optim_args, training.weight_decay) == ("sgd", "momentum=0.9", 0)
    assert (training.learning_rate, training.num_train_epochs) == ((0.4, 35) if ssv2 else (5e-2, 30))
    assert training.warmup_steps * training.num_train_epochs == pytest.approx(2.5, abs=2e-3)
    assert training.max_grad_norm == 1.0
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 64


def picture(seed: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of images of three classes, as options of the script."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "validation"):
        for number in range(12):
            path = root / split / "abc"[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(path)
    return ["--train_dir", str(root / "train"), "--validation_dir", str(root / "validation")]


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("augreg")])
def test_image_recipes_run(tmp_path, folders, name):
    metrics = train_image_classification.main(
        [
            *(str(RECIPES[name]), *folders, "--output_dir", str(tmp_path / "out"), "--resize", "36"),
            *("--config_overrides", TINY + ",image_size=32,patch_size=8", "--cache_dir", str(tmp_path), *QUICK),
        ]
    )
    assert 0 <= metrics["eval_precision_at_1"] <= 1
    model = MoNEForImageClassification.from_pretrained(tmp_path / "out")
    assert (model.config.problem_type, model.config.capacity) == ("multi_label_classification", 0.4)
    bias = -10 if name.endswith("21k") else -6.9
    assert model.classifier.bias.detach().numpy() == pytest.approx(np.full(3, bias), abs=0.01), "still warming up"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.size["shortest_edge"], processor.do_center_crop) == (36, True)
    assert processor(images=picture(0), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_recipe_on_examples_with_any_number_of_labels(tmp_path, streaming):
    """Parquet shards, with examples of no label and of several."""
    features = Features({"image": Image(), "labels": List(ClassLabel(names=["a", "b", "c"]))})
    for number, part in enumerate((range(8), range(8, 16))):
        labels = [[], [0, 2], [1], [2]]
        rows = {"image": [picture(i) for i in part], "labels": [labels[i % 4] for i in part]}
        Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"shard-{number}.parquet"))
    metrics = train_image_classification.main(
        [
            *(str(RECIPES["augreg_b16_imagenet21k"]), "--output_dir", str(tmp_path / "out"), "--resize", "36"),
            *("--train_file", str(tmp_path / "shard-*.parquet"), "--validation_file", str(tmp_path)),
            *("--streaming", str(streaming), "--eval_capacities", "0.2", "1.0"),
            *("--config_overrides", TINY + ",image_size=32,patch_size=8", "--cache_dir", str(tmp_path / "c"), *QUICK),
        ]
    )
    # Of 16 examples 4 have no label: a share of 12.
    assert 12 * metrics["eval_capacity_0.2_precision_at_1"] == pytest.approx(
        round(12 * metrics["eval_capacity_0.2_precision_at_1"])
    )
    assert metrics["epoch"] == 1, "two steps of 8"
    with pytest.raises(ValueError, match="--loss softmax is for one label per example"):
        train_image_classification.main(
            [
                *("--train_file", str(tmp_path), "--config_overrides", TINY, "--loss", "softmax"),
                *("--output_dir", str(tmp_path / "out"), "--do_train", "--cache_dir", str(tmp_path / "c"), *QUICK),
            ]
        )


def test_the_input_of_a_recipe_is_measured(tmp_path, folders):
    result = train_image_classification.main(
        [
            *(str(RECIPES["augreg_s16_imagenet1k"]), *folders, "--output_dir", str(tmp_path / "out")),
            *("--config_overrides", TINY, "--cache_dir", str(tmp_path), *QUICK, "--measure_input", "2"),
        ]
    )
    assert (result["examples"], result["num_workers"]) == (8, 0)
    assert result["examples_per_second"] > 0
    assert not (tmp_path / "out" / "model.safetensors").exists(), "nothing was trained"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for split in ("train", "validation"):
        for number in range(4):
            path = root / split / "ab"[number % 2] / f"{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, np.random.default_rng(number).integers(0, 256, (12, 40, 48, 3), dtype=np.uint8), 12)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(root / "vit")
    return root


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("vivit")])
def test_video_recipes_run(tmp_path, videos, name):
    metrics = train_video_classification.main(
        [
            *(
                str(RECIPES[name]),
                "--train_dir",
                str(videos / "train"),
                "--validation_dir",
                str(videos / "validation"),
            ),
            *("--init_from", str(videos / "vit"), "--output_dir", str(tmp_path / "out"), "--resize", "36"),
            *("--config_overrides", "num_frames=4,tubelet_size=(2,8,8),num_temporal_layers=1,image_size=32"),
            *("--num_clips", "2", *QUICK),
        ]
    )
    assert 0 <= metrics["eval_accuracy"] <= 1
    model = MoNEViViTForVideoClassification.from_pretrained(tmp_path / "out")
    assert (model.config.num_labels, model.config.capacity, model.config.pooling) == (2, 0.4, "mean")
    assert model.config.drop_path_rate == (0.3 if name.endswith("ssv2") else 0)
    processor = AutoVideoProcessor.from_pretrained(tmp_path / "out")
    assert (processor.size["shortest_edge"], processor.frame_sampling_rate) == (36, 1 if name.endswith("ssv2") else 2)
