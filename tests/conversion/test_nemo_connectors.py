"""NeMo's own importer and exporter, where they work, are a reference: the same tensors from theirs and from ours."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from conversion import hf_to_nemo, nemo_to_hf, safetensors_io
from nemo_ext.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["llama", "qwen2"]
VOCABULARY = tiny_models.SIZES["vocab_size"]
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import nemo_connectors
for name in sys.argv[3:]:
    folder = Path(sys.argv[2], name)
    nemo_connectors.main("import", folder / "hf", folder / "theirs")
    nemo_connectors.main("export", folder / "theirs", folder / "theirs-hf")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models of NAMES, converted by NeMo to `theirs` and back to `theirs-hf`, and by us to `ours` and `ours-hf`."""
    folder = tmp_path_factory.mktemp("connectors")
    words = Tokenizer(models.WordLevel({"<eos>": 0, "word": 1}, unk_token="<eos>"))
    for name in NAMES:
        tiny_models.save(name, folder / name / "hf")
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder / name / "hf")
        hf_to_nemo.convert(folder / name / "hf", folder / name / "ours")
        nemo_to_hf.export(folder / name / "ours", folder / name / "ours-hf")
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "benchmarks"), str(folder), *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder


def read(weights: Path) -> dict[str, torch.Tensor]:
    """All tensors of a distributed checkpoint, through torch's own reader."""
    sizes = dcp.FileSystemReader(weights).read_metadata().state_dict_metadata
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in sizes.items() if hasattr(v, "size")}
    dcp.load(state, storage_reader=dcp.FileSystemReader(weights), no_dist=True)
    return state


@pytest.mark.parametrize("name", NAMES)
def test_import(folder, name):
    theirs, ours = read(folder / name / "theirs" / "weights"), read(folder / name / "ours" / "weights")
    untied(theirs, ours, "module.output_layer.weight", "module.embedding.word_embeddings.weight")
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        rows = VOCABULARY if key.endswith(("word_embeddings.weight", "output_layer.weight")) else None  # padded differently
        assert tensor.dtype == ours[key].dtype and torch.equal(tensor[:rows], ours[key][:rows]), key


@pytest.mark.parametrize("name", NAMES)
def test_export(folder, name):
    theirs, ours = (
        {key: info.read() for key, info in safetensors_io.open_folder(folder / name / f"{who}-hf").items()}
        for who in ("theirs", "ours")
    )
    untied(theirs, ours, "lm_head.weight", "model.embed_tokens.weight")
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        rows = len(tensor)  # NeMo's exporter crops the embeddings to the tokenizer's vocabulary
        assert rows == len(ours[key]) or "embed" in key or "lm_head" in key
        assert torch.equal(tensor, ours[key][:rows].to(tensor.dtype)), key


@pytest.mark.parametrize("name", NAMES)
def test_export_of_what_nemo_wrote(folder, name, tmp_path):
    """A checkpoint with NeMo's context/ says itself which model it is."""
    nemo_to_hf.export(folder / name / "theirs", tmp_path / "hf")
    theirs, ours = (
        {key: info.read() for key, info in safetensors_io.open_folder(each).items()}
        for each in (tmp_path / "hf", folder / name / "ours-hf")
    )
    untied(theirs, ours, "lm_head.weight", "model.embed_tokens.weight")
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert torch.equal(tensor, ours[key]), key
    configs = [json.loads((each / "config.json").read_text()) for each in (tmp_path / "hf", folder / name / "hf")]
    same = "model_type hidden_size num_hidden_layers num_key_value_heads vocab_size rope_theta".split()
    assert [configs[0][key] for key in same] == [configs[1][key] for key in same]
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("model.llama.LlamaModel", "model.gemma.GemmaModel"), "does not convert; known: llama"),
        (("normalization: RMSNorm", "normalization: LayerNorm"), "normalization=LayerNorm"),
        (("window_size: null", "window_size: [7, 0]"), "window_size"),
        (("  hidden_size: ", "  width: "), "lacks hidden_size"),
        (("_target_: ", "{"), "cannot be read"),
    ],
)
def test_context_that_does_not_fit(folder, tmp_path, change, said):
    copy = tmp_path / "nemo"
    shutil.copytree(folder / "llama" / "theirs", copy)
    file = copy / "context" / "model.yaml"
    text = file.read_text()
    old, new = change
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=said):
        nemo_to_hf.export(copy, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def untied(theirs: dict, ours: dict, output: str, embedding: str) -> None:
    """NeMo writes tied embeddings of a Qwen 2 twice."""
    if output not in ours and output in theirs:
        copy = theirs.pop(output)
        assert torch.equal(copy, theirs[embedding][: len(copy)])
