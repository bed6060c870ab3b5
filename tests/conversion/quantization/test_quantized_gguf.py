"""GGUF files: blocks by hand and by the `gguf` package, and the command's report of them."""

import json

import numpy as np
import pytest
import torch
from tiny_gguf_models import tiny

from conversion import quantize
from conversion.quantization import gguf_file
from nemo_ext.command_line import main


def test_blocks_by_hand():
    """A block of each kind, written out: scale 0.5, codes 1 and -2 first, then at weight 16 of Q4_0 a 7."""
    scale = np.float16(0.5).tobytes()
    q4 = bytes([9 | 15 << 4, 6 | 8 << 4] + [8 | 8 << 4] * 14)
    values = gguf_file.dequantize(scale + q4, True)
    assert values[[0, 1, 16, 2, 17]].tolist() == [0.5, -1.0, 3.5, 0, 0] and len(values) == 32
    q8 = np.array([1, -2] + [127] * 30, np.int8).tobytes()
    assert gguf_file.dequantize(scale + q8, False)[:3].tolist() == [0.5, -1.0, 63.5]


@pytest.mark.parametrize("kind, bits", [("q8_0", 8.5), ("q4_0", 4.5)])
def test_command(tmp_path, capsys, kind, bits):
    source = tiny("llama", tmp_path / "source")
    generator = torch.Generator().manual_seed(0)
    rows = ["".join("ab "[i] for i in torch.randint(3, (200,), generator=generator)) for _ in range(40)]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    arguments = [f"model=hf:{source}", f"method={kind}", "format=gguf", f"calibration={texts}", "samples=2", "batch=2", "seq=32"]

    def run(*more):
        return main(quantize.Options, quantize.command, [*arguments, *more], about="", example="")

    assert run(f"out={tmp_path / 'out'}", "heldout_samples=4") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["bits_per_weight"]["quantized_layers"] == bits and report["layers"]["model.embed_tokens"] == kind
    assert 0 < report["loss"]["kl"] < {"q8_0": 0.01, "q4_0": 2.0}[kind]
    assert report["bytes"]["artifact"] == (tmp_path / "out" / "model.gguf").stat().st_size
    assert "read back by ggml's rules" in report["verification"]
    capsys.readouterr()
    assert run(f"out={tmp_path / 'no'}", "max_ppl_increase=-99") == 1 and not (tmp_path / "no").exists()
    assert (tmp_path / "no.rejected" / "model.gguf").is_file() and "set aside" in capsys.readouterr().err
    assert run(f"out={tmp_path / 'no'}", "kv_cache=fp8") == 2 and "not for format=gguf" in capsys.readouterr().err
    assert run(f"out={tmp_path / 'no'}", "exclude=x") == 2


def test_methods_belong_to_formats(tmp_path, capsys):
    for method, form in (("q8_0", "modelopt"), ("fp8", "gguf")):
        line = [f"model=hf:{tmp_path}", f"method={method}", f"format={form}", f"out={tmp_path / 'out'}"]
        assert main(quantize.Options, quantize.command, line, about="", example="") == 2
        assert f"method={method} is not for format={form}" in capsys.readouterr().err
