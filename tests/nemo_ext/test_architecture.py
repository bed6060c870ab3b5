"""Counts of a decoder: parameters and operations, against published numbers and a hand computation."""

import pytest

from nemo_ext.architecture import Architecture, LongRope, RopeScaling, SlidingWindow

LLAMA_8B = Architecture("llama", 32, 4096, 14336, 32, 8, 128256, rotary_base=5e5, rope_scaling=RopeScaling(8.0))


def test_flops_follow_the_stated_formula():
    """3 x (2 tokens (layers (2 h^2 + 2 h kv + 3 h ffn) + h vocab) + 2 tokens seq h layers) a token."""
    seq, h, kv, ffn, layers, vocab = 8192, 4096, 1024, 14336, 32, 128256
    by_hand = 3 * (2 * (layers * (2 * h * h + 2 * h * kv + 3 * h * ffn) + h * vocab) + 2 * seq * h * layers)
    assert LLAMA_8B.flops_per_token(seq) == by_hand


def test_windows_attend_to_less():
    full = Architecture("gemma3", 6, 64, 128, 4, 1, 1000, kv_channels=32)
    windowed = Architecture("gemma3", 6, 64, 128, 4, 1, 1000, kv_channels=32, sliding_window=SlidingWindow(size=100, every=6))
    # five of six layers see 100 tokens and not 500; scores and values cost 2 x 128 multiply-adds a token seen, trained thrice
    assert full.flops_per_token(1000) - windowed.flops_per_token(1000) == 3 * 2 * 5 * (2 * 128 * 400)


def test_a_window_in_every_layer_and_an_mlp_without_gate():
    shape = dict(family="phi3", num_layers=6, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=1,
                 vocab_size=1000)  # fmt: skip
    full = Architecture(**shape)
    windowed = Architecture(**shape, sliding_window=SlidingWindow(size=100, every=0, rotary_base_local=None))
    assert full.flops_per_token(1000) - windowed.flops_per_token(1000) == 3 * 2 * 6 * (2 * 64 * 400)
    assert full.flops_per_token(1000) - Architecture(**shape, gated_linear_unit=False).flops_per_token(1000) == 6 * 6 * 64 * 128


def test_vocabulary_is_padded_alike_at_every_layout():
    assert LLAMA_8B.padded_vocab_size == 128256
    assert Architecture("llama", 1, 64, 64, 1, 1, 50_000).padded_vocab_size == 50_048


def test_round_trip_through_json():
    import json

    windowed = Architecture("gemma3", 2, 64, 128, 4, 1, 1000, kv_channels=32, sliding_window=SlidingWindow(size=8))
    long = Architecture("phi3", 2, 64, 128, 4, 1, 1000, rope_scaling=LongRope([1.0] * 8, [2.0] * 8, 32))
    for architecture in (LLAMA_8B, windowed, long):
        assert Architecture(**json.loads(json.dumps(architecture.to_dict()))) == architecture


def test_heads_must_group():
    with pytest.raises(ValueError, match="num_attention_heads=6 is not a multiple of num_query_groups=4"):
        Architecture("llama", 1, 48, 64, 6, 4, 100)
