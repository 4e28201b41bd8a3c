"""MoNETrainer on a tiny model and random images. That models learn is tested in test_modeling_mone.py."""

import contextlib
import copy
import errno
import logging
import math
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import double_weights, randomise_, reference_model
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, ViTImageProcessor
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

from mone import (
    MoNEConfig,
    MoNEForImageClassification,
    MoNEViViTConfig,
    MoNEViViTForVideoClassification,
    count_macs,
)
from mone.data import IGNORED
from mone.training import (
    Accuracy,
    CapacitySchedule,
    MoNETrainer,
    MoNETrainingArguments,
    Teacher,
    classification_metrics,
    distillation_loss,
)
from mone.training.resumption import SETTINGS_NAME, last_complete_checkpoint


def tiny_model(**config) -> MoNEForImageClassification:
    torch.manual_seed(0)
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 4,
        "num_labels": 3,
    }
    return MoNEForImageClassification(MoNEConfig(**{**fields, **config}))


def tiny_video_model() -> MoNEViViTForVideoClassification:
    torch.manual_seed(0)
    config = MoNEViViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_temporal_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        tubelet_size=(2, 8, 8),
        num_frames=4,
        num_labels=3,
        initializer_range=0.2,
    )
    return MoNEViViTForVideoClassification(config)


def rows(count: int, labels=lambda i: i % 3) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": labels(i)} for i in range(count)]


def make_trainer(tmp_path, model=None, train=None, evaluation=None, processing_class=None, **args) -> MoNETrainer:
    accuracy = Accuracy()
    defaults = {"per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return MoNETrainer(
        model=model or tiny_model(),
        args=MoNETrainingArguments(output_dir=str(tmp_path / "out"), **{**defaults, "use_cpu": True, **args}),
        train_dataset=train or rows(16),
        eval_dataset=evaluation or rows(9),
        processing_class=processing_class,
        compute_metrics=lambda p: accuracy.compute(
            predictions=p.predictions.argmax(-1), references=p.label_ids.astype(int)
        ),
    )


def record_capacities(model) -> list:
    """The capacities that the model's forward is called with, as a growing list."""
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["capacity"]), with_kwargs=True)
    return seen


def test_each_step_runs_at_its_schedules_capacity(tmp_path):
    trainer = make_trainer(tmp_path, capacity_schedule="uniform", seed=5, max_steps=6, gradient_accumulation_steps=2)
    seen = record_capacities(trainer.model)
    trainer.train()
    steps = [CapacitySchedule("uniform", seed=5)(step)[0] for step in range(6)]
    assert seen == [capacity for capacity in steps for _ in range(2)]
    assert len(set(seen)) > 1


@pytest.mark.parametrize("options", [{}, {"mixup": 0.5}, {"distill_from": "self", "capacity": 0.5}], ids=str)
def test_bytes_train_as_the_pixels_they_stand_for(tmp_path, options):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=generator) for _ in range(8)]
    processor = ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    pixels = processor(images=images, do_resize=False, return_tensors="pt").pixel_values
    losses = []
    for values in (images, pixels):
        train = [{"pixel_values": value, "labels": i % 3} for i, value in enumerate(values)]
        trainer = make_trainer(tmp_path, train=train, max_steps=3, processing_class=processor, **options)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_bytes_without_a_processor(tmp_path):
    train = [{"pixel_values": torch.zeros(3, 16, 16, dtype=torch.uint8), "labels": 0}] * 4
    with pytest.raises(ValueError, match="bytes need a processing_class"):
        make_trainer(tmp_path, train=train).train()


def test_fixed_capacity_defaults_to_the_configs(tmp_path):
    trainer = make_trainer(tmp_path, model=tiny_model(capacity=0.3), max_steps=2)
    seen = record_capacities(trainer.model)
    trainer.train()
    assert seen == [0.3, 0.3]


def test_evaluation_at_several_capacities(tmp_path):
    trainer = make_trainer(tmp_path, eval_capacities=[0.2, 0.5, 1.0])
    for router in trainer.model.mone.routers:
        router.alpha.data.fill_(0.5)
    metrics = trainer.evaluate()
    pixel_values = torch.stack([row["pixel_values"] for row in trainer.eval_dataset])
    labels = torch.tensor([row["labels"] for row in trainer.eval_dataset])
    losses = []
    for capacity in (0.2, 0.5, 1.0):
        with torch.no_grad():
            output = trainer.model.eval()(pixel_values, labels=labels, capacity=capacity)
        losses.append(output.loss.item())
        assert metrics[f"eval_capacity_{capacity:g}_loss"] == pytest.approx(output.loss.item(), abs=1e-5)
        accuracy = (output.logits.argmax(-1) == labels).float().mean().item()
        assert metrics[f"eval_capacity_{capacity:g}_accuracy"] == pytest.approx(accuracy)
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert len({round(loss, 5) for loss in losses}) == 3
    seen = record_capacities(trainer.model)
    trainer.model.config.capacity = 0.3
    trainer.predict(rows(3))
    assert seen == [0.3], "a later prediction must not run at the last capacity, nor at the config's first"


class OverBatches:
    """Metrics of Trainer's `batch_eval_metrics`, which gather batches until they are asked for a result."""

    def __init__(self):
        self.logits = []

    def __call__(self, prediction, compute_result=True):
        assert isinstance(prediction.losses, torch.Tensor) and len(prediction.losses) == len(prediction.predictions)
        self.logits.append(torch.as_tensor(prediction.predictions))
        if compute_result:
            logits, self.logits = torch.cat(self.logits), []
            return {"examples": len(logits), "logit": logits.abs().mean(), "last": prediction.losses.sum().item()}


def describe(prediction) -> dict:
    """All that Trainer may hand to metrics, in numbers that tell it apart."""
    parts = [prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses]
    metrics = {"classes": [type(part).__name__ for part in parts], "lengths": [len(part) for part in parts[:2]]}
    parts = [np.concatenate(part) if isinstance(part, list) else part for part in parts]
    metrics |= {str(i): float(np.abs(part).sum()) for i, part in enumerate(parts) if part is not None}
    for labels in prediction.label_ids if isinstance(prediction.label_ids, list) else [prediction.label_ids]:
        labels[:] = 0  # of no other capacity
    return metrics


def hidden_states(prediction) -> dict:
    return {"hidden": float(np.abs(prediction.predictions[1][1]).sum())}


