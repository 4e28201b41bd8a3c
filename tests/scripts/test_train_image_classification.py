"""The fine-tuning script as a user runs it, on digits as image folders and parquet files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import (
    BeitConfig,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from mone import MoNEForImageClassification, count_macs


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import train_image_classification as script  # noqa: E402


TINY = (
    "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,image_size=16,patch_size=4,"
    "layer_norm_eps=1e-6"
)
QUIET = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu"]


def digits(count):
    data = load_digits()
    images = [PILImage.fromarray((pixels * 15.9).astype("uint8")).convert("RGB") for pixels in data.images[:count]]
    return images, data.target[:count].tolist()


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    images, labels = digits(400)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    for name, part in (("train", slice(0, 300)), ("validation", slice(300, 400))):
        rows = {"image": images[part], "label": labels[part]}
        Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{name}.parquet"))
    return ["--train_file", str(folder / "train.parquet"), "--validation_file", str(folder / "validation.parquet")]


def test_a_new_model_learns_and_can_be_loaded(tmp_path, parquet):
    metrics = script.main(
        [
            *parquet,
            *("--config_overrides", TINY + ",initializer_range=0.1", "--do_train", "--do_eval"),
            *("--output_dir", str(tmp_path / "out"), "--num_train_epochs", "30"),
            *("--capacity_schedule", "uniform", "--eval_capacities", "0.2", "0.5", "1.0"),
            *("--per_device_train_batch_size", "32", "--learning_rate", "3e-3", "--router_learning_rate", "1e-2"),
            *("--flip", "false", "--min_crop", "0.8", "--warmup_steps", "5", "--save_strategy", "no"),
            *("--cache_dir", str(tmp_path / "cache"), *QUIET),
        ]
    )
    for capacity, least in (("0.2", 0.25), ("0.5", 0.45), ("1", 0.5)):
        assert metrics[f"eval_capacity_{capacity}_accuracy"] > least, "chance is 0.1"
    model = MoNEForImageClassification.from_pretrained(tmp_path / "out")
    assert metrics["eval_capacity_0.2_gmacs"] == count_macs(model.config, 0.2) / 1e9
    assert model.config.id2label[7] == "7"
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_accuracy"] == metrics["eval_accuracy"]


@pytest.mark.parametrize("name", ["eager", "flex_attention", "nonsense"])
def test_the_named_attention_is_used(tmp_path, parquet, name, monkeypatch):
    monkeypatch.setattr(script, "train_and_evaluate", lambda model, *args: model)
    arguments = [
        *(*parquet, "--config_overrides", TINY, "--do_train", "--attn_implementation", name),
        *("--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), *QUIET),
    ]
    if name == "nonsense":
        with pytest.raises(ValueError, match=r"nonsense.*not supported"):
            script.main(arguments)
        return
    for layer in script.main(arguments).mone.layers:
        assert layer.attention.config._attn_implementation == name


def test_what_the_model_cannot_do_is_said_before_it_is_calibrated(tmp_path, parquet, monkeypatch):
    monkeypatch.setattr(script, "calibrate", lambda *args: pytest.fail("it had begun"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(tmp_path / "vit")
    common = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--do_train", *QUIET]
    with pytest.raises(ValueError, match=r"capacity=0\.05 is out of range"):
        source = ["--model_name_or_path", str(tmp_path / "vit"), "--calibrate", "true", "--capacity", "0.05"]
        script.main([*parquet, *source, *common])
    with pytest.raises(ValueError, match="num_channels=1 must be 3"):
        script.main([*parquet, "--config_overrides", TINY + ",num_channels=1", *common])


def test_a_vit_checkpoint_from_folders_with_sample_limits(tmp_path):
    images, labels = digits(60)
    for split, part in (("train", slice(0, 40)), ("validation", slice(40, 60))):
        for number, (image, label) in enumerate(zip(images[part], labels[part], strict=True)):
            path = tmp_path / split / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    metrics = script.main(
        [
            *("--train_dir", str(tmp_path / "train"), "--validation_dir", str(tmp_path / "validation")),
            *(
                "--model_name_or_path",
                str(tmp_path / "vit"),
                "--output_dir",
                str(tmp_path / "out"),
                "--capacity",
                "0.4",
            ),
            *("--max_train_samples", "16", "--max_eval_samples", "8", "--num_train_epochs", "1"),
            *("--do_train", "--do_eval", "--cache_dir", str(tmp_path / "cache"), *QUIET),
        ]
    )
    assert 0 <= metrics["eval_accuracy"] <= 1
    model = MoNEForImageClassification.from_pretrained(tmp_path / "out")
    assert (model.config.num_labels, model.config.pooling) == (10, "cls")
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 2, "16 images in batches of 8"
    # Once more, from the MoNE and without training: evaluation alone gives the same numbers.
    again = script.main(
        [
            *("--validation_dir", str(tmp_path / "validation"), "--model_name_or_path", str(tmp_path / "out")),
            *("--output_dir", str(tmp_path / "eval"), "--capacity", "0.4", "--max_eval_samples", "8", "--do_eval"),
            *("--cache_dir", str(tmp_path / "cache"), *QUIET),
        ]
    )
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)


def test_a_checkpoint_of_another_family(tmp_path, parquet):
    """DINOv2 without a head, whose processor makes smaller images than its positions are for."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dinov2")
    processor = BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "dinov2")
    script.main(
        [
            *(*parquet, "--model_name_or_path", str(tmp_path / "dinov2"), "--output_dir", str(tmp_path / "out")),
            *("--do_train", "--do_eval", "--max_steps", "2", "--capacity", "0.4", "--max_eval_samples", "8"),
            *("--config_overrides", "pooling=cls_mean", "--cache_dir", str(tmp_path / "cache"), *QUIET),
        ]
    )
    model = MoNEForImageClassification.from_pretrained(tmp_path / "out")
    assert (model.config.num_labels, list(model.config.image_size)) == (10, [16, 16])
    assert (model.config.pooling, model.classifier.in_features) == ("cls_mean", 64)


