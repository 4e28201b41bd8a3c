# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Distillation (Hinton et al., https://arxiv.org/abs/1503.02531): what a student learns from a teacher's logits."""

import logging

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    PreTrainedModel,
)

from ..configuration_mone import MoNEConfig, MoNEViViTConfig, as_pair
from ..conversion import load_image_processor
from ..flops import count_macs
from ..modeling_mone import MoNEPreTrainedModel
from ..pixels import normalisation


logger = logging.getLogger(__name__)


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, multi_label: bool = False
) -> torch.Tensor:
    """T² KL(teacher || student) of the softened predictions, mean over the batch.

    Args:
        logits, teacher_logits: (batch, classes).
        temperature: T > 0 divides both. T² keeps the gradients' size.
        multi_label: each class is a yes or no of its own; the mean goes over classes, too, as in the labels' loss.
    """
    logits, teacher_logits = logits.float() / temperature, teacher_logits.float() / temperature
    if multi_label:
        target, cross_entropy = teacher_logits.sigmoid(), nn.functional.binary_cross_entropy_with_logits
        return temperature**2 * (cross_entropy(logits, target) - cross_entropy(teacher_logits, target))
    log_p, log_q = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    return temperature**2 * nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


class Teacher(nn.Module):
    """A frozen classifier of transformers, dense where it is a MoNE, on the student's `pixel_values`.

    The pixels are normalised anew and resized where its processor's mean, standard deviation and size differ from
    the student's.

    Args:
        name: folder or Hub name of an image classifier, or of a video classifier for a video student.
        config: the student's.
        processor: the student's; `None` where the teacher expects the same pixels.
        hub: further arguments of `from_pretrained`.

    Raises:
        ValueError: the teacher has another number of classes, does not take the student's input, or has no processor.
    """

    def __init__(self, name: str, config: MoNEConfig, processor=None, **hub):
        super().__init__()
        video = isinstance(config, MoNEViViTConfig)
        model_class = AutoModelForVideoClassification if video else AutoModelForImageClassification
        self.model: PreTrainedModel = model_class.from_pretrained(name, **hub).eval().requires_grad_(False)
        theirs = self.model.config
        if theirs.num_labels != config.num_labels:
            raise ValueError(f"The teacher {name} has {theirs.num_labels} classes, the student {config.num_labels}.")
        if [theirs.id2label[i] for i in range(theirs.num_labels)] != [config.id2label[i] for i in theirs.id2label]:
            logger.warning("The classes of the teacher %s are named or ordered otherwise than the student's.", name)
        if theirs.problem_type != config.problem_type and "multi_label_classification" in (
            theirs.problem_type,
            config.problem_type,
        ):
            logger.warning(
                "The teacher %s was trained with problem_type=%r, the student is with %r: one has a probability for "
                "each class, the other one over all of them.",
                *(name, theirs.problem_type, config.problem_type),
            )
        if processor is None:
            theirs = None
        elif video:
            theirs = AutoVideoProcessor.from_pretrained(name, **hub)
        else:
            theirs = load_image_processor(name, **hub)
            if theirs is None:
                raise ValueError(f"The teacher {name} has no image processor, by which to normalise its pixels.")
        self._set_pixels(config, processor, theirs)
        shape = (config.num_channels, *as_pair(config.image_size))
        example = torch.zeros(1, config.num_frames, *shape) if video else torch.zeros(1, *shape)
        try:
            self.macs = self._count_macs(example)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"The teacher {name} does not take the student's pixel_values of shape {tuple(example.shape)}: {error}"
            ) from error

    def _set_pixels(self, config, processor, theirs):
        scale, shift = torch.ones(config.num_channels, 1, 1), torch.zeros(config.num_channels, 1, 1)
        if processor is not None:
            (mean, std), (their_mean, their_std) = (normalisation(p, config.num_channels) for p in (processor, theirs))
            scale, shift = std / their_std, (mean - their_mean) / their_std
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        size = getattr(self.model.config, "image_size", None)
        self.size = None if size is None or as_pair(size) == as_pair(config.image_size) else as_pair(size)

    @torch.no_grad()
    def _count_macs(self, example: torch.Tensor) -> int:
        """Multiply-accumulates of one forward."""
        if isinstance(self.model, MoNEPreTrainedModel):
            self(example)
            return count_macs(self.model.config, 1.0)
        # Attention in plain products: not every fused kernel is known to the counter.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self(example)
        return counter.get_total_flops() // 2

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, [frames,] channels, height, width) -> logits (batch, classes)."""
        pixel_values = pixel_values * self.scale + self.shift
        if self.size is not None:
            resized = nn.functional.interpolate(
                pixel_values.flatten(0, -4), self.size, mode="bilinear", align_corners=False, antialias=True
            )
            pixel_values = resized.unflatten(0, pixel_values.shape[:-3])
        options = {"capacity": 1.0} if isinstance(self.model, MoNEPreTrainedModel) else {}
        return self.model(pixel_values=pixel_values, **options).logits
