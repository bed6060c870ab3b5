"""What a process that trains does not import, though it could, and what the launcher does not."""

import importlib.util
import subprocess
import sys

from nemo_processes import run_group

HEAVY = {"trl", "peft", "sklearn", "scipy.signal", "torchmetrics.functional", "bitsandbytes", "diffusers", "wandb", "tensorflow",
         "nemo.collections.asr", "nemo.collections.tts", "nemo.collections.vlm", "nemo.collections.speechlm"}  # fmt: skip


def look() -> None:
    import nemo_imported

    assert "nemo.collections.llm" in nemo_imported.FOUND
    came = HEAVY & nemo_imported.FOUND
    assert not came, f"imported again: {sorted(came)}"
    import torchmetrics
    from lightning.pytorch.core import module

    assert torchmetrics.Metric is module.Metric
    assert "torchmetrics.functional" not in sys.modules
    assert torchmetrics.MeanMetric.__mro__[2] is torchmetrics.Metric, torchmetrics.MeanMetric.__mro__  # now all of it is there
    assert "torchmetrics.functional" in sys.modules
    for name in ("sklearn", "modelopt.torch.quantization.plugins.trl"):
        assert importlib.util.find_spec(name) is not None


def test_training_imports_no_more_than_it_needs(tmp_path):
    run_group(1, look, log=tmp_path / "log")


def test_the_launcher_imports_no_torch():
    modules = "launchers.run, launchers.local, launchers.plan, launchers.prepare, nemo_ext.platform.hardware"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'nemo', 'transformers', 'pandas'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
