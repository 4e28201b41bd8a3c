"""Metrics without a network."""

import socket

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from mone.data import IGNORED
from mone.training import Accuracy, classification_metrics


def test_accuracy_offline(monkeypatch):
    def refuse(*args):
        raise AssertionError("a metric must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    metric = Accuracy()
    assert metric.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}
    # Twice: a metric is used for every evaluation of a run.
    assert metric.compute(predictions=[1], references=[0]) == {"accuracy": 0.0}


def test_accuracy_in_batches():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}


def test_unreadable_examples_are_left_out_and_counted():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, IGNORED, 2, 1, IGNORED])
    kept = torch.tensor([0, 2, 3])
    metrics = classification_metrics(EvalPrediction(logits.numpy(), labels.numpy()))
    loss = torch.nn.functional.cross_entropy(logits[kept], labels[kept]).item()
    accuracy = (logits[kept].argmax(-1) == labels[kept]).float().mean().item()
    assert metrics == {"accuracy": pytest.approx(accuracy), "loss": pytest.approx(loss), "unreadable": 2}
    assert "unreadable" not in classification_metrics(EvalPrediction(logits[kept].numpy(), labels[kept].numpy()))


def test_nothing_readable_is_an_error():
    with pytest.raises(ValueError, match="None of the 2 examples"):
        classification_metrics(EvalPrediction(np.zeros((2, 3)), np.full(2, IGNORED)))
