"""Writes a Triton model repository that serves a TensorRT-LLM engine: text in, text out.

python deploy/triton.py engine=ENGINE tokenizer=HF_FOLDER out=REPOSITORY

For the backend "tensorrtllm" as of TensorRT-LLM 1.1, in the containers nvcr.io/nvidia/tritonserver:YY.MM-trtllm-python-py3.
Exit codes: 0 written, 2 bad input.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # instead of this folder

from deploy import trtllm_folder
from nemo_ext.command_line import NO_DEFAULT, key, main
from nemo_ext.disk import write_atomic
from nemo_ext.errors import UserError

SOURCES = Path(__file__).with_name("triton_models")
LAUNCHER = "/app/scripts/launch_triton_server.py"  # in the container: a process a GPU, by MPI
KEPT = ".keep"  # Triton needs a version's folder, also of a model without files; copies may drop empty ones


@dataclass
class Options:
    """The command's keys."""

    engine: str = key(NO_DEFAULT, "folder of the engines, as python deploy/build.py writes it")
    tokenizer: str = key(NO_DEFAULT, "Hugging Face folder of the model's tokenizer")
    out: str = key(NO_DEFAULT, "folder of the repository; must not exist, or be empty")
    engine_path: str | None = key(None, "where Triton finds the engines", auto="engine=", group="in Triton's container")
    tokenizer_path: str | None = key(None, "where Triton finds the tokenizer", auto="tokenizer=")
    gpu_memory: float = key(0.9, "share of the memory that the weights leave, for the cache", group="serving")
    queue: int = key(64, "requests that may wait; more are refused")
    workers: int = key(2, "processes that tokenise, and as many that decode")
    special_tokens: bool = key(True, "put before a prompt what the tokenizer puts there (BOS); false if clients send chats "
                                     "through a template that has it")  # fmt: skip


class Word(str):
    """A value of a protobuf enumeration: written without quotes."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model. `dims` is without the batch."""

    name: str
    kind: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    ragged: bool = False  # requests of one batch may have other lengths
    scalar: bool = False  # the backend reads [batch], where clients send [batch, 1]

    def config(self) -> dict[str, Any]:
        """As config.pbtxt has it."""
        return {
            "name": self.name,
            "data_type": Word(f"TYPE_{self.kind}"),
            "dims": list(self.dims),
            **({"reshape": {"shape": []}} if self.scalar else {}),
            **({"allow_ragged_batch": True} if self.ragged else {}),
            **({"optional": True} if self.optional else {}),
        }


def _setting(name: str, kind: str) -> Tensor:
    return Tensor(name, kind, optional=True, scalar=True)


# What a client may say of the sampling: its name here, and the backend's tensor.
SAMPLING = {
    "temperature": _setting("temperature", "FP32"),
    "top_k": _setting("runtime_top_k", "INT32"),
    "top_p": _setting("runtime_top_p", "FP32"),
    "seed": _setting("seed", "UINT64"),
    "min_tokens": _setting("min_tokens", "INT32"),
    "repetition_penalty": _setting("repetition_penalty", "FP32"),
    "presence_penalty": _setting("presence_penalty", "FP32"),
    "frequency_penalty": _setting("frequency_penalty", "FP32"),
    "beam_width": _setting("beam_width", "INT32"),
    "length_penalty": _setting("len_penalty", "FP32"),
}
ENGINE_INPUTS = (
    Tensor("input_ids", "INT32", (-1,), ragged=True),
    Tensor("input_lengths", "INT32", scalar=True),
    Tensor("request_output_len", "INT32", scalar=True),
    Tensor("end_id", "INT32", optional=True, scalar=True),
    Tensor("pad_id", "INT32", optional=True, scalar=True),
    Tensor("stop_words_list", "INT32", (2, -1), optional=True, ragged=True),
    *SAMPLING.values(),
)
ENGINE_OUTPUTS = (Tensor("output_ids", "INT32", (-1, -1)), Tensor("sequence_length", "INT32", (-1,)))
PREPARED = ("input_ids", "input_lengths", "stop_words_list", "end_id", "pad_id")  # of ENGINE_INPUTS: the preprocessing's outputs
TEXT = Tensor("text", "STRING")
STOP = Tensor("stop", "STRING", (-1,), optional=True)


