"""What FP8 products of the output layer do to a trained model's loss and gradients: why `output_layer=fp8` has bf16 logits.

    python benchmarks/output_precision.py [model=FOLDER] [tokens=4096] [seq=512] [out=benchmarks/results/output_precision.json]

A Hugging Face model (SmolLM2-135M) reads held-out documents of python-docs. Of its last hidden states X and its output weight W,
in bf16, the logits, their gradient D, D W and D^T X are computed as the layer on a GPU has them: all in bf16; with D in e5m2 and
W and X in e4m3 for the two gradients; and with logits of e4m3 too, by a scale for each tensor or for each row. Sums are in fp32,
so that only roundings of operands and to bf16 logits are seen. Shares are of the bf16 loss and, in the norm, of its gradients.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402
from nemo_ext.platform import cpu_torch, hardware  # noqa: E402
from nemo_ext.run_folder import write_json  # noqa: E402


def rounded(values, by_rows: bool = False):
    """To e4m3 and back, scaled by the largest magnitude."""
    import torch

    largest = values.abs().amax(1, keepdim=True) if by_rows else values.abs().max()
    scale = torch.finfo(torch.float8_e4m3fn).max / largest
    return (values * scale).to(torch.float8_e4m3fn).float() / scale


def loss_and_gradient(x, w, labels):
    """The mean loss, and D [tokens, vocabulary]."""
    import torch

    logits = (x @ w.t()).bfloat16().float()
    log_sums = logits.logsumexp(-1, keepdim=True)
    losses = log_sums - logits.gather(1, labels[:, None])
    gradient = (logits - log_sums).exp_()
    gradient[torch.arange(len(labels)), labels] -= 1
    return losses.mean().item(), gradient


def measure(x, w, labels) -> dict[str, dict[str, float]]:
    """{way: its loss and what it changes}."""
    import torch

    loss, d = loss_and_gradient(x, w, labels)
    wanted = d @ w, d.t() @ x

    def change(d, w8, x8) -> dict[str, float]:
        d = (2.0**15 * d).to(torch.float8_e5m2).float() / 2.0**15
        found = d @ w8, d.t() @ x8
        return {
            f"{name} gradient": ((mine - each).norm() / each.norm()).item()
            for name, mine, each in zip(("inputs'", "weight's"), found, wanted, strict=True)
        }

    found = {"bf16": {"loss": loss}, "FP8 gradients": {"loss": loss, **change(d, rounded(w), rounded(x))}}
    for name, by_rows in (("a tensor", False), ("a row", True)):
        operands = rounded(x, by_rows), rounded(w, by_rows)
        own, d = loss_and_gradient(*operands, labels)
        changed = {"change": own / loss - 1, **change(d, *operands[::-1])}
        found[f"FP8 logits and gradients, a scale for {name}"] = {"loss": own, **changed}
    return found


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    if not hardware.has_cuda():
        cpu_torch.install()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from conversion import gguf
    from conversion.quantization import texts

    tokens, seq = int(given.get("tokens", 4096)), int(given.get("seq", 512))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.get("model", temporary))
        if "model" not in given:
            gguf.to_hf(gguf.smollm2_gguf(), folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    count = tokens // seq
    found = texts.windows(tokenizer, "python-docs", None, samples=count, heldout_samples=count, seq=seq + 1, batch=1)
    rows = torch.as_tensor(found.heldout)
    with torch.no_grad():
        x = model.model(rows[:, :-1]).last_hidden_state.flatten(0, 1)
        found = measure(x.bfloat16().float(), model.lm_head.weight.bfloat16().float(), rows[:, 1:].flatten())
    for way, each in found.items():
        print(f"{way:48}", *(f"{name} {value:.4f}" for name, value in each.items()))
    write_json(Path(given.get("out", ROOT / "benchmarks/results/output_precision.json")), {
        "tokens": tokens, "seq": seq, "vocabulary": model.config.vocab_size, "hidden": model.config.hidden_size,
        "model": given.get("model", "SmolLM2-135M"), "device": machine.device(), "date": datetime.date.today().isoformat(),
        "versions": machine.versions(("torch", "transformers")), "ways": found,
    })  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
