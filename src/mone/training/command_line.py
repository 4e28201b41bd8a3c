# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""The options of the training scripts, and how they are read."""

import ast
import dataclasses
import difflib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import transformers
import yaml
from transformers import HfArgumentParser
from transformers.trainer_utils import set_seed

from ..configuration_mone import MoNEConfig
from .arguments import MoNETrainingArguments


@dataclass
class ModelArguments:
    """Which model the training scripts start from, and how it is loaded."""

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
    loss: str | None = field(
        default=None,
        metadata={
            "help": "softmax: one class per example. sigmoid: a yes or no for each class, also where every example "
            "has one (AugReg). Default: the checkpoint's, else sigmoid where examples have lists of labels.",
            "choices": ["softmax", "sigmoid"],
        },
    )
    head_bias: float | None = field(
        default=None,
        metadata={
            "help": "Start a new classifier with zero weights and this bias, such as -log(classes) for the sigmoid "
            "loss. Default: random weights in a new model, zeros in one that was made from another or loaded."
        },
    )
    resize: int | None = field(
        default=None,
        metadata={
            "help": "Shorter side in pixels to which images of an evaluation, and all videos, are resized before a "
            "crop of the model's image size. Default: the checkpoint's; of a new model, images are resized as a whole "
            "and videos to 256/224 of the image size."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "eager, sdpa, flash_attention_2, flex_attention, ..., as Transformers has them. Default: sdpa. "
            "With --bf16 --use_cpu eager may be faster."
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
    """Which examples the training scripts read, and how they are augmented."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of examples per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same for validation."})
    train_file: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Parquet files with examples and labels, patterns such as 'train-*.parquet', or folders of such "
            "files; for videos also lists of files."
        },
    )
    validation_file: list[str] = field(default_factory=list, metadata={"help": "The same for validation."})
    validation_split: float = field(
        default=0.15,
        metadata={
            "help": "Share of the training examples held out where no validation set is given. Of a data set on the "
            "Hub that has no validation set, the test set is taken for one."
        },
    )
    label_column: str | None = field(default=None, metadata={"help": "Default: label or labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many examples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many examples only."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read parquet files or the Hub while the run goes on, without a copy in the cache. Shuffling is "
            "by file and in a buffer."
        },
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Examples that a worker shuffles in memory with --streaming."}
    )
    flip: bool = field(default=True, metadata={"help": "Mirror half of the training examples."})
    randaugment_layers: int = field(
        default=0, metadata={"help": "RandAugment's number of operations on a training example; 0 for none."}
    )
    randaugment_magnitude: int = field(
        default=10,
        metadata={
            "help": "RandAugment's strength on the published scale, 0 to 30; torchvision's strongest is 10, to which "
            "larger ones are cut."
        },
    )

    measure_input: int = field(
        default=0,
        metadata={
            "help": "Instead of training, time so many training batches of --per_device_train_batch_size as they are "
            "read by --dataloader_num_workers."
        },
    )

    def source(self) -> dict:
        """Arguments of `load_labelled_datasets`: where the examples are."""
        names = (
            *("dataset_name", "dataset_config_name", "train_dir", "validation_dir", "train_file", "validation_file"),
            *("validation_split", "label_column", "streaming"),
        )
        return {name: getattr(self, name) for name in names}


def parse_arguments(argv: list[str], *classes: type) -> tuple:
    """Instances of the dataclasses, from options, or from a JSON or YAML file and options; logging and seeds are set.

    The file comes first. Options win over it, except that `--config_overrides` adds to the file's, field by field.

    Raises:
        ValueError: an unknown option, with the one that may have been meant.
    """
    parser = HfArgumentParser((*classes, MoNETrainingArguments), allow_abbrev=False)
    of_file = None
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        settings = _read_settings(argv[0], {f.name: f for c in parser.dataclass_types for f in dataclasses.fields(c)})
        of_file = settings.pop("config_overrides", None)
        argv = [*_as_options(settings), *argv[1:]]
    parsed = parser.parse_args_into_dataclasses(argv)
    if of_file:
        (target,) = (arguments for arguments in parsed if hasattr(arguments, "config_overrides"))
        target.config_overrides = f"{of_file},{target.config_overrides or ''}"
    *others, training_args = parsed
    # One token for all: models, data, a teacher, and what is pushed.
    training_args.hub_token = training_args.hub_token or next(
        filter(None, (getattr(o, "token", None) for o in others)), None
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    set_seed(training_args.seed)
    return parsed


def _read_settings(path: str, known: dict[str, dataclasses.Field]) -> dict:
    """The options of a JSON or YAML file."""
    text = Path(path).read_text(encoding="utf-8")
    settings = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold options, `name: value`.")
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{path}: {name!r} is not an option.{_hint(str(name), known)}")
        if value == [] and known[name].default_factory is not list:  # else it is the default
            raise ValueError(f"{path}: {name} is an empty list: give it values, or leave it out.")
    return settings


def _hint(name: str, known: Iterable[str]) -> str:
    """For an error's end, the known name that is most like an unknown one; empty where none is."""
    close = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {close[0]}?" if close else ""


def _as_options(settings: dict) -> list[str]:
    """As they would be typed, so that a file's values are read and checked as those of the command line."""
    options = []
    for name, value in settings.items():
        if isinstance(value, list):
            options += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            options.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return options


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
            raise ValueError(
                f"--config_overrides: {part!r} is not FIELD=VALUE with a field of {config_class.__name__}."
                f"{_hint(name, known)}"
            )
        try:
            fields[name] = ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
        except (SyntaxError, ValueError):
            fields[name] = value  # a string
    return fields
