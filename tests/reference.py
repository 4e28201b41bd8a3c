"""The model as design and paper state it, one token at a time: without sorting, slicing or batching.

Nested projections are Extract and Pad of section 3.1: features past d_j are set to zero before a whole in-projection
and after a whole out-projection. Nothing here is shared with the package but the number of tokens of each expert,
which test_capacity.py checks. Weights are read from a state dict, in double precision, by the names of the design.
"""

import math
from types import SimpleNamespace

import torch

from mone.capacity import resolve_capacity, tokens_per_expert


def randomise_(model, std=0.2, alpha=0.5):
    """Weights that are large enough for every path to matter: at initialisation biases and alpha are 0.

    Each router gets an alpha of its own, from `alpha` upwards.
    """
    generator = torch.Generator().manual_seed(1)
    routers = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(alpha + 0.1 * routers if alpha else 0.0)
                routers += 1
            else:
                parameter.normal_(std=std, generator=generator)
                if "layernorm" in name and name.endswith("weight"):
                    parameter.add_(1.0)
    return model


def assert_close(actual, expected, tolerance=1e-5):
    """Largest difference at most `tolerance`, or that times the largest expected value where this is above 1."""
    assert actual.shape == expected.shape
    expected = expected.to(actual.device, torch.float64)
    error = (actual.double() - expected).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    assert error <= tolerance * scale, f"largest difference {error:.3g} with values up to {scale:.3g}"


def linear(weights, name, x):
    y = weights[f"{name}.weight"] @ x
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def layer_norm(weights, config, name, x):
    centred = x - x.mean()
    normed = centred / torch.sqrt((centred**2).mean() + config.layer_norm_eps)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def zero_beyond(x, d):
    return torch.cat([x[:d], x.new_zeros(len(x) - d)])


def patch_tokens(kernel, bias, pixels):
    """Tokens of the patches of `pixels` (..., height, width), row by row; the kernel is (D, ..., rows, columns)."""
    tokens = []
    rows, columns = kernel.shape[-2:]
    for top in range(0, pixels.shape[-2], rows):
        for left in range(0, pixels.shape[-1], columns):
            patch = pixels[..., top : top + rows, left : left + columns]
            tokens.append((kernel * patch).flatten(1).sum(dim=1) + bias)
    return tokens


def add_positions(weights, name, tokens):
    """Class token in front where there is one, then position embeddings."""
    if f"{name}.cls_token" in weights:
        tokens = [weights[f"{name}.cls_token"][0, 0], *tokens]
    return [token + weights[f"{name}.position_embeddings"][0, n] for n, token in enumerate(tokens)]


def pool(config, tokens):
    return tokens[0] if config.pooling == "cls" else tokens.mean(dim=0)


