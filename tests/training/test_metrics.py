"""Metrics without a network."""

import socket

import pytest

from mone.training import Accuracy


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
