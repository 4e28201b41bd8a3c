# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""What the training scripts share beside the trainer; whole runs are in tests/scripts."""

import pytest
import torch

from mone import MoNEConfig, MoNEForImageClassification
from mone.training.runs import start_classifier


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 16}


@pytest.mark.parametrize("checkpoint", [None, "org/model"])
@pytest.mark.parametrize("trained", [True, False])
def test_a_bias_starts_new_classifiers_and_leaves_trained_ones(checkpoint, trained, caplog):
    model = MoNEForImageClassification(MoNEConfig(**SIZES, num_labels=3))
    if not trained:  # as a checkpoint's of another number of classes comes
        torch.nn.init.zeros_(model.classifier.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_classifier(model, None, checkpoint)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    start_classifier(model, -7.0, checkpoint)
    kept = trained and checkpoint is not None
    assert kept == ("head_bias=-7.0 is for a new classifier: org/model keeps its own" in caplog.text)
    weight, bias = before["classifier.weight"], before["classifier.bias"]
    if not kept:
        weight, bias = torch.zeros_like(weight), torch.full((3,), -7.0)
    assert torch.equal(model.classifier.weight, weight) and torch.equal(model.classifier.bias, bias)
