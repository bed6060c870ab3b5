"""GGUF files: blocks by hand and by the `gguf` package, and the command's report of them."""

import json

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf_models import VOCABULARY, tiny

from conversion import quantize
from conversion.gguf import q4_k
from conversion.gguf import tokenizer as gguf_tokenizer
from conversion.gguf import writer as gguf_writer
from conversion.quantization import gguf_file
from nemo_ext.command_line import main


def test_blocks_by_hand():
    """A block of each kind, written out: scale 0.5, codes 1 and -2 first, then at weight 16 of Q4_0 a 7."""
    scale = np.float16(0.5).tobytes()
    q4 = bytes([9 | 15 << 4, 6 | 8 << 4] + [8 | 8 << 4] * 14)
    values = gguf_file.q4_0(np.frombuffer(scale + q4, np.uint8))
    assert values[[0, 1, 16, 2, 17]].tolist() == [0.5, -1.0, 3.5, 0, 0] and len(values) == 32
    q8 = np.array([1, -2] + [127] * 30, np.int8).tobytes()
    assert gguf_file.q8_0(np.frombuffer(scale + q8, np.uint8))[:3].tolist() == [0.5, -1.0, 63.5]
    six = [33, 0, 0, 2 | 1 << 6, 5, 0, 0, 3 << 6, 0, 0, 0, 7 | 2 << 4]  # block 0: 33, 5; 3: 2, 0; 7: 7 + 16, 2 + 48
    codes = np.zeros(128, np.uint8)
    codes[[0, 32 + 1, 96 + 31]] = 9, 4 << 4, 15 << 4
    values = gguf_file.q4_k(np.frombuffer(scale + np.float16(0.25).tobytes() + bytes(six) + codes.tobytes(), np.uint8))
    assert values[[0, 1, 96 + 1, 96, 255, 254]].tolist() == [0.5 * 33 * 9 - 0.25 * 5, -1.25, 4.0, 0, 0.5 * 23 * 15 - 12.5, -12.5]


@pytest.mark.parametrize("draw", ["normal", "one_sided", "heavy", "tiny", "zeros"])
def test_q4_k_as_the_gguf_package_reads_it(draw):
    """Every super-block as it and this reader have it, nearer to the weights than Q4_0, which has as many bits."""
    generator = np.random.default_rng(0)
    rows = {
        "normal": generator.normal(size=(16, 512)), "one_sided": 1 + generator.random((16, 512)),
        "heavy": generator.standard_t(3, size=(16, 512)), "tiny": 1e-6 * generator.normal(size=(16, 512)),
        "zeros": np.zeros((4, 256)),
    }[draw].astype(np.float32)  # fmt: skip
    stored = q4_k.quantize(rows)
    assert stored.shape == (len(rows), rows.shape[1] // 256 * 144) and stored.dtype == np.uint8
    values = gguf_file.q4_k(stored).reshape(rows.shape)
    assert np.array_equal(values, gguf.dequantize(stored, gguf.GGMLQuantizationType.Q4_K))
    error = abs(values - rows)
    assert (error <= gguf_writer._allowed(rows, gguf_writer.Q4_K)).all()
    if draw in ("normal", "one_sided", "heavy"):
        plain = gguf.dequantize(gguf.quantize(rows, gguf_writer.Q4_0), gguf_writer.Q4_0)
        assert np.square(error).mean() < 0.8 * np.square(plain - rows).mean()


def wide(folder):
    """A random Llama whose rows are whole super-blocks."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=8, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    gguf_tokenizer.write(VOCABULARY, folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    rows = ["".join("ab "[i] for i in torch.randint(3, (200,), generator=generator)) for _ in range(40)]
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("kind, bits", [("q8_0", 8.5), ("q4_0", 4.5), ("q4_k", 4.5)])
def test_command(tmp_path, capsys, texts, kind, bits):
    from transformers import AutoModelForCausalLM

    source = wide(tmp_path / "source") if kind == "q4_k" else tiny("llama", tmp_path / "source")
    arguments = [f"model=hf:{source}", f"method={kind}", "format=gguf", f"calibration={texts}", "samples=2", "batch=2", "seq=32"]

    def run(*more):
        return main(quantize.Options, quantize.command, [*arguments, *more], about="", example="")

    out = tmp_path / "out"
    assert run(f"out={out}", "heldout_samples=4") == 0
    report = json.loads((out / "report.json").read_text())
    assert report["bits_per_weight"]["quantized_layers"] == bits and report["layers"]["model.embed_tokens"] == kind
    assert 0 < report["loss"]["kl"] < {"q8_0": 0.01, "q4_0": 2.0, "q4_k": 2.0}[kind]
    assert report["bytes"]["artifact"] == (out / "model.gguf").stat().st_size
    assert "read back by ggml's rules" in report["verification"]

    # transformers reads GGUF files itself: the logits are those of the model that was measured
    ids = torch.randint(8, (2, 24), generator=torch.Generator().manual_seed(3))
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        before = plain(ids).logits
        measured = gguf_file.load_into(plain, out / "model.gguf")[0](ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(theirs, measured, rtol=0, atol=1e-5 * float(measured.abs().max()))
    assert (measured - before).abs().mean() > 100 * (theirs - measured).abs().mean()

    capsys.readouterr()
    assert run(f"out={tmp_path / 'no'}", "max_ppl_increase=-99") == 1 and not (tmp_path / "no").exists()
    assert (tmp_path / "no.rejected" / "model.gguf").is_file() and "set aside" in capsys.readouterr().err
    assert run(f"out={tmp_path / 'no'}", "kv_cache=fp8") == 2 and "not for format=gguf" in capsys.readouterr().err
    assert run(f"out={tmp_path / 'no'}", "exclude=x") == 2


def test_q4_k_of_other_widths_is_one_line(tmp_path, capsys, texts):
    source = tiny("llama", tmp_path / "source")
    line = [f"model=hf:{source}", "method=q4_k", "format=gguf", f"calibration={texts}", "samples=2", "batch=2", "seq=32"]
    assert main(quantize.Options, quantize.command, [*line, f"out={tmp_path / 'out'}"], about="", example="") == 2
    error = capsys.readouterr().err
    assert "has rows of 64, q4_k has blocks of 256: write q4_0 or q8_0" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_methods_belong_to_formats(tmp_path, capsys):
    for method, form in (("q8_0", "modelopt"), ("fp8", "gguf")):
        line = [f"model=hf:{tmp_path}", f"method={method}", f"format={form}", f"out={tmp_path / 'out'}"]
        assert main(quantize.Options, quantize.command, line, about="", example="") == 2
        assert f"method={method} is not for format={form}" in capsys.readouterr().err
