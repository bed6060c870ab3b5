"""The embedding's gradient, row by row, is the dense one: Megatron's data-parallel model, two processes, gloo."""

from __future__ import annotations

import contextlib
from pathlib import Path

from nemo_processes import run_group

CASES = [
    dict(tp=2, tied=True, overlapped=False),
    dict(tp=2, tied=False, overlapped=False),
    dict(tp=1, tied=True, overlapped=True),
    dict(tp=1, tied=False, overlapped=True),
]


def gradients(tp: int, tied: bool, overlapped: bool):
    """Two micro batches' gradient of the embedding, in fp32, as Megatron's hooks leave it in the buffer."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, tensor_model_parallel_size=tp, sequence_parallel=tp > 1,
        normalization="RMSNorm", add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
    )  # fmt: skip
    torch.manual_seed(3)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, spec, vocab_size=32, max_sequence_length=8, share_embeddings_and_output_weights=tied,
                     position_embedding_type="rope")  # fmt: skip
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlapped), model
    )
    ddp.zero_grad_buffer()
    for seed in (5, 6):
        draw = torch.Generator().manual_seed(seed + 10 * parallel_state.get_data_parallel_rank())
        tokens = torch.randint(0, 32, (2, 8), generator=draw)
        with ddp.no_sync() if seed == 5 else contextlib.nullcontext():
            ddp(tokens, torch.arange(8).expand(2, -1), None, labels=tokens.roll(-1, 1)).sum().backward()
    ddp.finish_grad_sync()
    weight = model.embedding.word_embeddings.weight
    assert weight.grad is None
    return weight.main_grad.clone()


def compare(folder: Path) -> None:
    import torch

    from nemo_ext.platform import embedding_gradient

    torch.distributed.init_process_group("gloo")
    wanted = [gradients(**case) for case in CASES]
    embedding_gradient.install()
    added: list[int] = []
    add = embedding_gradient.Lookup.backward
    embedding_gradient.Lookup.backward = staticmethod(lambda ctx, gradient: added.append(1) or add(ctx, gradient))
    for case, expected in zip(CASES, wanted, strict=True):
        found = gradients(**case)
        assert expected.abs().max() > 0.01, case
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, case=case: f"{case}: {text}")
    assert len(added) == 2 * len(CASES)
    torch.use_deterministic_algorithms(True)
    gradients(**CASES[0])
    assert len(added) == 2 * len(CASES), "where order is fixed, Megatron's way stays"
    (folder / f"done{torch.distributed.get_rank()}").touch()


def test_rows_added_are_the_dense_gradient(tmp_path):
    run_group(2, compare, tmp_path, log=tmp_path / "log")
    assert all((tmp_path / f"done{rank}").exists() for rank in range(2))


def test_placeholder_only_where_nothing_else_gives_one():
    """By hand: two equal tokens' gradients are summed in their row; a placeholder only for a weight that is used alone."""
    import torch

    from nemo_ext.platform.embedding_gradient import Lookup

    for alone in (True, False):
        weight = torch.nn.Parameter(torch.arange(6.0).view(3, 2))
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones(3, 2), False
        Lookup.apply(torch.tensor([[2, 0, 2]]), weight, alone).backward(torch.tensor([[[1.0, 2], [3, 4], [5, 6]]]))
        assert weight.main_grad.tolist() == [[4, 5], [1, 1], [7, 9]]
        assert (weight.grad is not None) == weight.grad_added_to_main_grad == alone