@pytest.mark.parametrize(
    ("metrics", "options"),
    [
        (None, {}),
        (None, {"eval_do_concat_batches": False}),
        (describe, {}),
        (describe, {"include_for_metrics": ["loss", "inputs"]}),
        (describe, {"include_for_metrics": ["loss"], "eval_do_concat_batches": False}),
        (describe, {"include_for_metrics": ["loss"], "eval_accumulation_steps": 1}),
        (describe, {"prediction_loss_only": True}),
        (hidden_states, {}),
        (OverBatches(), {"batch_eval_metrics": True, "include_for_metrics": ["loss"]}),
    ],
    ids=lambda value: getattr(value, "__name__", "over_batches" if isinstance(value, OverBatches) else str(value)),
)
def test_capacities_evaluated_together_have_the_metrics_of_each(tmp_path, metrics, options):
    model = tiny_model(initializer_range=0.3, output_hidden_states=metrics is hidden_states)
    capacities, size = [0.2, 0.5, 1.0], {"per_device_eval_batch_size": 3}
    trainer = make_trainer(tmp_path, model, evaluation=rows(8), eval_capacities=capacities, **size)
    trainer.compute_metrics = metrics
    for name, value in options.items():
        setattr(trainer.args, name, value)
    if metrics is not hidden_states:
        trainer.preprocess_logits_for_metrics = lambda logits, labels: logits + labels[:, None]
    together = trainer.evaluate()
    seen = []
    for capacity in capacities:
        alone = trainer.evaluate(capacity=capacity)
        for key in (key for key in alone if "_per_second" not in key and "time" not in key and key != "epoch"):
            found = together[f"eval_capacity_{capacity:g}_{key.removeprefix('eval_')}"]
            assert found == (alone[key] if isinstance(found, list) else pytest.approx(alone[key], rel=1e-6)), key
        measures = metrics is not None and not options.get("prediction_loss_only")
        assert measures == any(key.startswith(("eval_0", "eval_hidden", "eval_logit")) for key in alone)
        seen.append(alone["eval_loss"])
    assert together["eval_loss"] == pytest.approx(np.mean(seen)) and len(set(seen)) == 3
    assert together["eval_samples_per_second"] > 0
    assert trainer.compute_metrics is metrics, "the trainer has its own again"


def test_examples_are_read_once_for_all_capacities(tmp_path):
    read = []

    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            read.append(index)
            return rows(5)[index]

    trainer = make_trainer(tmp_path, evaluation=Examples(), eval_capacities=[0.2, 0.5, 1.0])
    seen = record_capacities(trainer.model)
    trainer.evaluate()
    assert sorted(read) == list(range(5)) and set(seen) == {0.2, 0.5, 1.0}
    unlabelled = [{"pixel_values": row["pixel_values"]} for row in rows(3)]
    assert not any("loss" in key for key in trainer.evaluate(unlabelled))
    assert len(trainer.predict(rows(3)).predictions) == 3, "a prediction after it is at one capacity"


def test_a_prediction_step_and_metrics_of_ones_own(tmp_path):
    """Each sees one capacity, and metrics may predict."""

    class Own(MoNETrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return loss, logits.argmax(-1), labels

    args = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    trainer = Own(tiny_model(), MoNETrainingArguments(**args, eval_capacities=[0.2, 1.0]), eval_dataset=rows(9))
    shapes = []

    def metrics(prediction):
        if len(prediction.predictions) == 9:
            shapes.append((prediction.predictions.shape, trainer.predict(rows(3)).predictions.shape))
        return {"count": len(prediction.predictions)}

    trainer.compute_metrics = metrics
    seen = record_capacities(trainer.model)
    measured = trainer.evaluate(metric_key_prefix="capacity")
    assert shapes == [((9,), (3,))] * 2 and seen[-2:] == [0.2, 1.0]
    assert measured["capacity_capacity_0.2_count"] == measured["capacity_count"] == 9


def test_metrics_that_fail_leave_the_trainer_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path, eval_capacities=[0.2, 1.0])

    def metrics(prediction):
        raise RuntimeError("no metrics")

    trainer.compute_metrics = metrics
    with pytest.raises(RuntimeError, match="no metrics"):
        trainer.evaluate()
    trainer.compute_metrics = lambda prediction: {"count": len(prediction.predictions)}
    assert trainer.evaluate(capacity=0.2)["eval_count"] == len(trainer.eval_dataset)


def test_several_evaluation_sets(tmp_path):
    trainer = make_trainer(tmp_path, evaluation={"a": rows(4), "b": rows(8)}, eval_capacities=[0.2, 1.0])
    metrics = trainer.evaluate()
    assert {f"eval_{s}_capacity_{c}_accuracy" for s in "ab" for c in ("0.2", "1")} <= set(metrics)


@pytest.mark.parametrize("capacity", [0.3, (0.0, 0.0, 1.0, 0.0)])
def test_a_calls_capacity_beats_the_arguments(tmp_path, capacity):
    evaluation = {"a": rows(4), "b": rows(8)}
    trainer = make_trainer(tmp_path, capacity=0.4, evaluation=evaluation, eval_capacities=[0.2, 1.0])
    seen = record_capacities(trainer.model)
    metrics = trainer.evaluate(capacity=capacity)
    assert "eval_a_accuracy" in metrics and not any("_capacity_" in key for key in metrics)
    trainer.evaluate(evaluation["a"], capacity=capacity)
    trainer.predict(evaluation["a"], capacity=capacity)
    assert set(seen) == {capacity} and len(seen) >= 4
    with pytest.raises(ValueError, match=r"capacity=0\.01 is out of range"):
        trainer.predict(evaluation["a"], capacity=0.01)
    del seen[:]
    trainer.evaluate(evaluation["a"])
    assert set(seen) == {0.2, 1.0}, "it holds for one call"


def test_prediction_without_labels_runs_at_the_capacity(tmp_path):
    trainer = make_trainer(tmp_path, capacity=0.4)
    seen = record_capacities(trainer.model)
    trainer.compute_metrics = None
    trainer.predict([{"pixel_values": row["pixel_values"]} for row in rows(3)])
    assert seen == [0.4]


def test_alpha_is_projected_after_every_step(tmp_path):
    """Adam moves alpha by about the learning rate: without projection it would pass 1 or 0 within a few steps."""
    trainer = make_trainer(tmp_path, capacity=0.4, max_steps=8, learning_rate=0.5, lr_scheduler_type="constant")
    alphas = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            alphas.append(model.mone.routers[0].alpha.item())

    trainer.add_callback(Watch())
    trainer.train()
    assert len(alphas) == 8
    assert all(0.0 <= alpha < 1.0 for alpha in alphas)


