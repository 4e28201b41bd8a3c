# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""What every source is read into, a plain ViT in MoNE's terms, and the model that is built from it."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from ..configuration_mone import MoNEConfig, as_pair
from ..modeling_mone import MoNEForImageClassification, MoNEModel, patch_grid, resize_positions
from .folding import cls_token_to_register, num_registers


logger = logging.getLogger(__name__)

# Of every config, beside the fields of its model.
LABEL_FIELDS = ("num_labels", "id2label", "label2id", "problem_type")

# Weights do not show these, and fit whatever they are: only a source that does not state them can be given others.
STATED_FIELDS = ("num_attention_heads", "hidden_act", "layer_norm_eps")


@dataclass
class Tower:
    """A pre-norm ViT whose weights have the names, shapes and layout of [`MoNEModel`]'s.

    Args:
        name: of the source, for messages.
        fields: of [`MoNEConfig`], and of the labels where it has a classifier.
        weights: state dict of `MoNEModel` without routers, and `classifier.weight` and `.bias` for the pooled tokens.
        left: keys of the source that a MoNE has no use for, such as a pooler or a text tower.
    """

    name: str
    fields: dict
    weights: dict[str, torch.Tensor]
    left: list[str] = field(default_factory=list)


def check_fields(config: Mapping, *config_classes: type[MoNEConfig]) -> None:
    """Raise TypeError for a name that is a field of none of these, nor of the labels."""
    allowed = {*MoNEConfig.__annotations__, *LABEL_FIELDS}.union(*(c.__annotations__ for c in config_classes))
    unknown = sorted(set(config) - allowed)
    if unknown:
        names = " or ".join(c.__name__ for c in config_classes)
        raise TypeError(f"{unknown} are no fields of {names}; allowed are {sorted(allowed)}.")


def check_stated(config: Mapping, stated: Mapping, name: str) -> None:
    """Raise ValueError for a field to set that the source `name` states otherwise: it would be another function."""
    for key in STATED_FIELDS:
        if key in config and key in stated and config[key] != stated[key]:
            raise ValueError(f"{key}={config[key]!r}: {name} has {stated[key]!r}, and its weights are for that.")


def number_labels(fields: Mapping) -> dict:
    """`fields`, with the names of an `id2label` numbered from 0 and a `label2id` that says the same."""
    if fields.get("id2label") is None:
        return dict(fields)
    names = [fields["id2label"][number] for number in sorted(fields["id2label"], key=int)]
    ids = {name: number for number, name in enumerate(names)}
    return {**fields, "id2label": dict(enumerate(names)), "label2id": ids}


def count_labels(fields: Mapping, default: int | None = None) -> int | None:
    """The number of labels that `fields` give, as `id2label` or `num_labels`; `default` where they give none."""
    return len(fields["id2label"]) if "id2label" in fields else fields.get("num_labels", default)


def check_labels(config: Mapping) -> None:
    """Raise ValueError for labels to set that are none."""
    count = count_labels(config, 1)
    if count < 1:
        raise ValueError(f"num_labels={count} must be at least 1.")


def build_image_model(
    tower: Tower, attn_implementation: str | None = None, **config
) -> MoNEForImageClassification | MoNEModel:
    """The MoNE that is exactly `tower` at capacity 1.0, with fresh routers.

    A classifier where the tower has one or `config` gives labels. The tower's own is kept if the number of labels
    stays the same; else it is new.

    Args:
        config: fields of [`MoNEConfig`] to set. Another `image_size` resizes the positions, once and for all.

    Raises:
        TypeError: for a name that is no field.
        ValueError: lists the keys that are missing, have no counterpart or another shape; or for no labels, or a
            field that the tower states otherwise.
    """
    check_fields(config, MoNEConfig)
    check_labels(config)
    check_stated(config, tower.fields, tower.name)
    config = number_labels(config)
    tower = replace(tower, fields=number_labels(tower.fields), weights=dict(tower.weights))
    _leave_out_cut_patches(tower, config)
    _leave_out_other_classifier(tower, config)
    _change_pooling(tower, config)
    mone_config = MoNEConfig(**{**tower.fields, **config})
    _resize_positions(tower, mone_config)

    weights, has_head = tower.weights, "classifier.weight" in tower.weights
    model_class = MoNEForImageClassification if has_head or count_labels(config) is not None else MoNEModel
    patches = weights.get("embeddings.patch_embeddings.projection.weight")
    model = model_class._from_config(
        mone_config,
        dtype=None if patches is None else patches.dtype,  # None: it is reported below
        attn_implementation=attn_implementation,
    )
    if model_class is MoNEForImageClassification:
        weights = {k if k.startswith("classifier.") else f"mone.{k}": v for k, v in weights.items()}
    new = ("routers.", "mone.routers.") if has_head else ("routers.", "mone.routers.", "classifier.")
    load(model, weights, new, tower.name)
    if has_head:
        follow_labels(model, tower.fields.get("id2label"))
    elif model_class is MoNEForImageClassification:
        start_new_classifier(model)
    if tower.left:
        logger.warning("Left behind of %s, since a MoNE has no such part: %s", tower.name, ", ".join(tower.left))
    return model


