"""count_macs against the paper's figure and against what PyTorch counts while the model runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from mone import (
    MoNEConfig,
    MoNEForImageClassification,
    MoNEViViTConfig,
    MoNEViViTForVideoClassification,
    capacity_for_macs,
    count_macs,
)
from mone.capacity import proportionate_allocation, uniform_allocation
from mone.flops import attention_macs


VIT_TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
ONE_HOTS = [[float(i == j) for j in range(4)] for i in range(4)]


def small_config(**fields):
    """36 tokens; widths chosen so that no two terms of the count are alike."""
    defaults = {
        "hidden_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "image_size": 48,
        "patch_size": 8,
        "num_labels": 11,
    }
    return MoNEConfig(**{**defaults, **fields})


@torch.no_grad()
def measured_macs(config, capacity, size=None):
    """MACs of one forward by PyTorch's counter. Eager attention: on CPU it does not see inside SDPA."""
    model = MoNEForImageClassification._from_config(config, attn_implementation="eager").eval()
    height, width = size or (config.image_size, config.image_size)
    images = torch.randn(1, config.num_channels, height, width)
    with FlopCounterMode(display=False) as counter:
        model(images, capacity=capacity, interpolate_pos_encoding=size is not None)
    return counter.get_total_flops() / 2


def test_dense_vit_tiny():
    """1.25 GMACs at 224², which the paper rounds to 1.3 "GFLOPs"."""
    assert count_macs(MoNEConfig(**VIT_TINY, num_labels=1000), 1.0) / 1e9 == pytest.approx(1.25, abs=0.01)


def test_dense_vit_base_is_the_published_17_6():
    """With a class token ViT-B/16 has 17.6 GMACs (timm's and torchvision's tables)."""
    config = MoNEConfig(pooling="cls", num_labels=1000)
    assert count_macs(config, 1.0) / 1e9 == pytest.approx(17.6, abs=0.05)


@pytest.mark.parametrize("capacity", [0.13, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 0.97, 1.0, *ONE_HOTS], ids=str)
@pytest.mark.parametrize(
    "fields",
    [{}, {"pooling": "cls"}, {"router_layers": (0, 2, 3)}, {"router_layers": (2,), "pooling": "cls"}],
    ids=str,
)
def test_count_equals_pytorchs(fields, capacity):
    config = small_config(**fields)
    assert count_macs(config, capacity) == pytest.approx(measured_macs(config, capacity), rel=0.005)


@pytest.mark.parametrize("capacity", [uniform_allocation(), proportionate_allocation(), [0.0, 0.3, 0.0, 0.7]], ids=str)
@pytest.mark.parametrize("router_type", ["learned", "random", "argmax"])
def test_count_equals_pytorchs_for_every_router_type(router_type, capacity):
    config = small_config(router_type=router_type, router_layers=(1, 3))
    assert count_macs(config, capacity) == pytest.approx(measured_macs(config, capacity), rel=0.005)


@pytest.mark.parametrize("size", [(96, 96), (16, 40), (8, 8)], ids=str)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_count_equals_pytorchs_at_another_image_size(pooling, size):
    config = small_config(pooling=pooling)
    for capacity in (0.3, 1.0):
        measured = measured_macs(config, capacity, size)
        assert count_macs(config, capacity, image_size=size) == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 1},
        {"num_experts": 2},
        {"num_experts": 5},
        {"num_channels": 1},
        {"qkv_bias": False},
        {"num_labels": 0},
        {"patch_size": (16, 4)},
        {"pooling": "cls_registers", "num_register_tokens": 7},
        {"pooling": "cls_mean", "embedding_norm": True, "final_norm": "pooled"},
    ],
    ids=str,
)
def test_count_equals_pytorchs_for_other_configs(fields):
    config = small_config(**fields)
    capacity = 1.0 if fields.get("num_experts") == 1 else 0.6
    assert count_macs(config, capacity) == pytest.approx(measured_macs(config, capacity), rel=0.005)