def test_routers_have_their_own_learning_rate_and_alpha_no_decay(tmp_path):
    rates = {"learning_rate": 1e-3, "router_learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, **rates, weight_decay=0.1, capacity_schedule="uniform")
    optimizer = trainer.create_optimizer()
    where = {p: group for group in optimizer.param_groups for p in group["params"]}
    model = trainer.model
    assert set(where) == set(model.parameters())
    router = model.mone.routers[0]
    assert {where[p]["lr"] for p in router.parameters()} == {1e-2}
    assert {where[p]["lr"] for p in set(model.parameters()) - set(router.parameters())} == {1e-3}
    assert where[router.alpha]["weight_decay"] == 0.0
    assert where[router.proj.weight]["weight_decay"] == 0.1
    assert where[model.classifier.weight]["weight_decay"] == 0.1
    assert where[model.mone.layernorm.weight]["weight_decay"] == 0.0


def test_training_the_dense_model_leaves_its_routers_alone(tmp_path):
    model = tiny_model()
    before = copy.deepcopy(model.mone.routers.state_dict())
    classifier = model.classifier.weight.detach().clone()
    make_trainer(tmp_path, model, rows(8), max_steps=2, learning_rate=1e-2).train()
    assert not torch.equal(model.classifier.weight, classifier)
    for name, value in model.mone.routers.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_routers_with_a_rate_are_trained_also_at_capacity_one(tmp_path, caplog):
    model = tiny_model()
    make_trainer(tmp_path, model, rows(8), max_steps=2, router_learning_rate=1e-1).train()
    assert model.mone.routers[0].alpha > 0
    assert "router_learning_rate also trains the routers, which learn nothing useful at capacity 1.0" in caplog.text


def test_layers_far_from_the_classifier_move_less(tmp_path):
    """Adam's first step moves each weight by its learning rate, whatever its gradient."""
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"learning_rate": 1e-3, "layer_decay": 0.5, "adam_epsilon": 1e-20, "lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path, model, rows(4), max_steps=1, weight_decay=0.0, max_grad_norm=0.0, **options)
    trainer.train()
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert moved["classifier.weight"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["mone.layers.1.mlp.fc2.weight"] == pytest.approx(5e-4, rel=1e-3)
    assert moved["mone.layers.0.mlp.fc2.weight"] == pytest.approx(2.5e-4, rel=1e-3)
    assert moved["mone.embeddings.patch_embeddings.projection.weight"] == pytest.approx(1.25e-4, rel=1e-3)


@pytest.mark.parametrize("decay", [0.0, 1.5, float("nan")])
def test_a_layer_decay_out_of_range_is_refused(tmp_path, decay):
    with pytest.raises(ValueError, match=re.escape(f"layer_decay={decay} must be in (0, 1].")):
        MoNETrainingArguments(output_dir=str(tmp_path), layer_decay=decay)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_gradient_accumulation_equals_the_full_batch(tmp_path, problem_type):
    """Also with a last micro-batch that is smaller, where a mean of means would be wrong."""
    labels = {
        "single_label_classification": lambda i: i % 3,
        "multi_label_classification": lambda i: [float(i % 2), 1.0, 0.0],
        "regression": lambda i: [0.1 * i, 1.0, -0.5],
    }[problem_type]
    results = []
    for batch_size, accumulation in ((7, 1), (2, 4)):
        model = tiny_model(problem_type=problem_type)
        trainer = make_trainer(
            tmp_path,
            model=model,
            train=rows(7, labels),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            capacity=0.4,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        trainer.train()
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=1e-5, msg=name)
    assert not torch.equal(results[0]["classifier.bias"], torch.zeros(3))


@pytest.mark.parametrize(
    "options",
    [
        {"capacity_schedule": "uniform", "seed": 7},
        {"capacity_schedule": "joint"},
        {"capacity_schedule": "joint", "distill_from": "self", "distillation_weight": 0.7},
        {"capacity": 0.4, "distill_from": "teacher", "distillation_temperature": 2.0, "mixup": 0.0},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_four_micro_batches_equal_the_full_batch(tmp_path, options):
    if options.get("distill_from") == "teacher":
        tiny_model(initializer_range=0.5).save_pretrained(tmp_path / "teacher")
        options = {**options, "distill_from": str(tmp_path / "teacher")}
    results, losses = [], []
    for batch_size, accumulation in ((7, 1), (2, 4)):
        model = tiny_model(initializer_range=0.2)
        trainer = make_trainer(
            tmp_path,
            model=model,
            train=rows(7),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            **options,
        )
        losses.append(trainer.train().training_loss)
        results.append(model.state_dict())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=0, msg=name)


def after_one_step(tmp_path, model, train, **options) -> tuple[dict, float]:
    """Gradients of a step, read off plain gradient descent, and its loss."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(
        tmp_path,
        model=model,
        train=train,
        per_device_train_batch_size=len(train),
        max_steps=1,
        optim="sgd",
        learning_rate=1e-2,
        max_grad_norm=0.0,
        **options,
    )
    loss = trainer.train().training_loss
    return {name: (before[name] - value) / 1e-2 for name, value in model.state_dict().items()}, loss


def test_joint_training_is_the_sum_over_sliced_models(tmp_path):
    """Against the naive model of reference.py, which slices the weights for one token at a time."""
    model = randomise_(tiny_model(num_hidden_layers=1), alpha=0.3)
    train = rows(3)
    weights = double_weights(model)
    pixel_values = torch.stack([row["pixel_values"] for row in train]).double()
    labels = torch.tensor([row["labels"] for row in train])
    expected = 0
    for width in range(4):
        one_hot = [float(expert == width) for expert in range(4)]
        logits = reference_model(weights, model.config, pixel_values, one_hot).logits
        expected = expected + torch.nn.functional.cross_entropy(logits, labels)
    expected.backward()
    gradients, loss = after_one_step(tmp_path, model, train, capacity_schedule="joint")
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), weights[name].grad, atol=1e-4, rtol=1e-4, msg=name)


def test_the_widths_are_propagated_back_in_turn(tmp_path):
    """So that the memory of one of them is enough."""
    model, events = tiny_model(), []
    model.register_forward_pre_hook(lambda *_: events.append("forward"))
    model.classifier.bias.register_hook(lambda _: events.append("backward"))
    make_trainer(tmp_path, model=model, capacity_schedule="joint", max_steps=1).train()
    assert events == ["forward", "backward"] * 4


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_dense_model_teaches_the_smaller_ones_and_learns_from_the_labels(tmp_path, temperature):
    model = tiny_model(initializer_range=0.3)
    model.mone.routers[0].alpha.data.fill_(0.3)
    same = copy.deepcopy(model).train()
    train = rows(5)
    pixel_values = torch.stack([row["pixel_values"] for row in train])
    labels = torch.tensor([row["labels"] for row in train])
    dense = same(pixel_values, labels=labels, capacity=1.0)
    small = same(pixel_values, labels=labels, capacity=0.3)
    divergence = distillation_loss(small.logits, dense.logits.detach(), temperature)
    expected = dense.loss + 0.75 * small.loss + 0.25 * divergence
    expected.backward()
    gradients, loss = after_one_step(
        tmp_path,
        model,
        train,
        capacity=0.3,
        distill_from="self",
        distillation_weight=0.25,
        distillation_temperature=temperature,
    )
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in same.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_teacher_checkpoint_teaches(tmp_path):
    tiny_model(initializer_range=0.5).save_pretrained(tmp_path / "teacher")
    teacher = Teacher(str(tmp_path / "teacher"), tiny_model().config)
    model = tiny_model(initializer_range=0.3)
    model.mone.routers[0].alpha.data.fill_(0.3)
    same = copy.deepcopy(model).train()
    train = rows(5)
    pixel_values = torch.stack([row["pixel_values"] for row in train])
    expected = distillation_loss(same(pixel_values, capacity=0.3).logits, teacher(pixel_values), 1.0)
    expected.backward()
    options = {"capacity": 0.3, "distill_from": str(tmp_path / "teacher"), "distillation_weight": 1.0}
    gradients, loss = after_one_step(tmp_path, model, train, **options)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in same.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)
    trainer = make_trainer(tmp_path, model=tiny_model(), max_steps=2, **options)
    trainer.train()
    forward = count_macs(model.config, 1.0)
    assert trainer.state.total_flos == 2 * 8 * (3 * count_macs(model.config, 0.3) + forward)
    # Evaluation is that of the labels.
    assert trainer.evaluate(train)["eval_loss"] == pytest.approx(
        trainer.model(pixel_values, labels=torch.tensor([row["labels"] for row in train]), capacity=0.3).loss.item()
    )


def test_distillation_needs_classes(tmp_path):
    for model in (tiny_model(problem_type="regression"), tiny_model(num_labels=1)):
        with pytest.raises(ValueError, match="distill_from='self' needs classification"):
            make_trainer(tmp_path, model=model, distill_from="self")
    with pytest.raises(ValueError, match=r"needs capacities below 1\.0"):
        make_trainer(tmp_path, distill_from="self", capacity=1.0).train()


@pytest.mark.parametrize(
    "options",
    [
        {"capacity_schedule": "uniform"},
        {"capacity_schedule": "uniform", "capacity_range": [0.2, 0.3]},
        {"capacity_schedule": "anneal", "capacity": 0.2},
        {"capacity_schedule": "joint"},
        {"capacity": 0.25, "distill_from": "self"},
        {"capacity": 0.25, "dataloader_drop_last": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_iso_flops_spends_what_the_dense_model_would(tmp_path, caplog, options):
    """The budget is printed before training; the last batch of an epoch is smaller, or dropped."""
    examples = 16 if options.get("dataloader_drop_last") else 21
    epochs = 20 if options.get("capacity_schedule") in ("uniform", "anneal") else 40  # a step is more than 1% of few
    trainer = make_trainer(
        tmp_path,
        model=tiny_model(num_hidden_layers=1),
        train=rows(21),
        per_device_train_batch_size=8,
        num_train_epochs=epochs,
        iso_flops=True,
        **options,
    )
    with caplog.at_level(logging.INFO, logger="mone"):
        trainer.train()
    (message,) = (record.getMessage() for record in caplog.records if "isoFLOPs" in record.getMessage())
    spent, budget = map(float, re.search(r"are ([\d.e+]+) multiply.* are ([\d.e+]+)\.$", message).groups())
    assert budget == pytest.approx(3 * count_macs(trainer.model.config, 1.0) * examples * epochs, rel=1e-5)
    assert trainer.state.total_flos / 2 == pytest.approx(spent, rel=1e-5)
    assert trainer.state.total_flos / 2 == pytest.approx(budget, rel=0.01)
    assert trainer.state.global_step == trainer.state.max_steps != 3 * epochs
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9), "the learning rate ends with training"


def test_annealing_is_a_share_of_the_steps(tmp_path):
    trainer = make_trainer(tmp_path, capacity_schedule="anneal", capacity=0.3, anneal_steps=0.5, max_steps=8)
    seen = record_capacities(trainer.model)
    trainer.train()
    assert seen[0] == 1.0 and seen[3] > 0.3 and seen[4:] == [0.3] * 4
    assert trainer.model.config.capacity == 0.3


def test_what_is_logged(tmp_path):
    """Means over the steps since the last log, against what the model's outputs say."""
    trainer = make_trainer(
        tmp_path,
        model=randomise_(tiny_model(router_layers=(0, 1)), alpha=0.2),
        capacity_schedule="uniform",
        max_steps=4,
        logging_steps=2,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        weight_decay=0.0,
    )
    entropies, loads, capacities = [], [], record_capacities(trainer.model)

    def record(model, args, output):
        probabilities = torch.stack(output.router_logits).softmax(-1)
        entropies.append(torch.distributions.Categorical(probabilities).entropy().mean().item())
        experts = torch.stack(output.expert_indices)
        loads.append([(experts == expert).float().mean().item() for expert in range(4)])

    trainer.model.register_forward_hook(record)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for i, log in enumerate(logs):
        part = slice(4 * i, 4 * (i + 1))
        assert log["capacity"] == pytest.approx(sum(capacities[part]) / 4)
        assert log["router_entropy"] == pytest.approx(sum(entropies[part]) / 4, abs=1e-5)
        for expert in range(4):
            assert log[f"router_load_{expert}"] == pytest.approx(sum(load[expert] for load in loads[part]) / 4)
        assert (log["router_alpha_0"], log["router_alpha_1"]) == pytest.approx((0.2, 0.3))
        assert log["images_per_second"] > 0
    assert logs[-1]["macs"] == trainer.state.total_flos / 2
    assert logs[0]["macs"] == 3 * 4 * sum(count_macs(trainer.model.config, capacity) for capacity in capacities[:4])


def test_images_per_second_leave_evaluations_out(tmp_path, monkeypatch):
    """By a clock that only the model moves: a second for a step of four images, far more for an evaluation."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=1)

    def pass_time(model, args):
        now[0] += 1.0 if model.training else 100.0

    trainer.model.register_forward_pre_hook(pass_time)
    trainer.train()
    speeds = [log["images_per_second"] for log in trainer.state.log_history if "images_per_second" in log]
    assert speeds == pytest.approx([4.0, 4.0])


@pytest.mark.parametrize("router_type", ["random", "argmax"])
def test_logs_of_other_routers(tmp_path, router_type):
    trainer = make_trainer(tmp_path, model=tiny_model(router_type=router_type), max_steps=1, logging_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert ("router_entropy" in log) == ("router_alpha_0" in log) == (router_type == "argmax")
    assert sum(log[f"router_load_{expert}"] for expert in range(4)) == pytest.approx(1)


@pytest.mark.parametrize("capacity", [1.0, 0.4, 0.125, (0, 1, 0, 0)])
@pytest.mark.parametrize("fields", [{}, {"pooling": "cls", "router_layers": (0, 1)}, {"router_type": "argmax"}])
def test_every_parameter_has_a_gradient_at_every_capacity(capacity, fields):
    """So that DDP need not search for those without one (MoNETrainingArguments turns this off)."""
    model = tiny_model(**fields)
    model(torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1]), capacity=capacity).loss.backward()
    check_gradients(model)


@pytest.mark.parametrize("capacity", [1.0, 0.4, (0, 1, 0, 0)])
def test_every_parameter_of_a_video_model_has_a_gradient(capacity):
    model = tiny_video_model()
    model(torch.randn(2, 4, 3, 16, 16), labels=torch.tensor([0, 1]), capacity=capacity).loss.backward()
    check_gradients(model)


def check_gradients(model):
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_compiled_layers_compute_the_same_at_every_capacity(tmp_path, monkeypatch):
    """One graph for each, past dynamo's limit, and all layers share it. Traced only: inductor takes minutes."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **kwargs: compile_module(self, backend="eager", **kwargs)
    )
    torch._dynamo.reset()
    options = {"capacity_schedule": "joint", "max_steps": 2, "logging_steps": 1}
    logs = []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=256):  # puts them back
            trainer = make_trainer(
                tmp_path, model=tiny_model(initializer_range=0.2), compile_layers=compiled, **options
            )
            trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (4 if compiled else 0)
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)


