# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""MoNETrainer on a stream of parquet shards: epochs, and resumption in the middle of one."""

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from mone import MoNEConfig, MoNEForImageClassification
from mone.data import LabelledStream, collate_examples, load_image_datasets
from mone.training import MoNETrainer, MoNETrainingArguments


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Three files of 8 images."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    for shard in range(3):
        pixels = np.random.default_rng(shard).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
        rows = {"image": list(pixels), "label": [i % 3 for i in range(8)]}
        Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"train-{shard}.parquet"))
    return str(tmp_path / "train-*.parquet")


def make_trainer(shards, output_dir, workers, **options):
    torch.manual_seed(0)
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = MoNEForImageClassification(MoNEConfig(**config, image_size=16, patch_size=4, num_labels=3))
    read = []

    def transform(image):
        read.append(1)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 + 0.1 * torch.rand(3, 16, 16)

    data = LabelledStream(
        load_image_datasets(train_file=shards, streaming=True)["train"],
        transform,
        batch_size=2,
        num_workers=workers,
        buffer_size=4,
    )
    args = MoNETrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        dataloader_num_workers=workers,
        capacity_schedule="uniform",
        learning_rate=1e-2,
        logging_steps=3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return MoNETrainer(model=model, args=args, data_collator=collate_examples, train_dataset=data), read


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_in_the_middle_of_an_epoch(tmp_path, shards, workers):
    whole, _ = make_trainer(shards, tmp_path / "out", workers, save_steps=8)
    whole.train()
    # 24 images in steps of 2 times 2: 6 steps an epoch, of which the checkpoint has seen 2 of the second.
    assert (whole.state.global_step, whole.state.epoch) == (12, 2)
    rest, read = make_trainer(shards, tmp_path / "rest", workers, save_strategy="no")
    rest.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name
    if not workers:
        assert len(read) == 4 * 2 * 2, "only what is left is decoded"
    waiting = [entry["data_waiting"] for entry in whole.state.log_history if "data_waiting" in entry]
    assert len(waiting) == 4 and all(0 < share < 1 for share in waiting)
