"""Mixture of Depths against a loop over single tokens, and against the dense model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mone import MoNEConfig, MoNEViViTConfig
from mone.baselines import DenseModel, MixtureOfDepthsModel, TokenMergingModel, mixture_of_depths_macs


def make(kind, image_size=32, **fields):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    return kind(MoNEConfig(**sizes, image_size=image_size, patch_size=8, num_labels=5, **fields)).eval()


@torch.no_grad()
@pytest.mark.parametrize(("image_size", "count"), [(32, 2), (48, 4), (16, 1)])
def test_it_equals_the_loop(image_size, count):
    """Of 16 and 36 tokens the eighth, rounded down, and of 4 still one."""
    model = make(MixtureOfDepthsModel, image_size)
    images = torch.randn(2, 3, image_size, image_size)
    expected = []
    for image in images:
        tokens = model.layers[0](model.embed(image[None]))[0]
        scores = [float(model.routers[0].weight @ token) for token in tokens]
        chosen = sorted(range(len(tokens)), key=lambda i: -scores[i])[:count]
        output = model.layers[1](tokens[chosen][None])[0]
        tokens = [
            token + scores[i] * (output[chosen.index(i)] - token) if i in chosen else token
            for i, token in enumerate(tokens)
        ]
        tokens = model.layers[2](torch.stack(tokens)[None])[0]
        expected.append(model.classifier(model.layernorm(tokens).mean(0)))
    torch.testing.assert_close(model(images), torch.stack(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_with_all_tokens_and_scores_of_one_it_is_the_dense_model():
    model, dense = make(MixtureOfDepthsModel), make(DenseModel)
    model.chosen = 16
    dense.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 32)
    model.routers[0].register_forward_hook(lambda module, args, output: torch.ones_like(output))
    torch.testing.assert_close(model(images), dense(images), atol=1e-5, rtol=1e-5)


def test_everything_learns():
    model = make(MixtureOfDepthsModel)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    # A bias of the keys shifts all of a query's scores alike, which softmax does not see.
    silent = {name for name, p in model.named_parameters() if not p.grad.abs().max() > 1e-6}
    assert silent == {f"layers.{number}.attention.k_proj.bias" for number in range(3)}


def test_macs_are_those_that_torch_counts():
    model = make(MixtureOfDepthsModel)
    for layer in model.layers:
        layer.attention.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert mixture_of_depths_macs(model.config) == counter.get_total_flops() // 2


def test_another_pooling_is_refused():
    for fields in ({"pooling": "cls"}, {"num_register_tokens": 2}, {"final_norm": "pooled"}):
        (name, value), *_ = fields.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}.*: the baselines have 'mean', 'tokens' and 0 only"):
            make(MixtureOfDepthsModel, **fields)
    for baseline, options in ((MixtureOfDepthsModel, ()), (TokenMergingModel, (1,))):
        with pytest.raises(TypeError, match="is of a video model"):
            baseline(MoNEViViTConfig(), *options)
