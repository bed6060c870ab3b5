"""Every family: Hugging Face's logits and those of NeMo's Megatron model loaded from our checkpoint."""

import dataclasses

import pytest
import tiny_models
import torch
import torch.distributed.checkpoint as dcp

from conversion import hf_to_nemo, nemo_folder
from conversion.compare import huggingface, megatron
from conversion.compare.activations import LOGITS, compare
from nemo_ext.architecture import LongRope

# Shorter and longer than the windows (12) and than the length from which LongRoPE is another (32).
PROMPTS = [torch.randint(250, (length,), generator=torch.Generator().manual_seed(length)) for length in (11, 48)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """converted(name) -> (the Hugging Face folder, the NeMo checkpoint), made once."""
    folders = {}

    def convert(name: str):
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            hf = tiny_models.save(name, folder / "hf")
            folders[name] = hf, nemo_folder.find(hf_to_nemo.convert(hf, folder / "nemo"))
        return folders[name]

    return convert


@pytest.mark.parametrize("name", tiny_models.DENSE)
def test_logits_equal_hugging_face(name, converted):
    hf, nemo = converted(name)
    for one, other in zip(huggingface.traces(hf, PROMPTS), megatron.traces(nemo, PROMPTS), strict=True):
        found = compare(one[LOGITS].value, other[LOGITS].value)
        assert found.largest_logit > 0.5  # the comparison is of something
        assert found.max_abs < 1e-5
        assert found.top1_agreement == 1.0


@pytest.mark.parametrize("name", tiny_models.DENSE)
def test_keys_and_shapes_are_megatrons(name, converted):
    """Every tensor and every extra state that the model would load is there with its shape, and no other tensor."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    _, nemo = converted(name)
    with megatron.single_process():
        wanted = megatron.load_megatron(nemo, seq_length=16).sharded_state_dict(prefix="module.")
        apply_factories(wanted)
        tensors = {t.key: tuple(t.global_shape) for t in nested_values(wanted) if isinstance(t, ShardedTensor)}
        objects = {o.unique_key for o in nested_values(wanted) if isinstance(o, ShardedObject)}
    stored = dcp.FileSystemReader(nemo.weights).read_metadata().state_dict_metadata
    assert {k: tuple(v.size) for k, v in stored.items() if hasattr(v, "size")} == tensors
    assert objects <= set(stored)


def window(**changes):
    return lambda a: {"sliding_window": dataclasses.replace(a.sliding_window, **changes)}


def longrope(**changes):
    return lambda a: {"rope_scaling": dataclasses.replace(a.rope_scaling, **changes)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", window(size=11)),
        ("mistral", window(size=13)),
        ("mistral", window(every=2)),
        ("phi3_window", lambda a: {"sliding_window": None}),
        ("phi3_longrope", longrope(long_factor=tiny_models.LONG_ROPE["short_factor"])),
        ("phi3_longrope", longrope(short_factor=tiny_models.LONG_ROPE["long_factor"])),
        ("phi3_longrope", lambda a: {"max_position_embeddings": 128}),  # the magnitude
        ("phi3_longrope", lambda a: {"rope_scaling": LongRope([1.0] * 8, [1.0] * 8, 32), "rotary_percent": 1.0}),
        ("phi", lambda a: {"rotary_percent": 0.5}),
        ("stablelm", lambda a: {"rotary_percent": 0.5}),
        ("gemma2", window(size=13)),
        ("gemma2", window(every=4)),
        ("gemma2", lambda a: {"attn_logit_softcapping": None}),
        ("gemma2", lambda a: {"final_logit_softcapping": 50.0}),
        ("gemma2", lambda a: {"softmax_scale": None}),
    ],
)
def test_what_the_architecture_says_is_in_the_model(name, change, converted):
    """The comparison above would fail without it: a model with another value gives other logits at one of the two lengths."""
    hf, nemo = converted(name)
    other = dataclasses.replace(nemo, architecture=dataclasses.replace(nemo.architecture, **change(nemo.architecture)))
    traces = zip(huggingface.traces(hf, PROMPTS), megatron.traces(other, PROMPTS), strict=True)
    assert max(compare(a[LOGITS].value, b[LOGITS].value).max_abs for a, b in traces) > 1e-3
