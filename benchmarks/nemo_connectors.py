"""NeMo's own connectors on this machine, for comparison: `python benchmarks/nemo_connectors.py import|export FROM TO`.

`import` is `llm.import_ckpt` of a Hugging Face folder, `export` is `llm.export_ckpt` of what it wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main(action: str, source: Path, out: Path) -> None:
    from nemo_ext import platform

    on_cpu = platform.activate()
    from nemo.collections import llm

    if action == "export":
        llm.export_ckpt(path=source, target="hf", output_path=out, overwrite=True)
        return
    from conversion.hf_to_nemo import read_config

    config = read_config(source)
    model = {"llama": llm.LlamaModel, "qwen2": llm.Qwen2Model, "mistral": llm.MistralModel}[config["model_type"]]
    importer, options = model.importer(f"hf://{source}"), {}
    if config["model_type"] == "qwen2":  # its importer reads what only its caller sets
        importer.trust_remote_code, options = False, {"trust_remote_code": False}
    settings = importer.config
    if on_cpu:  # kernels that need a GPU
        for name in ("gradient_accumulation_fusion", "masked_softmax_fusion", "bias_activation_fusion", "bias_dropout_fusion",
                     "apply_rope_fusion", "cross_entropy_loss_fusion", "persist_layer_norm"):  # fmt: skip
            setattr(settings, name, False)
        settings.use_cpu_initialization = True
    llm.import_ckpt(model=model(settings), source=f"hf://{source}", output_path=out, overwrite=True, **options)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).absolute(), Path(sys.argv[3]).absolute())
