# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts share: arguments, data sets cut to size, and the run itself."""

import ast
import difflib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import transformers
from datasets import DatasetDict
from transformers import BaseImageProcessor, BaseVideoProcessor, HfArgumentParser, PreTrainedModel
from transformers.trainer_utils import set_seed

from ..configuration_mone import MoNEConfig
from ..data import LabelledExamples, collate_examples
from ..flops import count_macs
from .arguments import MoNETrainingArguments
from .metrics import classification_metrics
from .resumption import last_complete_checkpoint
from .trainer import MoNETrainer


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a checkpoint. Without it, a new model is made."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Config fields of a new model, or to change in a checkpoint's: "
            "hidden_size=64,num_hidden_layers=2,router_layers=(0,1),..."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Hub token for private models and data."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and data sets are cached."})

    @property
    def hub(self) -> dict:
        """Arguments of `from_pretrained`."""
        return {"revision": self.model_revision, "token": self.token, "cache_dir": self.cache_dir}


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of examples per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    train_file: str | None = field(
        default=None, metadata={"help": "Parquet file with examples and labels; for videos also a list of files."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for validation."})
    validation_split: float = field(
        default=0.15, metadata={"help": "Share of the training examples held out where no validation set is given."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Default: label or labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many examples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many examples only."})
    flip: bool = field(default=True, metadata={"help": "Mirror half of the training examples."})

    def source(self) -> dict:
        """Arguments of `load_labelled_datasets`: where the examples are."""
        others = ("max_train_samples", "max_eval_samples", "flip")
        names = [name for name in DataArguments.__dataclass_fields__ if name not in others]
        return {name: getattr(self, name) for name in names}


def parse_arguments(argv: list[str], *classes: type) -> tuple:
    """Instances of the dataclasses, from options or from one JSON or YAML file; logging and seeds are set."""
    parser = HfArgumentParser((*classes, MoNETrainingArguments))
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        read = parser.parse_json_file if argv[0].endswith(".json") else parser.parse_yaml_file
        parsed = read(argv[0])
    else:
        parsed = parser.parse_args_into_dataclasses(argv)
    training_args = parsed[-1]
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    set_seed(training_args.seed)
    return parsed


def parse_overrides(text: str | None, config_class: type[MoNEConfig] = MoNEConfig) -> dict:
    """`"hidden_size=64,router_layers=(0,1),pooling=cls"` -> fields of `config_class`.

    Raises:
        ValueError: for a part without "=", or a name that is no field.
    """
    known = {**MoNEConfig.__annotations__, **config_class.__annotations__}
    fields = {}
    for part in re.split(r",(?![^(\[]*[)\]])", (text or "").replace(" ", "")):  # commas outside of brackets
        name, equals, value = part.partition("=")
        if not part:
            continue
        if not equals or name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"--config_overrides: {part!r} is not FIELD=VALUE with a field of {config_class.__name__}.{hint}"
            )
        try:
            fields[name] = ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
        except (SyntaxError, ValueError):
            fields[name] = value  # a string
    return fields


def prepare_splits(splits: DatasetDict, data_args: DataArguments, training_args: MoNETrainingArguments) -> DatasetDict:
    """Check that what the run needs is there, and cut it to the numbers asked for.

    Raises:
        ValueError: names the missing split.
    """
    for needed, name in ((training_args.do_train, "train"), (training_args.do_eval, "validation")):
        if needed and name not in splits:
            raise ValueError(f"No {name} set is given, but --do_{'train' if name == 'train' else 'eval'} needs one.")
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    return DatasetDict(
        {
            name: split
            if limits[name] is None
            else split.shuffle(seed=training_args.seed).select(range(min(limits[name], len(split))))
            for name, split in splits.items()
        }
    )


def label_fields(splits: DatasetDict) -> dict[str, dict]:
    """Config fields that name the classes."""
    names = next(iter(splits.values())).features["label"].names
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def train_and_evaluate(
    model: PreTrainedModel,
    processor: BaseImageProcessor | BaseVideoProcessor,
    splits: DatasetDict,
    make_transforms: Callable[..., Callable],
    args: MoNETrainingArguments,
    task: str,
) -> dict[str, float]:
    """Do what the arguments say (do_train, do_eval, push_to_hub), from the last checkpoint in the output folder on.

    Args:
        model, processor: what to train and to save.
        splits: "train" and "validation", those needed.
        make_transforms: `train=True` or `False` -> the transforms of a `LabelledExamples`.
        task: of the Hub, "image-classification" or "video-classification".

    Returns:
        All metrics; they are also saved in the output folder.
    """
    data_sets = {
        name: LabelledExamples(split, make_transforms(train=name == "train"), args.seed, train=name == "train")
        for name, split in splits.items()
    }
    trainer = MoNETrainer(
        model=model,
        args=args,
        data_collator=collate_examples,
        train_dataset=data_sets.get("train"),
        eval_dataset=data_sets.get("validation"),
        processing_class=processor,
        compute_metrics=classification_metrics,
    )
    metrics = {}
    if args.do_train:
        checkpoint = args.resume_from_checkpoint or last_complete_checkpoint(args.output_dir)
        if checkpoint is not None:
            logger.info("Going on from the checkpoint %s.", checkpoint)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        unreadable = data_sets["train"].unreadable
        if unreadable:
            result.metrics["train_unreadable"] = len(unreadable)
            logger.warning(
                "%d of %d training examples could not be read and were replaced by others: rows %s.",
                *(len(unreadable), len(data_sets["train"]), ", ".join(map(str, unreadable[:20]))),
            )
        trainer.save_model()
        trainer.save_state()
        if trainer.state.global_step > trainer._initial_global_step:  # one that had finished before keeps its numbers
            trainer.log_metrics("train", result.metrics)
            trainer.save_metrics("train", result.metrics)
        metrics.update(result.metrics)
    if args.do_eval:
        result = trainer.evaluate()
        for capacity in args.eval_capacities:
            result[f"eval_capacity_{capacity:g}_gmacs"] = count_macs(model.config, capacity) / 1e9
        trainer.log_metrics("eval", result)
        trainer.save_metrics("eval", result)
        metrics.update(result)
    if args.push_to_hub:
        trainer.push_to_hub(tasks=task, tags=[task, "vision", "mone"])
    return metrics
