"""What the keys of a command name: paths on this machine, and the model that a run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import recipes
from nemo_ext.errors import UserError
from recipes import models

PATHS = ("model", "tokenizer", "tower", "images")  # keys that may name files of this machine


def starting_point(recipe: str, method, family: str, keys: dict[str, Any], planning: bool):
    """The checkpoint a run starts from (None for random weights) and the model's architecture. Raises UserError."""
    from launchers import prepare

    if not method.needs_weights:
        if keys["model"]:
            raise UserError(f"model= is for recipe=cpt_{family}: {recipe} starts from random weights")
        return None, recipes.architecture(recipe, keys)
    size = models.size(family, keys["size"])
    if keys["model"]:
        checkpoint = prepare.find(keys["model"])
        try:
            shape = prepare.shape(checkpoint)
        except UserError as error:
            raise UserError(f"model={keys['model']}: {error}") from None
        wanted = size.architecture.family
        if shape.family != wanted:
            raise UserError(f"model={keys['model']} is a {shape.family} model, recipe={recipe} trains {wanted}")
        return checkpoint, shape
    if planning:
        return None, size.architecture
    if not size.hub:
        advice = f"give model=hf:FOLDER, or use recipe=pretrain_{family}"
        raise UserError(f"{recipe} size={keys['size']} has no published weights: {advice}")
    try:
        checkpoint = prepare.find(size.hub if size.hub == models.EMBEDDED else f"hf:{size.hub}")
    except UserError:
        raise UserError(
            f"{size.hub} is not in Hugging Face's local cache: give model=hf:FOLDER, or start from random weights with "
            f"recipe=pretrain_{family}"
        ) from None
    return checkpoint, prepare.shape(checkpoint)


def absolute(keys: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Paths (of the keys `names`, of `data` and `out`) as absolute ones, so that a saved configuration works from any folder."""
    changed = dict(keys)
    for name in names:
        changed[name] = _absolute(keys[name]) if keys[name] else None
    changed["out"] = str(Path(keys["out"]).expanduser().absolute())
    data = keys["data"]
    changed["data"] = [_absolute(str(each)) for each in data] if isinstance(data, list) else _absolute(str(data))
    return changed


def _absolute(text: str) -> str:
    prefix, separator, rest = text.partition(":")
    if separator and prefix in ("hf", "gguf", "nemo"):
        return f"{prefix}:{Path(rest).expanduser().absolute()}" if Path(rest).expanduser().exists() else text
    path, separator, weight = text.rpartition(":")
    if separator and Path(path).expanduser().exists():
        return f"{Path(path).expanduser().absolute()}:{weight}"
    whole = Path(text).expanduser()
    return str(whole.absolute()) if whole.exists() or any(c in text for c in "*?/") else text