def test_activation_checkpointing_changes_nothing(tmp_path):
    results = []
    for checkpointing in (False, True):
        model = tiny_model(initializer_range=0.2)
        make_trainer(
            tmp_path,
            model=model,
            capacity_schedule="joint",
            max_steps=2,
            activation_checkpointing=checkpointing,
            optim="sgd",
            learning_rate=0.1,
        ).train()
        assert model.is_activation_checkpointing == checkpointing
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=0, msg=name)


def test_mixed_precision(tmp_path):
    losses = []
    for bf16 in (False, True):
        model = tiny_model(initializer_range=0.2)
        trainer = make_trainer(tmp_path, model=model, capacity_schedule="joint", bf16=bf16, max_steps=3)
        losses.append(trainer.train().training_loss)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


class AtStep(TrainerCallback):
    """Calls `action(model)` at the end of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2, "learning_rate": 3e-3}


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, capacity_schedule="uniform", lr_scheduler_type="constant", **SAVING)
    trainer.add_callback(AtStep(3, lambda model: model.classifier.weight.data.fill_(float("nan"))))
    capacity = CapacitySchedule("uniform")(3)[0]
    folder = tmp_path / "out" / "checkpoint-2"
    with pytest.raises(
        FloatingPointError, match=rf"step 3, with capacity {capacity} and learning rate 0\.003"
    ) as error:
        trainer.train()
    assert str(folder) in str(error.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    assert last_complete_checkpoint(tmp_path / "out") == str(folder)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The loss does not show them before the next step."""
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.add_callback(AtStep(4, lambda model: model.classifier.weight.data.fill_(float("inf"))))
    with pytest.raises(FloatingPointError, match="Weights are not finite after step 4"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]

    trainer = make_trainer(tmp_path / "end", **{**SAVING, "save_strategy": "no"})
    trainer.add_callback(AtStep(6, lambda model: model.classifier.weight.data.fill_(float("inf"))))
    with pytest.raises(FloatingPointError, match="Weights are not finite after step 6"):
        trainer.train()  # before anyone saves its result


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SAVING)
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written: .*No space left.*checkpoint-2\. Start"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    again = make_trainer(tmp_path, **SAVING)
    again.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "out"))
    assert again.state.global_step == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_to_go_on_from(tmp_path, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    options = {**SAVING, "capacity_schedule": "uniform", "save_steps": 5}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    trainer = make_trainer(tmp_path, **options)
    trainer.add_callback(AtStep(3, lambda model: os.kill(os.getpid(), number)))
    with pytest.raises(
        KeyboardInterrupt, match=rf"{number.name} at step [34]\. The last complete .*checkpoint-[34]\."
    ):
        trainer.train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "out"))
    for name, expected in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], expected, atol=0, rtol=0, msg=name)


