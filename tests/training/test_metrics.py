"""Metrics without a network."""

import socket

import evaluate
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from datasets import Dataset, Image
from transformers import EvalPrediction, ViTImageProcessor, pipeline

from mone import MoNEConfig, MoNEForImageClassification
from mone.data import IGNORED
from mone.training import Accuracy, PrecisionAt1, calibration_error, classification_metrics


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


def test_precision_at_1_is_the_published_definition():
    """Row by row: a hit where the arg-max class is among the labels; rows without labels do not count."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(40, 5)).astype(np.float32)
    labels = (generator.random((40, 5)) < 0.4).astype(np.float32)
    labels[[3, 9]] = 0
    labels[5] = [1, 1, 0, 1, 0]
    labels[11] = IGNORED
    hits, counted, kept = 0, 0, []
    for row, (scores, positive) in enumerate(zip(logits, labels, strict=True)):
        if row == 11:
            continue
        kept.append(row)
        if positive.sum() > 0:
            counted += 1
            hits += positive[int(scores.argmax())] == 1
    assert 0 < hits < counted <= 37
    metrics = classification_metrics(EvalPrediction(logits, labels))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits[kept]), torch.tensor(labels[kept]))
    expected = {"precision_at_1": hits / counted, "loss": loss.item(), "unreadable": 1}
    assert metrics == {name: pytest.approx(value) for name, value in expected.items()}
    metric = PrecisionAt1()
    assert metric.compute(predictions=[1, 2, 0], references=[[0, 1], [], [2]]) == {"precision_at_1": 0.5}
    with pytest.raises(ValueError, match="None of the 2 examples has a label"):
        metric.compute(predictions=[1, 2], references=[[], []])


def test_the_metrics_of_an_evaluation_are_those_of_the_classes_but_need_no_cache(monkeypatch):
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(30, 4)).astype(np.float32)
    labels, several = generator.integers(0, 4, 30), (generator.random((30, 4)) < 0.3).astype(np.int64)
    predicted = logits.argmax(1)
    one = Accuracy().compute(predictions=predicted, references=labels)
    any_of = PrecisionAt1().compute(predictions=predicted, references=[np.flatnonzero(row) for row in several])
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", "/proc/nowhere")
    with pytest.raises(OSError, match="nowhere"):
        Accuracy()
    assert classification_metrics(EvalPrediction(logits, labels)).items() >= one.items()
    assert classification_metrics(EvalPrediction(logits, several)).items() >= any_of.items()
    with pytest.raises(ValueError, match="None of the 30 examples has a label"):
        classification_metrics(EvalPrediction(logits, 0 * several))


def test_values_of_a_regression_are_no_labels():
    prediction = EvalPrediction(np.zeros((2, 3), np.float32), np.array([[0.5, 1.0, 0.0], [2.0, 0.0, 1.0]]))
    with pytest.raises(ValueError, match="must be 0 and 1 for each class, not a regression"):
        classification_metrics(prediction)


def test_with_one_label_each_precision_at_1_is_the_accuracy():
    logits = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32)
    labels = np.arange(30) % 4
    one = classification_metrics(EvalPrediction(logits, labels))
    several = classification_metrics(EvalPrediction(logits, np.eye(4, dtype=np.float32)[labels]))
    assert several["precision_at_1"] == one["accuracy"]


def test_calibration_error_by_a_loop_over_bins():
    generator = np.random.default_rng(2)
    confidence, correct = generator.random(200), generator.random(200) < 0.5
    confidence[:2] = (0.0, 1.0)
    expected = 0.0
    for number in range(15):
        inside = [i for i, c in enumerate(confidence) if number / 15 < c <= (number + 1) / 15 or (number == 0 == c)]
        if inside:
            expected += len(inside) / 200 * abs(correct[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, correct) == pytest.approx(expected)
    assert calibration_error(np.full(10, 0.7), np.arange(10) < 7) == pytest.approx(0)


@pytest.mark.parametrize("multi_label", [False, True])
def test_calibration_of_a_sure_model(multi_label):
    """Sure of everything and right in three of four: the error is a quarter."""
    logits = 100 * np.eye(4, dtype=np.float32) - 50
    labels = np.array([0, 1, 2, 0])
    labels = np.eye(4, dtype=np.float32)[labels] if multi_label else labels
    metrics = classification_metrics(EvalPrediction(logits, labels), calibration=True)
    assert metrics["calibration_error"] == pytest.approx(0.25)


def test_evaluates_evaluator_takes_our_models_and_metric(tmp_path, monkeypatch):
    """Offline, and the same accuracy as by hand: a folder, and a pipeline with a capacity."""

    def refuse(*args):
        raise AssertionError("nothing may open a connection")

    torch.manual_seed(0)
    config = MoNEConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        initializer_range=0.5,
        capacity=0.4,
        id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2},
    )
    model = MoNEForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    images = [PIL.Image.fromarray(image) for image in pixels]
    labels = [i % 3 for i in range(12)]
    data = Dataset.from_dict({"image": images, "label": labels}).cast_column("image", Image())
    evaluator = evaluate.evaluator("image-classification")
    options = {"data": data, "metric": Accuracy(), "label_mapping": config.label2id}
    results = {0.4: evaluator.compute(model_or_pipeline=str(tmp_path), **options)}
    # evaluate 0.4.6 asks pipelines whether they are of this class, which transformers 5 no longer has.
    monkeypatch.setattr(transformers, "TFPreTrainedModel", type("TFPreTrainedModel", (), {}), raising=False)
    for capacity in (0.2, 1.0):
        classify = pipeline("image-classification", model=model, image_processor=processor, capacity=capacity)
        results[capacity] = evaluator.compute(model_or_pipeline=classify, **options)
    for capacity, result in results.items():
        with torch.no_grad():
            logits = model(**processor(images=images, return_tensors="pt"), capacity=capacity).logits
        expected = (logits.argmax(-1) == torch.tensor(labels)).float().mean().item()
        assert result["accuracy"] == pytest.approx(expected)
