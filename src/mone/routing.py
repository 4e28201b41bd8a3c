# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Which expert processes which token: Algorithm 1 of "Mixture of Nested Experts" (NeurIPS 2024) and the router.

Axis letters: B batch (for video, batch times time), N tokens, E experts, D width.
Experts are numbered 0..E-1, smallest first. Nothing here waits for the device: the number of tokens of every
expert is a Python integer, so that shapes are static under `torch.compile` and `torch.export`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn


# The paper's range for alpha is [0, 1).
ALPHA_MAX = 1.0 - 1e-6


def expert_preferred_routing(probabilities: torch.Tensor, token_counts: Sequence[int]) -> torch.Tensor:
    """Expert Preferred Routing (Algorithm 1): from the largest expert down, each takes the tokens it ranks highest.

    Args:
        probabilities: (..., N, E) router probabilities. Leading axes are routed independently.
        token_counts: E integers, smallest expert first, that sum to N (`capacity.tokens_per_expert`).

    Returns:
        (..., N) int64, the expert of every token. Among equal probabilities the earlier token goes first.
        Assigned tokens are masked with -inf, not with the paper's 0, which would tie with a probability of 0.

    Raises:
        ValueError: unless `token_counts` are E numbers, none of them negative, that sum to N.
    """
    _check_counts(token_counts, probabilities)
    shape, device = probabilities.shape[:-1], probabilities.device
    largest = max(token_counts)
    if largest == sum(token_counts):  # one expert takes all: nothing to rank
        return torch.full(shape, list(token_counts).index(largest), dtype=torch.int64, device=device)
    experts = torch.zeros(shape, dtype=torch.int64, device=device)
    for expert in range(probabilities.shape[-1] - 1, 0, -1):
        if token_counts[expert] == 0:
            continue
        scores = probabilities[..., expert].detach().masked_fill(experts > expert, float("-inf"))
        # A stable sort and not topk, whose choice among equal values depends on the device.
        ranking = scores.sort(dim=-1, descending=True, stable=True).indices
        experts = experts.scatter(-1, ranking[..., : token_counts[expert]], expert)
    return experts


def argmax_routing(probabilities: torch.Tensor) -> torch.Tensor:
    """Token choice without a capacity bound (section A.3, "Task Difficulty"): (..., N, E) -> (..., N) int64."""
    return probabilities.argmax(dim=-1)


def _check_counts(token_counts: Sequence[int], probabilities: torch.Tensor) -> None:
    num_tokens, num_experts = probabilities.shape[-2:]
    if len(token_counts) != num_experts or sum(token_counts) != num_tokens or min(token_counts) < 0:
        raise ValueError(
            f"token_counts={tuple(token_counts)} must be {num_experts} non-negative integers that sum to the "
            f"{num_tokens} tokens of probabilities of shape {tuple(probabilities.shape)}."
        )


class Routing(NamedTuple):
    """A router's decision for (B, N) tokens. It holds until the next router."""

    logits: torch.Tensor
    """(B, N, E) router logits; of a random router its scores. Original token order."""
    experts: torch.Tensor
    """(B, N) int64, the expert of every token. Original token order."""
    gate: torch.Tensor | None
    """(B, N, 1) factor 1 + alpha r_j of the MLP's update (Eq. 1), in original order; None for a random router."""


class Router(nn.Module):
    """The router of section 4.1: r = softmax(W_r x + b_r), then an assignment of every token to one expert.

    Args:
        hidden_size: D.
        num_experts: E.
        router_type: "learned" (EPR on r), "random" (EPR on uniform random scores, no gate, no parameters) or
            "argmax" (token choice on r; ignores the capacity).
    """

    def __init__(self, hidden_size: int, num_experts: int, router_type: str = "learned"):
        super().__init__()
        self.num_experts = num_experts
        self.router_type = router_type
        if router_type != "random":
            self.proj = nn.Linear(hidden_size, num_experts)
            # One element and not a scalar: FSDP2 shards along the first axis and refuses scalars.
            self.alpha = nn.Parameter(torch.zeros(1))

    def forward(
        self, hidden_states: torch.Tensor, token_counts: Sequence[int], generator: torch.Generator | None = None
    ) -> Routing:
        """Assign every token to one expert.

        Args:
            hidden_states: (B, N, D), the tokens that enter the layer, before its norm.
            token_counts: E integers, smallest expert first, that sum to N.
            generator: source of a random router's scores; the global one by default.

        Raises:
            ValueError: `token_counts` do not fit, as in [`expert_preferred_routing`]. "argmax" ignores them.
        """
        if self.router_type == "random":
            device = hidden_states.device if generator is None else generator.device
            shape = (*hidden_states.shape[:-1], self.num_experts)
            scores = torch.rand(shape, generator=generator, device=device).to(hidden_states.device)
            return Routing(scores, expert_preferred_routing(scores, token_counts), None)
        logits = self.proj(hidden_states)
        # At least float32: in half precision many tokens would share one probability, and position would decide.
        probabilities = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        if self.router_type == "argmax":
            experts = argmax_routing(probabilities)
        else:
            experts = expert_preferred_routing(probabilities, token_counts)
        chosen = probabilities.gather(-1, experts.unsqueeze(-1))
        return Routing(logits, experts, (1.0 + self.effective_alpha() * chosen).to(hidden_states.dtype))

    def effective_alpha(self) -> torch.Tensor:
        """Alpha clamped to [0, 1), straight-through: the gradient passes, so that alpha can come back into range."""
        alpha = self.alpha.to(torch.promote_types(self.alpha.dtype, torch.float32))
        # In this order exactly 0 is added to the clamped value, so that no bit of it is lost.
        return alpha.detach().clamp(0.0, ALPHA_MAX) + (alpha - alpha.detach())

    def project_alpha_(self) -> None:
        """Put alpha itself back into [0, 1). Call it after each optimiser step, so that it cannot drift away."""
        if self.router_type != "random":
            clamp_alpha_(self.alpha)


@torch.no_grad()
def clamp_alpha_(alpha: torch.Tensor) -> torch.Tensor:
    """Put the values of `alpha`, or of a copy of it, back into [0, 1), in place."""
    # In half precision ALPHA_MAX would round to 1.
    return alpha.clamp_(0.0, min(ALPHA_MAX, 1.0 - torch.finfo(alpha.dtype).eps))
