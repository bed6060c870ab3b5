"""Layouts: inverse of each other bit for bit, and where each row goes, over random shapes."""

import random

import pytest
import torch

from conversion.layout import FUSED_QKV, GATE_UP, PLAIN, QKV, VOCABULARY
from nemo_ext.architecture import Architecture


def architectures(count: int = 12):
    chooser = random.Random(0)
    for _ in range(count):
        heads = chooser.choice([1, 2, 3, 4, 6, 8, 12])
        groups = chooser.choice([g for g in range(1, heads + 1) if heads % g == 0])
        yield Architecture(
            family="llama", num_layers=1, hidden_size=chooser.randrange(1, 40), ffn_hidden_size=chooser.randrange(1, 50),
            num_attention_heads=heads, num_query_groups=groups, kv_channels=chooser.choice([1, 2, 8, 24]),
            vocab_size=chooser.randrange(1, 300),
        )  # fmt: skip


def tensors(*shapes):
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [part.view(shape) for part, shape in zip(torch.arange(sum(sizes)).split(sizes), shapes, strict=True)]


def cases(a):
    h = a.hidden_size
    separate = [(a.attention_width, h), (a.kv_width, h), (a.kv_width, h)]
    yield QKV, tensors(*separate)
    yield QKV, tensors(*[(rows,) for rows, _ in separate])
    yield FUSED_QKV, tensors((a.attention_width + 2 * a.kv_width, h))
    yield GATE_UP, tensors((a.ffn_hidden_size, h), (a.ffn_hidden_size, h))
    yield VOCABULARY, tensors((a.vocab_size, h))
    yield PLAIN, tensors((h,))


@pytest.mark.parametrize("a", architectures(), ids=lambda a: f"{a.num_attention_heads}h{a.num_query_groups}g{a.kv_channels}d")
def test_split_undoes_merge(a):
    for layout, parts in cases(a):
        merged = layout.merge(a, parts)
        back = layout.split(a, merged)
        assert len(back) == len(parts)
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(back, parts, strict=True))
        assert torch.equal(layout.merge(a, back), merged)
        on_meta = layout.merge(a, [part.to("meta") for part in parts])
        assert on_meta.shape == merged.shape


@pytest.mark.parametrize("a", architectures(), ids=lambda a: f"{a.num_attention_heads}h{a.num_query_groups}g{a.kv_channels}d")
def test_qkv_rows_by_hand(a):
    """Row by row from the definition: group g holds its query heads, then its key head, then its value head."""
    q, k, v = parts = tensors((a.attention_width, 3), (a.kv_width, 3), (a.kv_width, 3))
    queries, d, expected = a.num_attention_heads // a.num_query_groups, a.kv_channels, []
    for g in range(a.num_query_groups):
        expected += [q[(g * queries + j) * d + r] for j in range(queries) for r in range(d)]
        expected += [k[g * d + r] for r in range(d)] + [v[g * d + r] for r in range(d)]
    assert torch.equal(QKV.merge(a, parts), torch.stack(expected))
    assert torch.equal(FUSED_QKV.merge(a, [torch.cat(parts)]), torch.stack(expected))


@pytest.mark.parametrize("a", architectures(4), ids=lambda a: str(a.vocab_size))
def test_vocabulary_padding_is_zero(a):
    (rows,) = tensors((a.vocab_size, 5))
    padded = VOCABULARY.merge(a, [rows + 1])
    assert padded.shape[0] == a.padded_vocab_size and padded.shape[0] % 64 == 0
    assert torch.equal(padded[: a.vocab_size], rows + 1) and not padded[a.vocab_size :].any()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_tensor_parallel_cut_holds_whole_groups(tp):
    """Rank r of the merged tensor is the merge of the heads r owns: a loader may cut the checkpoint anywhere between groups."""
    a = Architecture("llama", 1, 16, 8, num_attention_heads=8, num_query_groups=4, vocab_size=10, kv_channels=2)
    mine = Architecture("llama", 1, 16, 8, num_attention_heads=8 // tp, num_query_groups=4 // tp, vocab_size=10, kv_channels=2)
    parts = tensors((16, 16), (8, 16), (8, 16))
    for rank, cut in enumerate(QKV.merge(a, parts).chunk(tp)):
        assert torch.equal(cut, QKV.merge(mine, [part.chunk(tp)[rank] for part in parts]))
