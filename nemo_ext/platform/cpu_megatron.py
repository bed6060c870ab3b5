"""Megatron-Core on CPU tensors and gloo: what it assumes of CUDA, Transformer Engine or apex, answered without them."""

from __future__ import annotations

import contextlib

import torch

# Every model configuration gets these, whoever builds it, before it validates itself.
CPU_CONFIG = dict(
    use_cpu_initialization=True,
    apply_rope_fusion=False,
    gradient_accumulation_fusion=False,
    masked_softmax_fusion=False,
    bias_activation_fusion=False,
    bias_dropout_fusion=False,
    persist_layer_norm=False,
    cross_entropy_loss_fusion=False,
    moe_grouped_gemm=False,
    moe_permute_fusion=False,
    tp_comm_overlap=False,
    enable_cuda_graph=False,
    # gloo's isend reads a tensor until its handle is waited for. Freeing a stage's output right after sending it, which a
    # CUDA stream orders safely, corrupts activations here without an error.
    deallocate_pipeline_outputs=False,
)


def install() -> None:
    """Redirect what Megatron-Core 0.15 does on CUDA, in this process. torch must have been redirected before."""
    _random_state()
    _norms()
    _config()
    _mixture_of_experts()
    _optimizer()
    from nemo_ext.platform import te_layers

    te_layers.install()


def _random_state() -> None:
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(self, name=random._MODEL_PARALLEL_RNG_TRACKER_NAME):
        """As upstream's, without its warning that the CPU state changed: here that is the state it forks."""
        if name not in self.states_:
            raise KeyError(f"random state {name!r} was never added to the tracker: seed model parallelism first")
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    random.CudaRNGStatesTracker.fork = fork


def _norms() -> None:
    """torch's norms, tagged for the tensor-parallel sum of their gradients (for whose lack upstream refuses sequence
    parallelism), and with gamma stored as gamma - 1 where the configuration says so."""
    import megatron.core.transformer.torch_norm as torch_norm

    class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
        def forward(self, x):
            return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)

    class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
        def forward(self, x):
            return torch.nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)

    norms = {
        ("LayerNorm", False): torch.nn.LayerNorm,
        ("RMSNorm", False): torch.nn.RMSNorm,
        ("LayerNorm", True): ZeroCenteredLayerNorm,
        ("RMSNorm", True): ZeroCenteredRMSNorm,
    }

    def new(cls, config, hidden_size, eps=1e-5, persist_layer_norm=False, zero_centered_gamma=False, normalization="LayerNorm"):
        if config.normalization == "L2Norm":
            return torch_norm.L2Norm(hidden_size=hidden_size, eps=eps)
        zero_centered = bool(config.layernorm_zero_centered_gamma)
        norm = norms[config.normalization, zero_centered](hidden_size, eps=eps)
        if zero_centered:
            torch.nn.init.zeros_(norm.weight)
        norm.to(config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = staticmethod(new)


def _config() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    post_init = TransformerConfig.__post_init__

    def cpu_post_init(self):
        for name, value in CPU_CONFIG.items():
            if getattr(self, name, None) not in (None, value):
                setattr(self, name, value)
        post_init(self)

    TransformerConfig.__post_init__ = cpu_post_init


def _mixture_of_experts() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):  # the router names it whether Transformer Engine is there or not
        moe_utils.te_general_gemm = None

    def to_host(tensor, as_numpy=False, record_stream=False):
        """Split sizes as numpy: upstream converts them only when they come from a GPU."""
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _optimizer() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    from nemo_ext.platform.fused_adam import FusedAdam

    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = FusedAdam, False
    distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = FusedAdam, True, True
    # loading copies into views of fp32 leaf parameters
    distributed.DistributedOptimizer.load_state_dict = torch.no_grad()(distributed.DistributedOptimizer.load_state_dict)
