"""Checkpoints compared tensor by tensor, and tokenizers by what they do."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from conversion import hf_to_nemo, nemo_to_hf, verify
from conversion.checkpoint import Checkpoint
from conversion.compare import prompts, tensors
from nemo_ext.errors import UserError

NAMES = [f"word{i}" for i in range(40)]


def write_tokenizer(folder: Path, words: list[str], template: str | None = None) -> None:
    """A tokenizer of whole words with the ids of their order."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tiny_models.save("llama", tmp_path_factory.mktemp("llama") / "hf")
    write_tokenizer(folder, NAMES, "{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def nemo(llama) -> Path:
    return hf_to_nemo.convert(llama, llama.parent / "nemo")


@pytest.fixture
def copy(llama, tmp_path):
    """A copy of the Hugging Face folder with edited weights."""

    def make(edit=lambda weights: None) -> Path:
        folder = Path(shutil.copytree(llama, tmp_path / "hf"))
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def compare(a: Path, b: Path) -> tensors.TensorReport:
    return verify.check(a, b, tensors=True, logits=False).tensors


@pytest.mark.parametrize("name", ["llama", "llama_tied_scaled", "phi3", "gemma3", "stablelm", "mixtral"])
def test_hf_and_nemo_hold_the_same(name, tmp_path):
    """Every tensor of the original under its own name, whatever the family's layout; the vocabulary of 250 is padded to 256."""
    hf = tiny_models.save(name, tmp_path / "hf")
    found = compare(hf, hf_to_nemo.convert(hf, tmp_path / "nemo"))
    stored = load_file(hf / "model.safetensors")
    text = [key for key in stored if "vision_tower" not in key and "multi_modal_projector" not in key]
    assert found.passed and found.total == found.bitwise == len(text) and found.dtypes == ("float32", "float32")
    lazy = tensors.hf_tensors(Checkpoint("nemo", tmp_path / "nemo"))
    if name != "gemma3":
        assert set(lazy) == set(stored) and all(torch.equal(lazy[key].read(), stored[key]) for key in stored)


def test_a_value(copy, nemo):
    def edit(weights):
        weights["model.layers.1.self_attn.k_proj.weight"][3, 4] += 0.25
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 2.0

    found = compare(copy(edit), nemo)
    assert found.bitwise == 37 and found.worst.name == "model.layers.0.mlp.up_proj.weight"
    assert {d.name: round(d.max_abs, 3) for d in found.differences} == {
        "model.layers.1.self_attn.k_proj.weight": 0.25, "model.layers.0.mlp.up_proj.weight": 2.0,
    }  # fmt: skip
    assert found.failure.startswith("2 of 39 tensors differ, worst model.layers.0.mlp.up_proj.weight: differs by up to 2 ")


def test_minus_zero_and_nan_are_compared_by_their_bits(copy, llama):
    def edit(weights):
        weights["model.norm.weight"][0] = -0.0 if weights["model.norm.weight"][0] == 0 else torch.nan

    broken = copy(edit)
    assert compare(broken, broken).passed
    found = compare(llama, broken)
    assert [d.name for d in found.differences] == ["model.norm.weight"]


def test_missing_unexpected_and_ill_shaped(copy, llama):
    def edit(weights):
        del weights["lm_head.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        weights["model.norm.weight"] = torch.zeros(65)

    found = compare(llama, copy(edit))
    said = {d.name: d.what for d in found.differences}
    assert said == {
        "lm_head.weight": "missing in b",
        "model.layers.0.self_attn.q_proj.bias": "not in a",
        "model.norm.weight": "shape [64] in a, [65] in b",
    }
    assert found.total == 40 and found.bitwise == 37


def test_another_dtype_is_equal_if_rounding_explains_it(llama, tmp_path):
    rounded = hf_to_nemo.convert(llama, tmp_path / "nemo", dtype="bfloat16")
    found = compare(llama, rounded)
    assert found.passed and (found.rounded, found.bitwise) == (39, 0) and found.dtypes == ("float32", "bfloat16")
    back = nemo_to_hf.export(rounded, tmp_path / "hf", dtype="float32")
    assert compare(rounded, back).passed
    assert not compare(llama, back).passed  # both fp32, and one was rounded on the way


def test_the_copy_of_a_tied_embedding_is_no_tensor_of_its_own(tmp_path):
    hf = tiny_models.save("llama_tied_scaled", tmp_path / "hf")
    nemo = hf_to_nemo.convert(hf, tmp_path / "nemo")
    weights = load_file(hf / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, hf / "model.safetensors")
    assert compare(hf, nemo).passed


def test_folders_of_a_family_without_a_table(copy):
    folder = copy()
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "falcon"}
    (folder / "config.json").write_text(json.dumps(config))
    assert compare(folder, folder).bitwise == 39


def test_a_damaged_checkpoint_is_bad_input(copy, nemo):
    folder = copy()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        compare(folder, nemo)


def choose(a: Path, b: Path, **options) -> prompts.Prompts:
    return prompts.choose(Checkpoint.parse(a), Checkpoint.parse(b), options.get("file"), options.get("max_tokens", 128))


def test_equal_tokenizers(llama, nemo):
    found = choose(llama, nemo)
    assert found.failure is None and "same ids" in found.tokenizers and len(found.prompts) == len(prompts.TEXTS)


def test_tokens_of_other_ids(copy, llama):
    folder = copy()
    write_tokenizer(folder, [*NAMES[:3], *reversed(NAMES[3:])], "{{ messages }}")
    file = folder / "prompts.txt"
    file.write_text("word1 word2 word0\nword0 word9 word2\n")
    found = choose(llama, folder, file=file)
    assert found.failure == "the tokenizers differ: 'word0 word9 word2' has other ids from token 1 on ([10, 3], [34, 3])"
    report = verify.check(llama, folder, prompts=file)
    assert not report.passed and report.failure == found.failure  # the models are equal


def test_another_chat_template(copy, llama):
    folder = copy()
    write_tokenizer(folder, NAMES, "{{ other }}")
    assert choose(llama, folder).failure == "the tokenizers' chat templates differ"


def test_a_tokenizer_larger_than_the_model(copy, tmp_path):
    folder = copy()
    write_tokenizer(folder, [f"word{i}" for i in range(300)])
    (tmp_path / "prompts.txt").write_text("word299\n")
    with pytest.raises(UserError, match="the tokenizer gives id 300, the models have 250"):
        choose(folder, folder, file=tmp_path / "prompts.txt")


def test_prompts_are_cut_and_random_without_a_tokenizer(tmp_path, llama):
    bare = tiny_models.save("gemma3_text", tmp_path / "hf")
    found = choose(bare, bare, max_tokens=20)
    assert [len(p.ids) for p in found.prompts] == [20, 20, 7, 28] and found.tokenizers == "no tokenizer: random ids"  # window 12
    again = choose(bare, bare, max_tokens=20)
    assert all(torch.equal(p.ids, q.ids) for p, q in zip(found.prompts, again.prompts, strict=True))
    assert max(len(p.ids) for p in choose(llama, llama, max_tokens=5).prompts) == 5


def test_prompts_that_cannot_be_used(tmp_path, llama):
    bare = tiny_models.save("llama", tmp_path / "hf")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "text.txt").write_text("word1\n")
    for folder, name, message in [
        (llama, "none.txt", "cannot be read: No such file"),
        (llama, "empty.txt", "has no lines"),
        (bare, "text.txt", "needs a tokenizer"),
    ]:
        with pytest.raises(UserError, match=message):
            choose(folder, folder, file=tmp_path / name)