# The steps of `build_image_model`. They change its own copies of the tower and of the fields to set.


def _leave_out_cut_patches(tower: Tower, config: dict) -> None:
    """Make the image size one of whole patches, all that a ViT reads of an image; a warning says so."""
    size, patch = as_pair(tower.fields["image_size"]), as_pair(tower.fields["patch_size"])
    covered = tuple(pixels // step * step for pixels, step in zip(size, patch, strict=True))
    if covered == size:
        return
    logger.warning(
        "Patches of %dx%d pixels do not cover the %dx%d of %s, which leaves the last ones out: the MoNE is for %dx%d.",
        *(*patch, *size, tower.name, *covered),
    )
    tower.fields["image_size"] = covered
    if as_pair(config.get("image_size", size)) == size:  # as its processor has it
        config["image_size"] = covered


def _leave_out_other_classifier(tower: Tower, config: dict) -> None:
    """Remove the tower's classifier, and what it says of labels, where `config` gives another number of labels."""
    count, classifier = count_labels(config), tower.weights.get("classifier.weight")
    if count is None or (classifier is not None and classifier.shape[0] == count):
        return
    tower.fields = {k: v for k, v in tower.fields.items() if k not in LABEL_FIELDS}
    tower.weights = {k: v for k, v in tower.weights.items() if not k.startswith("classifier.")}


def _change_pooling(tower: Tower, config: dict) -> None:
    """Make the class token a register if the pooling to set reads none.

    Raises:
        ValueError: a pooling for which the classifier was not trained, or that reads a class token that is not there.
    """
    own = tower.fields["pooling"]
    pooling = config.get("pooling", own)
    if pooling == own:
        return
    if "classifier.weight" in tower.weights:
        raise ValueError(
            f"pooling={pooling!r}: the classifier of {tower.name} reads pooling={own!r}. Another number of labels "
            "gives it a new one."
        )
    if own == "mean":
        raise ValueError(f"pooling={pooling!r}: {tower.name} reads no class token.")
    if pooling == "mean":
        cls_token_to_register(tower.weights)
        config["num_register_tokens"] = num_registers(tower.weights)


def _resize_positions(tower: Tower, config: MoNEConfig) -> None:
    """Resize the positions to the patches of another image size."""
    before, after = (patch_grid(config, as_pair(size)) for size in (tower.fields["image_size"], config.image_size))
    positions = tower.weights.get("embeddings.position_embeddings")
    if positions is None or before == after:
        return
    num_cls = int("embeddings.cls_token" in tower.weights)
    if positions.shape[1] == num_cls + before[0] * before[1]:  # else loading reports it
        tower.weights["embeddings.position_embeddings"] = resize_positions(
            positions, before, after, config.position_antialias
        )


def start_new_classifier(model: torch.nn.Module) -> None:
    """All zeros, as Scenic's fine-tuning starts it: it prefers no class and, to `calibrate`, is none."""
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)


@torch.no_grad()
def follow_labels(model: PreTrainedModel, before: Mapping[int, str] | None) -> None:
    """Put the rows of a classifier, made for the labels `before`, in the order of the model's, if they are the same.

    Other labels are taken for other names of the same classes, and where both are real ones a warning says so.
    """
    after = [model.config.id2label[number] for number in range(model.config.num_labels)]
    before = after if before is None else [before[number] for number in sorted(before)]
    if before == after:
        return
    if sorted(before) == sorted(after) and len(set(after)) == len(after):
        order = [before.index(name) for name in after]
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter[order])
    elif not any(re.fullmatch(r"LABEL_\d+", name) for name in (before[0], after[0])):
        changed = next((old, new) for old, new in zip(before, after, strict=True) if old != new)
        logger.warning(
            "The classifier is kept, but its %d classes have other names now, %r for example %r. Where they are other "
            "classes, it has to be trained.",
            *(len(after), *changed),
        )


def check_fit(
    message: str, missing: list[str], extra: list[str], shapes: list[tuple[str, torch.Size, torch.Size]]
) -> None:
    """Raise ValueError if any of the lists is not empty.

    Args:
        message: says whose weights do not fit, without a full stop.
        missing: keys of the model that the weights lack.
        extra: keys of the weights that the model lacks.
        shapes: key, shape of the weights and shape of the model, where the two differ.
    """
    if missing or extra or shapes:
        others = [f"{key} {tuple(have)} instead of {tuple(want)}" for key, have, want in shapes]
        raise ValueError(f"{message}. Missing: {missing}; without counterpart: {extra}; of another shape: {others}.")


@torch.no_grad()
def load(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], new: tuple[str, ...], name: str) -> None:
    """Copy `weights` into `model`, all but those whose names start with one of `new`.

    Raises:
        ValueError: lists the keys that are missing, have no counterpart or another shape; nothing was copied then.
    """
    state = model.state_dict()
    missing = [key for key in state if key not in weights and not key.startswith(new)]
    extra = [key for key in weights if key not in state]
    shapes = [
        (key, value.shape, state[key].shape)
        for key, value in weights.items()
        if key in state and value.shape != state[key].shape
    ]
    check_fit(f"The weights of {name} do not fit", missing, extra, shapes)
    for key, value in weights.items():
        state[key].copy_(value)
