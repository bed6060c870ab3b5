"""One of two processes of test_parallel_layouts: `python layout_worker.py RANK FOLDER NAME...`.

Writes FOLDER/NAME/rank{RANK}.pt: tensor-parallel logits `[b, s, vocab]` and the parameters of its pipeline stage.
"""

import sys
from pathlib import Path

SEQ = 32


def tokens():
    import torch

    return torch.randint(250, (2, SEQ), generator=torch.Generator().manual_seed(0))


def main(rank: int, folder: Path, names: list[str]) -> None:
    from nemo_ext import platform

    platform.activate()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from conversion import verify

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    positions = torch.arange(SEQ).expand(2, SEQ)
    mask = torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)[None, None]
    for name in names:
        nemo = folder / name / "nemo"
        a = verify.read_architecture(nemo)
        for variable in verify.ATTENTION_VARIABLES:
            verify.os.environ.pop(variable, None)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        model = verify.load_megatron(nemo, a, SEQ, tensor_model_parallel_size=2)
        with torch.inference_mode():
            mine = model(tokens(), positions, mask).contiguous()
        parts = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(parts, mine)
        parallel_state.destroy_model_parallel()

        parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        stage = verify.load_megatron(nemo, a, SEQ, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
        parallel_state.destroy_model_parallel()
        parameters = {key: parameter.detach() for key, parameter in stage.named_parameters()}
        logits = torch.cat(parts, dim=-1)[..., : a.vocab_size]
        torch.save((logits, parameters), folder / name / f"rank{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
