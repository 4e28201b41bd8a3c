"""MoNEConfig: ViT's fields under ViT's names, the fields of the design, and errors for what cannot work."""

import copy
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, ViTConfig

from mone import MoNEConfig
from mone.capacity import solve_capacity_distribution


VIT_FIELDS = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
]


def test_shared_fields_have_the_names_and_defaults_of_vit():
    """A ViT config then converts by copying fields."""
    ours, theirs = MoNEConfig(), ViTConfig()
    for name in VIT_FIELDS:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_defaults_of_the_added_fields():
    config = MoNEConfig()
    assert isinstance(config, PreTrainedConfig) and config.model_type == "mone"
    assert config.pooling == "mean"
    assert config.num_experts == 4
    assert tuple(config.router_layers) == (0,)
    assert config.router_type == "learned"
    assert config.capacity == 1.0
    assert config.capacity_delta == 2.0
    assert config.capacity_beta == 10.0


def test_router_outputs_stay_out_of_trainer_predictions():
    """Else Trainer hands a tuple to compute_metrics instead of the logits."""
    assert {"router_logits", "expert_indices"} <= set(MoNEConfig().keys_to_ignore_at_inference)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"capacity": 0.4, "num_labels": 7, "problem_type": "multi_label_classification"},
        {"capacity": (0.1, 0.2, 0.3, 0.4), "router_layers": (0, 3, 7), "pooling": "cls"},
        {"num_experts": 2, "hidden_size": 6, "num_attention_heads": 3, "capacity": [0.5, 0.5]},
        {"image_size": (32, 64), "patch_size": [16, 8], "router_type": "argmax", "capacity_beta": 1.5},
        {"router_type": "random", "output_router_logits": True},
        {"pooling": "cls_registers", "num_register_tokens": 2, "embedding_norm": True, "final_norm": "pooled"},
        {"pooling": "cls_mean", "position_antialias": True, "final_norm": "none"},
    ],
)
def test_save_and_load(tmp_path, fields):
    config = MoNEConfig(**fields)
    config.save_pretrained(tmp_path)
    loaded = MoNEConfig.from_pretrained(tmp_path)
    for name, value in fields.items():
        expected = list(value) if isinstance(value, tuple) else value
        actual = getattr(loaded, name)
        assert (list(actual) if isinstance(actual, (list, tuple)) else actual) == expected, name
    assert loaded.resolve_capacity() == config.resolve_capacity()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mone"
    # Loading and saving again changes nothing.
    assert MoNEConfig.from_dict(loaded.to_dict()).to_dict() == loaded.to_dict()


def test_configs_do_not_share_state():
    first = MoNEConfig(router_layers=[0])
    second = copy.deepcopy(first)
    second.router_layers.append(3)
    assert first.router_layers == [0]
    assert tuple(MoNEConfig().router_layers) == (0,)


def test_resolve_capacity_takes_the_calls_value_before_the_configs():
    config = MoNEConfig(capacity=0.4)
    assert config.resolve_capacity() == solve_capacity_distribution(0.4)
    assert config.resolve_capacity(None) == solve_capacity_distribution(0.4)
    assert config.resolve_capacity(0.3) == solve_capacity_distribution(0.3)
    assert config.resolve_capacity([0, 1, 0, 0]) == (0.0, 1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"1\.2.*\[0\.125, 1\]"):
        config.resolve_capacity(1.2)


@pytest.mark.parametrize(
    ("capacity", "plain"),
    [
        (np.float64(0.4), 0.4),
        (np.int64(1), 1.0),
        (Fraction(1, 2), 0.5),
        (np.array([0.0, 0.5, 0.5, 0.0]), [0.0, 0.5, 0.5, 0.0]),
        ([np.float32(0.25)] * 4, [0.25] * 4),
        ((0, 0, Fraction(1, 4), 0.75), (0, 0, 0.25, 0.75)),
    ],
    ids=repr,
)
def test_whatever_a_call_takes_the_config_takes_and_saves(tmp_path, capacity, plain):
    config = MoNEConfig(capacity=capacity)
    assert config.capacity == plain and type(config.capacity) is type(plain)
    config.save_pretrained(tmp_path)
    assert MoNEConfig.from_pretrained(tmp_path).resolve_capacity() == config.resolve_capacity(capacity)
    changed = MoNEConfig()
    changed.capacity = capacity
    assert changed == MoNEConfig(capacity=plain) and repr(changed) == repr(MoNEConfig(capacity=plain))
    for wrong in (True, "0.4", None, [True] * 4, np.array(0.4)):
        changed.capacity = wrong
        with pytest.raises(ValueError, match=r"capacity=.*Allowed"):
            changed.resolve_capacity()


def test_resolve_capacity_uses_the_configs_eq_3():
    config = MoNEConfig(num_experts=3, capacity_delta=4.0, capacity_beta=0.5)
    expected = solve_capacity_distribution(0.5, 3, 4.0, 0.5)
    assert config.resolve_capacity(0.5) == expected
    assert expected != pytest.approx(solve_capacity_distribution(0.5, 3), abs=0.01)


