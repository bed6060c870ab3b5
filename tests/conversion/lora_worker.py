"""What each of the two processes of test_lora_nemo does."""

import json
import os
from pathlib import Path


def main(folder: Path) -> None:
    """Load the adapters of `folder`/cases.json, a list of [name, NeMo base, NeMo adapter, sequence parallel].

    Writes NAME.pt, tensor-parallel logits `[b, s, vocab]`, and saves the adapter again from two ranks as NAME-saved.
    """
    import lora_adapters
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    from conversion import nemo_folder
    from conversion.compare.megatron import ATTENTION_VARIABLES, load_megatron
    from conversion.lora import nemo as lora_nemo

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    b, s = lora_adapters.TOKENS.shape
    mask = torch.ones(s, s, dtype=torch.bool).triu(1)[None, None]
    for name, base, adapter, sequence_parallel in json.loads((folder / "cases.json").read_text()):
        for variable in ATTENTION_VARIABLES:  # Megatron refuses to change them
            os.environ.pop(variable, None)
        checkpoint = nemo_folder.find(base)
        model = load_megatron(checkpoint, s, tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
        lora_nemo.load_megatron(Path(adapter), model)
        with torch.inference_mode():
            mine = model(lora_adapters.TOKENS, torch.arange(s).expand(b, s), mask).contiguous()
            parts = [torch.empty_like(mine) for _ in range(2)]
            dist.all_gather(parts, mine)
        state = {key: value for key, value in model.sharded_state_dict(prefix="module.").items() if ".adapter." in key}
        saved = folder / f"{name}-saved" / "weights"
        saved.mkdir(parents=True, exist_ok=True)
        dist_checkpointing.save({"state_dict": state}, str(saved))
        if dist.get_rank() == 0:
            torch.save(torch.cat(parts, dim=-1)[..., : checkpoint.architecture.vocab_size], folder / f"{name}.pt")
    dist.barrier()