@pytest.mark.parametrize("router_type", ["learned", "random"])
def test_every_term_is_counted(router_type):
    """To the last product on a model so small that a missing router or classifier is far more than 0.5%."""
    config = small_config(num_hidden_layers=2, router_layers=(0, 1), router_type=router_type, pooling="cls")
    for capacity in (0.2, 0.5, 1.0):
        assert count_macs(config, capacity) == measured_macs(config, capacity)


def test_defaults_are_the_configs():
    config = small_config(capacity=0.3)
    assert count_macs(config) == count_macs(config, 0.3) == count_macs(config, 0.3, image_size=48)
    assert count_macs(config) < count_macs(config, 1.0)


def test_argmax_has_no_bound_below_the_dense_model():
    config = small_config(router_type="argmax")
    assert count_macs(config, 0.125) == count_macs(config, 1.0)


@pytest.mark.parametrize("capacity", [0.05, 1.2, True, "high", [0.5, 0.5]], ids=repr)
def test_bad_capacity(capacity):
    with pytest.raises(ValueError, match=r"\[0\.125, 1\]"):
        count_macs(small_config(), capacity)


@pytest.mark.parametrize("size", [-8, 1, (32, 33)])
def test_bad_image_size(size):
    for count in (count_macs, attention_macs):
        with pytest.raises(ValueError, match=r"must be a positive multiple of patch_size"):
            count(small_config(), image_size=size)


