"""Adapters of models that see or hear, from a run's checkpoint to PEFT and merged, against the same sums made by hand."""

from __future__ import annotations

import json

import pytest
import tiny_multimodal
import torch

from nemo_ext import platform

platform.activate()

import transformers  # noqa: E402
from peft import PeftModel  # noqa: E402

from conversion import families, nemo_folder  # noqa: E402
from conversion.compare import media  # noqa: E402
from conversion.dist_checkpoint import Chunk, StoredTensor, write  # noqa: E402
from conversion.hf_to_nemo import read_config  # noqa: E402
from conversion.lora import from_nemo, merge  # noqa: E402
from conversion.lora import nemo as lora  # noqa: E402
from conversion.multimodal import senses_of  # noqa: E402
from conversion.multimodal.configuration import CLASSES  # noqa: E402
from conversion.multimodal.rows import sense_rows  # noqa: E402
from nemo_ext.multimodal.description import TOWER_LINEARS  # noqa: E402

RANK, ALPHA = 3, 6.0
KEYS = dict(rank=RANK, alpha=ALPHA, dropout=0.0, targets="q_proj,down_proj", rslora=False)
# The model, what of its language model and of its tower is trained, and what transformers' modules are called before their names
CASES = {
    "both": ("llava_siglip_qwen2", "lora", "lora", "model.language_model.", "model."),
    "tower": ("llava_clip", None, "lora", "model.language_model.", "model."),
    "whole_tower": ("llava_clip", "lora", "full", "model.language_model.", "model."),
    "tiles": ("llava_next", "lora", "frozen", "model.language_model.", "model."),
    "ears": ("voxtral", "lora", "lora", "language_model.model.", ""),
}


def stored(tensor: torch.Tensor) -> StoredTensor:
    return StoredTensor(tuple(tensor.shape), tensor.dtype, [Chunk((0,) * tensor.dim(), tuple(tensor.shape), lambda: tensor)])


def make(case: str, folder) -> dict[str, torch.Tensor]:
    """A base, and the checkpoint of a run that trained an adapter of it: {parameter: what it is in the trained model}."""
    name, language, tower, prefix, beside = CASES[case]
    base = tiny_multimodal.save(name, folder / "base")
    config = read_config(base)
    (sense,), a = senses_of(config), families.architecture(config)
    random = torch.Generator().manual_seed(1)
    before = {n: p.detach() for n, p in tiny_multimodal.model(name).named_parameters()}
    tensors, after = {}, {}

    def pair(key: str, parameters: list[str]) -> None:
        """A and B for linears of one shape, one of each layer if several."""
        rows, columns = before[parameters[0]].shape
        down = torch.randn((len(parameters), RANK, columns), generator=random) * 0.3
        up = torch.randn((len(parameters), rows, RANK), generator=random) * 0.3
        stacked = "decoder" in key
        tensors[f"{key}.linear_in.weight"] = down if stacked else down[0]
        tensors[f"{key}.linear_out.weight"] = up if stacked else up[0]
        for number, parameter in enumerate(parameters):
            after[parameter] = before[parameter] + ALPHA / RANK * up[number] @ down[number]

    if language:
        for slot in lora.slots_of(families.FAMILIES[a.family], a, "canonical_lora"):
            if slot.parts[0].rsplit(".", 1)[1] in ("q_proj", "down_proj"):
                part = prefix + slot.parts[0].removeprefix("model.")
                pair(f"module.{slot.key}", [f"{part.format(i=i)}.weight" for i in range(a.num_layers)])
    for row in sense_rows(sense, a.hidden_size):
        (hf,) = row.hf
        of_tower = ".encoder." in row.megatron
        layer = next((int(part) for part in row.megatron.split(".") if part.isdigit()), None)
        computed = layer is None or layer < sense.encoder.num_computed_layers
        linear = row.megatron.split(".")[-2] in TOWER_LINEARS and row.megatron.endswith(".weight") and layer is not None
        if of_tower and tower == "lora" and linear and computed:
            pair(f"module.{row.megatron.removesuffix('.weight')}.adapter", [beside + hf])
        elif not of_tower or tower == "full" and computed and "post_layernorm" not in hf:
            parameter = beside + hf
            after[parameter] = before[parameter] + 0.1 * torch.randn(before[parameter].shape, generator=random)
            tensors[f"module.{row.megatron}"] = after[parameter]
    (folder / "run").mkdir()
    write(folder / "run" / nemo_folder.WEIGHTS, {key: stored(tensor) for key, tensor in tensors.items()}, {})
    settings = lora.describe(a, KEYS, str(base), "float32", prefix, language, (sense,))
    (folder / "run" / lora.SETTINGS).write_text(json.dumps(settings))
    return after


@pytest.mark.parametrize("case", CASES)
def test_peft_and_the_merged_model_compute_what_was_trained(case, tmp_path):
    name, *_ = CASES[case]
    after = make(case, tmp_path)
    base, adapter, merged = tmp_path / "base", tmp_path / "lora", tmp_path / "hf"
    from_nemo.convert(tmp_path / "run", adapter)
    found = merge.merge(base, adapter, merged)

    wanted = tiny_multimodal.model(name)
    wanted.load_state_dict(after, strict=False)
    config = read_config(base)
    _, ids, inputs = media.prompt(senses_of(config), 250)
    more = inputs.for_huggingface("cpu", torch.float32)
    loader = getattr(transformers, CLASSES[config["model_type"]])
    with torch.no_grad():
        logits = wanted(ids[None], **more).logits
        result = loader.from_pretrained(merged)
        torch.testing.assert_close(result(ids[None], **more).logits, logits, atol=1e-4, rtol=1e-4)
        own = PeftModel.from_pretrained(loader.from_pretrained(base), adapter).eval()
        theirs = own(ids[None], **more).logits
    torch.testing.assert_close(theirs, logits, atol=1e-4, rtol=1e-4)
    parameters = dict(result.named_parameters())
    changed = {n for n, p in tiny_multimodal.model(name).named_parameters() if not torch.equal(p, parameters[n])}
    assert changed == set(after)
    assert found.tensors == len(after) and found.difference.relative < 1e-5 < 1e-2 < found.effect.relative


def test_a_tensor_of_no_sense_is_refused(tmp_path):
    make("both", tmp_path)
    file = tmp_path / "run" / lora.SETTINGS
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "senses": []}))
    with pytest.raises(from_nemo.UserError, match="which no sense of its adapter.json has"):
        from_nemo.convert(tmp_path / "run", tmp_path / "lora")
