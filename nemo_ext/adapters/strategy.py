"""NeMo's Megatron strategy for training an adapter: a frozen base, and checkpoints that hold the adapter alone.

NeMo's own way (`PEFT` as a callback) loads the base into a model that is complete, and puts the adapter in when the first epoch
begins: too late for a trainer that evaluates and resumes before. Here the adapter is in the model before Megatron wraps it for
data parallelism, so that gradient buffers, optimizer, saving and resuming see nothing special.

Importing this module imports NeMo; call `nemo_ext.platform.activate()` first.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.lightning import MegatronStrategy
from torch import nn

from nemo_ext.adapters import transforms
from nemo_ext.adapters.adalora import SVDAdapter
from nemo_ext.adapters.fourierft import SpectralAdapter
from nemo_ext.adapters.initial import generator


class AdapterStrategy(MegatronStrategy):
    """`MegatronStrategy` that loads `base`, a converted checkpoint's folder, freezes it, and trains `adapter` in it.

    `adapter` are the arguments of `transforms.transform`; `seed` draws A, the same at every layout, B is zero. Without `base`
    (None) the base is random. A checkpoint has the adapter's weights and optimizer states; `base` is read at every start.
    `nf4` keeps the linears of the base's layers in 4 bits: the arguments of `nf4.quantizing`. What a model's senses train is
    trained and saved too; `tower`, the arguments of `multimodal.adapter.put`, is an adapter of their encoders. `adapter` None
    leaves the language model as it is.
    """

    def __init__(
        self,
        *arguments: Any,
        adapter: dict[str, Any] | None,
        seed: int,
        base: str | None = None,
        nf4: dict[str, Any] | None = None,
        tower: dict[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(*arguments, **options)
        self.adapter, self.seed, self.base, self.nf4, self.tower = adapter, seed, base, nf4, tower

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """The context in which a model is built."""
        with super().model_sharded_context(), self._quantizing():
            yield

    def setup_megatron_parallel(self, trainer: Any) -> None:
        """Also builds the other chunks of a pipeline stage."""
        with self._quantizing():
            super().setup_megatron_parallel(trainer)

    @contextmanager
    def _quantizing(self) -> Iterator[None]:
        if self.nf4 is None:
            yield
            return
        from nemo_ext.adapters import nf4  # and with it bitsandbytes

        with nf4.quantizing(**self.nf4, random=self.base is None):
            yield

    def init_model_parallel(self) -> None:
        """Called once the modules of all pipeline chunks are there and before they are wrapped."""
        model = self.megatron_parallel
        if self.base is not None:
            metadata = self.unwrapped_checkpoint_io.load_content_metadata(self.base)
            states = [chunk.module.sharded_state_dict(prefix="module.", metadata=metadata) for chunk in model]
            wanted = states[0] if model.vp_size is None else {f"model_{i}": state for i, state in enumerate(states)}
            loaded = self.checkpoint_io.load_checkpoint(self.base, sharded_state_dict={"state_dict": wanted})
            super().load_model_state_dict({"state_dict": loaded["state_dict"]})
            if self.nf4 is not None:
                from nemo_ext.adapters import nf4

                nf4.load(model, self.base, metadata)
        for chunk in model:
            if self.adapter is not None:
                put_adapter(chunk.module, self.adapter, self.seed)
            if self.tower is not None:
                put_tower_adapter(chunk.module, self.tower, self.seed)
        of_senses = {f"module.{name}" for chunk in model for name in _trained_of_senses(chunk.module)}
        whole = model.sharded_state_dict
        model.sharded_state_dict = lambda *arguments, **options: only_adapters(whole(*arguments, **options), of_senses)
        super().init_model_parallel()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load an adapter; that it is complete was checked when its tensors were asked for."""
        super().load_model_state_dict(checkpoint, strict=False)


def _signature() -> inspect.Signature:
    """`AdapterStrategy`'s arguments by name: the recipe checks what is set in it against them."""
    own = inspect.signature(AdapterStrategy.__init__).parameters
    known = dict(inspect.signature(MegatronStrategy).parameters)
    options = known.pop("kwargs")
    added = [own[name] for name in ("adapter", "seed", "base", "nf4", "tower")]
    return inspect.Signature([*known.values(), *added, options])


AdapterStrategy.__signature__ = _signature()


def put_adapter(model: nn.Module, settings: Mapping[str, Any], seed: int) -> None:
    """Put a new adapter into a Megatron GPTModel, in place, and freeze everything else but what its senses train."""
    of_senses = _trained_of_senses(model)
    transforms.apply(transforms.transform(settings), model)
    for parameter in of_senses.values():
        parameter.requires_grad_(True)
    for layer in model.decoder.layers:
        for name, parameter in layer.named_parameters():
            if name.endswith(("linear_in.weight", "router.weight")) and ".adapter." in name:
                draw(parameter, f"{seed} {layer.layer_number} {name}")
        for name, module in layer.named_modules():
            if isinstance(module, (SVDAdapter, SpectralAdapter)):
                module.draw(f"{seed} {layer.layer_number} {name}")
    if model.pre_process and model.config.recompute_granularity is not None:
        model.embedding.register_forward_hook(_with_gradient)


def put_tower_adapter(model: nn.Module, settings: Mapping[str, Any], seed: int) -> None:
    """Put an adapter into the encoders of a GPTModel's senses, in place."""
    from nemo_ext.multimodal import adapter, encoder

    for sense in getattr(model, "senses", {}).values():
        adapter.put(encoder.computed_layers(sense.encoder, sense.sense.encoder), **settings, seed=seed)
        sense.train(sense.training)  # the encoder has something to train now


def _trained_of_senses(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a model's senses train, by the model's names."""
    return {n: p for n, p in model.named_parameters() if n.startswith("senses.") and p.requires_grad}


def draw(parameter: nn.Parameter, words: str) -> None:
    """Fill this process's shard of an A `[rank, in]`, uniformly in +-1/sqrt(in) as PEFT does, determined by `words` alone."""
    shape, dim = list(parameter.shape), parameter.partition_dim
    ranks = parallel_state.get_tensor_model_parallel_world_size() if parameter.tensor_model_parallel else 1
    shape[dim] *= ranks
    whole = torch.rand(shape, generator=generator(words)).mul_(2).sub_(1).div_(math.sqrt(shape[1]))
    with torch.no_grad():
        parameter.copy_(whole.chunk(ranks, dim)[parallel_state.get_tensor_model_parallel_rank() % ranks])


def only_adapters(state: Mapping[str, Any], others: Collection[str] = ()) -> dict[str, Any]:
    """The adapter's part of a model's sharded state, and `others`; with virtual pipeline stages, of each of them."""
    return {
        name: only_adapters(value, others) if isinstance(value, dict) and name.startswith("model_") else value
        for name, value in state.items()
        if ".adapter." in name or name in others or name.startswith("model_")
    }


def _with_gradient(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    """Recomputed layers get gradients only if their input does, which a frozen embedding's output does not."""
    return output.requires_grad_() if torch.is_grad_enabled() else output
