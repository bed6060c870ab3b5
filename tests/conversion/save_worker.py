"""What each of two processes does that save a model as Megatron does."""

import dataclasses
import os
import shutil
from pathlib import Path


def main(folder: Path, names: list[str]) -> None:
    """Load `folder`/NAME/nemo and write `folder`/NAME/tp2 and NAME/pp2, with a moment of an optimizer beside every weight."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from conversion import nemo_folder
    from conversion.compare import megatron

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in names:
        nemo = nemo_folder.find(folder / name / "nemo")
        for kind, size in (("tp2", "tensor_model_parallel_size"), ("pp2", "pipeline_model_parallel_size")):
            for variable in megatron.ATTENTION_VARIABLES:
                os.environ.pop(variable, None)
            parallel_state.initialize_model_parallel(**{size: 2})
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            model = megatron.load_megatron(nemo, 16, pipeline_dtype=torch.float32, **{size: 2})
            out = folder / name / kind
            if dist.get_rank() == 0:
                shutil.copytree(nemo.folder, out, ignore=shutil.ignore_patterns("weights"))
                (out / "weights").mkdir()
            dist.barrier()
            state = model.sharded_state_dict(prefix="module.")
            moments = model.sharded_state_dict(prefix="module.")
            apply_factories(moments)

            def moment(value):
                if isinstance(value, ShardedTensor):
                    return dataclasses.replace(value, key=f"optimizer.state.exp_avg.{value.key}", data=value.data * 0.5)
                return None

            dict_list_map_inplace(moment, moments)
            moments = {key: value for key, value in moments.items() if value is not None}
            dist_checkpointing.save({"state": state, "optimizer": moments}, str(out / "weights"))
            parallel_state.destroy_model_parallel()
