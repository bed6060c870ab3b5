"""A converted checkpoint in two processes: tensor parallel gives one process's logits, each pipeline stage has its layers."""

import traceback

import pytest
import tiny_models
import torch
import torch.multiprocessing as mp

from conversion import hf_to_nemo, verify

SEQ = 32


def tokens():
    return torch.randint(250, (2, SEQ), generator=torch.Generator().manual_seed(0))


def worker(rank, folder, answers):
    try:
        torch.set_num_threads(1)  # the parent's thread pool does not survive the fork
        answers.put((rank, check(rank, folder)))
    except BaseException:
        answers.put((rank, traceback.format_exc()))


def check(rank, folder):
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    nemo = folder / "nemo"
    a = verify.read_architecture(nemo)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = verify.load_megatron(nemo, a, SEQ, tensor_model_parallel_size=2)
    mask = torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)[None, None]
    with torch.inference_mode():
        mine = model(tokens(), torch.arange(SEQ).expand(2, SEQ), mask).contiguous()
    parts = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(parts, mine)
    logits = torch.cat(parts, dim=-1)[..., : a.vocab_size]
    parallel_state.destroy_model_parallel()

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    stage = verify.load_megatron(nemo, a, SEQ, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    parameters = {name: p.detach().numpy() for name, p in stage.named_parameters()}
    return logits.numpy(), parameters


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text"])
def test_two_processes(name, tmp_path):
    hf = tiny_models.save(name, tmp_path / "hf")
    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo")
    a = verify.read_architecture(nemo)
    if a.num_layers % 2:
        pytest.fail("the test wants two equal stages")
    context = mp.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=worker, args=(rank, tmp_path, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    assert all(isinstance(answer, tuple) for answer in found.values()), found

    reference = verify.hf_logits(hf, tokens())
    for logits, _ in found.values():
        assert verify.compare(reference, torch.from_numpy(logits)).max_abs < 1e-5

    with verify.single_process():
        whole = dict(verify.load_megatron(nemo, a, SEQ).named_parameters())
    half = a.num_layers // 2
    seen = set()
    for rank, (_, parameters) in found.items():
        for key, value in parameters.items():
            if key.startswith("decoder.layers."):
                _, _, layer, rest = key.split(".", 3)
                key = f"decoder.layers.{int(layer) + rank * half}.{rest}"
            if key in whole:  # a last stage keeps its own copy of tied embeddings as output_layer
                assert torch.equal(whole[key], torch.from_numpy(value)), key
                seen.add(key)
    assert seen == set(whole)