def test_a_checkpoint_without_a_classifier_is_not_evaluated(tmp_path, parquet):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    names = {str(i): i for i in range(10)}
    config = Dinov2Config(**sizes, label2id=names, id2label={i: name for name, i in names.items()})
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    BitImageProcessor(size=32, crop_size=32).save_pretrained(tmp_path / "dinov2")
    with pytest.raises(ValueError, match="dinov2 has no trained classifier to evaluate"):
        script.main(
            [
                *(*parquet, "--model_name_or_path", str(tmp_path / "dinov2"), "--output_dir", str(tmp_path / "out")),
                *("--do_eval", "--cache_dir", str(tmp_path / "cache"), *QUIET),
            ]
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_is_trained_in_float32(tmp_path, parquet, dtype):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    Dinov2Model(Dinov2Config(**sizes)).to(dtype).save_pretrained(tmp_path / "dinov2")
    BitImageProcessor(size=32, crop_size=32).save_pretrained(tmp_path / "dinov2")
    options = ["--do_train", "--max_steps", "1", "--cache_dir", str(tmp_path / "cache"), *QUIET]
    script.main(
        [*parquet, "--model_name_or_path", str(tmp_path / "dinov2"), "--output_dir", str(tmp_path / "out"), *options]
    )
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}
    assert MoNEForImageClassification.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_calibration(tmp_path, parquet):
    """The same predictions at capacity 1.0, which a learning rate of 0 leaves, from other weights."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    names = {str(i): i for i in range(10)}
    config = ViTConfig(**sizes, intermediate_size=64, label2id=names, id2label={i: name for name, i in names.items()})
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    losses, kernels = [], []
    for calibrated in ("false", "true"):
        out = str(tmp_path / calibrated)
        metrics = script.main(
            [
                *(*parquet, "--model_name_or_path", str(tmp_path / "vit"), "--calibrate", calibrated),
                *("--output_dir", out, "--do_train", "--do_eval", "--max_steps", "1", "--learning_rate", "0"),
                *("--eval_capacities", "1.0", "0.3", "--cache_dir", str(tmp_path / "cache"), *QUIET),
            ]
        )
        losses.append((metrics["eval_capacity_1_loss"], metrics["eval_capacity_0.3_loss"]))
        kernels.append(
            load_file(Path(out) / "model.safetensors")["mone.embeddings.patch_embeddings.projection.weight"]
        )
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    assert losses[0][1] != pytest.approx(losses[1][1], abs=1e-5)
    assert not np.allclose(*kernels, atol=1e-3)
    trained = MoNEForImageClassification.from_pretrained(tmp_path / "true")
    trained.mone.routers[0].alpha.data.fill_(0.1)
    trained.save_pretrained(tmp_path / "trained")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "trained")
    for options, message in (
        (["--model_name_or_path", str(tmp_path / "trained")], "was trained as a MoNE"),
        (["--config_overrides", TINY], "a new model has nothing to keep"),
        (["--model_name_or_path", str(tmp_path / "vit"), "--streaming"], "which --streaming has not"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main([*parquet, *options, "--calibrate", "--do_train", "--output_dir", str(tmp_path / "no")])


def test_a_checkpoint_that_cannot_be_converted_is_refused_before_data_are_read(tmp_path):
    BeitConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'beit' model cannot become a MoNE"):
        script.main(
            [
                *("--train_file", "nowhere.parquet", "--model_name_or_path", str(tmp_path), "--do_train"),
                *("--output_dir", str(tmp_path / "out"), *QUIET),
            ]
        )


def wait_for_checkpoint(folder, process):
    deadline = time.monotonic() + 300
    while not (folder / "trainer_state.json").exists():  # the last file of a checkpoint
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)


def test_a_killed_run_goes_on_where_it_was(tmp_path, parquet):
    """SIGKILL in the middle, the same command again: the parameters of a run that was never killed."""
    arguments = [
        *parquet,
        *("--config_overrides", TINY, "--do_train", "--num_train_epochs", "20", "--per_device_train_batch_size", "32"),
        *("--capacity_schedule", "uniform", "--save_steps", "25", "--cache_dir", str(tmp_path / "cache"), *QUIET),
    ]
    script.main([*arguments, "--output_dir", str(tmp_path / "whole")])

    command = [sys.executable, str(ROOT / "scripts" / "train_image_classification.py"), *arguments]
    command += ["--output_dir", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_checkpoint(tmp_path / "killed" / "checkpoint-25", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "killed too late to show anything"

    script.main([*arguments, "--output_dir", str(tmp_path / "killed")])
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    for name, value in weights[0].items():
        assert np.array_equal(value.numpy(), weights[1][name].numpy()), name


def test_a_signal_to_the_whole_process_group_saves_a_checkpoint(tmp_path, parquet):
    """As a job scheduler sends it: the processes that read the data get it, too."""
    command = [
        *(sys.executable, str(ROOT / "scripts" / "train_image_classification.py"), *parquet, "--do_train"),
        *("--config_overrides", TINY, "--num_train_epochs", "1000", "--save_steps", "25", *QUIET),
        *("--dataloader_num_workers", "2", "--dataloader_persistent_workers", "--cache_dir", str(tmp_path / "cache")),
        *("--output_dir", str(tmp_path)),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_checkpoint(tmp_path / "checkpoint-25", process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert "Training was stopped by SIGTERM at step" in errors, errors[-3000:]
    step = int(errors.split("Training was stopped by SIGTERM at step ")[1].split(".")[0])
    assert f"The last complete checkpoint is {tmp_path / f'checkpoint-{step}'}." in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config_overrides", TINY, "--capacity", "1.2"], r"capacity=1\.2 .*\[0\.125, 1\]"),
        (["--config_overrides", "hidden_size=36,num_attention_heads=2"], r"hidden_size=36 .* 8"),
        (["--config_overrides", "hiden_size=64"], r"'hiden_size=64'.*Did you mean hidden_size"),
        ([], "--model_name_or_path, or --config_overrides"),
        (["--config_overrides", TINY, "--max_train_samples", "0"], "--max_train_samples 0 must be at least 1"),
        (["--config_overrides", TINY, "--max_eval_samples", "-5"], "--max_eval_samples -5 must be at least 1"),
        (
            ["--config_overrides", TINY, "--max_train_samples", "7", "--dataloader_drop_last", "true"],
            "7 training examples are less than a batch of 8, and --dataloader_drop_last",
        ),
    ],
)
def test_bad_arguments_are_found_before_training(tmp_path, parquet, arguments, message):
    with pytest.raises(ValueError, match=message):
        script.main([*parquet, *arguments, "--do_train", "--output_dir", str(tmp_path), *QUIET])
    assert not list(tmp_path.glob("checkpoint-*"))


def test_nothing_trained_is_not_evaluated(tmp_path, parquet):
    options = [*parquet, "--config_overrides", TINY, "--output_dir", str(tmp_path), *QUIET]
    with pytest.raises(ValueError, match="Nothing to do: give --do_train, --do_eval or both"):
        script.main(options)
    with pytest.raises(ValueError, match=r"evaluates a trained model: give --model_name_or_path\.$"):
        script.main([*options, "--do_eval"])
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "eval_results.json").write_text("of the training")
    with pytest.raises(ValueError, match=f"The one in --output_dir: --model_name_or_path {tmp_path}"):
        script.main([*options, "--do_eval"])
    assert (tmp_path / "eval_results.json").read_text() == "of the training"


def test_a_misspelt_schedule_is_refused_by_the_command_line(parquet, capsys):
    with pytest.raises(SystemExit):
        script.main([*parquet, "--config_overrides", TINY, "--capacity_schedule", "unifrom", "--output_dir", "unused"])
    assert "unifrom" in capsys.readouterr().err


def test_a_missing_validation_set_is_named(tmp_path, parquet):
    with pytest.raises(ValueError, match="No validation set is given, but --do_eval needs one"):
        script.main(
            [
                *(*parquet[:2], "--validation_split", "0", "--config_overrides", TINY, "--do_eval", "--do_train"),
                *("--output_dir", str(tmp_path), *QUIET),
            ]
        )


def test_a_damaged_image_does_not_end_a_run(tmp_path):
    images, labels = digits(40)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / ("train" if number < 30 else "validation") / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    damaged = [sorted(tmp_path.glob(f"{split}/*/*.png"))[3] for split in ("train", "validation")]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:60])
    metrics = script.main(
        [
            *("--train_dir", str(tmp_path / "train"), "--validation_dir", str(tmp_path / "validation")),
            *("--config_overrides", TINY, "--do_train", "--do_eval", "--num_train_epochs", "2"),
            *("--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), *QUIET),
        ]
    )
    assert metrics["train_unreadable"] == metrics["eval_unreadable"] == 1


@pytest.mark.parametrize("length", [("--num_train_epochs", "1"), ("--max_steps", "1")], ids=str)
def test_a_run_that_had_finished_keeps_its_numbers(tmp_path, parquet, length):
    arguments = [
        *(*parquet, "--config_overrides", TINY, "--do_train", *length, "--per_device_train_batch_size", "10"),
        *("--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), *QUIET),
    ]
    script.main(arguments)
    files = [tmp_path / "out" / name for name in ("train_results.json", "model.safetensors")]
    before = [file.read_bytes() for file in files]
    script.main(arguments)
    assert [file.read_bytes() for file in files] == before


def test_arguments_from_a_yaml_file(tmp_path, parquet):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"train_file: {parquet[1]}\nvalidation_file: {parquet[3]}\nconfig_overrides: {TINY},router_layers=(0,1)\n"
        f"output_dir: {tmp_path / 'out'}\ncache_dir: {tmp_path / 'cache'}\ndo_train: true\ndo_eval: true\n"
        "learning_rate: 1e-3\nrouter_learning_rate: 1e-2\neval_capacities: 0.4\nmax_steps: 2\nuse_cpu: true\n"
        "report_to: none\ncapacity: 0.4\n"
    )
    metrics = script.main([str(file)])
    assert "eval_capacity_0.4_accuracy" in metrics
    config = MoNEForImageClassification.from_pretrained(tmp_path / "out").config
    assert tuple(config.router_layers) == (0, 1)
    assert config.capacity == 0.4, "what it was trained for is what the saved model runs at"
