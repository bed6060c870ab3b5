"""A converted checkpoint on several processes gives Hugging Face's logits at every layout, and names a wrong layer there too."""

import shutil
from pathlib import Path

import pytest
import tiny_models
import tiny_multimodal
import torch
from safetensors.torch import load_file, save_file

from conversion import hf_to_nemo, verify
from conversion.compare import megatron
from conversion.compare.megatron import Layout
from nemo_ext.errors import RunError, UserError


@pytest.fixture(scope="module")
def processes():
    """Two processes for all layouts: importing NeMo is most of what a small check costs."""
    with megatron.Processes(2) as running:
        yield running


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    made = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            models = tiny_multimodal if name in tiny_multimodal.NAMES else tiny_models
            hf = models.save(name, folder / "hf")
            made[name] = hf, hf_to_nemo.convert(hf, folder / "nemo")
        return made[name]

    return get


@pytest.mark.parametrize(
    "name, layout, said",
    [
        ("qwen2", dict(tp=2), "TP2"),  # biases, tied embeddings
        ("qwen2", dict(pp=2), "PP2"),
        ("gemma3_text", dict(tp=2), "TP2"),  # two RoPE bases, norms after attention and MLP
        ("gemma3_text", dict(pp=2), "PP2"),
        ("mixtral", dict(ep=2), "EP2"),
        ("mixtral", dict(tp=2), "TP2"),
    ],
)
def test_layouts(converted, processes, name, layout, said):
    report = verify.check(*converted(name), **layout, processes=processes)
    assert report.layout == said and len(report.prompts) == 3
    for prompt in report.prompts:
        assert prompt.difference.max_abs < 1e-5 and prompt.difference.largest_logit > 0.5


@pytest.mark.parametrize("layout", [dict(tp=2), dict(pp=2)])
def test_a_tower_is_on_the_first_stage_and_whole_on_every_rank(converted, processes, layout):
    report = verify.check(*converted("llava_siglip_qwen2"), **layout, processes=processes)
    assert report.passed and "2 random images" in report.prompts[-1].label
    assert report.prompts[-1].difference.max_abs < 1e-5


def test_bf16_through_a_pipeline(converted, processes):
    report = verify.check(*converted("qwen2"), pp=2, dtype="bfloat16", processes=processes)
    assert report.passed and report.prompts[0].difference.max_abs > 1e-3


def test_one_process_against_two(converted, processes):
    _, nemo = converted("qwen2")
    report = verify.check(nemo, nemo, tp=2, processes=processes)
    assert report.passed and 0 < report.prompts[0].difference.max_abs < 1e-5  # the sums are in another order


@pytest.mark.parametrize("layout", [dict(tp=2), dict(pp=2)])
def test_a_wrong_layer_is_named(converted, processes, tmp_path, layout):
    hf, nemo = converted("qwen2")
    shutil.copytree(hf, tmp_path / "hf")
    weights = load_file(hf / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][5] *= 1.5  # in the second stage
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    report = verify.check(tmp_path / "hf", nemo, **layout, processes=processes)
    assert report.first_difference["a"] == "model.layers.3.mlp" and report.first_difference["b"] == "decoder.layers.3.mlp"
    assert [entry["name"] for entry in report.first_difference["tensors"]] == ["model.layers.3.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    "layout, message",
    [
        (dict(tp=3), "tp=3 does not divide the model's num_attention_heads=4"),
        (dict(tp=4), "tp=4 does not divide the model's num_query_groups=2"),
        (dict(pp=3), "pp=3 does not divide the model's num_layers=4"),
        (dict(ep=2), "ep=2 needs experts"),
        (dict(pp=0), "pp=0"),
    ],
)
def test_layouts_that_do_not_divide(converted, layout, message):
    with pytest.raises(UserError, match=message):
        verify.check(*converted("qwen2"), **layout)


def test_a_layout_needs_a_nemo_model(converted):
    hf, _ = converted("qwen2")
    with pytest.raises(UserError, match="neither checkpoint is one"):
        verify.check(hf, hf, tp=2)


def test_a_process_that_dies(converted):
    _, nemo = converted("qwen2")
    checkpoint = verify.Checkpoint("nemo", nemo).nemo
    with megatron.Processes(2) as running:
        running._start()
        running._workers[1].kill()
        with pytest.raises(RunError, match=r"process 1 of 2 \(PP2\) died"):
            megatron.traces(checkpoint, [torch.arange(5)], layout=Layout(pp=2), processes=running)


def test_bad_input_in_a_process_is_bad_input(converted, processes, tmp_path):
    """A file that is gone when the processes load it; they end, and what one said arrives. The last test that has them."""
    hf, nemo = converted("qwen2")
    broken = Path(shutil.copytree(nemo, tmp_path / "nemo"))
    checkpoint = verify.Checkpoint("nemo", broken).nemo
    for file in broken.glob("weights/*.distcp"):
        file.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        megatron.traces(checkpoint, [torch.arange(5)], layout=Layout(tp=2), processes=processes)
    assert all(worker.wait(20) for worker in processes._workers)
