"""A LoRA adapter merged into its base: a Hugging Face folder that needs no PEFT.

Every adapted weight becomes `W + scale * B A`, computed in fp32 and stored in the base's dtype; with DoRA the rows of that are
stretched to the adapter's magnitudes. All other tensors, the shards, the configuration and the tokenizer stay as they are.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion import families, safetensors_io
from conversion.atomic import Unfinished, fingerprint, resumable_folder
from conversion.compare import media
from conversion.compare.activations import LogitDifference, compare
from conversion.dtypes import DTYPES, cast, parse
from conversion.hf_to_nemo import read_config
from conversion.lora import adapter as lora
from conversion.lora.adapter import Adapter, Spectrum, Update
from conversion.multimodal.configuration import CLASSES, OWN_TYPE, language_model, senses_of
from conversion.safetensors_io import INDEX, TensorInfo
from conversion.workers import Progress
from nemo_ext.errors import RunError, UserError

RECORD = "conversion.json"
WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")
FP32_LIMIT = 1e-4  # of the largest logit: what another order of summation explains


@dataclass(frozen=True)
class Merged:
    """A merged folder and how far it lies from the base with the adapter beside it.

    `rounding` is the largest, over the merged tensors, of |stored - exact| / |change| (Frobenius norms): 0.01 means that storing
    the weights lost a hundredth of what the adapter says. `difference` compares the logits of the merged model with those of
    PEFT's, both computed in fp32; `effect` those of PEFT's with the base's, the scale to read it by. None if not measured.
    """

    folder: Path
    tensors: int  # how many were changed or replaced
    rounding: float
    difference: LogitDifference | None = None
    effect: LogitDifference | None = None


def merge(
    base_hf_dir: Path,
    adapter_dir: Path,
    out_hf_dir: Path,
    dtype: str | None = None,
    progress: Progress | None = None,
    *,
    measure: bool = True,
) -> Merged:
    """Merge the PEFT folder `adapter_dir` into `base_hf_dir`, as the new folder `out_hf_dir`.

    One tensor is in memory at a time; a merge that was killed goes on where it was. `dtype` ("float32", "bfloat16", "float16")
    stores all weights in another type. With `measure`, transformers and PEFT then run the unmerged and the merged model (one in
    memory at a time) on 2 x 32 random tokens, of a model that sees or hears on tokens with random images or sounds.

    Raises UserError: a quantized base, an adapter that does not fit, one for an embedding that the output shares, or what
    `lora.read` refuses. Raises RunError, and leaves nothing, if weights stored in fp32 compute something else than PEFT does.
    """
    base, adapter = Path(base_hf_dir), lora.read(adapter_dir)
    target = parse(dtype)
    config = read_config(base)
    _refuse_quantized(base, config)
    source = safetensors_io.open_folder(base)
    changes = _changes(base, config, adapter, source)
    stored = {name: target if target and info.dtype in DTYPES.values() else info.dtype for name, info in source.items()}

    files = [*safetensors_io.files_of(source), adapter.folder / lora.WEIGHTS, adapter.folder / lora.CONFIG]
    with resumable_folder(out_hf_dir, fingerprint(files, "lora_merge", dtype)) as unfinished:
        folder = unfinished.path
        losses = _write_shards(unfinished, source, changes, stored, progress)
        _copy_rest(base, folder, config, dtype, sum(math.prod(i.shape) * stored[n].itemsize for n, i in source.items()))
        merged = Merged(Path(out_hf_dir), len(changes), max(losses))
        if measure and config.get("model_type") != OWN_TYPE:  # which has no model in transformers
            difference, effect = _measure(base, adapter.folder, folder, config)
            exact = all(stored[name] == torch.float32 for name in changes)
            if not math.isfinite(difference.max_abs) or (exact and difference.relative > FP32_LIMIT):
                raise RunError(
                    f"the merged model differs from PEFT's by {difference.max_abs:.2e} in a logit: nothing was written"
                )
            merged = dataclasses.replace(merged, difference=difference, effect=effect)
        (folder / RECORD).write_text(json.dumps(_record(base, adapter, merged), indent=2) + "\n")
    return merged


def _refuse_quantized(base: Path, config: Mapping[str, Any]) -> None:
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown method")
        raise UserError(
            f"{base} is quantized ({method}): its weights are rounded, and merging would round the adapter away; "
            "merge into the original and quantize the result"
        )


def _changes(
    base: Path, config: Mapping[str, Any], adapter: Adapter, source: Mapping[str, TensorInfo]
) -> dict[str, Update | Spectrum | TensorInfo]:
    """{tensor of the base: what happens to it}, checked."""
    family = families.family_of(config) if _known(config) else None
    tied = _tied(config, source)
    changes: dict[str, Update | Spectrum | TensorInfo] = {}
    for module, update in adapter.updates.items():
        name = lora.tensor_name(family, source, f"{module}.weight")
        if name is None:
            raise UserError(f"{adapter.folder} adapts {module}, which {base} does not have: it is for another base")
        if not update.fits(source[name].shape):
            raise UserError(
                f"{adapter.folder} changes {module} by {update}, but {base} has {list(source[name].shape)} there: "
                "it is for another base"
            )
        if tied and _is_vocabulary(name):
            raise UserError(
                f"{adapter.folder} adapts {module}, but in {base} the output shares its weight with the embedding: "
                "merging would change both; run it unmerged"
            )
        changes[name] = update
    for parameter, info in adapter.replaced.items():
        name = lora.tensor_name(family, source, parameter)
        fits = name is not None and source[name].shape == info.shape
        if fits and torch.equal(info.read().to(source[name].dtype), source[name].read()):
            continue  # PEFT saves a copy of the base's embedding beside an adapter for it
        if tied and _is_vocabulary(parameter):
            raise UserError(
                f"{adapter.folder} replaces {parameter}, but in {base} the output shares its weight with the embedding: "
                "the other one would change too; run it unmerged"
            )
        if not fits:
            has = "no such tensor" if name is None else f"shape {list(source[name].shape)}"
            raise UserError(f"{adapter.folder} replaces {parameter} by {list(info.shape)}, but {base} has {has}")
        if name in changes:
            raise UserError(f"{adapter.folder} adapts {parameter} of another base: its copy differs from {base}'s")
        changes[name] = info
    if (targets := adapter.config.get("target_modules")) != "all-linear" and targets:
        modules = (name.removesuffix(".weight") for name, info in source.items() if len(info.shape) == 2 and name not in changes)
        missing = sorted(m for m in modules if lora.is_target(adapter.config, m) and not _is_vocabulary(f"{m}.weight"))
        if missing:
            raise UserError(
                f"{adapter.folder} targets {missing[0]} and {len(missing) - 1} more modules of {base} but has no tensors for "
                "them: it is incomplete or for another base"
            )
    for name in changes:
        if source[name].dtype not in DTYPES.values():
            kind = str(source[name].dtype).removeprefix("torch.")
            raise UserError(f"{base}: {name} is {kind}: merging into a quantized base would round the adapter away")
    return changes


def _known(config: Mapping[str, Any]) -> bool:
    kind = language_model(config).get("model_type")
    return any(kind in family.model_types for family in families.FAMILIES.values())


def _tied(config: Mapping[str, Any], source: Mapping[str, TensorInfo]) -> bool:
    """Whether embedding and output are one tensor: by the configuration, else by the lack of an output."""
    text = language_model(config)
    parts = (config, config.get("text_config") or {}) if text is config else (text,)
    said = [part["tie_word_embeddings"] for part in parts if "tie_word_embeddings" in part]
    return bool(said[0]) if said else not any(name.endswith("lm_head.weight") for name in source)


def _is_vocabulary(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight", "embed_out.weight"))


def _write_shards(
    unfinished: Unfinished,
    source: Mapping[str, TensorInfo],
    changes: Mapping[str, Update | Spectrum | TensorInfo],
    stored: Mapping[str, torch.dtype],
    progress: Progress | None,
) -> list[float]:
    """Write the base's files with the changed tensors in place; returns what rounding lost of a file's updates, at most."""
    shards: dict[Path, list[str]] = {}
    for name, info in source.items():
        shards.setdefault(unfinished.path / info.file.name, []).append(name)
    unfinished.check_space(
        {file: sum(math.prod(source[n].shape) * stored[n].itemsize for n in names) for file, names in shards.items()}
    )
    total, done = sum(info.nbytes for info in source.values()), 0
    losses = [0.0]

    def tensors(names: list[str]) -> Iterator[torch.Tensor]:
        nonlocal done
        for name in names:
            change = changes.get(name)
            if isinstance(change, (Update, Spectrum)):
                tensor, loss = _merged(source[name].read(), change, stored[name], name)
                losses[-1] = max(losses[-1], loss)
            else:
                tensor = cast((change or source[name]).read(), stored[name], name)
            yield tensor
            done += source[name].nbytes
            if progress:
                progress(done, total, "B")

    for file, names in shards.items():
        if facts := unfinished.finished(file):
            losses.append(facts["loss"])
            done += sum(source[name].nbytes for name in names)
            continue
        losses.append(0.0)
        safetensors_io.write_file(file, {name: (stored[name], source[name].shape) for name in names}, tensors(names))
        unfinished.finish(file, loss=losses[-1])
    return losses


def _merged(weight: torch.Tensor, update: Update | Spectrum, dtype: torch.dtype, name: str) -> tuple[torch.Tensor, float]:
    """The merged weight in `dtype`, and |stored - exact| / |exact - weight|."""
    weight = weight.float()
    exact = weight.T if update.transposed else weight
    exact = exact + update.delta(exact.shape)
    if update.magnitude is not None:
        exact = exact * (update.magnitude.read().float().flatten() / torch.linalg.norm(exact, dim=1))[:, None]
    exact = exact.T if update.transposed else exact
    tensor = cast(exact, dtype, name)
    change = torch.linalg.norm(exact - weight).item()
    lost = torch.linalg.norm(tensor.float() - exact).item()
    return tensor, lost / change if change else 0.0


def _copy_rest(base: Path, folder: Path, config: Mapping[str, Any], dtype: str | None, total_size: int) -> None:
    """Everything of the base but weights, byte for byte; dtype and size are rewritten if they changed."""
    for file in sorted(base.iterdir()):
        if file.is_file() and file.suffix not in WEIGHT_FILES and file.name != RECORD and not _is_weight_index(file):
            shutil.copyfile(file, folder / file.name)
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text())
        if dtype is not None:
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": total_size}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        else:
            shutil.copyfile(base / INDEX, folder / INDEX)
    if dtype is not None:
        parts = [dict(config)]
        if isinstance(config.get("text_config"), dict):
            parts[0]["text_config"] = dict(config["text_config"])
            parts.append(parts[0]["text_config"])
        for part in parts:
            part["dtype" if "dtype" in part else "torch_dtype"] = dtype
        (folder / "config.json").write_text(json.dumps(parts[0], indent=2) + "\n", encoding="utf-8")


def _is_weight_index(file: Path) -> bool:
    return file.name.endswith(".index.json")


def _measure(base: Path, adapter: Path, merged: Path, config: Mapping[str, Any]) -> tuple[LogitDifference, LogitDifference]:
    """(merged against PEFT's, PEFT's against the base's) logits in fp32, on 2 x 32 random tokens, or one sequence with media."""
    from nemo_ext import platform

    platform.activate()
    import transformers
    from peft import PeftModel

    vocabulary = (config.get("text_config") or config).get("vocab_size") or 256
    loader = getattr(transformers, CLASSES.get(config.get("model_type"), "AutoModelForCausalLM"))
    tokens = torch.randint(vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))
    more: dict[str, Any] = {}
    if senses := senses_of(config):
        _, ids, inputs = media.prompt(senses, vocabulary)
        tokens, more = ids[None], inputs.for_huggingface("cpu", torch.float32)

    def load(folder: Path) -> Any:
        return loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    with torch.inference_mode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following rank_pattern keys")  # said of every AdaLoRA adapter, and used
        model = load(base)
        plain = model(tokens, **more).logits
        model = PeftModel.from_pretrained(model, adapter).float().eval()
        adapted = model(tokens, **more).logits
        del model
        gc.collect()
        result = load(merged)(tokens, **more).logits
    return compare(adapted, result), compare(plain, adapted)


def _record(base: Path, adapter: Adapter, merged: Merged) -> dict[str, Any]:
    return {
        "source": str(base.absolute()),
        "adapter": str(adapter.folder.absolute()),
        "adapter_config": adapter.config,
        "tensors": merged.tensors,
        "rounding": merged.rounding,
        "difference": dataclasses.asdict(merged.difference) if merged.difference else None,
        "effect": dataclasses.asdict(merged.effect) if merged.effect else None,
    }
