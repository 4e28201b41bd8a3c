"""The image script on two CPU processes (gloo), as `accelerate launch` starts it with the project's configurations.

The tests of DeepSpeed are left out where it is not installed.
"""

import json
import os
import random
import subprocess
import sys
import time
import zlib
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from mone import MoNEForImageClassification


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "scripts" / "accelerate"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
BATCH = 16
# A large epsilon, so that Adam does not blow up the last bits of a gradient that is zero.
FIELDS = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,image_size=16,patch_size=4"
SETTINGS = [
    *("--config_overrides", f"{FIELDS},initializer_range=0.1", "--do_train", "--use_cpu", "--logging_steps", "1"),
    *("--learning_rate", "1e-2", "--adam_epsilon", "1e-3", "--lr_scheduler_type", "constant"),
    *("--capacity_schedule", "uniform", "--report_to", "none", "--disable_tqdm", "true"),
]
# The last batch of two processes is filled up.
EVALUATION = ["--do_eval", "--eval_capacities", "0.3", "1.0", "--per_device_eval_batch_size", "24"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    digits = load_digits()
    images = [PILImage.fromarray((pixels * 15.9).astype("uint8")).convert("RGB") for pixels in digits.images[:128]]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    rows = {"image": images, "label": digits.target[:128].tolist()}
    Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train.parquet"))
    # Whole batches: accelerate fills up the last one of an epoch, so that all processes have as many examples.
    options = ["--validation_split", "0", "--cache_dir", str(folder / "cache")]
    return ["--train_file", str(folder / "train.parquet"), *options]


def command(config: str | None, output: Path, *arguments: str) -> list[str]:
    """One process without a configuration, two with one; the same global batch."""
    script = [
        str(ROOT / "tests" / "training" / "launched.py"),
        str(ROOT / "scripts" / "train_image_classification.py"),
    ]
    launch, processes = [sys.executable], 1
    if config is not None:
        launch += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
        # Port 0: any that is free.
        launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
        processes = 2
    batch = ["--per_device_train_batch_size", str(BATCH // processes)]
    if "--gradient_accumulation_steps" in arguments:
        batch[1] = str(BATCH // processes // 2)
    return [*launch, *script, *SETTINGS, *batch, "--output_dir", str(output), *arguments]


def start(config: str | None, output: Path, *arguments: str) -> subprocess.CompletedProcess:
    if config is not None and config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    return subprocess.run(
        command(config, output, *arguments), capture_output=True, text=True, timeout=1200, env=ENVIRONMENT
    )


def run(config: str | None, output: Path, *arguments: str) -> str:
    done = start(config, output, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def kill_after_checkpoint(config: str | None, output: Path, steps: range, *arguments: str) -> None:
    """SIGKILL for the launcher and its processes, at random soon after the folder of a step's checkpoint appeared."""
    step, delay = random.choice(steps), random.uniform(0, 0.3)
    print(f"killed {delay:.3f} s after the folder of checkpoint {step}")
    process = subprocess.Popen(
        command(config, output, *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 1200
    while not (output / f"checkpoint-{step}").exists():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.005)
    time.sleep(delay)
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in processes:
        each.kill()
    process.wait()
    psutil.wait_procs(processes, timeout=60)
    assert not (output / "model.safetensors").exists(), "killed too late to show anything"


def logs(output: Path) -> list[dict]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def losses(output: Path) -> list[float]:
    return [log["loss"] for log in logs(output) if "loss" in log]


def parameters(output: Path, rank: int = 0) -> dict:
    return torch.load(output / f"parameters_{rank}.pt")


def largest_difference(output: Path, other: Path, rank: int = 0) -> float:
    ours, theirs = parameters(output, rank)["parameters"], parameters(other)["parameters"]
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    run(None, output, *data, "--max_steps", "6", "--save_strategy", "no", *EVALUATION, "--validation_file", data[1])
    return output


def check_equal(output: Path, expected: Path, sharded: bool) -> None:
    assert losses(output) == pytest.approx(losses(expected), abs=1e-5)
    assert len(losses(output)) > 3
    for rank in range(2):
        assert (parameters(output, rank)["processes"], parameters(output, rank)["sharded"]) == (2, sharded)
        assert largest_difference(output, output, rank) == 0, "all processes have the same parameters"
    assert largest_difference(output, expected) < 1e-5


def test_two_processes_equal_one(data, one_process, tmp_path):
    options = ["--max_steps", "6", "--save_strategy", "no", *EVALUATION, "--validation_file", data[1]]
    run("ddp.yaml", tmp_path, *data, *options)
    check_equal(tmp_path, one_process, sharded=False)
    ours, theirs = (json.loads((folder / "eval_results.json").read_text()) for folder in (tmp_path, one_process))
    for key in ("eval_capacity_0.3_loss", "eval_capacity_1_loss", "eval_capacity_0.3_accuracy", "eval_accuracy"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-5)
    assert ours["eval_capacity_0.3_loss"] != pytest.approx(ours["eval_capacity_1_loss"], abs=1e-4)


@pytest.mark.slow
def test_two_sharded_processes_equal_one(data, one_process, tmp_path):
    run("fsdp2.yaml", tmp_path, *data, "--max_steps", "6", "--save_strategy", "no")
    check_equal(tmp_path, one_process, sharded=True)
    assert (tmp_path / "modeling_mone.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["deepspeed_zero2.yaml", "deepspeed_zero3.yaml"])
def test_two_processes_of_deepspeed_equal_one(data, tmp_path, config):
    """With a router's alpha that comes to both sides of zero, which DeepSpeed has copies of."""
    options = [*data, "--max_steps", "12", "--save_strategy", "no", "--router_learning_rate", "0.3", "--seed", "6"]
    options += ["--validation_file", data[1], "--do_eval", "--eval_capacities", "0.3", "1.0"]
    run(config, tmp_path / "two", *options)
    run(None, tmp_path / "one", *options)
    check_equal(tmp_path / "two", tmp_path / "one", sharded=config == "deepspeed_zero3.yaml")
    (ours, alphas), (theirs, expected) = (
        (
            json.loads((tmp_path / name / "eval_results.json").read_text()),
            [log["router_alpha_0"] for log in logs(tmp_path / name) if "loss" in log],
        )
        for name in ("two", "one")
    )
    assert alphas == pytest.approx(expected, abs=1e-5)
    assert 0 in expected[1:] and max(expected) > 0.1
    for key in ("eval_capacity_0.3_loss", "eval_capacity_1_loss", "eval_accuracy"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-5)
    saved = MoNEForImageClassification.from_pretrained(tmp_path / "two").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in parameters(tmp_path / "two")["parameters"].items())


@pytest.mark.slow
def test_zero3_fine_tunes_with_a_teacher(data, one_process, tmp_path):
    """Both are loaded while transformers knows of ZeRO-3, and must not be sharded before DeepSpeed does it."""
    options = [*data, "--max_steps", "4", "--save_strategy", "no", "--model_name_or_path", str(one_process)]
    options += ["--distill_from", str(one_process)]
    run("deepspeed_zero3.yaml", tmp_path / "two", *options)
    run(None, tmp_path / "one", *options)
    check_equal(tmp_path / "two", tmp_path / "one", sharded=True)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml", "deepspeed_zero2.yaml", "deepspeed_zero3.yaml"])
def test_several_widths_and_micro_batches_on_two_processes_equal_one(data, tmp_path, config):
    options = [*data, "--max_steps", "4", "--save_strategy", "no", "--gradient_accumulation_steps", "2"]
    options += ["--capacity_schedule", "joint", "--distill_from", "self"]
    run(config, tmp_path / "two", *options)
    run(None, tmp_path / "one", *options)
    check_equal(tmp_path / "two", tmp_path / "one", sharded=config in ("fsdp2.yaml", "deepspeed_zero3.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp.yaml", "fsdp2.yaml"])
def test_a_killed_run_goes_on_with_the_same_result(data, tmp_path, config):
    """On two processes to the last bit, on one to rounding. Checkpoints come every 5 of 60 steps."""
    options = [*data, "--max_steps", "60", "--save_steps", "5"]
    run(config, tmp_path / "whole", *options)
    kill_after_checkpoint(config, tmp_path / "killed", range(10, 45, 5), *options)
    checkpoints = sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*"))
    print(checkpoints)
    subprocess.run(["cp", "-r", str(tmp_path / "killed"), str(tmp_path / "on_one")], check=True)
    assert "Going on from the checkpoint" in run(config, tmp_path / "killed", *options)
    assert largest_difference(tmp_path / "killed", tmp_path / "whole") == 0
    assert "Going on from the checkpoint" in run(None, tmp_path / "on_one", *options)
    assert losses(tmp_path / "on_one") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    assert largest_difference(tmp_path / "on_one", tmp_path / "whole") < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("config", ["deepspeed_zero2.yaml", "deepspeed_zero3.yaml"])
def test_a_killed_run_of_deepspeed_goes_on_with_the_same_result(data, tmp_path, config):
    """With as many processes only; on one it is refused, as it would lose the optimiser's state."""
    options = [*data, "--max_steps", "30", "--save_steps", "5"]
    run(config, tmp_path / "whole", *options)
    kill_after_checkpoint(config, tmp_path / "killed", range(5, 20, 5), *options)
    on_one = start(None, tmp_path / "killed", *options)
    assert on_one.returncode and "was written under DeepSpeed" in on_one.stderr, on_one.stderr[-3000:]
    assert "Going on from the checkpoint" in run(config, tmp_path / "killed", *options)
    assert largest_difference(tmp_path / "killed", tmp_path / "whole") == 0


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 4])
def test_two_processes_share_a_stream(data, tmp_path, files):
    """An epoch of it: each example is read once, by one of them. Of a single file each takes its rows."""
    examples = Dataset.from_parquet(data[1], cache_dir=str(tmp_path / "cache"))
    for number in range(files):
        examples.shard(files, number).to_parquet(str(tmp_path / f"train-{number}.parquet"))
    options = ["--train_file", str(tmp_path / "train-*.parquet"), "--validation_split", "0", "--streaming"]
    output = tmp_path / "out"
    run("ddp.yaml", output, *options, "--num_train_epochs", "1", "--save_strategy", "no")
    first, second = (parameters(output, rank)["read"] for rank in range(2))
    encoded = (row["bytes"] for row in examples.cast_column("image", Image(decode=False))["image"])
    assert len(first) == len(second) == 64 and sorted(first + second) == sorted(map(zlib.crc32, encoded))
    assert len(losses(output)) == 8
    saved = MoNEForImageClassification.from_pretrained(output).state_dict()
    for rank in range(2):
        own = parameters(output, rank)["parameters"]
        assert all(torch.equal(own[name], value) for name, value in saved.items())


def test_unreadable_examples_of_all_processes_are_counted(tmp_path):
    for number, pixels in enumerate(load_digits().images[:64]):
        (tmp_path / "train" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        file = tmp_path / "train" / str(number % 2) / f"{number:02}.png"
        PILImage.fromarray((pixels * 15.9).astype("uint8")).save(file)
        if number % 13 == 3:
            file.write_bytes(file.read_bytes()[:40])
    options = ["--train_dir", str(tmp_path / "train"), "--validation_split", "0", "--num_train_epochs", "2"]
    run("ddp.yaml", tmp_path / "out", *options, "--cache_dir", str(tmp_path / "cache"))
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["train_unreadable"] == 5


@pytest.mark.slow
def test_a_checkpoint_of_one_process_goes_on_sharded(data, one_process, tmp_path):
    run(None, tmp_path, *data, "--max_steps", "3", "--save_steps", "3")
    run("fsdp2.yaml", tmp_path, *data, "--max_steps", "6", "--save_strategy", "no")
    assert parameters(tmp_path)["sharded"]
    assert losses(tmp_path) == pytest.approx(losses(one_process), abs=1e-5)
    assert largest_difference(tmp_path, one_process) < 1e-5


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration(path):
    config = load_config_from_file(str(path))
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type == expected[path.stem]
    assert config.mixed_precision == "bf16"
    if path.stem.startswith("deepspeed"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
