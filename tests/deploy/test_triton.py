"""The Triton model repository: parsed with Triton's own messages, its models connected, and its Python models run on a stand-in
for Triton's module. No Triton was at hand."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format

from deploy import triton
from nemo_ext.command_line import parse
from nemo_ext.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden") / "triton"
# The inputs that are used here, and their types in the configuration that TensorRT-LLM 1.1 has for its backend.
BACKEND = {
    "input_ids": "INT32", "input_lengths": "INT32", "request_output_len": "INT32", "end_id": "INT32", "pad_id": "INT32",
    "stop_words_list": "INT32", "beam_width": "INT32", "temperature": "FP32", "runtime_top_k": "INT32", "runtime_top_p": "FP32",
    "len_penalty": "FP32", "repetition_penalty": "FP32", "min_tokens": "INT32", "presence_penalty": "FP32",
    "frequency_penalty": "FP32", "seed": "UINT64",
}  # fmt: skip
MODELS = ("ensemble", "postprocessing", "preprocessing", "tensorrt_llm")


@pytest.fixture(scope="module")
def model_config():
    """Triton's ModelConfig message."""
    described = json.loads(Path(__file__).with_name("triton_model_config.json").read_text())["file"]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(json_format.ParseDict(described, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


@pytest.fixture
def engine(tmp_path) -> Path:
    """A folder of engines as far as this command reads it."""
    folder = tmp_path / "engine"
    folder.mkdir()
    config = {
        "version": "1.1.0",
        "pretrained_config": {"architecture": "LlamaForCausalLM", "mapping": {"tp_size": 2, "pp_size": 1}},
        "build_config": {"max_batch_size": 32, "max_beam_width": 4, "max_seq_len": 2048, "kv_cache_type": "PAGED",
                         "plugin_config": {"use_paged_context_fmha": True}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(2):
        (folder / f"rank{rank}.engine").touch()
    return folder


def change(engine: Path, **build) -> None:
    config = json.loads((engine / "config.json").read_text())
    config["build_config"] |= build
    (engine / "config.json").write_text(json.dumps(config))


@pytest.fixture
def options(engine, small, tmp_path):
    def make(*more: str) -> triton.Options:
        given = {"engine": engine, "tokenizer": small.tokenizer, "out": tmp_path / "repository"}
        return parse(triton.Options, [*(f"{name}={value}" for name, value in given.items()), *more], "")

    return make


@pytest.fixture
def repository(options, model_config, capsys) -> dict:
    """The models' configurations by name, parsed."""
    asked = options("engine_path=/models/engine", "tokenizer_path=/models/tokenizer", "queue=10", "workers=3", "gpu_memory=0.5")
    triton.command(asked)
    return {name: text_format.Parse((Path(asked.out) / name / "config.pbtxt").read_text(), model_config()) for name in MODELS}


def test_what_is_written(repository, tmp_path):
    written = {str(path.relative_to(tmp_path / "repository")) for path in (tmp_path / "repository").rglob("*") if path.is_file()}
    assert written == {f"{name}/config.pbtxt" for name in MODELS} | {
        "preprocessing/1/model.py", "postprocessing/1/model.py", "ensemble/1/.keep", "tensorrt_llm/1/.keep",
    }  # fmt: skip
    for name in MODELS:
        text = (tmp_path / "repository" / name / "config.pbtxt").read_text()
        assert text == (GOLDEN / f"{name}.pbtxt").read_text()
        assert repository[name].name == name and repository[name].max_batch_size == 32


def test_the_parser_finds_what_is_wrong(model_config):
    for wrong in ('name: "x" rows: 3', "input { data_type: TYPE_WORDS }", 'max_batch_size: "3"', "input { dims: [1.5] }"):
        with pytest.raises(text_format.ParseError):
            text_format.Parse(wrong, model_config())


def test_the_engine_gets_what_its_backend_reads(repository):
    config = repository["tensorrt_llm"]
    values = {name: each.string_value for name, each in config.parameters.items()}
    assert config.backend == "tensorrtllm" and not config.model_transaction_policy.decoupled
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 10
    assert values["gpt_model_path"] == "/models/engine" and values["gpt_model_type"] == "inflight_fused_batching"
    assert (values["max_beam_width"], values["kv_cache_free_gpu_mem_fraction"], values["enable_kv_cache_reuse"]) == (
        "4", "0.5", "true",
    )  # fmt: skip
    assert values["exclude_input_in_output"] == "true"
    # Read without a default by the backend, which does not start where one is missing.
    assert {"gpt_model_type", "tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend"} <= set(values)
    inputs = {each.name: each for each in config.input}
    assert {each.name for each in config.output} == {"output_ids", "sequence_length"}  # without which it answers an error
    assert not inputs["input_ids"].HasField("reshape") and inputs["input_ids"].allow_ragged_batch
    kind = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    kinds = {name: kind[each.data_type].name.removeprefix("TYPE_") for name, each in inputs.items()}
    assert kinds == BACKEND  # of the backend's own configuration
    scalars = {name for name, each in inputs.items() if list(each.dims) == [1]}
    assert {name for name, each in inputs.items() if each.HasField("reshape") and not each.reshape.shape} == scalars
    assert {name for name, each in inputs.items() if not each.optional} == {"input_ids", "input_lengths", "request_output_len"}


def test_reuse_needs_paged_attention(options, engine):
    def reuse() -> str:
        written = triton.files(options(), triton.read_engine(engine))["tensorrt_llm/config.pbtxt"]
        return written.split('key: "enable_kv_cache_reuse"')[1].split("string_value: ")[1].split("\n")[0]

    assert reuse() == '"true"'
    change(engine, plugin_config={"use_paged_context_fmha": False})
    assert reuse() == '"false"'


def test_the_ensemble_connects_its_models(repository):
    """Every tensor of a step is one of its model's, has one type and shape from where it is made to where it is read, and is made
    before; what a model needs is there."""
    ensemble = repository["ensemble"]
    made = {each.name: (each.data_type, list(each.dims), each.optional) for each in ensemble.input}
    used = set()
    for step in ensemble.ensemble_scheduling.step:
        model = repository[step.model_name]
        inputs, outputs = ({each.name: each for each in side} for side in (model.input, model.output))
        assert set(step.input_map) == set(inputs) and set(step.output_map) == set(outputs)
        for name, tensor in step.input_map.items():
            kind, dims, optional = made[tensor]
            assert (kind, dims) == (inputs[name].data_type, list(inputs[name].dims)), (step.model_name, name)
            assert inputs[name].optional or not optional
            used.add(tensor)
        made |= {tensor: (outputs[name].data_type, list(outputs[name].dims), False) for name, tensor in step.output_map.items()}
    assert [step.model_name for step in ensemble.ensemble_scheduling.step] == ["preprocessing", "tensorrt_llm", "postprocessing"]
    final = {each.name: (each.data_type, list(each.dims), False) for each in ensemble.output}
    assert final.items() <= made.items() and set(made) == used | set(final)
    assert {each.name for each in ensemble.input if not each.optional} == {"text_input", "max_tokens"}


class Backend(ModuleType):
    """What the Python models use of triton_python_backend_utils."""

    def __init__(self) -> None:
        super().__init__("triton_python_backend_utils")
        self.TritonError = lambda message: message

    class Tensor:
        def __init__(self, name: str, value: np.ndarray) -> None:
            self.name, self.value = name, value

        def as_numpy(self) -> np.ndarray:
            return self.value

    class InferenceResponse:
        def __init__(self, output_tensors: list, error: str | None = None) -> None:
            self.tensors, self.error = {each.name: each.value for each in output_tensors}, error

    @staticmethod
    def get_input_tensor_by_name(request: dict, name: str):
        return request.get(name)


@pytest.fixture
def python_model(monkeypatch):
    """Makes one of the repository's Python models, initialised with its own configuration."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Backend())

    def make(folder: Path, config) -> SimpleNamespace:
        spec = importlib.util.spec_from_file_location("triton_model", folder / "1" / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        model.initialize({"model_config": json_format.MessageToJson(config, preserving_proto_field_name=True)})
        return SimpleNamespace(model=model, module=module)

    return make


def request(**values) -> dict:
    return {name: Backend.Tensor(name, np.array(value)) for name, value in values.items()}


TYPES = {"TYPE_INT32": np.int32, "TYPE_STRING": np.object_}


def conforms(tensors: dict, config) -> bool:
    """Whether outputs have the types and shapes of the configuration, after a batch of 1."""
    described = {each.name: each for each in config.output}
    kinds = type(config).DESCRIPTOR.fields_by_name["output"].message_type.fields_by_name["data_type"].enum_type.values_by_number
    return set(tensors) == set(described) and all(
        value.dtype == TYPES[kinds[described[name].data_type].name]
        and value.shape[0] == 1
        and len(value.shape) - 1 == len(described[name].dims)
        and all(wanted in (-1, found) for wanted, found in zip(described[name].dims, value.shape[1:], strict=True))
        for name, value in tensors.items()
    )


@pytest.fixture
def local(options, model_config, small, tmp_path, transformers_imports):
    """A repository whose tokenizer is here, with a second token that ends answers; its configurations and folder."""
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(small.tokenizer, tokenizer)
    (tokenizer / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    given = [f"engine={options().engine}", f"tokenizer={tokenizer}", f"out={tmp_path / 'local'}"]
    asked = parse(triton.Options, given, "")
    triton.command(asked)
    read = {name: text_format.Parse((tmp_path / "local" / name / "config.pbtxt").read_text(), model_config()) for name in MODELS}
    return SimpleNamespace(folder=tmp_path / "local", configs=read, tokenizer=tokenizer)


def test_preprocessing(local, python_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(local.tokenizer)
    config = local.configs["preprocessing"]
    model = python_model(local.folder / "preprocessing", config).model
    asked = [request(text=[[b"def main():"]]), request(text=[["naïve".encode()]], stop=[[b"\n\n", b"return x"]])]
    plain, stopped = model.execute(asked)
    assert plain.error is None and conforms(plain.tensors, config) and conforms(stopped.tensors, config)
    ids = tokenizer.encode("def main():")
    assert plain.tensors["input_ids"].tolist() == [ids] and plain.tensors["input_lengths"].tolist() == [[len(ids)]]
    assert plain.tensors["end_id"].tolist() == plain.tensors["pad_id"].tolist() == [[tokenizer.eos_token_id]] == [[0]]
    assert plain.tensors["stop_words_list"].tolist() == [[[7], [1]]]  # the other token of generation_config.json
    assert tokenizer.decode(stopped.tensors["input_ids"][0]) == "naïve"
    words = read_words(stopped.tensors["stop_words_list"][0])
    assert words == [tokenizer.encode("\n\n", add_special_tokens=False), tokenizer.encode("return x"), [7]]


def read_words(pairs: np.ndarray) -> list[list[int]]:
    """TensorRT-LLM's reading of a list of words: [2, n], tokens and the words' ends, which rise until the first -1."""
    tokens, ends = pairs.tolist()
    kept = ends[: ends.index(-1)] if -1 in ends else ends
    assert kept == sorted(set(kept)) and all(end == -1 for end in ends[len(kept) :]) and all(end <= len(tokens) for end in kept)
    return [tokens[start:end] for start, end in zip([0, *kept], kept, strict=False)]


def test_word_lists_by_hand(local, python_model):
    word_list = python_model(local.folder / "preprocessing", local.configs["preprocessing"]).module.word_list
    assert word_list([[5, 6], [9], [1, 2, 3]]).tolist() == [[5, 6, 9, 1, 2, 3], [2, 3, 6, -1, -1, -1]]
    assert word_list([]).tolist() == [[0], [-1]] and read_words(word_list([])) == []
    assert read_words(word_list([[5, 6], [9]])) == [[5, 6], [9]]
    assert word_list([[4]]).dtype == np.int32


def test_preprocessing_refuses(local, python_model):
    model = python_model(local.folder / "preprocessing", local.configs["preprocessing"]).model
    two, empty, bad, good = model.execute(
        [request(text=[[b"a"], [b"b"]]), request(text=[[b""]]), request(text=[[b"\xff"]]), request(text=[[b"a"]])]
    )
    assert "one prompt" in two.error and "no tokens" in empty.error and "utf-8" in bad.error
    assert good.error is None  # in the same batch


def test_postprocessing(local, python_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(local.tokenizer)
    config = local.configs["postprocessing"]
    model = python_model(local.folder / "postprocessing", config).model
    answers = [tokenizer.encode("import os, naïve"), tokenizer.encode("x")]
    longest = max(map(len, answers))
    rows = [answer + [-1] * (longest - len(answer)) for answer in answers]  # the backend's padding
    lengths = [[len(answer) for answer in answers]]
    ended = [[[*tokenizer.encode("y = 1"), tokenizer.eos_token_id]]]
    beams, special = model.execute(
        [request(output_ids=[rows], sequence_length=lengths), request(output_ids=ended, sequence_length=[[len(ended[0][0])]])]
    )
    assert conforms(beams.tensors, config)
    assert [text.decode() for text in beams.tensors["text"][0]] == ["import os, naïve", "x"]
    assert special.tensors["text"].tolist() == [[b"y = 1"]]


def test_the_line(options, engine, capsys, tmp_path):
    config = triton.read_engine(engine)
    assert triton.line(tmp_path, config) == [
        "python3", "/app/scripts/launch_triton_server.py", "--world_size=2", f"--model_repo={tmp_path}",
    ]  # fmt: skip
    config["pretrained_config"]["mapping"]["tp_size"] = 1
    assert triton.line(tmp_path, config)[:2] == ["tritonserver", f"--model-repository={tmp_path}"]
    run = subprocess.run(
        [sys.executable, "deploy/triton.py", f"engine={engine}", f"tokenizer={options().tokenizer}", f"out={tmp_path / 'new'}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (0, f"python3 {triton.LAUNCHER} --world_size=2 --model_repo={tmp_path / 'new'}\n")
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "x").touch()
    with pytest.raises(UserError, match="is not an empty folder"):
        triton.command(options())


@pytest.mark.parametrize(
    "build, words",
    [
        ({"max_batch_size": None}, "no build_config.max_batch_size"),
        ({"kv_cache_type": "KVCacheType.CONTINUOUS"}, "built with a continuous cache"),
    ],
)
def test_engines_that_do_not_fit(options, engine, build, words):
    change(engine, **build)
    with pytest.raises(UserError, match=words):
        triton.command(options())


def test_what_is_no_engine(options, engine):
    (engine / "rank1.engine").unlink()
    with pytest.raises(UserError, match="lacks rank1.engine of its 2"):
        triton.command(options())
    (engine / "config.json").write_text('{"architecture": "LlamaForCausalLM"}')
    with pytest.raises(UserError, match="python deploy/build.py checkpoint="):
        triton.command(options())
    (engine / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        triton.command(options())
    (engine / "config.json").unlink()
    with pytest.raises(UserError, match="No such file"):
        triton.command(options())


@pytest.mark.parametrize(
    "keys, words",
    [
        (["workers=0"], "1 or more"),
        (["queue=0"], "1 or more"),
        (["gpu_memory=1.2"], "at most 1"),
        (["engine_path=models"], "absolute path in the container"),
        (["engin_path=/x"], "did you mean engine_path"),
    ],
)
def test_refused(options, keys, words):
    with pytest.raises(UserError, match=words):
        triton.command(options(*keys))


def test_a_folder_without_tokenizer(options, engine, tmp_path):
    with pytest.raises(UserError, match="it is no Hugging Face folder"):
        triton.command(parse(triton.Options, [f"engine={engine}", f"tokenizer={engine}", f"out={tmp_path / 'r'}"], ""))
