"""The command: its report, its exit codes, and one line for bad input."""

import json
import shutil

import pytest
import torch

from conversion import quantize
from conversion.quantization import texts
from nemo_ext.command_line import main
from nemo_ext.errors import UserError

SMALL = ["samples=4", "batch=2", "seq=64", "heldout_samples=2", "group=64"]


def run(*arguments):
    return main(quantize.Options, quantize.command, list(arguments), about="", example="")


def test_writes_a_model_with_its_report(llama, texts_file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [f"model=hf:{llama}", "method=int4_awq", f"calibration={texts_file}", "auto=bits:5", *SMALL]
    assert run(*arguments, f"out={out}") == 0
    report = json.loads((out / "report.json").read_text())
    assert set(report["layers"].values()) == {"int4", "fp8"} and report["not_quantized"] == ["lm_head"]
    assert 4.25 < report["bits_per_weight"]["quantized_layers"] <= 5
    assert report["loss"]["tokens"] == 2 * 63 and 0 < report["loss"]["kl"] < 1 and report["passed"]
    assert report["bytes"]["artifact"] == (out / "model.safetensors").stat().st_size < 0.5 * report["bytes"]["parent"]
    text = (out / "report.md").read_text()
    assert f"{report['loss']['quantized']:.4f}" in text and "read back by the format's rules" in text
    assert run(*arguments, f"out={out}") == 2 and "exists already" in capsys.readouterr().err
    assert run(f"model=hf:{out}", "method=fp8", f"out={tmp_path / 'again'}") == 2
    assert "is quantized already (compressed-tensors)" in capsys.readouterr().err


def test_too_much_lost_fails(llama, texts_file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [f"model=hf:{llama}", "method=nvfp4", "format=modelopt", f"calibration={texts_file}", *SMALL]
    assert run(*arguments, f"out={out}", "max_ppl_increase=-90") == 1
    assert "max_ppl_increase= allows -90 %" in capsys.readouterr().err
    assert not out.exists() and "**exceeded**" in (tmp_path / "out.rejected" / "report.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model=nemo:x"], "give hf:FOLDER"),
        (["model=hf:/nowhere"], "neither a folder"),
        (["method=w4a8_awq"], "compressed-tensors has no w4a8"),
        (["method=int8_sq", "format=modelopt"], "no runtime loads int8"),
        (["method=fp8", "auto=bits:6"], "auto= mixes"),
        (["group=48"], "group=48: the runtimes have kernels for"),
        (["group=128"], "not a multiple of the group of 128"),
        (["samples=1"], "samples=1 is less than batch=2"),
        (["samples=0"], "samples=0 must be at least 1"),
        (["seq=1"], "seq=1 must be at least 2"),
        (["tp=0"], "tp=0 must be at least 1"),
        (["kv_cache=int8"], "kv_cache=int8 is for format=tensorrt_llm"),
        (["kv_cache=int4"], "kv_cache=int4"),
        (["max_ppl_increase=nan"], "max_ppl_increase=nan must be a number"),
        (["max_ppl_increase=-100"], "max_ppl_increase=-100 must be above -100"),
        (["max_ppl_increase=much"], "max_ppl_increase=much"),
        (["auto=bits:nan"], "auto=bits:nan is not bits:NUMBER"),
        (["auto=bits:4.1"], "auto=bits:4.1 is less than the 4.25 bits of int4"),
        (["calibration=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["calibration={empty}"], "empty.jsonl"),
        (["calibration={broken}"], "broken.jsonl"),
        (["samples=400", "batch=400"], "a batch has 400"),
        (["seq=500"], "seq=500 is more than the model's 128 positions"),
        (["exclude=lm_hed"], "exclude=lm_hed matches no linear layer"),
        (["dtype=float32"], "dtype=float32"),
        (["tp=2"], "tp= and pp= split a TensorRT-LLM checkpoint"),
        (["format=tensorrt_llm", "tp=3"], "tp=3 does not divide"),
        (["format=tensorrt_llm", "tp=2"], "tp=2 leaves down_proj 96 inputs a rank, not a multiple of the group of 64"),
        (["heldout={texts}"], "every document of it is in calibration="),
    ],
)
def test_bad_input_is_one_line(llama, texts_file, tmp_path, tmp_path_factory, capsys, arguments, message):
    elsewhere = tmp_path_factory.mktemp("texts")
    files = {"empty": elsewhere / "empty.jsonl", "broken": elsewhere / "broken.jsonl"}
    files["empty"].touch()
    files["broken"].write_text('{"text": "half a rec\n')
    usual = [f"model=hf:{llama}", "method=int4_gptq", f"out={tmp_path / 'out'}", f"calibration={texts_file}", *SMALL]
    given = [argument.format(texts=texts_file, **files) for argument in arguments]
    names = {argument.split("=")[0] for argument in given}
    assert run(*[each for each in usual if each.split("=")[0] not in names], *given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_export_that_was_not_quantized_is_taken(llama, texts_file, tmp_path):
    """ModelOpt's export of a plain model has a quantization_config without quant_algo; what is written then says what it is."""
    source = tmp_path / "plain"
    shutil.copytree(llama, source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "ignore": [],
        "producer": {"name": "modelopt", "version": "0.37.0"},
    }
    (source / "config.json").write_text(json.dumps(config))
    line = [f"model=hf:{source}", "method=fp8", "format=modelopt", f"calibration={texts_file}", f"out={tmp_path / 'out'}", *SMALL]
    assert run(*[each for each in line if each != "group=64"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_algo"] == "FP8"


@pytest.mark.parametrize("method, options", [("fp8", []), ("int4_awq", ["format=modelopt"]), ("int8_sq", [])])
def test_where_memory_is_short_everything_is_bfloat16(llama, texts_file, tmp_path, monkeypatch, method, options):
    """As a GPU without room for fp32 computes it; the artifact's reader does the same, and finds the same logits."""
    monkeypatch.setattr(quantize.Job, "computed", torch.bfloat16)
    loaded = []
    monkeypatch.setattr(quantize.Job, "_load", lambda job, load=quantize.Job._load: loaded.append(load(job)) or loaded[-1])
    out = tmp_path / "out"
    line = [f"model=hf:{llama}", f"method={method}", f"calibration={texts_file}", f"out={out}", *SMALL, *options]
    assert run(*line, "kv_cache=fp8") == 0
    assert len(loaded) == 2 and all(p.dtype == torch.bfloat16 for model in loaded for p in model.parameters())
    report = json.loads((out / "report.json").read_text())
    assert 0 < report["loss"]["kl"] < 0.5
    assert float(report["verification"].split()[-1]) < 1e-3, report["verification"]


def test_heldout_documents_are_others(llama, tmp_path, texts_file):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)

    def windows(calibration, heldout=None):
        return texts.windows(tokenizer, str(calibration), heldout, samples=1000, heldout_samples=1000, seq=32, batch=2)

    found = windows(texts_file)
    documents = {json.loads(line)["text"] for line in texts_file.read_text().splitlines()}
    parts = [set(tokenizer.decode(part.flatten()).split("</s>")[:-1]) for part in (found.calibration, found.heldout)]
    assert not parts[0] & parts[1] and parts[0] | parts[1] <= documents
    assert len(parts[0]) > 2 * len(parts[1]) > 4
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "Which river?"}, {"role": "assistant", "content": "The old one, under the stone."}]
    chat.write_text("".join(json.dumps({"messages": turns[:1] + [{**turns[1], "content": f"{i}"}]}) + "\n" for i in range(60)))
    assert "[user]Which river?\n[assistant]" in tokenizer.decode(windows(chat).calibration.flatten())
    with pytest.raises(UserError, match="holds out less than"):
        windows(texts_file, str(_one(tmp_path, "short")))


def _one(folder, text):
    file = folder / "one.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n")
    return file