def test_a_stop_keeps_the_last_checkpoint_beside_the_best(tmp_path):
    options = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, load_best_model_at_end=True, **options)  # of equal ones the first is the best
    trainer.add_callback(AtStep(4, lambda model: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(KeyboardInterrupt, match=r"at step 5\. .*checkpoint-5\."):
        trainer.train()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-2", "checkpoint-5"}
    again = make_trainer(tmp_path, load_best_model_at_end=True, **options)
    again.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-2", "checkpoint-6"}


def test_a_stop_at_an_evaluation_saves_also_where_only_the_best_is(tmp_path):
    options = {**SAVING, "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, metric_for_best_model="loss", **options)  # of equal ones the first is the best
    trainer.add_callback(AtStep(3, lambda model: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(KeyboardInterrupt, match=r"at step 4\. .*checkpoint-4\."):
        trainer.train()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_a_checkpoint_of_weights_only_says_what_is_lost(tmp_path, caplog):
    make_trainer(tmp_path, **SAVING).train()
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert "weights only" not in caplog.text
        for name in ("optimizer.pt", "scheduler.pt"):
            (tmp_path / "out" / "checkpoint-4" / name).unlink()
        make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert "checkpoint-4 has weights only" in caplog.text and "start anew at step 4" in caplog.text


def test_a_model_of_model_init_is_trained_as_one_that_is_given(tmp_path):
    options = {"max_steps": 3, "capacity": 0.4, "label_smoothing_factor": 0.1, "learning_rate": 3e-3}
    given = make_trainer(tmp_path, **options)
    made = MoNETrainer(model_init=lambda: tiny_model(), args=given.args, train_dataset=rows(16))
    given.train(), made.train()
    assert (made.model.config.capacity, made.model.config.problem_type) == (0.4, "single_label_classification")
    for name, expected in given.model.state_dict().items():
        torch.testing.assert_close(made.model.state_dict()[name], expected, atol=0, rtol=0, msg=name)


def test_models_of_a_search_are_made_for_each_trial(tmp_path):
    """Backends take the model away after each."""
    args = make_trainer(tmp_path, max_steps=2, capacity=0.4, logging_steps=1).args
    trainer = MoNETrainer(model_init=lambda trial: tiny_model(num_experts=3), args=args, train_dataset=rows(16))
    for _ in range(2):
        assert math.isfinite(trainer.train().training_loss)
        trainer.model = trainer.model_wrapped = None


def test_arguments_are_made_as_trainer_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = MoNETrainer(tiny_model(), train_dataset=rows(16))
    assert isinstance(trainer.args, MoNETrainingArguments) and trainer.args.output_dir == "tmp_trainer"


def test_other_arguments_are_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(TypeError, match="args must be MoNETrainingArguments, got TrainingArguments"):
        MoNETrainer(model=tiny_model(), args=args, train_dataset=rows(16))


def test_one_process_trains_on_one_device(tmp_path):
    args = MoNETrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    args._n_gpu = 2  # as torch counts them
    with pytest.raises(ValueError, match=r"has 2 GPUs, but trains on one: .*accelerate launch"):
        MoNETrainer(model=tiny_model(), args=args, train_dataset=rows(16))


def test_total_flos_counts_what_was_computed(tmp_path):
    trainer = make_trainer(tmp_path, capacity_schedule="uniform", max_steps=4, logging_steps=1)
    trainer.train()
    config = trainer.model.config
    macs = [count_macs(config, CapacitySchedule("uniform")(step)[0]) for step in range(4)]
    assert trainer.state.total_flos == 6 * 4 * sum(macs)


def test_stopped_and_resumed_equals_never_stopped(tmp_path):
    args = {"capacity_schedule": "uniform", "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "seed": 9}
    whole = make_trainer(tmp_path / "whole", **args)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", **args)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    stopped.add_callback(Stop())
    stopped.train()
    resumed = make_trainer(tmp_path / "stopped", **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "out" / "checkpoint-3"))
    resumed_weights = resumed.model.state_dict()
    for name, expected in whole.model.state_dict().items():
        torch.testing.assert_close(resumed_weights[name], expected, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacity": 0.8}, r"capacity=0\.8 \(was 0\.4\)\. Give those"),
        ({"learning_rate": 1e-3, "layer_decay": 0.7}, r"learning_rate=0\.001 \(was 5e-05\), layer_decay=0\.7 \(was"),
        ({"capacity_schedule": "uniform", "capacity": None}, r"capacity_schedule=uniform \(was fixed\)"),
        ({"router_learning_rate": 1e-3}, r"router_learning_rate=0\.001 \(was None\)"),
    ],
    ids=str,
)
def test_a_run_goes_on_with_the_settings_it_was_started_with(tmp_path, changes, message):
    """The checkpoint's optimiser would keep its rates, and a run that is over would only rename its capacity."""
    args = {"capacity": 0.4, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **args).train()
    resumed = make_trainer(tmp_path, **{**args, "max_steps": 4, **changes})
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match=rf"checkpoint-2 cannot go on .*: {message}"):
        resumed.train(resume_from_checkpoint=checkpoint)
    longer = make_trainer(tmp_path, **{**args, "max_steps": 4})
    longer.train(resume_from_checkpoint=checkpoint)
    assert longer.state.global_step == 4
    Path(checkpoint, SETTINGS_NAME).unlink()  # as older checkpoints have none
    make_trainer(tmp_path, **{**args, "learning_rate": 1e-3}).train(resume_from_checkpoint=checkpoint)


def test_the_best_checkpoint_is_chosen_by_the_mean_over_capacities(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_capacities=[0.2, 1.0],
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(losses) == 2
    assert trainer.state.best_metric == pytest.approx(min(losses))


@pytest.mark.parametrize(
    "args",
    [
        {"capacity": 1.2},
        {"capacity": 0.05},
        {"eval_capacities": [0.4, 0.0]},
        {"capacity_grid": [0.1, 0.5], "capacity_schedule": "uniform"},
        {"capacity_range": [0.5, 1.1], "capacity_schedule": "uniform"},
    ],
)
def test_a_capacity_that_is_not_allowed_is_found_before_any_work(tmp_path, args):
    with pytest.raises(ValueError, match=r"capacity=.* \[0\.125, 1\]"):
        make_trainer(tmp_path, **args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"capacity_range": [0.5]}, r"capacity_range=\[0\.5\] must be two"),
        ({"capacity_range": [0.2, 0.5], "capacity_grid": [0.3]}, r"capacity_grid=\[0\.3\]"),
        ({"anneal_steps": -1}, "anneal_steps=-1"),
        (
            {"capacity_grid": [0.2, 0.4]},
            r"capacity_grid=\[0\.2, 0\.4\] .* for .*'uniform', got 'fixed'",
        ),
        ({"capacity_range": [0.2, 0.4], "capacity_schedule": "joint"}, "got 'joint'"),
        ({"distillation_weight": 1.5}, r"distillation_weight=1\.5"),
        ({"distillation_weight": 0.9}, r"distillation_weight=0\.9 .* for distill_from, which is not given"),
        ({"distillation_temperature": 0}, "distillation_temperature=0"),
        ({"capacity_schedule": "unifrom"}, "'unifrom'.*uniform"),
        ({"eval_capacities": [0.4, (0, 0, 1, 0)]}, r"eval_capacities=\[0\.4, \(0, 0, 1, 0\)\] must be numbers"),
        ({"eval_capacities": [0.4, 0.4000001]}, "differ in their first six digits"),
    ],
)
def test_arguments_that_are_not_allowed(tmp_path, args, message):
    with pytest.raises(ValueError, match=message):
        MoNETrainingArguments(output_dir=str(tmp_path), **args)


def test_a_grid_and_a_range_of_ones_own(tmp_path):
    own = make_trainer(tmp_path, capacity_schedule="uniform", capacity_grid=[0.2, 0.7])
    assert {own.schedule(step)[0] for step in range(50)} == {0.2, 0.7}
    between = make_trainer(tmp_path, capacity_schedule="uniform", capacity_range=[0.2, 0.23])
    assert {between.schedule(step)[0] for step in range(50)} == {0.2, 0.21, 0.22, 0.23}


def test_grid_keeps_to_what_fewer_experts_allow(tmp_path):
    trainer = make_trainer(tmp_path, model=tiny_model(num_experts=2), capacity_schedule="uniform")
    assert trainer.schedule.grid == (0.55, 0.65, 0.75, 0.85, 0.95)
    alone = make_trainer(tmp_path, model=tiny_model(num_experts=1), capacity_schedule="uniform")
    assert alone.schedule(0) == (1.0,)


def test_early_stopping_sees_the_means(tmp_path):
    """Callbacks hear of an evaluation at several capacities once, with the metrics they look for."""
    trainer = make_trainer(
        tmp_path,
        eval_capacities=[0.2, 1.0],
        max_steps=20,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=0.0,  # nothing improves
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 3


def test_the_saved_model_runs_at_the_capacity_it_was_trained_for(tmp_path):
    for schedule, capacity in (("fixed", 0.4), ("uniform", 0.7)):
        model = tiny_model(capacity=0.7)
        trainer = make_trainer(tmp_path, model=model, capacity=0.4, capacity_schedule=schedule, max_steps=1)
        trainer.evaluate()
        assert model.config.capacity == 0.7, "an evaluation changes nothing"
        trainer.train()
        assert model.config.capacity == capacity


def test_a_capacity_that_is_set_later_counts(tmp_path):
    trainer = make_trainer(tmp_path, capacity=0.4, max_steps=1)
    seen = record_capacities(trainer.model)
    trainer.args.capacity = 0.2
    trainer.evaluate()
    trainer.train()
    assert set(seen) == {0.2}
    assert trainer.model.config.capacity == 0.2


def test_outputs_that_the_config_asks_for_do_not_disturb_an_evaluation(tmp_path):
    expected = make_trainer(tmp_path).evaluate()
    model = tiny_model(output_hidden_states=True)
    assert make_trainer(tmp_path, model=model).evaluate()["eval_accuracy"] == expected["eval_accuracy"]


def labels_seen(model) -> list:
    """(pixel_values, labels) that the model's forward gets in training, as a growing list."""
    seen = []

    def record(module, args, kwargs):
        if "labels" in kwargs:
            seen.append((kwargs["pixel_values"].clone(), kwargs["labels"].clone()))

    model.register_forward_pre_hook(record, with_kwargs=True)
    return seen


def test_label_smoothing_is_torchs_and_not_for_evaluation(tmp_path):
    options = {"max_steps": 1, "per_device_train_batch_size": 16, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, label_smoothing_factor=0.3, model=tiny_model(initializer_range=0.3), **options)
    loss = trainer.train().training_loss
    pixel_values = torch.stack([row["pixel_values"] for row in trainer.train_dataset])
    labels = torch.tensor([row["labels"] for row in trainer.train_dataset])
    with torch.no_grad():
        logits = trainer.model.train()(pixel_values).logits
    smoothed = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3).item()
    plain = torch.nn.functional.cross_entropy(logits, labels).item()
    assert abs(smoothed - plain) > 1e-3
    assert loss == pytest.approx(smoothed, abs=1e-5)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(plain, abs=1e-5)


def test_mixup_mixes_examples_and_labels_alike(tmp_path):
    trainer = make_trainer(tmp_path, mixup=0.5, label_smoothing_factor=0.1, max_steps=8, capacity=0.4)
    seen = labels_seen(trainer.model)
    trainer.train()
    originals = {tuple(row["pixel_values"][0, 0, :4].tolist()): row for row in trainer.train_dataset}
    corners = torch.tensor(list(originals))
    shares = []
    for pixel_values, labels in seen:
        assert labels.sum(-1) == pytest.approx(torch.ones(4))
        shares_of_batch = []
        for pixels, soft in zip(pixel_values, labels, strict=True):
            # Which two rows, in which shares? Solve for every pair.
            found = []
            for i in range(len(corners)):
                for j in range(len(corners)):
                    direction = corners[i] - corners[j]
                    if i == j:
                        continue
                    share = ((pixels[0, 0, :4] - corners[j]) @ direction / (direction @ direction)).item()
                    rest = (pixels[0, 0, :4] - corners[j] - share * direction).abs().max()
                    if rest < 1e-5 and -1e-6 <= share <= 1 + 1e-6:
                        hard = [trainer.train_dataset[k]["labels"] for k in (i, j)]
                        one_hot = torch.nn.functional.one_hot(torch.tensor(hard), 3).float() * 0.9 + 0.1 / 3
                        if torch.allclose(share * one_hot[0] + (1 - share) * one_hot[1], soft, atol=1e-4):
                            found.append(max(share, 1 - share))
            assert found
            shares_of_batch.append(found[0])
        shares.append(round(shares_of_batch[0], 3))
    assert len(set(shares)) > 4, "another share at every step"


def test_mixup_is_the_same_after_resumption_and_under_accumulation(tmp_path):
    """The loss of mixed labels, in micro-batches, is that of torch on all of them."""
    options = {"max_steps": 1, "mixup": 0.4, "learning_rate": 0.0, "seed": 3}
    whole = make_trainer(tmp_path, per_device_train_batch_size=8, train=rows(8), **options)
    seen = labels_seen(whole.model)
    whole.train()
    again = make_trainer(tmp_path, per_device_train_batch_size=8, train=rows(8), **options)
    seen_again = labels_seen(again.model)
    again.train()
    assert torch.equal(seen[0][0], seen_again[0][0]) and torch.equal(seen[0][1], seen_again[0][1])

    parts = make_trainer(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, train=rows(8), **options
    )
    seen = labels_seen(parts.model)
    loss = parts.train().training_loss
    with torch.no_grad():
        logits = [parts.model.train()(pixel_values).logits for pixel_values, _ in seen[:4]]
    labels = torch.cat([labels for _, labels in seen[:4]])
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), labels).item()
    assert loss == pytest.approx(expected, abs=1e-5)