# --- capacity_for_macs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [MoNEConfig(**VIT_TINY), small_config(), small_config(pooling="cls", router_layers=(1, 3), num_experts=3)],
    ids=["ViT-Ti/16", "small", "three experts"],
)
@pytest.mark.parametrize("position", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_capacity_fits_the_budget_and_is_nearly_the_largest(config, position):
    smallest = 2.0 ** (1 - config.num_experts)
    least, dense = count_macs(config, smallest), count_macs(config, 1.0)
    budget = least + position * (dense - least)
    capacity = capacity_for_macs(config, budget / 1e9)
    assert smallest <= capacity < 1.0
    assert count_macs(config, capacity) <= budget * (1 + 1e-12)
    assert count_macs(config, min(1.0, capacity + 2e-6)) > budget or capacity + 2e-6 > 1.0
    # Cost is not quite monotone: each larger expert rounds down by up to a token, which the smallest expert takes.
    # So a capacity that fits may lie above, but by no more than these tokens' share.
    tokens = (config.image_size // config.patch_size) ** 2
    widths = [2.0 ** (i - config.num_experts) for i in range(1, config.num_experts + 1)]
    slack = sum(width - widths[0] for width in widths) / tokens
    grid = [smallest + (1.0 - smallest) * i / 1000 for i in range(1000)]
    assert capacity >= max(c for c in grid if count_macs(config, c) <= budget) - slack - 2e-6


def test_capacity_for_macs_at_another_image_size():
    config = MoNEConfig(**VIT_TINY)
    budget = count_macs(config, 0.5, image_size=112) / 1e9
    capacity = capacity_for_macs(config, budget, image_size=112)
    assert capacity == pytest.approx(0.5, abs=0.02)
    assert count_macs(config, capacity, image_size=112) <= budget * 1e9
    assert capacity_for_macs(config, budget * 10, image_size=112) == 1.0


@pytest.mark.parametrize("factor", [1.0, 1.0001, 50.0])
def test_a_budget_of_the_dense_model_or_more_is_capacity_one(factor):
    config = MoNEConfig(**VIT_TINY)
    assert capacity_for_macs(config, factor * count_macs(config, 1.0) / 1e9) == 1.0


@pytest.mark.parametrize("gmacs", [0.0, -1.0, 0.1, float("nan"), float("-inf")])
def test_a_budget_below_the_least_is_an_error_that_names_the_least(gmacs):
    config = MoNEConfig(**VIT_TINY)
    least = count_macs(config, 0.125) / 1e9
    with pytest.raises(ValueError) as error:
        capacity_for_macs(config, gmacs)
    assert f"{least:.3g}" in str(error.value) and str(gmacs) in str(error.value)


def test_configs_of_the_code_beside_a_checkpoint(tmp_path):
    """As `trust_remote_code` loads them where the package is not imported."""
    config = MoNEViViTConfig(num_frames=4, image_size=32, num_labels=3)
    MoNEViViTForVideoClassification(config).save_pretrained(tmp_path)
    foreign = get_class_from_dynamic_module("configuration_mone.MoNEViViTConfig", str(tmp_path))
    assert foreign is not MoNEViViTConfig
    assert count_macs(foreign.from_pretrained(tmp_path), 0.4) == count_macs(config, 0.4)
    assert attention_macs(foreign.from_pretrained(tmp_path)) == attention_macs(config)


def test_what_is_no_config_and_what_is_no_budget_is_said():
    config = MoNEConfig(**VIT_TINY)
    model = torch.nn.Linear(1, 1)
    for count in (lambda: count_macs(model), lambda: capacity_for_macs(model, 1.0)):
        with pytest.raises(TypeError, match=r"config must be a MoNEConfig, such as model.config, got Linear"):
            count()
    for budget in ("0.1", None, True):
        with pytest.raises(TypeError, match=f"gmacs={budget!r} must be a number"):
            capacity_for_macs(config, budget)


def test_the_least_budget_works():
    config = MoNEConfig(**VIT_TINY)
    least = count_macs(config, 0.125) / 1e9
    capacity = capacity_for_macs(config, least)
    assert count_macs(config, capacity) <= least * 1e9
    with pytest.raises(ValueError):
        capacity_for_macs(config, least * 0.999)


@pytest.mark.parametrize(("capacity", "gmacs"), [(1.0, 372.5), (0.4, 163.0)])
def test_vivit_fe_b_at_256_pixels(capacity, gmacs):
    """ViViT-FE-B/16x2, 32 frames, 4 temporal layers, 174 classes: the model of Table 1."""
    config = MoNEViViTConfig(image_size=256, num_labels=174)
    assert count_macs(config, capacity) / 1e9 == pytest.approx(gmacs, abs=0.15)


@pytest.mark.parametrize("capacity", [0.125, 0.2, 0.4, 0.7, 1.0, (0.0, 0.0, 1.0, 0.0)], ids=str)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_video_macs_are_pytorchs(capacity, pooling):
    config = MoNEViViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_temporal_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        tubelet_size=(4, 8, 8),
        num_frames=8,
        router_layers=(1, 2),
        pooling=pooling,
        num_labels=7,
    )
    model = MoNEViViTForVideoClassification._from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 8, 3, 32, 32), capacity=capacity)
    assert count_macs(config, capacity) == pytest.approx(counter.get_total_flops() / 2, rel=0.005)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("size", [None, (64, 32)])
def test_attention_is_what_no_capacity_and_no_projection_explains(pooling, size):
    config = small_config(pooling=pooling)
    rows, columns = (size[0] // 8, size[1] // 8) if size else (6, 6)
    sequence = rows * columns + (pooling == "cls")
    projections = config.num_hidden_layers * sequence * 48 * (4 * 48 + 2 * 80)
    others = rows * columns * (3 * 64 * 48 + 48 * 4) + 48 * 11
    assert attention_macs(config, size) == count_macs(config, 1.0, size) - projections - others


@pytest.mark.parametrize(("pooling", "spatial", "temporal"), [("mean", 36, 3), ("cls", 37, 4)])
def test_attention_of_both_encoders_of_a_video_model(pooling, spatial, temporal):
    """Each has a class token of its own."""
    fields = {"hidden_size": 48, "num_attention_heads": 4, "image_size": 48, "num_hidden_layers": 5}
    config = MoNEViViTConfig(**fields, tubelet_size=(2, 8, 8), num_frames=6, num_temporal_layers=3, pooling=pooling)
    assert attention_macs(config) == 2 * 48 * (3 * 5 * spatial**2 + 3 * temporal**2)
