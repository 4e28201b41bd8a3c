# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that survive a full disk and a kill, and that another number of processes can take up."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SAFE_WEIGHTS_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints


logger = logging.getLogger(__name__)

SETTINGS_NAME = "mone_settings.json"


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint in `folder` that was written to its end; those that were not are named in the log.

    trainer_state.json is the last file of a checkpoint: one that a kill cut short has none, or half of it.
    """
    if not os.path.isdir(folder):
        return None
    for checkpoint in reversed(sort_checkpoints(str(folder))):
        try:
            json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning("The checkpoint %s is incomplete, as if its writing was cut short: left out.", checkpoint)
        else:
            return checkpoint
    return None


def describe_last_checkpoint(folder: str | os.PathLike) -> str:
    """What a message about a run that ended early says of going on."""
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        return f"There is no checkpoint in {folder} yet: a new run starts from the beginning."
    return f"The last complete checkpoint is {checkpoint}."


def write_settings(folder: str | os.PathLike, settings: dict) -> None:
    """Keep with a checkpoint what [`check_settings`] compares."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, SETTINGS_NAME).write_text(json.dumps(settings, indent=2) + "\n")


def check_settings(checkpoint: str | os.PathLike, settings: dict) -> None:
    """Whether a run with these settings can go on from a checkpoint.

    Raises:
        ValueError: names those that differ. Checkpoints without a record of them pass.
    """
    path = Path(checkpoint, SETTINGS_NAME)
    if not path.is_file():
        return
    kept, given = json.loads(path.read_text()), json.loads(json.dumps(settings))
    changed = [
        f"{name}={given[name]} (was {kept[name]})" for name in given if kept.get(name, given[name]) != given[name]
    ]
    if changed:
        raise ValueError(
            f"The run of {checkpoint} cannot go on with other settings: {', '.join(changed)}. Give those it was "
            "started with, or start anew in another --output_dir (from its weights: --model_name_or_path)."
        )


@contextlib.contextmanager
def writing_checkpoint(folder: str | os.PathLike, is_main_process: bool) -> Iterator[None]:
    """Around the writing of a checkpoint: a failure, such as a full disk, leaves none that looks complete.

    Raises:
        OSError: instead of what writing raised, with the free space and the last complete checkpoint.
    """
    folder = Path(folder)
    if is_main_process:  # where this step was saved before, until all is written again
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:  # OSError, SafetensorError, torch's RuntimeError, ...
        parent = folder.parent
        space = f" {shutil.disk_usage(parent).free / 2**20:.1f} MiB were free there." if parent.exists() else ""
        # So that it does not keep filling the disk.
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(
            f"The checkpoint {folder} could not be written: {error}.{space} {describe_last_checkpoint(parent)} "
            "Start the same command again."
        ) from error


# Trainer keeps an optimiser's state by the numbers of the parameters, in optimizer.pt; under FSDP2, with full state
# dicts, by their names in optimizer.bin. Each reads its own only.


def crosses_fsdp(checkpoint: str | os.PathLike, is_fsdp_enabled: bool) -> bool:
    """Whether a run with FSDP2 goes on from a checkpoint without, or the other way round."""
    return Path(checkpoint, OPTIMIZER_NAME if is_fsdp_enabled else OPTIMIZER_NAME_BIN).is_file()


def check_not_deepspeed(checkpoint: str | os.PathLike) -> None:
    """For a run without DeepSpeed, which would find weights in such a checkpoint, but no optimiser state.

    Raises:
        ValueError: the checkpoint is DeepSpeed's.
    """
    if any(Path(checkpoint).glob("global_step*")):
        raise ValueError(
            f"The checkpoint {checkpoint} was written under DeepSpeed: only a run with the same configuration and "
            "number of processes can go on from it. With --model_name_or_path and another --output_dir, a new run "
            "starts from its weights."
        )


def load_model(checkpoint: str | os.PathLike, model: nn.Module) -> None:
    """Load the weights, which every checkpoint with full state dicts has as safetensors, with FSDP2 or without."""
    state = safetensors.torch.load_file(Path(checkpoint, SAFE_WEIGHTS_NAME))
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def load_optimizer(checkpoint: str | os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load an optimiser's state that was written with FSDP2, or without, into an optimiser of either kind.

    Args:
        checkpoint: folder of a run on one process, under DDP, or under FSDP2 with full state dicts.
        model, optimizer: as this run trains them.
    """
    if Path(checkpoint, OPTIMIZER_NAME_BIN).is_file():
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME_BIN), weights_only=True, map_location="cpu")
    else:
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME), weights_only=True, map_location="cpu")
        # Parameters by number, in the order of the groups, which is that of this run.
        names = {parameter: name for name, parameter in model.named_parameters()}
        ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            "state": {ordered[number]: values for number, values in state["state"].items()},
            "param_groups": [
                {**group, "params": [ordered[number] for number in group["params"]]} for group in state["param_groups"]
            ],
        }
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
