"""What each method of `conversion/quantize.py` loses on SmolLM2-135M-Instruct, with its real weights, calibrated on python-docs.

    python benchmarks/quantize.py [methods=fp8,int8_sq,...] [samples=32] [heldout_samples=16] [seq=512]
                                  [out=benchmarks/results/quantize.json]

Every method runs in a process of its own; what its report.json says is collected, and stays in the file for those that another
call with the same settings measured on the same machine. The weights come from a GGUF file in Q4_1, so that the parent is on a
grid of four bits itself, with an offset that none of these formats has. Q4_K is not among them: it needs rows of a multiple of
256, and SmolLM2's have 576.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nemo_ext.run_folder import write_json  # noqa: E402

FORMATS = {"w4a8_awq": "modelopt", "q8_0": "gguf", "q4_0": "gguf"}  # others: compressed_tensors
METHODS = ("fp8", "int8_sq", "int4_awq", "int4_gptq", "w4a8_awq", "nvfp4", "q8_0", "q4_0")
REPORTED = ("format", "loss", "bytes", "bits_per_weight", "verification", "seconds")
PACKAGES = ("torch", "transformers", "nvidia-modelopt")


def main(arguments: list[str]) -> int:
    given = dict(argument.split("=", 1) for argument in arguments)
    out = Path(given.pop("out", ROOT / "benchmarks/results/quantize.json"))
    methods = given.pop("methods", ",".join(METHODS)).split(",")
    sizes = {"samples": "32", "heldout_samples": "16", "seq": "512"} | given
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    machine = {"device": _device(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}
    same = {"machine": machine, "settings": sizes}
    before = json.loads(out.read_text()) if out.is_file() else {}
    results = before["methods"] if all(before.get(key) == value for key, value in same.items()) else {}
    with tempfile.TemporaryDirectory() as folder:
        model = _model(Path(folder))
        for method in methods:
            target = Path(folder, method)
            form = FORMATS.get(method, "compressed_tensors")
            line = [f"model=hf:{model}", f"method={method}", f"format={form}", f"out={target}"]
            line += [f"{key}={value}" for key, value in sizes.items()]
            subprocess.run([sys.executable, str(ROOT / "conversion/quantize.py"), *line], check=True)
            report = json.loads((target / "report.json").read_text())
            results[method] = {key: report[key] for key in REPORTED}
            write_json(out, {"date": str(datetime.date.today()), **same, "methods": results})
    return 0


def _device() -> str:
    """The GPU's name or the processor's architecture."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()


def _model(folder: Path) -> Path:
    """SmolLM2 as a Hugging Face folder, made in a process of its own like everything else."""
    code = "from conversion import gguf; import sys; gguf.to_hf(gguf.smollm2_gguf(), sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder / "model")], check=True, cwd=ROOT)
    return folder / "model"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