def command(options: Options) -> None:
    """Write the repository, and print the line that starts Triton on it."""
    engine = read_engine(Path(options.engine))
    check(options)
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not an empty folder")
    for name, content in files(options, engine).items():
        write_atomic(out / name, content)
    print(shlex.join(line(out, engine)))


def line(out: Path, engine: dict[str, Any]) -> list[str]:
    """What starts Triton in its container."""
    if (ranks := trtllm_folder.ranks(engine["pretrained_config"])) > 1:
        return ["python3", LAUNCHER, f"--world_size={ranks}", f"--model_repo={out}"]
    return ["tritonserver", f"--model-repository={out}", "--disable-auto-complete-config"]


def files(options: Options, engine: dict[str, Any]) -> dict[str, str]:
    """The repository's files by their path in it."""
    rows, beams = engine["build_config"]["max_batch_size"], engine["build_config"].get("max_beam_width", 1)
    reuse = engine["build_config"].get("plugin_config", {}).get("use_paged_context_fmha", False)
    tokenizer = options.tokenizer_path or str(Path(options.tokenizer).resolve())
    backend = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": options.engine_path or str(Path(options.engine).resolve()),
        "batch_scheduler_policy": "guaranteed_no_evict",
        "max_beam_width": beams,
        "kv_cache_free_gpu_mem_fraction": options.gpu_memory,
        "enable_kv_cache_reuse": str(reuse is True).lower(),  # needs attention over the paged cache in the engine
        "exclude_input_in_output": "true",
        # The backend refuses to start where these are missing; empty is none.
        "tokenizer_dir": "", "guided_decoding_backend": "", "xgrammar_tokenizer_info_path": "",
    }  # fmt: skip
    batching = {"max_queue_delay_microseconds": 0, "default_queue_policy": {"max_queue_size": options.queue}}
    prepared = [each for each in ENGINE_INPUTS if each.name in PREPARED]
    python = {"backend": "python", "dynamic_batching": {}, "instance_group": [_group(options.workers)]}
    special = {"special_tokens": str(options.special_tokens).lower()}
    configs = {
        "preprocessing": python | _tensors([TEXT, STOP], [_bare(each) for each in prepared])
        | _parameters({"tokenizer_dir": tokenizer, **special}),
        "tensorrt_llm": {"backend": "tensorrtllm", "dynamic_batching": batching, "instance_group": [_group(1)],
                         "model_transaction_policy": {"decoupled": False}}
        | _tensors(ENGINE_INPUTS, ENGINE_OUTPUTS) | _parameters(backend),
        "postprocessing": python | _tensors(ENGINE_OUTPUTS, [Tensor("text", "STRING", (-1,))])
        | _parameters({"tokenizer_dir": tokenizer}),
        "ensemble": _ensemble(),
    }  # fmt: skip
    written = {}
    for name, config in configs.items():
        written[f"{name}/config.pbtxt"] = pbtxt({"name": name, "max_batch_size": rows, **config})
        source = SOURCES / f"{name}.py"
        model = {f"{name}/1/model.py": source.read_text()} if source.is_file() else {f"{name}/1/{KEPT}": ""}
        written |= model
    return written


