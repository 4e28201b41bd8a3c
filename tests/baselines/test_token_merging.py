"""Token merging against a loop over single tokens, and against the dense model it starts from."""

import pytest
import torch

from mone import MoNEConfig
from mone.baselines import DenseModel, TokenMergingModel, merge_tokens, merged_per_layer_for_macs, token_merging_macs


def naive_merge(tokens, sizes, keys, merged):
    """One image: (N, D), (N,), (N, K) -> groups of tokens, by the paper's steps."""
    count = len(tokens)
    keys = keys / keys.norm(dim=1, keepdim=True)
    best = {}
    for a in range(0, count, 2):
        scores = {b: float(keys[a] @ keys[b]) for b in range(1, count, 2)}
        partner = max(scores, key=scores.get)
        best[a] = (scores[partner], partner)
    gone = sorted(best, key=lambda a: -best[a][0])[:merged]
    groups = {i: [i] for i in range(count) if i not in gone}
    for a in gone:
        groups[best[a][1]].append(a)
    rows = []
    for members in groups.values():
        weight = sum(sizes[i] for i in members)
        rows.append(torch.cat([sum(tokens[i] * sizes[i] for i in members) / weight, weight.reshape(1)]))
    return torch.stack(rows)


@pytest.mark.parametrize("count", [10, 11])
@pytest.mark.parametrize("merged", [0, 1, 3, 5])
def test_merging_equals_the_loop(count, merged):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, count, 6, generator=generator)
    keys = torch.randn(2, count, 4, generator=generator)
    sizes = torch.randint(1, 5, (2, count, 1), generator=generator).float()
    out, out_sizes = merge_tokens(tokens, sizes, keys, merged)
    assert out.shape == (2, count - merged, 6)
    for image in range(2):
        expected = naive_merge(tokens[image], sizes[image, :, 0], keys[image], merged)
        actual = torch.cat([out[image], out_sizes[image]], dim=1)
        key = lambda rows: rows[rows[:, 0].argsort()]  # noqa: E731  the order is free
        torch.testing.assert_close(key(actual), key(expected))


def make(kind, *args):
    config = MoNEConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    torch.manual_seed(0)
    return kind(config, *args).eval()


@torch.no_grad()
def test_without_merging_it_is_the_dense_model():
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(make(TokenMergingModel, 0)(images), make(DenseModel)(images))


@torch.no_grad()
def test_merging_equal_tokens_changes_nothing():
    """16 equal patches: proportional attention and weighted averages make merged ones count as many."""
    dense, merging = make(DenseModel), make(TokenMergingModel, 2)
    for model in (dense, merging):
        model.embeddings.position_embeddings.zero_()
    images = torch.randn(2, 3, 8, 8).repeat(1, 1, 4, 4)
    torch.testing.assert_close(merging(images), dense(images), atol=1e-5, rtol=1e-5)
    # Two kinds, in one layer: which tokens stand beside each other in the next depends on ties, and so on the CPU.
    half = torch.cat([images[:1, :, :, :16], torch.randn(1, 3, 8, 8).repeat(1, 1, 4, 2)], dim=3)
    for model in (dense, merging):
        model.layers = model.layers[:1]
    torch.testing.assert_close(merging(half), dense(half), atol=1e-5, rtol=1e-5)


def test_macs_by_hand():
    config = make(DenseModel).config
    dense = 16 * 3 * 64 * 32 + 3 * (16 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 16 * 16 * 32) + 32 * 5
    assert token_merging_macs(config, 0) == dense
    layers = 0
    for tokens, left in ((16, 12), (12, 8), (8, 4)):
        layers += tokens * 4 * 32 * 32 + 2 * tokens * tokens * 32 + (tokens // 2) ** 2 * 8 + left * 2 * 32 * 64
    assert token_merging_macs(config, 4) == 16 * 3 * 64 * 32 + layers + 32 * 5


def test_the_least_merging_that_fits_a_budget():
    config = make(DenseModel).config
    for merged in (0, 1, 4, 8):
        assert merged_per_layer_for_macs(config, token_merging_macs(config, merged) / 1e9) == merged
    with pytest.raises(ValueError, match="cannot be met: merging half of the tokens needs"):
        merged_per_layer_for_macs(config, 1e-9)
