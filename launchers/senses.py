"""A run that gives a model a sense: the model it begins with, made of a text model and a tower, and how its media are read."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import recipes
from launchers import prepare
from launchers.prepare import Checkpoint
from nemo_ext import adapters
from nemo_ext.errors import UserError
from nemo_ext.multimodal import towers
from nemo_ext.multimodal.description import Sense, Tiling
from nemo_ext.progress import bar

RANDOM = "random:"


def request(method, keys: dict[str, Any], machine, checkpoint: Checkpoint | None, architecture):
    """What a training run asks of the planner (`layout.request`), with the tower where the recipe has one. Raises UserError."""
    from launchers import layout

    trained = layout.trained(method, keys, architecture)
    statistics = adapters.statistics(architecture, recipes.adapter(method, keys), keys) / max(1, trained)
    sense = planned(keys, checkpoint, method.modality) if method.modality else None
    tower = layout.tower(keys, architecture, sense)
    share, packed = trained / architecture.num_parameters(), method.conversations and keys["pack"]
    return layout.request(keys, machine, share, method.nf4, tower, statistics, packed)


def planned(keys: dict[str, Any], checkpoint: Checkpoint | None, modality: str) -> Sense:
    """The sense that a run's model has or will have, from configurations alone. Raises UserError."""
    if (found := _own(checkpoint)) is not None:
        if keys["tower"] is not None:
            raise UserError(f"model={keys['model']} has a tower already: leave tower={keys['tower']} out")
        return _of(found, keys, modality)
    if keys["tower"] is None:
        raise UserError(f"tower= is missing: hf:FOLDER of an encoder of {modality}, or random:NAME: {', '.join(towers.SHAPES)}")
    if keys["tower"].startswith(RANDOM):
        sense = recipes.described_sense(keys)
    else:
        from conversion.multimodal.towers import tower

        sense = recipes.described_sense(keys, tower(keys["tower"], keys["seed"]).config)
    if sense.modality != modality:
        raise UserError(f"tower={keys['tower']} is of {sense.modality}")
    return dataclasses.replace(sense, tiling=parse_tiling(keys["tiling"], sense))


def whole(checkpoint: Checkpoint, keys: dict[str, Any], modality: str) -> Checkpoint:
    """The model with its sense: the checkpoint itself where it has one, else composed of it and the tower, in the cache."""
    if _own(checkpoint) is not None:
        return checkpoint
    if checkpoint.kind == "nemo":
        raise UserError(f"model={keys['model']} has no tower: convert it to Hugging Face's form first, and give hf:FOLDER")
    from conversion.multimodal.compose import compose
    from conversion.multimodal.towers import tower

    text, described = prepare.as_hf(checkpoint), planned(keys, checkpoint, modality)
    files = [*sorted(text.glob("*.safetensors*")), text / "config.json", *tower(keys["tower"], keys["seed"]).files]
    settings = dict(
        encoder=keys["tower"], projector=described.projector, feature_layer=described.encoder.feature_layer,
        class_token=described.encoder.class_token, tiling=described.tiling, token=keys["image_token"], seed=keys["seed"],
    )  # fmt: skip
    words = f"{described} {settings} {prepare.fingerprint(files)}"
    out = prepare.cache_folder() / "composed" / f"{text.name}-{hashlib.sha256(words.encode()).hexdigest()[:12]}"
    if not out.is_dir():
        with bar(f"putting {keys['tower']} to {text.name}") as progress:
            compose(text, out, progress=progress, **settings)
    return Checkpoint(f"hf:{out}", "hf", out)


def inputs(checkpoint: Checkpoint, keys: dict[str, Any], modality: str) -> list[dict[str, Any]]:
    """How the media of a whole model are read, as `nemo_ext.data.multimodal.inputs` writes it down."""
    from nemo_ext.data.multimodal import inputs as media

    sense = _of(_own(checkpoint), keys, modality)
    return [media.read(sense, prepare.tokenizer_folder(checkpoint)).to_dict()]


def parse_tiling(value: Any, sense: Sense) -> Tiling | None:
    """`tiling=`: grids of pixels "384x768,768x384", or rows and columns of tiles "1x2,2x1". Raises UserError."""
    if not value:
        return None
    parts = value if isinstance(value, list) else str(value).split(",")
    side = sense.encoder.config["image_size"]
    try:
        grids = [tuple(int(number) for number in str(part).strip().split("x")) for part in parts]
        if any(len(grid) != 2 or min(grid) <= 0 for grid in grids):
            raise ValueError
    except ValueError:
        raise UserError(f"tiling={value}: give grids of tiles, rows x columns: 1x2,2x1,2x2") from None
    grids = [grid if max(grid) >= side else (grid[0] * side, grid[1] * side) for grid in grids]
    if bad := [grid for grid in grids if grid[0] % side or grid[1] % side]:
        raise UserError(f"tiling={value}: {bad[0][0]}x{bad[0][1]} pixels are no multiple of the encoder's {side}")
    return Tiling(tuple(grids))


def _own(checkpoint: Checkpoint | None) -> tuple[Sense, ...] | None:
    """The senses that a checkpoint has already."""
    if checkpoint is None or checkpoint.kind == "gguf":
        return None
    if checkpoint.kind == "nemo":
        from conversion import nemo_folder

        return nemo_folder.find(checkpoint.path).senses or None
    from conversion.hf_to_nemo import read_config
    from conversion.multimodal import senses_of

    return senses_of(read_config(checkpoint.path)) or None


def _of(senses: tuple[Sense, ...], keys: dict[str, Any], modality: str) -> Sense:
    """A model's only sense, which must be of this modality."""
    if [sense.modality for sense in senses] != [modality]:
        has = " and ".join(sense.modality for sense in senses)
        raise UserError(f"model={keys['model']} has a sense of {has}, the recipe is for {modality}")
    return senses[0]
