"""A tiny model quantized by a method, for the tests of artifacts."""

import json

import torch

from conversion.quantization import calibrate, gptq, layers
from conversion.quantization.formats import METHODS, format_of
from conversion.quantization.stored import Quantized


def load(folder):
    import transformers as tf

    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def quantized(folder, method, ids, *, kv=None, group=64, mixed=False, dtype=torch.bfloat16):
    """The model in `folder` quantized by `method`, half of `ids` calibrating; `mixed`: the second decoder layer in FP8."""
    model, half, scales = load(folder), ids[: len(ids) // 2], None
    small = format_of(METHODS[method].format, group)
    plan = dict.fromkeys(layers.linears(model, ["lm_head"]), small)
    if mixed:
        plan |= {name: format_of("fp8", 0) for name in plan if ".layers.1." in name}
    part = {name: form for name, form in plan.items() if form == small}
    if METHODS[method].smoothing:
        calibrate.smooth(model, part, METHODS[method].smoothing, calibrate.Batches(half, 4), dtype)
    if METHODS[method].gptq:
        scales = gptq.quantize(model, part, half, 4, dtype)
    calibrate.quantize(model, plan, calibrate.Batches(half, 4), dtype, kv, scales)
    config = json.loads((folder / "config.json").read_text())
    return Quantized(model, plan, dtype, folder, config, kv)


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits.float()