def test_mixup_needs_classes_and_smoothing_one_of_them(tmp_path):
    with pytest.raises(ValueError, match="mixup needs classification of at least 2 classes"):
        make_trainer(tmp_path, model=tiny_model(num_labels=1), mixup=0.3)
    with pytest.raises(ValueError, match="label_smoothing_factor of one label per example"):
        make_trainer(tmp_path, model=tiny_model(problem_type="multi_label_classification"), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="bce_sum needs problem_type='multi_label_classification', got None"):
        make_trainer(tmp_path, bce_sum=True)
    with pytest.raises(ValueError, match=r"mixup=-1\.0"):
        make_trainer(tmp_path, mixup=-1.0)


def test_logits_of_clips_are_averaged_and_unreadable_ones_left_out(tmp_path):
    model = tiny_video_model()
    generator = torch.Generator().manual_seed(1)
    videos = [
        {"pixel_values": torch.randn(5, 4, 3, 16, 16, generator=generator), "labels": [0, 2, IGNORED, 1][i]}
        for i in range(4)
    ]
    args = {"per_device_eval_batch_size": 1, "eval_capacities": [0.3, 1.0], "report_to": "none", "use_cpu": True}
    trainer = MoNETrainer(
        model=model,
        args=MoNETrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, **args),
        eval_dataset=videos,
        compute_metrics=classification_metrics,
    )
    metrics = trainer.evaluate()
    kept = [video for video in videos if video["labels"] != IGNORED]
    labels = torch.tensor([video["labels"] for video in kept])
    for capacity in (0.3, 1.0):
        with torch.no_grad():
            logits = torch.stack([model.eval()(v["pixel_values"], capacity=capacity).logits.mean(0) for v in kept])
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert metrics[f"eval_capacity_{capacity:g}_loss"] == pytest.approx(loss, abs=1e-5)
        accuracy = (logits.argmax(-1) == labels).float().mean().item()
        assert metrics[f"eval_capacity_{capacity:g}_accuracy"] == pytest.approx(accuracy)
        assert metrics[f"eval_capacity_{capacity:g}_unreadable"] == 1


