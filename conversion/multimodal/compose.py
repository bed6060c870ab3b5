"""A model with a sense from parts: a text model, an encoder and a fresh projector, as one Hugging Face folder.

The folder is LLaVA's, LLaVA-NeXT's or Voxtral's where transformers has a class for the pair, so that it and everything that takes
such folders load it before and after training; else one of our own (`configuration.OWN_TYPE`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from conversion import dtypes, families, hf_to_nemo, safetensors_io, shards
from conversion.atomic import Unfinished, fingerprint, resumable_folder
from conversion.families.table import WRAPPED
from conversion.multimodal.configuration import MODALITY_TOWERS, OWN_TYPE, WRAPPERS, hf_config, select_strategy
from conversion.multimodal.rows import NEWLINE, PROJECTOR, projector_shapes
from conversion.multimodal.towers import PREPROCESSOR, Part, random_parts, tower
from conversion.nemo_to_hf import MAX_SHARD_BYTES
from conversion.workers import Progress
from nemo_ext import run_folder
from nemo_ext.errors import UserError
from nemo_ext.multimodal.description import AUDIO, VISION, Encoder, Projector, Sense, Tiling

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # with a row a token
MARKS = {VISION: "<image>", AUDIO: "<audio>"}
# A message's content may be a list of parts, as OpenAI has it; the text model's own template then sees plain text
_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if not message['content'] or message['content'] is string -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set whole = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set whole.text = whole.text + part['text'] -%}
{%- else -%}{%- set whole.text = whole.text + '<|mark|>\\n' -%}{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=whole.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def compose(
    text: Path,
    out: Path,
    *,
    encoder: str | Mapping[str, Any],
    projector: Projector | None = None,
    feature_layer: int | None = -2,
    class_token: bool = False,
    tiling: Tiling | None = None,
    token: str | None = None,
    seed: int = 1234,
    chat_template: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the Hugging Face folder `out` of the text model in the folder `text` with a sense, and return it.

    `encoder` is "hf:FOLDER" (SiglipModel, SiglipVisionModel, CLIPModel, CLIPVisionModel, WhisperModel or
    WhisperForConditionalGeneration), "random:NAME" of a published shape, or a configuration that gets random weights. The
    `projector` is fresh, its weights decided by `seed`; None is LLaVA's, or for sounds Voxtral's, whose frames are stacked to the
    width of the encoder's MLP. The placeholder `token` ("<image>", "<audio>") is an existing one of the tokenizer, or is added:
    its row of the embedding, where there is none, is the mean of the others. `dtype` is "float32", "bfloat16", "float16" or
    None: what each part has, fresh weights as the text model's. `chat_template` replaces the text model's; either way content
    lists are understood, an image in them becomes the token and a line's end.

    A call that was killed goes on. Raises UserError: the text model's family does not convert or it has a sense already, an
    unknown encoder, a tokenizer without room, missing or ill-shaped tensors, too small a disk, `out` taken.
    """
    text, out = Path(text), Path(out)
    config = hf_to_nemo.read_config(text)
    if config.get("model_type") in WRAPPERS:
        raise UserError(f"{text} sees or hears already (model_type={config['model_type']!r}): give it as model=, without tower=")
    architecture, family = families.architecture(config), families.family_of(config)
    stored = safetensors_io.open_folder(text)
    prefix = families.base_prefix(family, stored)
    names = hf_to_nemo.tensor_names(family, architecture, stored, prefix, text)
    if prefix != hf_to_nemo.BARE:
        raise UserError(f"{text} is a wrapped model: give the text model alone")
    fresh, target = stored[f"{prefix}embed_tokens.weight"].dtype, dtypes.parse(dtype)
    found = tower(encoder, seed, target or fresh)
    modality = Encoder(found.config, None).modality
    heard = modality == AUDIO
    projector = projector or (_voxtral_projector(found.config) if heard else Projector())
    tokenizer, token_id = _tokenizer(text, token or MARKS[modality], architecture.vocab_size)
    vocab_size = architecture.vocab_size
    if token_id >= vocab_size:  # Megatron pads with rows of zeros, which take part in its softmax: none is left to pad
        vocab_size = dataclasses.replace(architecture, vocab_size=token_id + 1).padded_vocab_size
    sense = Sense(Encoder(found.config, None if heard else feature_layer, class_token), projector, token_id, tiling)
    width = architecture.hidden_size

    parts = {f"{MODALITY_TOWERS[modality]}.{name}": part for name, part in found.tensors.items()}
    linears = random_parts(projector_shapes(sense, width), seed, target or fresh, _linear_initial)
    parts |= {f"{PROJECTOR}.{name}": part for name, part in linears.items()}
    if tiling is not None:
        parts |= random_parts({NEWLINE: (width,)}, seed, target or fresh, _newline_initial)
    for name in names:
        info = stored[name]
        part = Part(info.dtype, info.shape, info.read)
        if name in VOCABULARY:
            part = _grown(part, vocab_size)
        parts[families.hf_name(name, WRAPPED[0])] = part
    if target is not None:
        parts = {name: Part(target, part.shape, functools.partial(_cast, part, target, name)) for name, part in parts.items()}

    text_config = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype", "transformers_version")}
    text_config |= {"vocab_size": vocab_size, "tie_word_embeddings": architecture.share_embeddings_and_output_weights}
    whole = hf_config(text_config, (sense,), dtypes.NAMES[target or fresh])
    specs = {name: (part.dtype, part.shape) for name, part in parts.items()}
    layout = shards.lay_out(specs, MAX_SHARD_BYTES)
    sources = [text / "config.json", *safetensors_io.files_of(stored), *found.files]
    key = fingerprint(sources, "compose", seed, dtype, whole, [shard.tensors for shard in layout])
    with resumable_folder(out, key) as unfinished:
        folder = unfinished.path
        _write(unfinished, layout, specs, parts, progress)
        if len(layout) > 1:
            shards.write_index(folder, layout, specs, None)
        run_folder.write_json(folder / "config.json", whole)
        _write_tokenizer(tokenizer, folder, chat_template, token or MARKS[modality])
        _write_processor(folder, sense, found.preprocessor, token or MARKS[modality])
        _write_generation(text, config, folder)
    return out