def _ensemble() -> dict[str, Any]:
    """text_input and max_tokens through the three models. Names between them begin with an underscore."""
    inputs = [
        Tensor("text_input", "STRING"),
        Tensor("max_tokens", "INT32"),
        Tensor("stop_words", "STRING", (-1,), optional=True),
        *(Tensor(name, each.kind, optional=True) for name, each in SAMPLING.items()),
    ]
    between = {name: f"_{name}" for name in PREPARED}
    answered = {each.name: f"_{each.name}" for each in ENGINE_OUTPUTS}
    asked = {"request_output_len": "max_tokens", **{each.name: name for name, each in SAMPLING.items()}}
    steps = [
        ("preprocessing", {TEXT.name: "text_input", STOP.name: "stop_words"}, between),
        ("tensorrt_llm", between | asked, answered),
        ("postprocessing", answered, {TEXT.name: "text_output"}),
    ]
    scheduling = {
        "step": [
            {"model_name": name, "model_version": -1, "input_map": _map(given), "output_map": _map(made)}
            for name, given, made in steps
        ]
    }
    outputs = [Tensor("text_output", "STRING", (-1,))]
    return {"platform": "ensemble", **_tensors(inputs, outputs), "ensemble_scheduling": scheduling}


def pbtxt(message: dict[str, Any], indent: str = "") -> str:
    """A protobuf message as text: a list is a field that stands several times, of numbers one in brackets."""
    lines = []
    for name, value in message.items():
        if isinstance(value, list) and not any(isinstance(each, dict) for each in value):
            lines.append(f"{indent}{name}: [{', '.join(_scalar(each) for each in value)}]\n")
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                inside = pbtxt(each, indent + "  ")
                lines.append(f"{indent}{name} {{\n{inside}{indent}}}\n" if inside else f"{indent}{name} {{}}\n")
            else:
                lines.append(f"{indent}{name}: {_scalar(each)}\n")
    return "".join(lines)


def read_engine(folder: Path) -> dict[str, Any]:
    """config.json of TensorRT-LLM's engines. Raises UserError for anything else, for missing ranks, and for engines without
    in-flight batching."""
    config = trtllm_folder.read(
        "engine", folder, "rank{rank}.engine",
        lambda config: config.get("pretrained_config") if isinstance(config.get("build_config"), dict) else None,
        f"holds no engines of TensorRT-LLM: python deploy/build.py checkpoint=FOLDER out={folder}",
    )  # fmt: skip
    build = config["build_config"]
    if type(build.get("max_batch_size")) is not int or build["max_batch_size"] < 1:
        raise UserError(f"engine={folder}: config.json has no build_config.max_batch_size")
    if (cache := str(build.get("kv_cache_type", "paged")).rpartition(".")[2].lower()) != "paged":
        raise UserError(f"engine={folder} was built with a {cache} cache; in-flight batching needs cache=paged")
    return config


def check(options: Options) -> None:
    """Raises UserError for what Triton or the backend would refuse."""
    for name in ("queue", "workers"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)} must be 1 or more")
    if not 0 < options.gpu_memory <= 1:
        raise UserError(f"gpu_memory={options.gpu_memory} must be above 0 and at most 1")
    for name in ("engine_path", "tokenizer_path"):
        if (value := getattr(options, name)) is not None and (not value.startswith("/") or not value.isprintable()):
            raise UserError(f"{name}={value} must be an absolute path in the container")
    if not (Path(options.tokenizer) / "tokenizer_config.json").is_file():
        raise UserError(f"tokenizer={options.tokenizer} has no tokenizer_config.json: it is no Hugging Face folder")


def _bare(tensor: Tensor) -> Tensor:
    """An input of the engine as another model's output."""
    return Tensor(tensor.name, tensor.kind, tensor.dims)


def _tensors(inputs: Any, outputs: Any) -> dict[str, Any]:
    return {"input": [each.config() for each in inputs], "output": [each.config() for each in outputs]}


def _parameters(values: dict[str, Any]) -> dict[str, Any]:
    return {"parameters": [{"key": name, "value": {"string_value": str(value)}} for name, value in values.items()]}


def _group(count: int) -> dict[str, Any]:
    return {"count": count, "kind": Word("KIND_CPU")}


def _map(names: dict[str, str]) -> list[dict[str, str]]:
    return [{"key": left, "value": right} for left, right in names.items()]


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, str) else str(value)


if __name__ == "__main__":
    sys.exit(main(Options, command, sys.argv[1:], about=__doc__,
                  example="python deploy/triton.py engine=FOLDER tokenizer=FOLDER out=FOLDER"))  # fmt: skip
