"""What each of the two processes of test_output_layer does, and its kernels, in plain PyTorch, for a CPU."""

import os
from pathlib import Path

import torch

LAYOUTS = {
    "tp1": dict(tensor_model_parallel_size=1),
    "tp2": dict(tensor_model_parallel_size=2),
    "tp2 with sequence parallelism": dict(tensor_model_parallel_size=2, sequence_parallel=True),
}


class Plain:
    """`nemo_ext.platform.output_kernels`, by the definitions."""

    IGNORED = -100

    @staticmethod
    def statistics(logits, labels, first, found, gradient=False):
        inside = (labels >= first) & (labels < first + logits.shape[1])
        at = logits.gather(1, (labels - first).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        found[0] = logits.float().logsumexp(-1)
        found[1] = at.float().masked_fill(~inside, float("-inf"))
        if gradient:
            Plain.gradient(logits, labels, first, found[0], logits)

    @staticmethod
    def gradient(logits, labels, first, log_sums, out, transposed=None, scale=1.0):
        numbers = torch.arange(first, first + logits.shape[1])
        found = (logits.float() - log_sums[:, None]).exp() - (labels[:, None] == numbers).float()
        out.copy_(scale * found.masked_fill((labels == Plain.IGNORED)[:, None], 0.0))
        if transposed is not None:
            transposed.copy_(out.t())

    @staticmethod
    def scaled(rows, factors):
        return rows * factors[:, None]


def add_weight_gradient(inputs, gradients, into):
    """`gpu_megatron.add_weight_gradient` without Transformer Engine."""
    into += gradients.t().to(into.dtype) @ inputs.to(into.dtype)


def main(folder: Path) -> None:
    """A tiny Llama's losses and gradients in each of LAYOUTS, by Megatron and by the fused layer, into LAYOUT-rankN.pt.

    Its embeddings are tied in the last of them.
    """
    from megatron.core import parallel_state, tensor_parallel

    from conversion.compare.megatron import ATTENTION_VARIABLES
    from nemo_ext.platform import gpu_megatron, output_layer

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    output_layer._kernels = lambda: Plain
    output_layer._computable = lambda weight: True
    gpu_megatron.add_weight_gradient = add_weight_gradient
    for name, sizes in LAYOUTS.items():
        for variable in ATTENTION_VARIABLES:
            os.environ.pop(variable, None)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=sizes["tensor_model_parallel_size"])
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        torch.manual_seed(5 + torch.distributed.get_rank())
        model = build(sizes, tied="sequence_parallel" in sizes)
        found = [run(model, "Megatron's"), run(model, "fused")]
        found.append(run(model, "fused", chunk=128) if not model.share_embeddings_and_output_weights else found[1])
        found.append(refused(model, output_layer))
        parallel_state.destroy_model_parallel()
        torch.save(found, folder / f"{name}-rank{torch.distributed.get_rank()}.pt")


def build(sizes, tied):
    import fiddle as fdl

    from nemo_ext.architecture import Architecture
    from nemo_ext.modeling import model_config

    shape = Architecture(
        "llama", 1, 32, 48, 4, num_query_groups=2, vocab_size=384, max_position_embeddings=64,
        share_embeddings_and_output_weights=tied,
    )  # fmt: skip

    class Tokenizer:
        vocab_size = shape.padded_vocab_size

    config = fdl.build(model_config(shape, 64, **sizes)).config
    config.perform_initialization = True
    return config.configure_model(Tokenizer(), pre_process=True, post_process=True)


def run(model, way, chunk=None):
    """Losses `[b, s]` and all gradients for weights of the losses that differ, one label ignored and one loss masked."""
    from nemo_ext import chunks
    from nemo_ext.platform import output_layer

    draw = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(300, (2, 2, 64), generator=draw)
    weights = torch.rand(2, 64, generator=draw)
    labels[1, 5] = 0 if way == "Megatron's" else Plain.IGNORED  # which its unfused loss does not know
    weights[1, 5] = weights[0, 7] = 0.0
    mask = torch.ones(64, 64, dtype=torch.bool).triu(1)[None, None]
    seen = []
    hook = model.output_layer.register_forward_pre_hook(lambda layer, inputs: seen.append(len(inputs)))
    layer, weight = model.output_layer, output_layer._weight(model)
    if way == "fused":
        model.config.cross_entropy_loss_fusion, model.config.cross_entropy_fusion_impl = True, "te"
        output_layer.use(torch.nn.ModuleList([model]))
    adds = chunk is not None
    if adds:  # as with Megatron's gradient buffers, and in chunks
        chunks.LOGITS = chunk * weight.shape[0]
        layer.gradient_accumulation_fusion = True
        weight.main_grad = torch.ones(weight.shape)
    model.zero_grad()
    losses = model(tokens, torch.arange(64).expand(2, 64), mask, labels=labels)
    (losses * weights).sum().backward()
    hook.remove()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    if adds:
        gradients["output_layer.weight"] = weight.main_grad - 1
        layer.gradient_accumulation_fusion = False
    losses = losses.detach().clone()
    losses[1, 5] = 0.0
    return {"losses": losses, "gradients": gradients, "pre-hooks": seen}


def refused(model, output_layer) -> list[str]:
    """What the fused layer is not taken for."""
    layer, found = model.output_layer, []

    def check(what):
        try:
            output_layer.use(model)
        except ValueError:
            found.append(what)

    check("nothing")
    hook = layer.register_forward_hook(lambda layer, inputs, output: None)
    check("soft caps")
    hook.remove()
    layer.bias = torch.nn.Parameter(torch.zeros(3))
    check("a bias")
    layer.bias = None
    model.compute_language_model_loss = lambda labels, logits: logits
    check("a loss of its own")
    del model.compute_language_model_loss
    model.config.cross_entropy_fusion_impl = "native"
    check("another loss")
    return found