@pytest.mark.parametrize(
    ("fields", "in_message"),
    [
        # A width that 2**(E-1) does not divide has no nested experts.
        ({"hidden_size": 100, "num_attention_heads": 4}, ["hidden_size=100", "8"]),
        ({"hidden_size": 24, "num_attention_heads": 3, "num_experts": 5}, ["hidden_size=24", "16"]),
        ({"hidden_size": 0}, ["hidden_size=0", "8"]),
        ({"hidden_size": -8}, ["hidden_size=-8", "8"]),
        ({"num_attention_heads": 5}, ["num_attention_heads=5", "768"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0", "768"]),
        ({"hidden_act": "nope"}, ["hidden_act='nope'", "gelu"]),
        ({"num_experts": 0}, ["num_experts", "0", "at least 1"]),
        ({"num_experts": -2}, ["num_experts", "-2", "at least 1"]),
        ({"image_size": 225}, ["image_size=225", "patch_size=16"]),
        ({"image_size": (224, 200)}, ["image_size=(224, 200)", "patch_size=16"]),
        ({"image_size": 0}, ["image_size=0", "patch_size=16"]),
        ({"image_size": 8}, ["image_size=8", "patch_size=16"]),
        ({"patch_size": 0}, ["patch_size=0"]),
        ({"image_size": [224, 224, 3]}, ["[224, 224, 3]"]),
        ({"router_layers": ()}, ["router_layers=()", "11"]),
        ({"router_layers": [12]}, ["router_layers=[12]", "11"]),
        ({"router_layers": [-1]}, ["router_layers=[-1]", "11"]),
        ({"router_layers": [2, 0]}, ["router_layers=[2, 0]", "increasing"]),
        ({"router_layers": [0, 0]}, ["router_layers=[0, 0]", "increasing"]),
        ({"router_layers": [0, 3], "num_hidden_layers": 3}, ["router_layers=[0, 3]", "2"]),
        ({"router_type": "token-choice"}, ["'token-choice'", "learned", "random", "argmax"]),
        ({"pooling": "max"}, ["'max'", "mean", "cls"]),
        ({"final_norm": "first"}, ["'first'", "tokens", "pooled", "none"]),
        ({"num_register_tokens": -1}, ["num_register_tokens=-1"]),
        ({"pooling": "cls_registers"}, ["num_register_tokens=0", "at least 1"]),
        ({"capacity": True}, ["True", "[0.125, 1]"]),
        ({"capacity": "0.4"}, ["'0.4'", "[0.125, 1]"]),
        ({"capacity": None}, ["None", "[0.125, 1]"]),
        ({"intermediate_size": 0}, ["intermediate_size=0", "at least 1"]),
        ({"num_channels": -1}, ["num_channels=-1", "at least 1"]),
        ({"capacity": 0.05}, ["0.05", "[0.125, 1]"]),
        ({"capacity": 0}, ["0", "[0.125, 1]"]),
        ({"capacity": 1.2}, ["1.2", "[0.125, 1]"]),
        ({"capacity": math.nan}, ["nan", "[0.125, 1]"]),
        ({"capacity": math.inf}, ["inf", "[0.125, 1]"]),
        ({"capacity": [0.2, 0.2, 0.2, 0.3]}, ["[0.2, 0.2, 0.2, 0.3]", "4 shares"]),
        ({"capacity": [0.5, 0.5]}, ["[0.5, 0.5]", "4 shares"]),
        ({"capacity": [-0.5, 0.5, 0.5, 0.5]}, ["-0.5", "4 shares"]),
        ({"capacity": 0.2, "num_experts": 2}, ["0.2", "[0.5, 1]"]),
        ({"capacity_delta": 1.0}, ["delta=1.0", "delta > 1"]),
        ({"capacity_beta": 0.0}, ["beta=0.0", "beta > 0"]),
        ({"capacity_beta": -1.0, "capacity": [0.25] * 4}, ["beta=-1.0", "beta > 0"]),
    ],
    ids=repr,
)
def test_bad_values_are_value_errors_that_give_the_value_and_what_is_allowed(fields, in_message):
    with pytest.raises(ValueError) as error:
        MoNEConfig(**fields)
    for part in in_message:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"router_layers": 0},
        {"router_layers": "0"},
        {"router_layers": [0.5]},
        {"num_experts": 4.0},
        {"hidden_size": "768"},
    ],
    ids=repr,
)
def test_wrong_types_are_refused_with_the_fields_name(fields):
    """By transformers' strict configs, with their own exception."""
    with pytest.raises((ValueError, StrictDataclassError), match=next(iter(fields))):
        MoNEConfig(**fields)


@pytest.mark.parametrize(
    "fields", [{"capacity": 7.0}, {"router_layers": [40]}, {"pooling": "max"}, {"hidden_size": 9}]
)
def test_a_field_set_wrongly_later_is_refused_before_saving(tmp_path, fields):
    """A checkpoint that nobody can load must not reach the disk."""
    config = MoNEConfig()
    with pytest.raises((ValueError, StrictDataclassError), match=next(iter(fields))):
        for name, value in fields.items():
            setattr(config, name, value)
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 1, "hidden_size": 9, "num_attention_heads": 3},
        {"num_experts": 6, "hidden_size": 64, "num_attention_heads": 2, "capacity": 1 / 32},
        {"capacity": 1},
        {"capacity": 0.125},
        {"capacity": [1, 0, 0, 0]},
        {"router_layers": range(12)},
        {"router_layers": (11,)},
        {"image_size": (16, 48)},
        {"num_labels": 0},
    ],
    ids=repr,
)
def test_edges_that_are_allowed(fields):
    fields = {name: list(value) if isinstance(value, range) else value for name, value in fields.items()}
    config = MoNEConfig(**fields)
    for name, value in fields.items():
        assert getattr(config, name) == value
