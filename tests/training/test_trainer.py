"""MoNETrainer on a tiny model and random images. That models learn is tested in test_modeling_mone.py."""

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from mone import (
    MoNEConfig,
    MoNEForImageClassification,
    MoNEViViTConfig,
    MoNEViViTForVideoClassification,
    count_macs,
)
from mone.data import IGNORED
from mone.training import Accuracy, CapacitySchedule, MoNETrainer, MoNETrainingArguments, classification_metrics


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


def rows(count: int, labels=lambda i: i % 3) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": labels(i)} for i in range(count)]


def make_trainer(tmp_path, model=None, train=None, evaluation=None, **args) -> MoNETrainer:
    accuracy = Accuracy()
    defaults = {"per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return MoNETrainer(
        model=model or tiny_model(),
        args=MoNETrainingArguments(output_dir=str(tmp_path / "out"), **{**defaults, "use_cpu": True, **args}),
        train_dataset=train or rows(16),
        eval_dataset=evaluation or rows(9),
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
    assert trainer._eval_capacity == trainer.capacity, "a later prediction must not run at the last capacity"


def test_several_evaluation_sets(tmp_path):
    trainer = make_trainer(tmp_path, evaluation={"a": rows(4), "b": rows(8)}, eval_capacities=[0.2, 1.0])
    metrics = trainer.evaluate()
    assert {f"eval_{s}_capacity_{c}_accuracy" for s in "ab" for c in ("0.2", "1")} <= set(metrics)


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
    trainer = make_trainer(tmp_path, learning_rate=1e-3, router_learning_rate=1e-2, weight_decay=0.1)
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


@pytest.mark.parametrize("args", [{"capacity": 1.2}, {"capacity": 0.05}, {"eval_capacities": [0.4, 0.0]}])
def test_a_capacity_that_is_not_allowed_is_found_before_any_work(tmp_path, args):
    with pytest.raises(ValueError, match=r"capacity=.* \[0\.125, 1\]"):
        make_trainer(tmp_path, **args)


def test_grid_keeps_to_what_fewer_experts_allow(tmp_path):
    trainer = make_trainer(tmp_path, model=tiny_model(num_experts=2), capacity_schedule="uniform")
    assert trainer.schedule.grid == (0.55, 0.65, 0.75, 0.85, 0.95)


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
    assert make_trainer(tmp_path, capacity=0.4).model.config.capacity == 0.4
    sampled = make_trainer(tmp_path, model=tiny_model(capacity=0.7), capacity=0.4, capacity_schedule="uniform")
    assert sampled.model.config.capacity == 0.7


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


@pytest.mark.parametrize("config", [{"problem_type": "multi_label_classification"}, {"num_labels": 1}])
def test_mixup_needs_one_label_out_of_several(tmp_path, config):
    with pytest.raises(ValueError, match="mixup and label_smoothing_factor need single-label"):
        make_trainer(tmp_path, model=tiny_model(**config), mixup=0.3)
    with pytest.raises(ValueError, match=r"mixup=-1\.0"):
        make_trainer(tmp_path, mixup=-1.0)


def test_logits_of_clips_are_averaged_and_unreadable_ones_left_out(tmp_path):
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
    model = MoNEViViTForVideoClassification(config)
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
