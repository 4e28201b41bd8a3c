# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Fine-tune a MoNE for image classification, or train one from scratch.

    python scripts/train_image_classification.py --train_file train.parquet --validation_file test.parquet \\
        --config_overrides "hidden_size=128,num_hidden_layers=6,num_attention_heads=4,intermediate_size=512,\\
    image_size=32,patch_size=4" --capacity_schedule uniform --eval_capacities 0.2 0.4 1.0 \\
        --do_train --do_eval --output_dir outputs/cifar10

The arguments may also stand in one JSON or YAML file. A run that was stopped goes on from its last checkpoint in
`--output_dir` when it is started again.
"""

import ast
import difflib
import logging
import re
import sys
from dataclasses import dataclass, field

import numpy as np
import transformers
from transformers import AutoConfig, AutoImageProcessor, HfArgumentParser, ViTForImageClassification, ViTImageProcessor
from transformers.trainer_utils import get_last_checkpoint, set_seed

from mone import MoNEConfig, MoNEForImageClassification, count_macs
from mone.configuration_mone import as_pair
from mone.conversion import mone_from_vit
from mone.data import LabelledImages, collate_images, load_image_datasets, make_image_transforms
from mone.training import Accuracy, MoNETrainer, MoNETrainingArguments


logger = logging.getLogger("train_image_classification")


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a MoNE or ViT checkpoint. Without it, a new model is made."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Config fields of a new model, or to change in a checkpoint's: "
            "hidden_size=64,num_hidden_layers=2,router_layers=(0,1),..."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Hub token for private models."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and data sets are cached."})


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file with images and labels."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for validation."})
    validation_split: float = field(
        default=0.15, metadata={"help": "Share of the training images held out where no validation set is given."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Default: the only column of images."})
    label_column: str | None = field(default=None, metadata={"help": "Default: label or labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many images only."})
    min_crop: float = field(default=0.08, metadata={"help": "Least share of an image that a training crop keeps."})
    flip: bool = field(default=True, metadata={"help": "Mirror half of the training images."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and evaluate as `argv` (default: the command line) says; the metrics of the run."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser((ModelArguments, DataArguments, MoNETrainingArguments))
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        read = parser.parse_json_file if argv[0].endswith(".json") else parser.parse_yaml_file
        model_args, data_args, training_args = read(argv[0])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    set_seed(training_args.seed)

    model, image_processor, splits = load(model_args, data_args, training_args)
    data_sets = {}
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    for name, split in splits.items():
        if limits[name] is not None:
            split = split.shuffle(seed=training_args.seed).select(range(min(limits[name], len(split))))
        augment = make_image_transforms(
            image_processor,
            as_pair(model.config.image_size),
            train=name == "train",
            flip=data_args.flip,
            min_crop=data_args.min_crop,
        )
        data_sets[name] = LabelledImages(split, augment, training_args.seed)

    accuracy = Accuracy()

    def compute_metrics(prediction):
        return accuracy.compute(predictions=np.argmax(prediction.predictions, axis=1), references=prediction.label_ids)

    trainer = MoNETrainer(
        model=model,
        args=training_args,
        data_collator=collate_images,
        train_dataset=data_sets.get("train"),
        eval_dataset=data_sets.get("validation"),
        processing_class=image_processor,
        compute_metrics=compute_metrics,
    )
    metrics = {}
    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint or get_last_checkpoint_or_none(training_args.output_dir)
        if checkpoint is not None:
            logger.info("Going on from the checkpoint %s.", checkpoint)
        first_step = int(str(checkpoint).rpartition("-")[2]) if checkpoint else 0
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
        if trainer.state.global_step > first_step:  # a run that had finished before keeps its numbers
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", result.metrics)
        metrics.update(result.metrics)
    if training_args.do_eval:
        result = trainer.evaluate()
        for capacity in training_args.eval_capacities:
            result[f"eval_capacity_{capacity:g}_gmacs"] = count_macs(model.config, capacity) / 1e9
        trainer.log_metrics("eval", result)
        trainer.save_metrics("eval", result)
        metrics.update(result)
    if training_args.push_to_hub:
        trainer.push_to_hub(tasks="image-classification", tags=["image-classification", "vision", "mone"])
    return metrics


def load(model_args: ModelArguments, data_args: DataArguments, training_args: MoNETrainingArguments):
    """The model, its image processor and the data sets, with one set of labels."""
    overrides = parse_overrides(model_args.config_overrides or "")
    if model_args.model_name_or_path is None and not overrides:
        raise ValueError("Give --model_name_or_path, or --config_overrides for a new model.")
    hub = {
        "revision": model_args.model_revision,
        "token": model_args.token,
        "cache_dir": model_args.cache_dir,
    }
    names = None
    if model_args.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, **hub)
        if config.model_type not in ("mone", "vit"):
            raise ValueError(
                f"{model_args.model_name_or_path} is a {config.model_type!r} model; allowed are 'mone' and 'vit'."
            )
        if not training_args.do_train:
            names = [config.id2label[number] for number in range(config.num_labels)]

    source = {name: getattr(data_args, name) for name in DataArguments.__annotations__ if name not in NOT_OF_SOURCE}
    splits = load_image_datasets(
        **source,
        label_names=names,
        seed=training_args.seed,
        token=model_args.token,
        cache_dir=model_args.cache_dir,
    )
    for needed, name in ((training_args.do_train, "train"), (training_args.do_eval, "validation")):
        if needed and name not in splits:
            raise ValueError(f"No {name} set is given, but --do_{'train' if name == 'train' else 'eval'} needs one.")
    names = next(iter(splits.values())).features["label"].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}

    if model_args.model_name_or_path is None:
        config = MoNEConfig(**overrides, **labels)
        height, width = as_pair(config.image_size)
        processor = ViTImageProcessor(size={"height": height, "width": width})
        return MoNEForImageClassification(config), processor, splits

    processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path, **hub)
    # Another number of classes than the checkpoint's gets a new classifier.
    options = {**hub, **labels, "ignore_mismatched_sizes": True}
    if config.model_type == "vit":
        vit = ViTForImageClassification.from_pretrained(model_args.model_name_or_path, **options)
        return mone_from_vit(vit, **overrides), processor, splits
    model = MoNEForImageClassification.from_pretrained(model_args.model_name_or_path, **options, **overrides)
    return model, processor, splits


def parse_overrides(text: str) -> dict:
    """`"hidden_size=64,router_layers=(0,1),pooling=cls"` -> fields of MoNEConfig.

    Raises:
        ValueError: for a part without "=", or a name that is no field.
    """
    fields = {}
    for part in re.split(r",(?![^(\[]*[)\]])", text.replace(" ", "")):  # commas outside of brackets
        name, equals, value = part.partition("=")
        if not part:
            continue
        if not equals or name not in MoNEConfig.__annotations__:
            close = difflib.get_close_matches(name, MoNEConfig.__annotations__, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"--config_overrides: {part!r} is not FIELD=VALUE with a field of MoNEConfig.{hint}")
        try:
            fields[name] = ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
        except (SyntaxError, ValueError):
            fields[name] = value  # a string
    return fields


# Fields of DataArguments that say what to do with the images, and not where they are.
NOT_OF_SOURCE = ("max_train_samples", "max_eval_samples", "min_crop", "flip")


def get_last_checkpoint_or_none(folder: str) -> str | None:
    try:
        return get_last_checkpoint(folder)
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    main()
