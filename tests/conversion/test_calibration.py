# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Converted ViTs fitted to images: routers that give the large experts the tokens that need them."""

import pytest
import torch
from vits import make_vit, randomise

from mone import MoNEConfig, MoNEForImageClassification, MoNEViViTConfig, MoNEViViTForVideoClassification
from mone.conversion import calibrate, mone_from_vit, start_routers
from mone.conversion.calibration import predict


SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32}


def make_model(**fields) -> MoNEForImageClassification:
    fields = {**SIZES, "num_hidden_layers": 3, "patch_size": 8, "num_labels": 5, **fields}
    model = randomise(MoNEForImageClassification(MoNEConfig(**fields)))
    for router in model.mone.routers:
        if hasattr(router, "alpha"):
            torch.nn.init.zeros_(router.alpha)
    return model


def make_pixels(count: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def missing_energy(tokens: torch.Tensor) -> torch.Tensor:
    """(B, N) of (B, N, D) tokens: what one norm passes on in the channels that experts 0, 1 and 2 of 4 lack."""
    squares = tokens.square()
    return squares[..., 4:].sum(-1) + squares[..., 8:].sum(-1) + squares[..., 16:].sum(-1)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("router_layers", [(0,), (1,), (0, 2)])
def test_the_routers_predict_what_experts_would_lack(pooling, router_layers):
    """Against a hand-written sum over recorded tokens, and the best regression on the tokens that it has seen."""
    model, pixel_values = make_model(pooling=pooling, router_layers=router_layers), make_pixels()
    read = {}
    for name, module in model.named_modules():
        if "layernorm_" in name:
            module.register_forward_hook(lambda m, args, out, name=name: read.__setitem__(name, out.transpose(0, 1)))
    with torch.no_grad():
        start_routers(model, pixel_values)
        outputs = model(pixel_values, output_hidden_states=True, output_router_logits=True)
    prefix = int(pooling == "cls")
    ends = (*router_layers[1:], 3)
    for number, (start, end) in enumerate(zip(router_layers, ends, strict=True)):
        energy = sum(
            missing_energy(read[f"mone.layers.{layer}.layernorm_{place}"][:, prefix:])
            for layer in range(start, end)
            for place in ("before", "after")
        ).flatten()
        x = outputs.hidden_states[start][:, prefix:].flatten(0, 1)
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        best = x @ torch.linalg.lstsq(x, energy.unsqueeze(1)).solution[:, 0]
        logits = outputs.router_logits[number].flatten(0, 1)
        for expert in range(3):
            step = logits[:, expert + 1] - logits[:, expert]
            assert torch.corrcoef(torch.stack([step, best]))[0, 1] > 0.999
        # One half for each standard deviation from two above the mean, shrunk by what cannot be predicted.
        step, share = logits[:, 1] - logits[:, 0], (best.std() / energy.std()).item()
        assert step.mean().item() == pytest.approx(-1.0, abs=1e-3)
        assert step.std().item() == pytest.approx(0.5 * share, rel=0.02)


def test_the_largest_expert_gets_the_tokens_that_need_it():
    model, pixel_values = make_model(), make_pixels(64, seed=1)
    with torch.no_grad():
        calibrate(model, make_pixels(64))
        outputs = model(pixel_values, capacity=(0.5, 0, 0, 0.5), output_router_logits=True)
        read = []
        for layer in model.mone.layers:
            for norm in (layer.layernorm_before, layer.layernorm_after):
                norm.register_forward_hook(lambda m, args, out: read.append(out.transpose(0, 1)))
        model(pixel_values, capacity=1.0)
    energy, experts = sum(missing_energy(tokens) for tokens in read), outputs.expert_indices[0]
    assert energy[experts == 3].mean() > 1.05 * energy[experts == 0].mean()


def test_predict_is_a_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 6, generator=generator, dtype=torch.float64) + 3
    truth = torch.randn(6, generator=generator, dtype=torch.float64)
    weight, bias = predict(x, x @ truth - 7)
    torch.testing.assert_close(weight, truth, atol=1e-2, rtol=0)
    torch.testing.assert_close(x @ weight + bias, x @ truth - 7, atol=0.05, rtol=0)
    weight, _ = predict(torch.cat([x, x], dim=1), x @ truth)  # where there are several solutions, the shortest
    torch.testing.assert_close(weight, torch.cat([truth, truth]) / 2, atol=1e-2, rtol=0)


def test_training_at_capacity_one_does_not_count():
    model = make_model()
    model.mone.routers[0].alpha.data.fill_(2e-4)
    calibrate(model, make_pixels())
    assert model.mone.routers[0].alpha.item() == 0


def test_nothing_changes_at_capacity_one():
    model, pixel_values = mone_from_vit(make_vit("dinov2")).train(), make_pixels(3)
    with torch.no_grad():
        expected = model.eval()(pixel_values).logits
        model.train()
        calibrate(model, make_pixels())
        assert model.training
        torch.testing.assert_close(model.eval()(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("router_type", ["random", "argmax"])
def test_routers_that_learn_no_ranking_stay(router_type):
    model = make_model(router_type=router_type)
    before = {name: value.clone() for name, value in model.named_parameters()}
    start_routers(model, make_pixels())
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_models_that_cannot_be_calibrated():
    trained = make_model()
    trained.mone.routers[0].alpha.data.fill_(0.25)
    before = {name: value.clone() for name, value in trained.named_parameters()}
    for fit in (calibrate, start_routers):
        with pytest.raises(ValueError, match=r"trained as a MoNE.*mone\.routers\.0\.alpha = 0\.25"):
            fit(trained, make_pixels())
    assert all(torch.equal(before[name], value) for name, value in trained.named_parameters())
    with pytest.raises(ValueError, match="embedding_norm=True"):
        calibrate(mone_from_vit(make_vit("clip")), make_pixels())
    video = MoNEViViTForVideoClassification(
        MoNEViViTConfig(**SIZES, num_hidden_layers=1, tubelet_size=(2, 8, 8), num_frames=4, num_temporal_layers=1)
    )
    for fit in (calibrate, start_routers):
        with pytest.raises(TypeError, match="calibrate one, and make the video model of that"):
            fit(video, make_pixels())
