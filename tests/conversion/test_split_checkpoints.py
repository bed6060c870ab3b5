"""Every family's table, both ways, through checkpoints cut as TP 1, 2, 4 and 8 and pipeline stages cut them: random shapes."""

import itertools
import json
import random
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from conversion import dist_checkpoint, families, hf_to_nemo, nemo_to_hf
from conversion.dist_checkpoint import Chunk, StoredTensor

NAMES = [name for name in tiny_models.configs() if name != "gemma3"]  # whose wrapped form comes back as gemma3_text
OUTPUT_SPLIT = ("linear_qkv.weight", "linear_qkv.bias", "word_embeddings.weight", "output_layer.weight", "output_layer.bias")
INPUT_SPLIT = ("linear_proj.weight", "linear_fc2.weight")


def hugging_face(name: str, folder: Path, rng: random.Random) -> Path:
    """A folder of random weights with random query groups, MLP width and odd vocabulary."""
    config = tiny_models.configs()[name]
    heads = config.num_attention_heads
    config.update(
        dict(
            num_key_value_heads=rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
            intermediate_size=8 * rng.randrange(1, 12),
            vocab_size=2 * rng.randrange(5, 150) + 1,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    config.architectures = ["Any"]
    config.save_pretrained(folder)
    a = families.architecture(json.loads((folder / "config.json").read_text()))
    weights = {
        canonical.format(**index): torch.randn(families.shape(symbols, a)).bfloat16()
        for row in families.FAMILIES[a.family].rows_of(a)
        for index in row.indices(a)
        for canonical, symbols in row.hf.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def cut(weights: Path, tp: int, gated: bool) -> None:
    """Write a distributed checkpoint anew, each tensor in the pieces that `tp` tensor ranks save, by layer and expert."""
    sizes = dcp.FileSystemReader(weights).read_metadata().state_dict_metadata
    whole = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in sizes.items() if hasattr(v, "size")}
    dcp.load(whole, storage_reader=dcp.FileSystemReader(weights), no_dist=True)
    tensors = {}
    for key, tensor in whole.items():
        stacked = (".layers." in key) + (".experts.experts." in key)
        axis, pieces = None, tp
        if key.endswith(OUTPUT_SPLIT):
            axis = stacked
        elif key.endswith(("linear_fc1.weight", "linear_fc1.bias")):
            axis, pieces = stacked, 2 * tp if gated else tp  # a rank has its part of the gate, and of the other half
        elif key.endswith(INPUT_SPLIT):
            axis = tensor.dim() - 1
        stored = StoredTensor(tuple(tensor.shape), tensor.dtype)
        for place in itertools.product(*map(range, tensor.shape[:stacked])):
            parts = [tensor[place]] if axis is None else tensor[place].tensor_split(pieces, axis - stacked)
            start = 0
            for part in parts:
                inner = [0] * part.dim()
                if axis is not None:
                    inner[axis - stacked] = start
                    start += part.shape[axis - stacked]
                shape = (*[1] * stacked, *part.shape)
                stored.chunks.append(Chunk((*place, *inner), shape, lambda part=part: part))
        tensors[key] = stored
    for file in weights.iterdir():
        file.unlink()
    dist_checkpoint.write(weights, tensors, {})


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_bit_for_bit(name, tp, tmp_path):
    hf = hugging_face(name, tmp_path / "hf", random.Random(f"{name} {tp}"))
    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo")
    a = families.architecture(hf_to_nemo.read_config(hf))
    cut(nemo / "weights", tp, a.gated_linear_unit)
    back = nemo_to_hf.export(nemo, tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert (back / "config.json").read_bytes() == (hf / "config.json").read_bytes()
