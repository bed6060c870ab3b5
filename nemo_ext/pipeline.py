"""How many layers each stage of a pipeline computes. Pure arithmetic."""

from __future__ import annotations

from nemo_ext.architecture import Architecture


def chunk_layers(architecture: Architecture, pp: int, vp: int | None) -> list[int]:
    """Decoder layers of each model chunk, in the order in which data goes through them; chunk c is on stage c % pp.

    The output layer is on the last stage and counts as many layers as its weight is larger than a layer's: 2.4 of the 8B's, where
    it took as long as 2.5 of them in FP8 and 1.7 in bf16. The last chunk has so many layers fewer, but one at least, and those
    before it share what it leaves.
    """
    a, chunks = architecture, pp * (vp or 1)
    if chunks == 1:
        return [a.num_layers]
    linear = a.hidden_size * (2 * a.attention_width + 2 * a.kv_width) + a.active_mlps_per_layer * a.mlp_parameters
    output = a.hidden_size * a.padded_vocab_size / linear
    last = max(1, round((a.num_layers + output) / chunks - output))
    each, more = divmod(a.num_layers - last, chunks - 1)
    return [each + (chunk < more) for chunk in range(chunks - 1)] + [last]


def megatron_layout(layers: list[int]) -> str:
    """The same in the notation of Megatron's `pipeline_model_parallel_layout`."""
    return "|".join(["E" + "t" * layers[0], *("t" * count for count in layers[1:-1]), "t" * layers[-1] + "L"])
