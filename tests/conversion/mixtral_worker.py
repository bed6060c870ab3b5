"""What each of the two processes of test_mixtral does, and parts of it that one process does."""

import os
from pathlib import Path

SEQ = 32
LAYOUTS = {
    "ep2": dict(expert_model_parallel_size=2),
    "tp2": dict(tensor_model_parallel_size=2),
    "pp2": dict(pipeline_model_parallel_size=2),
}


def tokens():
    import torch

    return torch.randint(250, (2, SEQ), generator=torch.Generator().manual_seed(0))


def main(folder: Path) -> None:
    """Load `folder`/nemo, a converted Mixtral, in each of LAYOUTS.

    Writes LAYOUT-rankN.pt: the logits `[b, s, vocab]` that the process sees, padding included, and its parameters.
    """
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from conversion import nemo_folder
    from conversion.compare import megatron

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    checkpoint = nemo_folder.find(folder / "nemo")
    for name, sizes in LAYOUTS.items():
        for variable in megatron.ATTENTION_VARIABLES:
            os.environ.pop(variable, None)
        parallel_state.initialize_model_parallel(**sizes)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        options = dict(sizes, pipeline_dtype=torch.float32) if name == "pp2" else sizes
        model = megatron.load_megatron(checkpoint, SEQ, **options)
        with torch.inference_mode():
            logits = {"ep2": own_sequence, "tp2": own_vocabulary, "pp2": own_layers}[name](model, rank)
        parallel_state.destroy_model_parallel()
        parameters = {key: parameter.detach() for key, parameter in model.named_parameters()}
        torch.save((logits, parameters), folder / f"{name}-rank{rank}.pt")


def run(model, tokens):
    import torch

    b, s = tokens.shape
    mask = torch.ones(s, s, dtype=torch.bool).triu(1)[None, None]
    return model(tokens, torch.arange(s).expand(b, s), mask)


def gathered(mine, dim: int):
    """Both processes' tensors, side by side."""
    import torch

    parts = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(parts, mine.contiguous())
    return torch.cat(parts, dim=dim)


def own_sequence(model, rank: int):
    """Expert parallel: each process reads one of the sequences, and tokens travel to their experts."""
    return gathered(run(model, tokens()[rank : rank + 1]), dim=0)


def own_vocabulary(model, rank: int):
    return gathered(run(model, tokens()), dim=-1)


def own_layers(model, rank: int):
    """Pipeline: the first process hands its hidden states to the second; only that has logits."""
    import torch

    hidden = torch.empty(SEQ, 2, model.config.hidden_size)
    if rank == 0:
        torch.distributed.send(run(model, tokens()).contiguous(), dst=1)
        return None
    torch.distributed.recv(hidden, src=0)
    model.set_input_tensor(hidden)
    return run(model, tokens())
