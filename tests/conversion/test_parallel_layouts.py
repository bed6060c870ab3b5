"""A converted checkpoint in two processes: tensor parallel gives one process's logits, each pipeline stage has its layers."""

import os
import subprocess
import sys
from pathlib import Path

import layout_worker
import pytest
import tiny_models
import torch

from conversion import hf_to_nemo, verify

NAMES = ["qwen2", "gemma3_text"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Both models converted and run by two processes."""
    folder = tmp_path_factory.mktemp("layouts")
    for name in NAMES:
        hf_to_nemo.convert(tiny_models.save(name, folder / name / "hf"), folder / name / "nemo")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for variable in verify.ATTENTION_VARIABLES:
        environment.pop(variable, None)
    command = [sys.executable, layout_worker.__file__]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(folder), *NAMES], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=180)[0].decode()[-3000:] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes(folder, name):
    nemo = folder / name / "nemo"
    a = verify.read_architecture(nemo)
    ranks = [torch.load(folder / name / f"rank{rank}.pt") for rank in range(2)]

    reference = verify.hf_logits(folder / name / "hf", layout_worker.tokens())
    for logits, _ in ranks:
        assert verify.compare(reference, logits).max_abs < 1e-5

    with verify.single_process():
        whole = dict(verify.load_megatron(nemo, a, layout_worker.SEQ).named_parameters())
    seen = set()
    for rank, (_, parameters) in enumerate(ranks):
        for key, value in parameters.items():
            if key.startswith("decoder.layers."):
                _, _, layer, rest = key.split(".", 3)
                key = f"decoder.layers.{int(layer) + rank * a.num_layers // 2}.{rest}"
            if key in whole:  # a last stage keeps its own copy of tied embeddings, under output_layer
                assert torch.equal(whole[key], value), key
                seen.add(key)
    assert seen == set(whole)
