"""The steps before an artifact: arithmetic, folding, GPTQ against the paper's equations, the search."""

import sys
from pathlib import Path

import pytest
import tiny_models
import torch

sys.path.insert(0, str(Path(__file__).parent))

from quantized_models import load, logits, quantized

from conversion.quantization import arithmetic, gptq, layers, measure, search, stored
from conversion.quantization.calibrate import Batches, smooth
from conversion.quantization.formats import format_of
from nemo_ext.errors import UserError


def test_modelopt_saturates_and_divides():
    from modelopt.torch.quantization import tensor_quant

    arithmetic.install()
    amax = torch.tensor(7.0)
    fp8 = tensor_quant.scaled_e4m3(torch.tensor([3.0, 7.5, -99.0]), amax, None, 4, 3)
    assert fp8.tolist() == [3.0, 7.0, -7.0]
    codes = tensor_quant.fake_tensor_quant(torch.tensor([0.49, 0.51, 2.5, -199.0]), torch.tensor(127.0), None, 8, False, False)
    assert codes.tolist() == [0.0, 1.0, 2.0, -128.0]


def test_nvfp4_by_hand():
    """One block: amax 3 gives the tensor's scale 3 / 2688, the block's scale 448 in its units, and steps of 0.5."""
    x = torch.zeros(1, 16)
    x[0, :7] = torch.tensor([3.0, -1.5, 0.25, 0.12, 0.13, 1.13, -0.9])
    codes, scale, outer = stored.encode_nvfp4(x, torch.tensor(3.0))
    assert scale.float().tolist() == [[448.0]] and float(outer) == pytest.approx(3 / 2688)
    assert codes[0, :7].tolist() == [7, 13, 1, 0, 1, 4, 12]
    expected = [3.0, -1.5, 0.25, 0.0, 0.25, 1.0, -1.0]
    assert arithmetic.fake_nvfp4(x, 16, torch.tensor(3.0))[0, :7].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_folding_leaves_the_function(name, tmp_path):
    """Random scales moved between inputs and weights change nothing but the weights."""
    model = load(tiny_models.save(name, tmp_path))
    ids = torch.randint(250, (2, 24))
    before, generator = logits(model, ids), torch.Generator().manual_seed(0)
    weights = {key: value.clone() for key, value in model.named_parameters()}
    for fold in layers.folds(model):
        layers.apply(fold, torch.rand(fold.readers[0].in_features, generator=generator) + 0.5, torch.float32)
    assert all(not torch.equal(weights[f"model.layers.0.{n}.weight"], model.get_parameter(f"model.layers.0.{n}.weight"))
               for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))  # fmt: skip
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-4 * float(before.abs().max()))


def test_folding_refuses_what_it_does_not_know(tmp_path):
    model = load(tiny_models.save("phi", tmp_path))
    with pytest.raises(UserError, match="cannot be folded into a phi"):
        smooth(model, {}, "awq_lite", Batches(torch.zeros(1, 8, dtype=torch.int64), 1), torch.float32)


def test_gptq_follows_the_equations():
    """Column after column by the paper's equation 2 with the inverse of what is left of H, computed anew each time."""
    torch.manual_seed(0)
    inputs = torch.randn(300, 64) @ torch.randn(64, 64)
    weight, group = torch.randn(12, 64), 32
    hessian = inputs.T @ inputs
    found, scales = gptq.quantize_weight(weight, hessian, group, torch.float32)
    damped = hessian.double() + gptq.DAMPING * hessian.double().diagonal().mean() * torch.eye(64)
    work, expected = weight.double(), torch.empty(12, 64, dtype=torch.float64)
    for q in range(64):
        if q % group == 0:
            scale = work[:, q : q + group].abs().amax(1) / 7
        expected[:, q] = (work[:, q] / scale).round().clamp(-8, 7) * scale
        inverse = torch.linalg.inv(damped[q:, q:])
        work[:, q:] -= ((work[:, q] - expected[:, q]) / inverse[0, 0])[:, None] * inverse[0]
    assert ((found - expected).abs() < 1e-3).double().mean() > 0.99  # a code may round the other way

    def error(quantized):
        return float(((weight - quantized) @ inputs.T).square().sum())

    plain = weight.view(12, 2, 32)
    step = plain.abs().amax(2, keepdim=True) / 7
    assert error(found) < 0.7 * error(((plain / step).round() * step).view(12, 64))
    codes = found.view(12, 2, 32) / scales[..., None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)


def test_gptq_and_awq_lose_less_than_rounding(llama, ids):
    """On the calibration text, against the same format by plain rounding."""
    from conversion.quantization import calibrate

    parent, half = load(llama), ids[:4]
    plain = load(llama)
    calibrate.quantize(plain, dict.fromkeys(layers.linears(plain, ["lm_head"]), format_of("int4", 64)), None, torch.bfloat16)
    lost = measure.compare(parent, plain, half).kl
    assert 0 < measure.compare(parent, quantized(llama, "int4_gptq", ids).model, half).kl < 0.9 * lost
    assert 0 < measure.compare(parent, quantized(llama, "int4_awq", ids).model, half).kl < lost


def test_measures_by_hand(llama, ids):
    """Perplexities are transformers' own losses; KL and top-1 of two distributions written out."""
    one, other = load(llama), load(llama)
    with torch.no_grad():
        other.lm_head.weight += 0.02 * torch.randn_like(other.lm_head.weight)
    found = measure.compare(one, other, ids[:2])
    for model, value in ((one, found.parent), (other, found.quantized)):
        with torch.no_grad():
            loss = torch.stack([model(row[None], labels=row[None]).loss for row in ids[:2]]).mean()
        assert value == pytest.approx(float(loss.exp()), rel=1e-5)
    p, q = (logits(model, ids[:2])[:, :-1].softmax(-1) for model in (one, other))
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean())) and found.tokens == 2 * 47


def test_search_keeps_the_budget(llama, ids):
    model = load(llama)
    names = list(layers.linears(model, ["lm_head"]))
    small, large = format_of("int4", 64), format_of("fp8", 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = search.choose(model, names, small, large, 5.5, Batches(ids[:4], 4))
    assert 5.0 < search.bits(plan, model) <= 5.5 and {form.name for form in plan.values()} == {"int4", "fp8"}
    for members in layers.groups(names):
        assert len({plan[name] for name in members}) == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="less than the 4.25 bits"):
        search.choose(model, names, small, large, 4.2, Batches(ids[:4], 4))
    with pytest.raises(UserError, match="auto=bits:few"):
        search.budget("bits:few")


def test_excluded_layers(llama):
    model = load(llama)
    left = layers.linears(model, ["lm_head", "*.layers.0.*", "down_proj"])
    assert sorted(left) == sorted(
        f"model.layers.1.{name}_proj" for name in
        ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")
    )  # fmt: skip
    with pytest.raises(UserError, match="v_proj are computed as one product"):
        layers.linears(model, ["model.layers.0.self_attn.k_proj"])
    with pytest.raises(UserError, match="exclude=nothing matches no linear layer"):
        layers.linears(model, ["nothing"])
