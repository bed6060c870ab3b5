"""The keys of a training recipe: short names with a type, a default, a unit and a line of help.

One dataclass is the schema, the help text and the saved configuration. A key whose default is None is chosen when the run
is planned (`tp`, `micro_batch` ...) or comes from the size; what was chosen is written to the run's `config.yaml`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nemo_ext.command_line import key, keys_of
from nemo_ext.gpus import KINDS

TEXT = ("pretrain", "cpt")  # methods that learn documents
LOW_RANK = ("lora", "qlora", "dora", "moe_dora")  # methods that train an adapter of a rank that is given
ADALORA, FOURIERFT = ("adalora",), ("fourierft",)
ADAPTER = (*LOW_RANK, *ADALORA, *FOURIERFT)  # methods that train an adapter of frozen weights
EXPERTS = ("moe_dora",)
QLORA = ("qlora",)
NEVA = ("neva", "alm")  # methods that give a model eyes or ears
CHAT = ("sft", *ADAPTER, *NEVA)  # methods that learn conversations


@dataclass
class TrainKeys:
    """Every key of a training recipe, in the order `--help` shows them."""

    size: str | None = key(None, "size of the model family", auto="the family's default; smoke without CUDA", group="model")
    model: str | None = key(
        None, "checkpoint to start from: hf:FOLDER, hf:NAME in the local cache, nemo:FOLDER, gguf:FILE", auto="the size's own"
    )
    tokenizer: str | None = key(None, "folder of a Hugging Face tokenizer", auto="the model's")
    layers: int | None = key(None, "layers of a custom model", path="model.config.num_layers", auto="the size's", above=0)
    hidden: int | None = key(None, "width of a custom model", path="model.config.hidden_size", auto="the size's", above=0)
    ffn: int | None = key(None, "width of a custom model's MLP", path="model.config.ffn_hidden_size", auto="the size's", above=0)
    heads: int | None = key(
        None, "attention heads of a custom model", path="model.config.num_attention_heads", auto="the size's", above=0
    )
    kv_heads: int | None = key(
        None, "key and value heads of a custom model", path="model.config.num_query_groups", auto="the size's, or heads", above=0
    )
    vocab: int | None = key(
        None, "vocabulary of a custom model", path="model.config.vocab_size", unit="tokens", auto="the size's", above=0
    )
    tied: bool | None = key(
        None, "share input and output embeddings in a custom model", path="model.config.share_embeddings_and_output_weights",
        auto="the size's",
    )  # fmt: skip

    tower: str | None = key(
        None, "encoder of images (SigLIP, CLIP) or sounds (Whisper): hf:FOLDER, hf:NAME in the local cache, random:SHAPE",
        auto="of model=hf:, where it has one; random:glyphs to learn glyphs on a CPU", only=NEVA, group="senses",
    )  # fmt: skip
    projector: str = key("mlp2x_gelu", "from the encoder's features to embeddings", choices=("mlp2x_gelu", "linear"), only=NEVA)
    downsample: int | None = key(
        None, "neighbouring features, along every dimension, that become one embedding (pixel shuffle, stacked frames)",
        auto="1; 4 frames of sounds", only=NEVA, above=0,
    )  # fmt: skip
    feature_layer: int | None = key(
        None, "hidden state that the projector sees: -1 is the last layer's", auto="-2; Whisper's normed last", only=NEVA
    )
    class_token: bool = key(False, "keep CLIP's class token among the features", only=NEVA)
    tiling: Any = key(
        None, "images at their own aspect: grids of tiles, 384x768,768x384,...", auto="one square an image", only=NEVA
    )
    image_token: str | None = key(None, "placeholder token", auto="<image>, <audio>; added where missing", only=NEVA)
    stage: str = key(
        "align", "what is trained: align the projector, instruct also the model", choices=("align", "instruct"), only=NEVA
    )
    train_language: str | None = key(
        None, "weights of the language model", choices=("frozen", "full", "lora"), auto="frozen to align, else full", only=NEVA
    )
    train_tower: str | None = key(None, "weights of the tower", choices=("frozen", "full", "lora"), auto="frozen", only=NEVA)

    data: Any = key(
        None, "text, Markdown, JSONL, Parquet (conversations: JSON, JSONL, CSV, Parquet), a folder or glob of them, a Hugging "
        "Face dataset, or [a:0.7,b:0.3]", auto="python-docs: the standard library's documentation on this machine; glyphs to see",
        group="data",
    )  # fmt: skip
    images: str | None = key(None, "folder of the media that the data names", auto="the data's own", only=NEVA)
    text_key: str = key("text", "column or field that holds the text", only=TEXT)
    columns: str | None = key(
        None, "fields of unusual records: prompt:question,completion:answer", auto="the formats' own", only=CHAT
    )
    skip_bad: bool = key(False, "count conversations that cannot be read instead of stopping at the first", only=CHAT)
    template: str | None = key(
        None, "chat template: a name or a Jinja file", auto="the tokenizer's own; chatml where it has none", only=CHAT
    )
    train_on: str = key("assistant", "turns that are learnt", choices=("assistant", "all", "last"), only=CHAT)
    reasoning: str = key("keep", "the assistant's reasoning (think) parts", choices=("keep", "drop"), only=CHAT)
    overlong: str = key(
        "truncate", "conversations longer than seq: drop turns from the end, or the conversation", choices=("truncate", "drop"),
        only=CHAT,
    )  # fmt: skip
    pack: bool = key(True, "several conversations in a row, without seeing each other", path="data.pack", only=CHAT)
    answers: int = key(
        3, "held-out questions answered before and after, for summary.md, where export=hf is given", only=CHAT, least=0
    )
    scored: int | None = key(
        None, "held-out answers compared with their references word for word, where export=hf is given", auto="200 of glyphs",
        only=NEVA, least=0,
    )  # fmt: skip
    preview: int = key(1, "conversations shown with what is learnt in colour", only=CHAT, least=0)
    heldout: float = key(0.02, "share of the documents kept out of training for evaluation", least=0, below=1)
    seq: int | None = key(
        None, "sequence length", unit="tokens", path="data.seq_length", auto="4096 on a GPU, 256 on a CPU", above=0
    )
    workers: int | None = key(None, "processes that tokenise", auto="one a core", above=0)

    steps: int | None = key(None, "optimizer steps", path="trainer.max_steps", auto="epochs over the data; 10 for a CPU smoke",
                               group="training", above=0)  # fmt: skip
    epochs: float = key(1.0, "passes over the data, where steps is not given", above=0)
    micro_batch: int | None = key(
        None, "sequences a device processes at once", path="data.micro_batch_size", auto="planned", above=0
    )
    global_batch: int | None = key(
        None,
        "sequences a step, over all devices and accumulation",
        path="data.global_batch_size",
        auto="128 on a GPU, 8 on a CPU",
        above=0,
    )
    seed: int = key(1234, "seed of the data order, initialisation and dropout", path="data.seed", above=0)
    precision: str | None = key(None, "arithmetic", choices=("bf16", "fp16", "fp32", "fp8"), auto="bf16 on a GPU, fp32 on a CPU")
    fp8_recipe: str = key("delayed", "scaling of precision=fp8", choices=("delayed", "tensorwise", "blockwise"))
    output_layer: str = key(
        "separate", "output layer and loss on a GPU: one after the other as upstream has them, fused, or so with FP8 gradients",
        choices=("separate", "fused", "fp8"),
    )  # fmt: skip

    lr: float = key(2e-5, "peak learning rate", path="optim.config.lr", group="optimizer", above=0)
    min_lr: float | None = key(None, "learning rate at the end", path="optim.lr_scheduler.min_lr", auto="a tenth of lr", least=0)
    schedule: str = key("cosine", "learning rate after warm-up", choices=("cosine", "wsd", "linear", "constant"),
                        path="optim.lr_scheduler.schedule")  # fmt: skip
    warmup: int | None = key(
        None,
        "warm-up",
        unit="steps",
        path="optim.lr_scheduler.warmup_steps",
        auto="3 % of the steps, at least 10 or a quarter of a short run",
        least=0,
    )
    decay: float = key(
        0.2, "share of the steps in which schedule=wsd falls", path="optim.lr_scheduler.decay_fraction", least=0, most=1
    )
    weight_decay: float = key(
        0.1, "decoupled weight decay; norms and biases have none", path="optim.config.weight_decay", least=0
    )
    beta1: float = key(0.9, "Adam's first-moment decay", path="optim.config.adam_beta1", least=0, below=1)
    beta2: float = key(0.95, "Adam's second-moment decay", path="optim.config.adam_beta2", least=0, below=1)
    eps: float = key(1e-8, "Adam's epsilon", path="optim.config.adam_eps", above=0)
    clip: float = key(1.0, "largest global norm of the gradient, 0 for no limit", path="optim.config.clip_grad", least=0)
    tower_lr: float | None = key(
        None, "peak learning rate of a trained tower", path="optim.tower_lr", auto="lr", only=NEVA, above=0
    )
    projector_lr: float | None = key(
        None, "peak learning rate of the projector", path="optim.projector_lr", auto="lr", only=NEVA, above=0
    )
    layer_decay: float = key(1.0, "learning rate of a layer relative to the next one up (layer-wise decay), 1 for none",
                             path="optim.layer_decay", above=0)  # fmt: skip

    rank: int = key(16, "rank of the adapter", only=(*LOW_RANK, *NEVA), group="adapter", above=0)
    alpha: float = key(32.0, "the adapter's B A is scaled by alpha / rank", only=(*LOW_RANK, *ADALORA, *NEVA), above=0)
    ranks: Any = key(None, "ranks of single linears: q_proj:8,mlp:32", auto="rank", only=LOW_RANK)
    alphas: Any = key(None, "alphas of single linears: q_proj:16,mlp:64", auto="alpha", only=LOW_RANK)
    targets: Any = key(
        "all-linear",
        "linears with an adapter: all-linear, attention, mlp, or names such as q_proj,v_proj",
        only=(*ADAPTER, *NEVA),
    )
    dropout: float = key(0.0, "dropout of the adapter's input", only=(*LOW_RANK, *ADALORA, *NEVA), least=0, below=1)
    rslora: bool = key(False, "scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)", only=LOW_RANK)
    lora_plus: float = key(
        1.0, "learning rate of B relative to A's (LoRA+ proposes 16)", path="optim.lora_plus", only=LOW_RANK, above=0
    )
    double_quant: bool = key(True, "round the magnitudes of NF4's blocks to 8 bits", only=QLORA)
    experts: int = key(4, "DoRA experts of a linear", only=EXPERTS, above=0)
    top_k: int = key(2, "experts that a token gets", only=EXPERTS, above=0)
    top_layers: int | None = key(
        None, "last layers that have experts; a plain DoRA below", auto="half of them", only=EXPERTS, above=0
    )
    balance: float = key(0.01, "weight of the experts' balancing loss, 0 for none", only=EXPERTS, least=0)

    init_rank: int = key(12, "rank of every linear at the start, by which alpha is divided", only=ADALORA, above=0)
    target_rank: int = key(8, "mean rank in the end", only=ADALORA, above=0)
    rank_warmup: int | None = key(
        None, "steps at full rank before the first cut", unit="steps", auto="a tenth of the run", only=ADALORA, least=0
    )
    rank_final: int | None = key(
        None, "steps at the target after the last cut", unit="steps", auto="three tenths of the run", only=ADALORA, least=0
    )
    delta_t: int | None = key(None, "steps between two cuts", unit="steps", auto="a hundredth of the run", only=ADALORA, above=0)
    importance_decay: float = key(0.85, "decay of the mean importance of a weight (beta 1)", only=ADALORA, least=0, below=1)
    uncertainty_decay: float = key(0.85, "decay of that importance's mean uncertainty (beta 2)", only=ADALORA, least=0, below=1)
    orthogonality: float = key(0.5, "weight of |P^T P - I| and |Q Q^T - I| in the loss", only=ADALORA, least=0)
    n_frequency: int = key(1000, "learnt frequencies of every linear", only=FOURIERFT, above=0)
    scaling: float = key(300.0, "factor of the inverse Fourier transform", only=FOURIERFT, above=0)
    spectrum_start: str = key(
        "zeros", "first coefficients: zeros leaves the model as it was; normal is the paper's, too much for small models with "
        "scaling=300", choices=("zeros", "normal"), only=FOURIERFT,
    )  # fmt: skip
    frequency_seed: int = key(777, "seed that draws the frequencies (PEFT's random_loc_seed)", only=FOURIERFT, least=0)

    nodes: int = key(1, "machines", path="trainer.num_nodes", group="parallelism", above=0)
    gpus: int | None = key(
        None, "GPUs a machine; CPU processes without CUDA", path="trainer.devices", auto="all; 1 without CUDA", above=0
    )
    tp: int | None = key(
        None, "tensor parallel size", path="trainer.strategy.tensor_model_parallel_size", auto="planned", above=0
    )
    pp: int | None = key(
        None, "pipeline parallel size", path="trainer.strategy.pipeline_model_parallel_size", auto="planned", above=0
    )
    vp: int | None = key(
        None,
        "virtual pipeline stages a device",
        path="trainer.strategy.virtual_pipeline_model_parallel_size",
        auto="planned",
        above=0,
    )
    cp: int | None = key(None, "context parallel size", path="trainer.strategy.context_parallel_size", auto="planned", above=0)
    ep: int | None = key(None, "expert parallel size of a mixture of experts", path="trainer.strategy.expert_model_parallel_size",
                         auto="planned; 1 for other models", above=0)  # fmt: skip
    balance_stages: bool = key(True, "give the last pipeline stage fewer layers, for the output layer that it has too")
    sp: bool | None = key(None, "sequence parallelism", path="trainer.strategy.sequence_parallel", auto="on with tp above 1")
    recompute: str = key("auto", "activation recomputation", choices=("auto", "none", "selective", "full"))
    distributed_optimizer: bool = key(True, "shard optimizer states over data-parallel ranks",
                                      path="trainer.strategy.ddp.use_distributed_optimizer")  # fmt: skip
    overlap: bool = key(True, "overlap gradient and parameter communication with computation",
                        path="trainer.strategy.ddp.overlap_grad_reduce")  # fmt: skip
    attention: str = key("transformer_engine", "kernels of attention on a GPU; flash4 needs the package flash-attn-4 and Hopper",
                         choices=("transformer_engine", "flash4"))  # fmt: skip
    cuda_graphs: bool | None = key(None, "start a step's kernels as one CUDA graph, which saves the host's time", only=TEXT,
                                   auto="on with one H100 or H200 and at most 8 micro batches, "
                                        "where Python needs nearly as long as the GPU")  # fmt: skip
    device: str | None = key(None, "what to train or plan for", choices=("gpu", "cpu"), auto="gpu with CUDA, else cpu")
    gpu: str | None = key(
        None, "kind of GPU to plan for, with its memory and links; implies device=gpu", choices=tuple(KINDS), auto="the machine's"
    )
    gpu_memory: float | None = key(
        None, "memory of a device to plan for; a GPU run takes no more", unit="GiB", auto="what the machine or gpu= has", above=0
    )

    out: str | None = key(None, "the run's folder; the same command continues it", auto="runs/RECIPE-SIZE", group="run")
    every: int | None = key(
        None, "steps between checkpoints", unit="steps", auto="a tenth of the run, at most 500; the end of a short run", above=0
    )
    keep: int = key(2, "checkpoints kept, newest first; 0 saves none", least=0)
    async_save: bool | None = key(None, "write checkpoints while training goes on", path="trainer.strategy.ckpt_async_save",
                                     auto="on with CUDA; on a CPU it takes as long and more memory")  # fmt: skip
    val_every: int | None = key(
        None, "steps between evaluations on held-out text", unit="steps", auto="a tenth of the run", above=0
    )
    val_batches: int | None = key(
        None, "global batches of held-out text an evaluation reads; 0 evaluates nothing", path="data.val_batches",
        auto="8 on a GPU, 4 on a CPU", least=0,
    )  # fmt: skip
    export: str | None = key(
        None,
        "write the trained model into the run's folder: hf, a Hugging Face folder, or lora, a PEFT adapter",
        choices=("hf", "lora"),
        auto="none",
    )
    profile: int = key(0, "step whose time is attributed to kinds of kernels in logs/ and summary.md; 0 for none", least=0)
    tensorboard: bool = key(True, "write TensorBoard event files")
    wandb: str | None = key(None, "Weights & Biases project to log to", auto="none")

    restarts: int = key(0, "times that all processes start again from the newest checkpoint when one dies or hangs",
                        group="faults", least=0)  # fmt: skip
    hang_timeout: float = key(480.0, "end a run in which a process comes no further for so long, with every stack; 0 never",
                              unit="seconds", least=0)  # fmt: skip
    on_nan: str = key("stop", "a step whose loss or gradient is no finite number: stop, leave it out, or also go back to "
                      "the newest checkpoint's weights", choices=("stop", "skip", "rollback"))  # fmt: skip
    on_spike: str = key("none", "a step whose loss jumps", choices=("none", "stop", "skip", "rollback"))
    spike_factor: float = key(
        1.5, "a loss jumps when it is above so many times the median of the last spike_window good ones", above=1
    )
    spike_window: int = key(
        32, "good losses that the median is of; before there are so many nothing jumps", unit="steps", above=0
    )
    straggler_factor: float = key(
        1.5, "report a process whose forward passes take so many times its peers' median, 0 for never", least=0
    )


def bytes_per_parameter(keys: dict[str, Any]) -> int:
    """What a checkpoint holds of a parameter that is trained: it, its moments in fp32 and, in lower precision, its fp32 copy."""
    return 12 if keys["precision"] == "fp32" else 14


def fields() -> dict[str, dataclasses.Field]:
    """The schema by key name."""
    return keys_of(TrainKeys)