@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (2, 4, 3, 16, 16)])
def test_a_loss_of_the_users_own_counts_for_any_number_of_clips(tmp_path, shape):
    videos = [{"pixel_values": torch.randn(shape), "labels": 0}] * 2
    args = MoNETrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = MoNETrainer(
        model=tiny_video_model(),
        args=args,
        eval_dataset=videos,
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs["logits"].sum() * 0 + 123.0,
    )
    assert trainer.evaluate()["eval_loss"] == 123.0


def test_labels_that_do_not_count_are_not_softened(tmp_path):
    """The loss is that of the others alone, as Trainer counts them."""
    train = rows(8)
    for number in (2, 5):
        train[number] = {**train[number], "labels": IGNORED}
    options = {"max_steps": 1, "label_smoothing_factor": 0.1, "per_device_train_batch_size": 8, "capacity": 0.5}
    trainer = make_trainer(tmp_path, train=train, **options)
    kept = [row for row in train if row["labels"] != IGNORED]
    pixel_values, labels = (torch.stack([torch.as_tensor(row[key]) for row in kept]) for key in train[0])
    with torch.no_grad():
        logits = trainer.model.train()(pixel_values, capacity=0.5).logits
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).item()
    assert trainer.train().training_loss == pytest.approx(expected, abs=1e-5)


def test_a_card_of_ones_own_is_kept_and_a_draft_renewed(tmp_path):
    trainer = make_trainer(tmp_path)
    card = tmp_path / "out" / "README.md"
    card.parent.mkdir(exist_ok=True)
    trainer.create_model_card(model_name="first")
    assert "# first" in card.read_text() and "trained from scratch" in card.read_text()
    trainer.create_model_card(model_name="second")
    assert "# second" in card.read_text()
    card.write_text("# Mine")
    trainer.create_model_card(model_name="third")
    assert card.read_text() == "# Mine"


def test_a_summed_sigmoid_loss_and_mixed_labels_are_exact_under_accumulation(tmp_path):
    """One step of SGD on the mean over examples of the sum over classes, written out."""
    labels = lambda i: [float(i % 2), 1.0, 0.0] if i != 4 else [0.0, 0.0, 0.0]  # noqa: E731
    options = {"learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "capacity": 0.4}
    results = []
    for batch_size, accumulation in ((7, 1), (2, 4)):
        model = tiny_model(problem_type="multi_label_classification", initializer_range=0.2)
        trainer = make_trainer(
            tmp_path,
            model=model,
            train=rows(7, labels),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            bce_sum=True,
            **options,
        )
        trainer.train()
        results.append(model.state_dict())
    expected = tiny_model(problem_type="multi_label_classification", initializer_range=0.2)
    examples = rows(7, labels)
    logits = expected(torch.stack([row["pixel_values"] for row in examples]), capacity=0.4).logits
    targets = torch.tensor([row["labels"] for row in examples])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
    loss.backward()
    bias = expected.classifier.bias.detach() - expected.classifier.bias.grad
    for result in results:
        torch.testing.assert_close(result["classifier.bias"], bias, atol=1e-6, rtol=1e-5)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=1e-5, msg=name)

    trainer = make_trainer(tmp_path, model=tiny_model(problem_type="multi_label_classification"), mixup=0.5)
    pixel_values = targets.reshape(7, 3, 1, 1).expand(7, 3, 16, 16)
    mixed = trainer._soften_labels(pixel_values, targets)
    assert torch.equal(mixed["pixel_values"][:, :, 0, 0], mixed["labels"]), "in the same shares"
    assert not torch.equal(mixed["labels"], targets)


def test_the_total_batch_size_sets_the_accumulation(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 8}
    args = MoNETrainingArguments(**options, total_train_batch_size=32)
    assert (args.gradient_accumulation_steps, args.train_batch_size) == (4, 8)
    with pytest.raises(ValueError, match="total_train_batch_size=12 must be a multiple of 8"):
        MoNETrainingArguments(**options, total_train_batch_size=12)


# --- in the user's own code -----------------------------------------------------------------------------------------


def test_labels_of_several_classes_are_softened_only_when_it_is_said_what_they_are(tmp_path):
    train = rows(8, labels=lambda i: [1.0, float(i % 2), 0.0])
    for options in ({"mixup": 0.5}, {"label_smoothing_factor": 0.1}):
        with pytest.raises(ValueError, match=r"Labels of shape \(4, 3\) with mixup .*: set config.problem_type"):
            make_trainer(tmp_path, train=train, max_steps=1, **options).train()
    model = tiny_model(problem_type="multi_label_classification")
    make_trainer(tmp_path, model, train=train, max_steps=1, mixup=0.5).train()
    with pytest.raises(ValueError, match="need labels, and these batches have none"):
        unlabelled = [{"pixel_values": row["pixel_values"]} for row in train]
        make_trainer(tmp_path, train=unlabelled, max_steps=1, mixup=0.5).train()


