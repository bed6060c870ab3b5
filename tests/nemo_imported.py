"""What the server of `nemo_processes` imports before it forks: everything that takes long in a process that trains."""

import gc
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"
for name in [name for name in os.environ if name.startswith("NVTE_")]:
    del os.environ[name]  # what Megatron noted of a model that the process of pytest built

from nemo_ext import platform  # noqa: E402
from nemo_ext.platform.lean import lean  # noqa: E402

with lean():
    platform.activate()

    import recipes.training  # noqa: F401

FOUND = frozenset(sys.modules)

gc.freeze()  # no pages are written in a fork only to look at what it shares
