"""Smoothed and mixed labels against torch's own."""

import random

import pytest
import torch
from torch.nn import functional as F

from mone.training.mixing import mixup, soft_labels


def test_smoothing_is_torchs():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    soft = soft_labels(labels, 5, 0.3, torch.float32)
    torch.testing.assert_close(F.cross_entropy(logits, soft), F.cross_entropy(logits, labels, label_smoothing=0.3))
    assert torch.equal(soft_labels(labels, 5, 0.0, torch.float32), F.one_hot(labels, 5).float())


def test_an_example_that_does_not_count_has_no_share():
    soft = soft_labels(torch.tensor([1, -100]), 3, 0.3, torch.float32)
    assert soft[0].sum() == pytest.approx(1) and torch.equal(soft[1], torch.zeros(3))


def test_probabilities_stay_probabilities():
    given = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(soft_labels(given, 3, 0.3, torch.float32), 0.7 * given + 0.1)


def test_each_example_is_mixed_with_the_one_before_it():
    pixel_values, labels = torch.randn(4, 3, 2, 2), torch.eye(4)
    mixed_pixels, mixed_labels = mixup(pixel_values, labels, 0.5, random.Random(3))
    share = random.Random(3).betavariate(0.5, 0.5)
    assert 0 < share < 1
    for i in range(4):
        torch.testing.assert_close(mixed_pixels[i], share * pixel_values[i] + (1 - share) * pixel_values[i - 1])
        torch.testing.assert_close(mixed_labels[i], share * labels[i] + (1 - share) * labels[i - 1])