def test_training_takes_one_clip(tmp_path):
    train = [{"pixel_values": torch.randn(2, 4, 3, 16, 16), "labels": 0}] * 4
    with pytest.raises(ValueError, match="hold several clips of each video: training takes one"):
        make_trainer(tmp_path, tiny_video_model(), train=train, max_steps=1).train()


def test_a_trainer_trains_again_after_a_loss_that_was_not_finite(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, logging_steps=1)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with torch.no_grad():
        trainer.model.classifier.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        trainer.train()
    trainer.model.load_state_dict(weights)
    trainer.optimizer = trainer.lr_scheduler = None  # Adam's has the NaN
    assert math.isfinite(trainer.train().training_loss)


def test_metrics_that_are_no_numbers_have_no_mean(tmp_path):
    trainer = make_trainer(tmp_path, eval_capacities=np.array([0.5, 1.0]))
    trainer.compute_metrics = lambda p: {"per_class": [0.0, 1.0], "first": float(p.predictions[0, 0])}
    metrics = trainer.evaluate()
    assert metrics["eval_capacity_0.5_per_class"] == [0.0, 1.0] and "eval_per_class" not in metrics
    mean = (metrics["eval_capacity_0.5_first"] + metrics["eval_capacity_1_first"]) / 2
    assert metrics["eval_first"] == pytest.approx(mean)
    with pytest.raises(ValueError, match=r"eval_capacities=0\.5 must be a list"):
        MoNETrainingArguments(output_dir=str(tmp_path), eval_capacities=0.5)


def test_a_search_is_by_the_means(tmp_path):
    """Trainer's objective is the sum of all metrics but eval_loss: capacities' losses would count as if good."""
    trainer = make_trainer(tmp_path, eval_capacities=[0.5, 1.0], max_steps=1, eval_strategy="steps", eval_steps=1)
    seen = []
    trainer.model_init = lambda trial: tiny_model()

    class Backend:
        name = "grid"

        @staticmethod
        def is_available():
            return True

        def ensure_available(self):
            pass

        def default_hp_space(self, trial):
            return {}

        def run(self, trainer, n_trials, direction, **kwargs):
            metrics = trainer.evaluate()
            seen.append((trainer.compute_objective(metrics), metrics["eval_accuracy"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
        trainer.hyperparameter_search(backend="optuna", direction="maximize")
    ((objective, accuracy),) = seen
    assert objective == accuracy


def test_a_loss_of_the_users_own_with_a_teacher(tmp_path):
    trainer = make_trainer(tmp_path, distill_from="self", capacity=0.5, max_steps=1)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs["logits"].square().mean()
    assert math.isfinite(trainer.train().training_loss)


def test_a_loader_of_the_users_own_without_a_data_set(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.zeros(4, dtype=torch.long)}
    trainer.get_train_dataloader = lambda: [batch] * 2
    assert trainer.train().global_step == 2


def test_an_optimiser_of_the_users_own_has_the_users_groups(tmp_path, caplog):
    def train(**args):
        model = tiny_model()
        optimizers = (torch.optim.SGD(model.parameters(), lr=1e-3), None)
        arguments = MoNETrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, **args
        )
        MoNETrainer(model=model, args=arguments, train_dataset=rows(8), optimizers=optimizers).train()

    for args in ({"router_learning_rate": 0.1}, {"layer_decay": 0.5}):
        with pytest.raises(ValueError, match="are for the optimiser that the trainer makes"):
            train(**args)
    train(capacity=0.5)
    assert "trains the routers" not in caplog.text
    train(capacity=1.0)
    assert "Your optimiser also trains the routers" in caplog.text


def test_what_weight_decay_spares(tmp_path):
    model = tiny_model(pooling="cls", num_register_tokens=2)
    decayed = make_trainer(tmp_path, model).get_decay_parameter_names(model)
    # Matrices and kernels, as in big_vision.
    assert set(decayed) == {
        name for name, value in model.named_parameters() if name.endswith(".weight") and value.dim() > 1
    }


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        ({}, {"mixup": 0.3}, r"mixup=0\.3 \(was 0\.0\)"),
        ({}, {"seed": 7}, r"seed=7 \(was 42\)"),
        ({}, {"optim": "sgd"}, r"optim=.*sgd.* \(was .*adamw"),
        ({"num_hidden_layers": 1}, {}, r"config\.num_hidden_layers=1 \(was 2\)"),
        ({"problem_type": "multi_label_classification"}, {}, r"config\.problem_type=multi_label_classification"),
    ],
)
def test_another_training_does_not_go_on_from_a_checkpoint(tmp_path, model, args, message):
    common = {"save_strategy": "steps", "save_steps": 2, "capacity": 0.5}
    make_trainer(tmp_path, max_steps=2, **common).train()
    with pytest.raises(ValueError, match=rf"checkpoint-2 cannot go on .*: {message}"):
        make_trainer(tmp_path, tiny_model(**model), max_steps=4, **common, **args).train(resume_from_checkpoint=True)
    trainer = make_trainer(tmp_path, max_steps=4, **common)
    (tmp_path / "out" / "checkpoint-3").mkdir()  # cut short
    assert trainer.train(resume_from_checkpoint=True).global_step == 4
    assert trainer._initial_global_step == 2


@pytest.mark.parametrize("max_steps", [3, 4], ids=["inside an epoch", "whole epochs"])
def test_a_run_that_took_all_its_steps_takes_no_more(tmp_path, max_steps):
    args = {"max_steps": max_steps, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    first = make_trainer(tmp_path, train=rows(8), capacity=0.5, **args)  # of two steps an epoch
    first.train()
    again = make_trainer(tmp_path, train=rows(8), capacity=0.5, **args)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == again._initial_global_step == max_steps
    assert not (tmp_path / "out" / f"checkpoint-{max_steps + 1}").exists()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_trial_goes_on_with_its_own_settings(tmp_path, monkeypatch):
    """As Ray Tune resumes one: its values replace the arguments' inside of `train`."""
    monkeypatch.setattr("transformers.integrations.hp_params", dict)  # which asks for Ray, as does the next
    monkeypatch.setattr(MoNETrainer, "_get_output_dir", lambda self, trial: self.args.output_dir)
    common = {"save_strategy": "steps", "save_steps": 2, "capacity": 0.5}
    make_trainer(tmp_path, max_steps=2, learning_rate=1e-3, **common).train()
    for rate in (1e-3, 1e-2):
        trainer = make_trainer(tmp_path, max_steps=3, **{**common, "save_strategy": "no"})
        trainer.hp_search_backend = HPSearchBackend.RAY
        other = pytest.raises(ValueError, match=r"learning_rate=0\.01 \(was 0\.001\)")
        with other if rate == 1e-2 else contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"), trial={"learning_rate": rate})
            assert trainer.state.global_step == 3


def test_a_signal_after_the_last_step_loses_nothing(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    evaluate = trainer.evaluate

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    trainer.evaluate = interrupted
    assert trainer.train().global_step == 2
