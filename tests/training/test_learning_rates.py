"""Which learning rate each parameter gets."""

import pytest
import torch

from mone import MoNEConfig, MoNEForImageClassification, MoNEViViTConfig, MoNEViViTForVideoClassification
from mone.training.learning_rates import layer_depths, set_learning_rates


FIELDS = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 16}


def image_model(**fields) -> MoNEForImageClassification:
    config = MoNEConfig(**FIELDS, num_hidden_layers=3, patch_size=4, num_labels=3, **fields)
    return MoNEForImageClassification(config)


def video_model() -> MoNEViViTForVideoClassification:
    config = MoNEViViTConfig(
        **FIELDS, num_hidden_layers=2, num_temporal_layers=3, tubelet_size=(2, 8, 8), num_frames=4, num_labels=3
    )
    return MoNEViViTForVideoClassification(config)


def rates(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, float]:
    found = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    return {name: found[p] for name, p in model.named_parameters()}


@pytest.mark.parametrize("fields", [{}, {"pooling": "cls_mean", "num_register_tokens": 2, "router_layers": (0, 2)}])
def test_the_depth_of_an_image_models_parameters(fields):
    model = image_model(**fields)
    depths = layer_depths(model)
    for name, parameter in model.named_parameters():
        if ".embeddings." in name:
            assert depths[parameter] == 0, name
        elif ".layers." in name:
            assert depths[parameter] == int(name.split(".layers.")[1].split(".")[0]) + 1, name
        elif ".routers." not in name:
            assert depths[parameter] == 4, name


def test_temporal_layers_count_on_from_the_spatial_ones():
    model = video_model()
    found = layer_depths(model)
    depths = {name: found[p] for name, p in model.named_parameters()}
    firsts = {"spatial": 1, "temporal": 3}
    for name, depth in depths.items():
        encoder = "temporal" if ".temporal." in name else "spatial"
        if ".layers." in name:
            assert depth == firsts[encoder] + int(name.split(".layers.")[1].split(".")[0]), name
    assert depths["mone_vivit.embeddings.patch_embeddings.projection.weight"] == 0
    assert depths["mone_vivit.spatial.position_embeddings"] == 0
    assert depths["mone_vivit.spatial.layernorm.weight"] == 3
    assert depths["mone_vivit.temporal.position_embeddings"] == 3
    assert depths["mone_vivit.temporal.layernorm.weight"] == 6
    assert depths["classifier.weight"] == 6


@pytest.mark.parametrize("router", [None, 0.3])
def test_rates_decay_from_the_classifier_and_routers_have_their_own(router):
    model = image_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    set_learning_rates(optimizer, model, router, 0.5)
    found = rates(optimizer, model)
    assert found["classifier.weight"] == found["mone.layernorm.bias"] == 0.1
    assert [found[f"mone.layers.{i}.mlp.fc1.weight"] for i in range(3)] == pytest.approx([0.0125, 0.025, 0.05])
    assert found["mone.embeddings.position_embeddings"] == pytest.approx(0.1 / 16)
    assert {found[name] for name in found if ".routers." in name} == {router or 0.1}
    assert optimizer.param_groups[0]["lr"] == 0.1  # which Trainer logs


def test_what_else_differs_between_groups_is_kept():
    model = image_model()
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}])
    set_learning_rates(optimizer, model, None, 0.7)
    for group in optimizer.param_groups:
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] == 0.2}


def test_without_decay_and_router_rate_the_groups_stay():
    model = image_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    set_learning_rates(optimizer, model, None, 1.0)
    assert len(optimizer.param_groups) == 1
    assert set(rates(optimizer, model).values()) == {0.1}