def reference_encoder(weights, config, name, num_layers, tokens, capacity, scores=None, routed=True):
    """Layers, routers and final norm under `name` ("mone") on the tokens of one image, class token first.

    Args:
        scores: for a random router, the (N, E) scores it drew, one per router.
        routed: False for an encoder without routers.
    """
    width, num_experts, heads = config.hidden_size, config.num_experts, config.num_attention_heads
    head_dim = width // heads
    expert_widths = [width // 2 ** (num_experts - i) for i in range(1, num_experts + 1)]
    full = num_experts - 1

    first_patch = 1 if config.pooling == "cls" else 0
    patches = range(first_patch, len(tokens))
    counts = tokens_per_expert(
        resolve_capacity(capacity, num_experts, config.capacity_delta, config.capacity_beta), len(patches)
    )
    # Before the first router, and a class token always: the full model, without a gate.
    expert_of, gate_of = [full] * len(tokens), [1.0] * len(tokens)
    hidden_states, attentions, router_logits, expert_indices = [torch.stack(tokens)], [], [], []

    for index in range(num_layers):
        if routed and index in config.router_layers:
            number = list(config.router_layers).index(index)
            if config.router_type == "random":
                logits = rank = scores[number]
            else:
                logits = torch.stack([linear(weights, f"{name}.routers.{number}.proj", tokens[n]) for n in patches])
                rank = torch.softmax(logits, dim=-1)
            if config.router_type == "argmax":
                chosen = [row.index(max(row)) for row in rank.tolist()]
            else:
                chosen = [0] * len(patches)
                free = set(range(len(patches)))
                for expert in range(full, 0, -1):
                    for token in sorted(free, key=lambda n: (-rank[n, expert].item(), n))[: counts[expert]]:
                        chosen[token] = expert
                        free.remove(token)
            for n, expert in zip(patches, chosen, strict=True):
                expert_of[n] = expert
                if config.router_type != "random":
                    alpha = weights[f"{name}.routers.{number}.alpha"].sum()
                    gate_of[n] = 1 + alpha * rank[n - first_patch, expert]
            router_logits.append(logits)
            expert_indices.append(torch.tensor(chosen))

        prefix = f"{name}.layers.{index}"
        normed = [layer_norm(weights, config, f"{prefix}.layernorm_before", x) for x in tokens]
        nested = [zero_beyond(x, expert_widths[j]) for x, j in zip(normed, expert_of, strict=True)]
        query, key, value = (
            torch.stack([linear(weights, f"{prefix}.attention.{kind}_proj", x) for x in nested]) for kind in "qkv"
        )
        probabilities = torch.stack(
            [
                torch.stack(
                    [
                        torch.softmax(key[:, part] @ query[n, part] / math.sqrt(head_dim), dim=0)
                        for n in range(len(key))
                    ]
                )
                for part in (slice(h * head_dim, (h + 1) * head_dim) for h in range(heads))
            ]
        )  # (heads, query, key)
        attentions.append(probabilities)

        updated = []
        for n, x in enumerate(tokens):
            d = expert_widths[expert_of[n]]
            context = torch.cat(
                [probabilities[h, n] @ value[:, h * head_dim : (h + 1) * head_dim] for h in range(heads)]
            )
            z = x + zero_beyond(linear(weights, f"{prefix}.attention.o_proj", context), d)
            hidden = linear(
                weights,
                f"{prefix}.mlp.fc1",
                zero_beyond(layer_norm(weights, config, f"{prefix}.layernorm_after", z), d),
            )
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2  # GELU
            updated.append(z + gate_of[n] * zero_beyond(linear(weights, f"{prefix}.mlp.fc2", hidden), d))
        tokens = updated
        hidden_states.append(torch.stack(tokens))

    final = torch.stack([layer_norm(weights, config, f"{name}.layernorm", x) for x in tokens])
    return SimpleNamespace(
        last_hidden_state=final,
        hidden_states=hidden_states,
        attentions=attentions,
        router_logits=router_logits,
        expert_indices=expert_indices,
    )


def reference_image(weights, config, image, capacity, scores):
    kernel = weights["mone.embeddings.patch_embeddings.projection.weight"]
    tokens = patch_tokens(kernel, weights["mone.embeddings.patch_embeddings.projection.bias"], image)
    tokens = add_positions(weights, "mone.embeddings", tokens)
    out = reference_encoder(weights, config, "mone", config.num_hidden_layers, tokens, capacity, scores)
    out.pooler_output = pool(config, out.last_hidden_state)
    out.logits = linear(weights, "classifier", out.pooler_output)
    return out


def reference_model(weights, config, pixel_values, capacity, scores=None):
    """Every output of the image model.

    Args:
        weights: state dict of `MoNEForImageClassification`, in double precision.
        scores: for a random router, the (B, N, E) scores it drew, one per router.
    """
    images = []
    for b, image in enumerate(pixel_values):
        image_scores = None if scores is None else [score[b] for score in scores]
        images.append(reference_image(weights, config, image, capacity, image_scores))
    out = SimpleNamespace()
    for name in ("logits", "last_hidden_state", "pooler_output"):
        setattr(out, name, torch.stack([getattr(image, name) for image in images]))
    for name in ("hidden_states", "attentions", "router_logits", "expert_indices"):
        per_image = zip(*(getattr(image, name) for image in images), strict=True)
        setattr(out, name, [torch.stack(values) for values in per_image])
    return out


def double_weights(model):
    return {name: value.detach().double().requires_grad_() for name, value in model.state_dict().items()}


def check_forward_and_gradients(model, capacity, pixel_values, scores=None, reference=reference_model, **kwargs):
    """Logits, and the gradients of a random projection of them with respect to all parameters and the pixels."""
    model.zero_grad()
    pixels = pixel_values.clone().requires_grad_()
    logits = model(pixels, capacity=capacity, **kwargs).logits
    weights = double_weights(model)
    reference_pixels = pixel_values.double().requires_grad_()
    expected = reference(weights, model.config, reference_pixels, capacity, scores).logits
    assert_close(logits, expected)

    projection = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    (logits * projection).sum().backward()
    (expected * projection).sum().backward()
    assert_close(pixels.grad, reference_pixels.grad)
    for name, parameter in model.named_parameters():
        actual = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = weights[name].grad
        assert_close(actual, torch.zeros_like(actual) if gradient is None else gradient)
    return weights
