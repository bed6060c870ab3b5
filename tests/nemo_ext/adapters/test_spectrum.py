"""FourierFT's matrix against torch's inverse transform and PEFT's layer, both ways of computing it, and its rows in Megatron."""

import pytest
import torch

from nemo_ext import platform

platform.activate()

from nemo_ext.adapters import fourierft, spectrum  # noqa: E402
from nemo_ext.adapters.fourierft import Frequencies, Slice, Slices, SpectralLinear, delta  # noqa: E402


class Thin(Frequencies):
    thin = True


class Dense(Frequencies):
    thin = False


def test_matrix_is_pefts():
    from peft import FourierFTConfig, get_peft_model

    for outputs, inputs, count in ((12, 10, 7), (9, 16, 144)):
        model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs))
        model = get_peft_model(model, FourierFTConfig(n_frequency=count, scaling=150.0, random_loc_seed=5, target_modules=["0"]))
        layer = model.base_model.model[0]
        ours = spectrum.matrix(layer.fourierft_spectrum["default"].detach(), outputs, inputs, 5, 150.0)
        torch.testing.assert_close(ours, layer.get_delta_weight("default"))


@pytest.mark.parametrize("kind", [Thin, Dense])
@pytest.mark.parametrize(("outputs", "inputs", "count"), [(12, 10, 7), (11, 9, 5), (16, 12, 192), (32, 49, 90)])
@pytest.mark.parametrize("part", ["all", "rows", "columns", "pieces"])
def test_product_and_gradients(kind, outputs, inputs, count, part):
    rows, columns = Slice(0, outputs), Slice(0, inputs)
    if part == "rows":
        rows = Slice(outputs // 3, outputs - 2)
    elif part == "pieces":
        rows = Slices((Slice(5, 8), Slice(0, 2)))
    elif part == "columns":
        columns = Slice(2, inputs // 2)
    f = kind(outputs, inputs, count, 777, rows, columns, 3.0 / (outputs * inputs), ranks=2)
    torch.manual_seed(0)
    x, c = torch.randn(5, 3, len(columns)), torch.randn(count)
    gradient = torch.randn(5, 3, len(rows))

    def run(product):
        inner, coefficients = x.clone().requires_grad_(), c.clone().requires_grad_()
        y = product(inner, coefficients)
        y.backward(gradient)
        return y, inner.grad, coefficients.grad

    def reference(inner, coefficients):
        u, v = spectrum.places(outputs, inputs, count, 777)
        dense = torch.zeros(outputs, inputs).index_put((u, v), coefficients)
        whole = torch.fft.ifft2(dense).real * 3.0
        return inner @ whole[rows.numbers()][:, columns.numbers()].T

    ours, theirs = run(lambda inner, coefficients: SpectralLinear.apply(inner, coefficients, f)), run(reference)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[2], 2 * theirs[2], atol=1e-5, rtol=1e-4)  # Megatron takes the mean over two ranks


def test_the_way_with_fewer_multiplications_is_taken():
    def frequencies(count):
        return Frequencies(2048, 2048, count, 777, Slice(0, 2048), Slice(0, 2048), 1.0)

    assert frequencies(600).thin
    assert not frequencies(1000).thin


def test_parts_of_ranks_are_the_whole():
    whole = Frequencies(12, 10, 20, 777, Slice(0, 12), Slice(0, 10), 0.1)
    c = torch.randn(20)
    for split in ("rows", "columns"):
        size = 12 if split == "rows" else 10
        halves = [{split: Slice(0, size // 2)}, {split: Slice(size // 2, size)}]
        parts = [delta(c, Frequencies(**{**vars(whole), **half})) for half in halves]
        torch.testing.assert_close(torch.cat(parts, dim=0 if split == "rows" else 1), delta(c, whole))


def test_rows_of_fused_heads_are_in_megatrons_order(monkeypatch):
    """By what converts the weights of a checkpoint whose queries, keys and values are one tensor."""
    from types import SimpleNamespace

    from conversion import families
    from conversion.lora.nemo import slots_of
    from recipes.models import size

    a = size("phi4", "smoke").architecture
    family = families.FAMILIES[a.family]
    slot = next(slot for slot in slots_of(family, a, "canonical_lora") if slot.target == "linear_qkv")
    width = slot.widths(a)[0]
    expected = slot.merge(a, [torch.arange(width)])
    config = SimpleNamespace(num_query_groups=a.num_query_groups, num_attention_heads=a.num_attention_heads)
    found = []
    for rank in range(2):
        monkeypatch.setattr(fourierft.parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
        monkeypatch.setattr(fourierft.parallel_state, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        found.append(fourierft._fused_heads(config, width).numbers())
    assert torch.equal(torch.cat(found), expected)
    assert not torch.equal(expected, torch.arange(width))
