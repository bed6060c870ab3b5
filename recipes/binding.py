"""Putting a machine's paths into a recipe, which itself knows none.

Importing this module imports NeMo; `recipes.bind` is the way in.
"""

from __future__ import annotations

from pathlib import Path

import fiddle as fdl
import nemo_run as run
from nemo import lightning as nl
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer

from nemo_ext.adapters.strategy import AdapterStrategy
from nemo_ext.callbacks.checkpoint import AtomicCheckpoint
from nemo_ext.data.module import CorpusDataModule
from nemo_ext.run_folder import CHECKPOINTS, LOGS


def bind(
    recipe: run.Partial, *, run_dir: str, tokenizer: str, blend: list, weights: str | None, checkpoint: str | None
) -> run.Partial:
    """See `recipes.bind`."""
    folder = Path(run_dir)
    loaded = run.Config(AutoTokenizer, tokenizer)
    recipe.model.tokenizer = loaded
    recipe.data.tokenizer = loaded
    recipe.data.blend = blend
    if fdl.get_callable(recipe.data) is CorpusDataModule:
        recipe.data.index_cache_dir = str(folder / "index_cache")
    recipe.log.explicit_log_dir = str(folder / LOGS)
    for callback in recipe.trainer.callbacks:
        if getattr(callback, "run_dir", None) == "":
            callback.run_dir = str(folder)
        elif fdl.get_callable(callback) is AtomicCheckpoint:
            callback.folder = str(folder / CHECKPOINTS)
    adapter = fdl.get_callable(recipe.trainer.strategy) is AdapterStrategy
    if adapter:
        recipe.trainer.strategy.base = weights
    if checkpoint is not None:
        recipe.resume.resume_from_path = checkpoint
    elif weights is not None and not adapter:
        recipe.resume.restore_config = run.Config(
            nl.RestoreConfig, path=weights, load_model_state=True, load_optim_state=False, load_artifacts=False
        )
    return recipe
