"""Importing NeMo without the parts of other packages that training never uses: a tenth of what a worker imports.

- torchmetrics: Lightning needs its base class. Its package brings every metric, and with them a part of scipy, of transformers
  and of torchvision.
- NVIDIA's Model Optimizer is named wherever NeMo loads or saves a model. Its plugins for Hugging Face's packages bring trl, peft
  and accelerate; it goes without a plugin whose package is missing.
- scikit-learn serves transformers' assisted generation, and brings scipy and pandas.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator

PLUGINS = {
    "opt": ("transformers", "peft", "diffusers"),
    "quantization": ("accelerate", "diffusers", "huggingface", "peft", "transformers", "transformers_trainer", "trl"),
}
UNUSED = ("sklearn", *(f"modelopt.torch.{part}.plugins.{name}" for part, names in PLUGINS.items() for name in names))


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Import NeMo inside, in a process that trains and does nothing else. Afterwards everything can be imported."""
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # None: an import of it finds no such module
    bring_metric()
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, ...) is None:
                del sys.modules[name]


class _Package(types.ModuleType):
    """A package whose `__init__` runs when something is asked of it that it has not been given."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        self.__class__ = types.ModuleType
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def bring_metric() -> None:
    """Let `from torchmetrics import Metric, MetricCollection` bring these alone; anything else of it brings the whole package."""
    name = "torchmetrics"
    if name in sys.modules or (spec := importlib.util.find_spec(name)) is None:
        return
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    package.__class__ = _Package
    package._logger = logging.getLogger(name)  # which its modules take from the package
    importlib.import_module(f"{name}.utilities")  # first: it and the class import each other
    package.Metric = importlib.import_module(f"{name}.metric").Metric
    package.MetricCollection = importlib.import_module(f"{name}.collections").MetricCollection