def _voxtral_projector(config: Mapping[str, Any]) -> Projector:
    return Projector(downsample=config["encoder_ffn_dim"] // config["d_model"], bias=False)


def _tokenizer(text: Path, token: str, vocab_size: int) -> tuple[Any, int]:
    """The text model's tokenizer with the placeholder in it, and its id."""
    from nemo_ext.platform import cpu_torch, hardware

    if not hardware.has_cuda():
        cpu_torch.declare_torchvision_ops()  # transformers imports torchvision
    from transformers import AddedToken, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(text)
    except Exception as error:  # whatever a missing or broken file makes of it
        raise UserError(f"{text}: the tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if len(tokenizer) > vocab_size:
        found = f"{len(tokenizer):,} tokens, the model embeds {vocab_size:,}"
        raise UserError(f"{text}: the tokenizer has {found}: no room for {token}")
    if token not in tokenizer.get_vocab():
        kept = list(tokenizer.additional_special_tokens)
        special = AddedToken(token, normalized=False, special=True)
        tokenizer.add_special_tokens({"additional_special_tokens": [*kept, special]})
    ids = tokenizer.encode(f"a{token}b", add_special_tokens=False)
    token_id = tokenizer.convert_tokens_to_ids(token)
    if ids.count(token_id) != 1:
        raise UserError(f"{text}: the tokenizer splits image_token={token} in a text: give a token that stays whole")
    return tokenizer, token_id


def _grown(part: Part, rows: int) -> Part:
    """The vocabulary's tensor with as many rows, the new ones the mean of the others: their logits are never the largest."""

    def read() -> torch.Tensor:
        tensor = part.read()
        mean = sum(chunk.float().sum(0) for chunk in tensor.split(4096)) / len(tensor)
        return torch.cat([tensor, mean.to(tensor.dtype).expand(rows - len(tensor), *tensor.shape[1:])])

    return Part(part.dtype, (rows, *part.shape[1:]), read) if rows > part.shape[0] else part


def _cast(part: Part, dtype: torch.dtype, name: str) -> torch.Tensor:
    return dtypes.cast(part.read(), dtype, name)


def _linear_initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """torch's own for a linear's weight, as LLaVA began; biases begin at zero."""
    if len(shape) == 1:
        return torch.zeros(shape)
    return (torch.rand(shape, generator=generator) * 2 - 1) * shape[1] ** -0.5


def _newline_initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * shape[0] ** -0.5


def _write(
    unfinished: Unfinished, layout: list[shards.Shard], specs: shards.Specs, parts: Mapping[str, Part], progress: Progress | None
) -> None:
    sizes = {unfinished.path / shard.file: sum(shards.nbytes(specs[name]) for name in shard.tensors) for shard in layout}
    unfinished.check_space(sizes)
    done, total = 0, sum(sizes.values())
    for shard, file in zip(layout, sizes, strict=True):
        if not unfinished.finished(file):
            places = safetensors_io.create(file, {name: specs[name] for name in shard.tensors}, shard.metadata)
            for name, place in places.items():
                place.write(parts[name].read())
                done += place.nbytes
                if progress:
                    progress(done, total, "B")
            unfinished.finish(file)
        else:
            done += sizes[file]


def _write_tokenizer(tokenizer: Any, folder: Path, template: str | None, token: str) -> None:
    template = template or tokenizer.chat_template
    if isinstance(template, str):
        tokenizer.chat_template = _FLATTEN.replace("<|mark|>", token) + template
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # generate() takes nothing else
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # so that it is saved
    tokenizer.save_pretrained(folder)


def _write_processor(folder: Path, sense: Sense, preprocessor: dict[str, Any], token: str) -> None:
    """What AutoProcessor reads. It has none for Voxtral's folders with another tokenizer than Mistral's."""
    config = run_folder.read_json(folder / "config.json")
    if sense.modality == AUDIO or config["model_type"] == OWN_TYPE:
        run_folder.write_json(folder / PREPROCESSOR, preprocessor)
        return
    kind = "LlavaNext" if sense.tiling else "Llava"
    if sense.tiling:
        preprocessor = _next_preprocessor(sense, preprocessor)
    run_folder.write_json(folder / PREPROCESSOR, preprocessor | {"processor_class": f"{kind}Processor"})
    settings = {
        "processor_class": f"{kind}Processor",
        "image_token": token,
        "patch_size": sense.encoder.config["patch_size"],
        "vision_feature_select_strategy": select_strategy(sense.encoder),
        "num_additional_image_tokens": int(sense.encoder.has_class_token),
    }
    run_folder.write_json(folder / "processor_config.json", settings)


def _next_preprocessor(sense: Sense, preprocessor: dict[str, Any]) -> dict[str, Any]:
    """LLaVA-NeXT's image processor, which cuts tiles, with the encoder's numbers."""
    side = sense.encoder.config["image_size"]
    square = {"height": side, "width": side}
    return preprocessor | {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": square,
        "do_center_crop": True,
        "do_pad": True,
        "image_grid_pinpoints": [list(grid) for grid in sense.tiling.grids],
    }


def _write_generation(text: Path, config: Mapping[str, Any], folder: Path) -> None:
    """The text model's generation_config.json, or one with its special ids."""
    source = text / "generation_config.json"
    if source.is_file():
        shutil.copyfile(source, folder / source.name)
        return
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    (folder / source.name).write_text(json.dumps(ids, indent=2) + "\n")
