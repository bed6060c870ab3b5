"""Where a step's time went, by hand."""

import pytest

from nemo_ext import attribution


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x256x64", "GEMM"),
        ("aten::addmm", "GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<...>", "norm"),
        ("void transformer_engine::fused_rope_forward_kernel<__nv_bfloat16>", "rotary"),
        ("void transformer_engine::detail::cast_transpose_fused_kernel<...>", "FP8 casts"),
        ("multi_tensor_apply_kernel<AdamFunctorMaster>", "optimizer"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("gloo:all_reduce", "communication"),
        ("triton_poi_fused_mul_silu_0", "other element-wise"),
        ("online_softmax_kernel", "cross entropy"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
    ],
)
def test_class_of(kernel, name):
    assert attribution.class_of(kernel) == name


def test_what_runs_at_once_counts_once():
    kernels = [("gemm", 1.0, 3.0), ("ncclAllReduce", 2.0, 5.0), ("rmsnorm", 4.0, 4.5), ("gemm", 7.0, 20.0), ("gemm", -2.0, -1.0)]
    spent = attribution.attribute(kernels, 0.0, 10.0)
    assert {name: seconds for name, seconds in spent.items() if seconds} == pytest.approx(
        {"GEMM": 2.0 + 3.0, "communication": 1.0 + 0.5, "norm": 0.5, "idle": 1.0 + 2.0}
    )
    assert sum(spent.values()) == pytest.approx(10.0)


def test_overlapping_kernels_of_a_class():
    spent = attribution.attribute([("gemm", 0.0, 2.0), ("gemm", 1.0, 4.0)], 0.0, 5.0)
    assert spent["GEMM"] == pytest.approx(4.0) and spent["idle"] == pytest.approx(1.0)


def test_longest():
    kernels = [("a", 0.0, 1.0), ("b", 1.0, 4.0), ("a", 4.0, 5.0)]
    assert attribution.longest(kernels) == [("b", 1, 3.0), ("a", 2, 2.0)]
    assert attribution.longest(kernels, 1) == [("b", 1, 3.0)]


def test_table():
    lines = attribution.table({"GEMM": 0.03, "idle": 0.01, "norm": 0.0})
    assert lines[2:] == ["| GEMM | 30.0 | 75.0 % |", "| idle | 10.0 | 25.0 % |"]


def test_an_operator_counts_without_those_that_it_calls():
    events = [(1, 0, 10, "matmul"), (1, 2, 9, "mm"), (1, 3, 4, "conj"), (1, 12, 13, "add"), (2, 0, 5, "mul")]
    assert sorted(attribution.own_time(events)) == [
        (1, 0, 2, "matmul"), (1, 2, 3, "mm"), (1, 3, 4, "conj"), (1, 4, 9, "mm"), (1, 9, 10, "matmul"), (1, 12, 13, "add"),
        (2, 0, 5, "mul"),
    ]  # fmt: skip
