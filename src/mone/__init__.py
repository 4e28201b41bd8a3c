# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Mixture of Nested Experts (MoNE, NeurIPS 2024) for Hugging Face Transformers.

Importing this package registers the Auto classes and the pipelines' `capacity` argument for this process.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

from .capacity import (
    effective_capacity,
    greedy_allocation,
    one_hot_allocation,
    proportionate_allocation,
    solve_capacity_distribution,
    uniform_allocation,
)
from .configuration_mone import MoNEConfig, MoNEViViTConfig
from .flops import capacity_for_macs, count_macs
from .modeling_mone import MoNEForImageClassification, MoNEModel
from .modeling_mone_vivit import MoNEViViTForVideoClassification, MoNEViViTModel
from .pipelines import register_pipelines
from .routing import expert_preferred_routing
from .video_processing_mone import MoNEViViTVideoProcessor


AutoConfig.register("mone", MoNEConfig)
AutoModel.register(MoNEConfig, MoNEModel)
AutoModelForImageClassification.register(MoNEConfig, MoNEForImageClassification)
AutoConfig.register("mone_vivit", MoNEViViTConfig)
AutoModel.register(MoNEViViTConfig, MoNEViViTModel)
AutoModelForVideoClassification.register(MoNEViViTConfig, MoNEViViTForVideoClassification)
AutoVideoProcessor.register(MoNEViViTConfig, MoNEViViTVideoProcessor)
AutoImageProcessor.register(
    MoNEConfig, image_processor_classes={"torchvision": ViTImageProcessor, "pil": ViTImageProcessorPil}
)
# With these, save_pretrained writes the modeling code beside the weights (trust_remote_code).
MoNEConfig.register_for_auto_class()
MoNEModel.register_for_auto_class("AutoModel")
MoNEForImageClassification.register_for_auto_class("AutoModelForImageClassification")
MoNEViViTConfig.register_for_auto_class()
MoNEViViTModel.register_for_auto_class("AutoModel")
MoNEViViTForVideoClassification.register_for_auto_class("AutoModelForVideoClassification")
MoNEViViTVideoProcessor.register_for_auto_class()
register_pipelines()

__version__ = "0.1.0"

__all__ = [
    "MoNEConfig",
    "MoNEForImageClassification",
    "MoNEModel",
    "MoNEViViTConfig",
    "MoNEViViTForVideoClassification",
    "MoNEViViTModel",
    "MoNEViViTVideoProcessor",
    "capacity_for_macs",
    "count_macs",
    "effective_capacity",
    "expert_preferred_routing",
    "greedy_allocation",
    "one_hot_allocation",
    "proportionate_allocation",
    "solve_capacity_distribution",
    "uniform_allocation",
]
