# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Converted ViTs fitted to images: routers that give the large experts the tokens that need them."""

import copy

import pytest
import torch
from vits import make_vit, randomise

from mone import MoNEConfig, MoNEForImageClassification, MoNEViViTConfig, MoNEViViTForVideoClassification
from mone.conversion import calibrate, mone_from_vit, start_routers
from mone.conversion.calibration import RidgeRegression


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


def token_scores(model: MoNEForImageClassification, image: torch.Tensor, layers: range) -> torch.Tensor:
    """(N,) of one image: the largest logit's first-order change when a token loses the channels of one norm, summed.

    Channels are lost by a factor on them, by which the logit is differentiated: no product of gradients and tokens.
    """
    prefix, total = model.config.num_prefix_tokens, 0.0
    norms = [
        getattr(model.mone.layers[layer], f"layernorm_{place}") for layer in layers for place in ("before", "after")
    ]
    for norm in norms:
        for width in (4, 8, 16):
            factor = torch.ones(1, prefix + 16, 1, requires_grad=True)

            def scale(norm, args, output, factor=factor, width=width):
                return torch.cat([output[..., :width], output[..., width:] * factor], dim=-1)

            hook = norm.register_forward_hook(scale)
            (gradient,) = torch.autograd.grad(model(image[None]).logits.max(), factor)
            hook.remove()
            total = total + gradient[0, prefix:, 0].abs()
    return total


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("router_layers", [(0,), (1,), (0, 2)])
def test_the_routers_predict_what_the_prediction_would_miss(pooling, router_layers):
    """Against the best regression on the scores of one image, one norm and one expert at a time."""
    model, pixel_values = make_model(pooling=pooling, router_layers=router_layers).eval(), make_pixels(10)
    start_routers(model, pixel_values)
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True, output_router_logits=True)
    ends = (*router_layers[1:], 3)
    for number, (start, end) in enumerate(zip(router_layers, ends, strict=True)):
        scores = torch.stack([token_scores(model, image, range(start, end)) for image in pixel_values])
        x = outputs.hidden_states[start][:, int(pooling == "cls") :]
        x = (x - x.mean(1, keepdim=True)).flatten(0, 1)
        scores = ((scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)).flatten()
        best = x @ torch.linalg.lstsq(x, scores.unsqueeze(1)).solution[:, 0]
        logits = outputs.router_logits[number]
        for expert in range(3):
            step = logits[..., expert + 1] - logits[..., expert]
            differences = (step - step.mean(1, keepdim=True)).flatten()
            assert torch.corrcoef(torch.stack([differences, best]))[0, 1] > 0.99
            # One half for each standard deviation, from two above the mean.
            assert step.mean().item() == pytest.approx(-1.0, abs=1e-3)
            assert differences.std(correction=0).item() == pytest.approx(0.5, rel=1e-3)


def test_the_largest_expert_gets_the_tokens_that_need_it():
    model, pixel_values = make_model(), make_pixels(8, seed=1)
    calibrate(model, make_pixels(64))
    with torch.no_grad():
        experts = model(pixel_values, capacity=(0.5, 0, 0, 0.5), output_router_logits=True).expert_indices[0]
    scores = torch.stack([token_scores(model, image, range(3)) for image in pixel_values])
    assert scores[experts == 3].mean() > 1.05 * scores[experts == 0].mean()


def test_a_model_without_a_classifier_and_frozen_weights(caplog):
    model, pixel_values = mone_from_vit(make_vit("dinov2 model")).requires_grad_(False), make_pixels()
    with torch.no_grad():
        calibrate(model, pixel_values)
    assert "no longer the source's features" in caplog.text
    assert model.routers[0].proj.weight.abs().max() > 0
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


def test_a_new_classifier_of_zeros():
    """It has no gradient: the same as without one."""
    model, pixel_values = make_model(pooling="cls"), make_pixels()
    torch.nn.init.zeros_(model.classifier.weight)
    encoder = copy.deepcopy(model.mone)
    for fitted in (model, encoder):
        calibrate(fitted, pixel_values)
    with torch.no_grad():
        have, want = (m(pixel_values, output_router_logits=True).router_logits[0] for m in (model, encoder))
    assert want.std() > 0.1
    torch.testing.assert_close(have, want)


def test_ridge_regression_within_images():
    """Against least squares on all tokens at once, whose constants of single images and lengths do not count."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(20, 50, 6, generator=generator, dtype=torch.float64)  # (N, B, D)
    truth = torch.randn(6, generator=generator, dtype=torch.float64)
    factors, constants = torch.rand(2, 50, generator=generator, dtype=torch.float64) + 0.1
    fit = RidgeRegression(6, torch.device("cpu"))
    for images in torch.arange(50).split(8):
        fit.add(tokens[:, images], (tokens[:, images] @ truth) * factors[images] + constants[images])
    within = (tokens - tokens.mean(0)).flatten(0, 1)
    best = truth / (within @ truth).std(correction=0)
    torch.testing.assert_close(fit.solve(), best, atol=0.05, rtol=0)
    assert (within @ fit.solve()).std(correction=0).item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(fit.mean(), tokens.mean((0, 1)))


def test_ridge_regression_of_what_cannot_be_told_apart():
    """The same channel twice, one image with equal scores, one token: weights are shared, and all are finite."""
    x = torch.randn(20, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, scores = torch.cat([x, x], dim=2), x[..., 0].clone()
    scores[:, 7] = 1.0
    fit, single = RidgeRegression(6, torch.device("cpu")), RidgeRegression(6, torch.device("cpu"))
    fit.add(tokens, scores)
    torch.testing.assert_close(fit.solve()[:3], fit.solve()[3:])
    single.add(tokens[:1], scores[:1])
    assert single.solve().isfinite().all()


def test_nothing_changes_at_capacity_one():
    model, pixel_values = mone_from_vit(make_vit("dinov2")).train(), make_pixels(3)
    with torch.no_grad():
        expected = model.eval()(pixel_values).logits
        model.train()
        model.base_model.embeddings.eval()  # as users do whose first layers are frozen
        calibrate(model, make_pixels())
        assert model.training and not model.base_model.embeddings.training
        torch.testing.assert_close(model.eval()(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pixel_values", [torch.zeros(0, 3, 32, 32), torch.full((2, 3, 32, 32), float("nan"))])
def test_images_that_cannot_be_fitted_to(pixel_values):
    model = make_model()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"pixel_values of shape \([02], 3, 32, 32\) must be at least one image of fin"
    ):
        calibrate(model, pixel_values)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


@pytest.mark.parametrize("pixel_values", [torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [1.0]])
def test_what_is_no_image_of_a_processor(pixel_values):
    with pytest.raises(
        TypeError, match=r"must be a floating tensor, as an image processor makes it, got (torch.uint8|list)"
    ):
        calibrate(make_model(), pixel_values)


@pytest.mark.parametrize("router_type", ["random", "argmax"])
def test_routers_that_learn_no_ranking_stay(router_type):
    model = make_model(router_type=router_type)
    before = {name: value.clone() for name, value in model.named_parameters()}
    start_routers(model, make_pixels())
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_models_that_cannot_be_calibrated():
    trained = make_model()
    trained.mone.routers[0].alpha.data.fill_(1e-5)
    with pytest.raises(ValueError, match=r"alpha = 1e-05\. If it was not, set that to 0"):
        calibrate(trained, make_pixels())
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
