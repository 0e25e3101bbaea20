"""What a training takes of memory, counted before it starts: a dry run of one micro-batch on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from pig.data.loading import largest_share
from pig.data.modules import PersonalisationData
from pig.data.schema import Batch
from pig.models.backbone import vae_scale
from pig.training.callbacks import EMA
from pig.training.module import PersonalisationModule
from pig.training.optimizers import lay_out

PRODUCTS = {"linear", "conv2d", "matmul", "__matmul__", "bmm", "baddbmm", "addmm", "scaled_dot_product_attention"}
NORMS = {"group_norm", "layer_norm"}
META = torch.device("meta")


class Autocast(TorchFunctionMode):
    """torch.autocast's rules, which do not reach the meta device: products in bf16, on GPUs norms in float32."""

    def __init__(self, enabled: bool, cuda: bool) -> None:
        super().__init__()
        self.enabled, self.cuda = enabled, cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.enabled and (name in PRODUCTS or (self.cuda and name in NORMS)):
            dtype = torch.bfloat16 if name in PRODUCTS else torch.float32
            args, kwargs = tree_map(lambda x: x.to(dtype) if _is_float(x) else x, (args, kwargs))
        if name == "scaled_dot_product_attention":  # what both devices have: queries, keys, values, output are kept
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **kwargs)


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors on the meta device that are alive, and the most there were; views of `known` are none."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.device == META:
                self.count(tensor)
        return result

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@contextmanager
def on_meta(module: PersonalisationModule) -> Iterator[None]:
    """The module with weights that take no memory; its own come back."""
    layers = list(module.modules())
    kept = [(layer, dict(layer._parameters), dict(layer._buffers)) for layer in layers]
    device = module.device
    try:
        for layer, parameters, buffers in kept:
            layer._parameters.update(
                {
                    name: one if one is None else nn.Parameter(torch.empty_like(one, device=META), one.requires_grad)
                    for name, one in parameters.items()
                }
            )
            layer._buffers.update(
                {name: one if one is None else torch.empty_like(one, device=META) for name, one in buffers.items()}
            )
        module._device = META
        yield
    finally:
        module._device = device
        for layer, parameters, buffers in kept:
            layer._parameters.update(parameters)
            layer._buffers.update(buffers)


@contextmanager
def nothing_dropped(module: PersonalisationModule) -> Iterator[None]:
    """The way that training takes, at its most: what may be dropped is there."""
    kept = module.dropout
    module.dropout = dict.fromkeys(kept, 1e-9)
    try:
        yield
    finally:
        module.dropout = kept


def blank_batch(module: PersonalisationModule, data: PersonalisationData, size: int) -> Batch:
    """A batch of the shape that the data will have, on the meta device."""
    vae, side = module.backbone.vae, data.resolution
    pixels, moments = (3, side, side), (2 * vae.config.latent_channels, *[side // vae_scale(vae)] * 2)
    encoded = data.encoded()[0]
    text = (size, module.backbone.tokenizer.model_max_length, module.backbone.text_encoder.config.hidden_size)
    reference = moments if encoded and encoded["variants"] else pixels
    words = [str(index) for index in range(size)]
    return Batch(
        target=torch.empty(size, *(moments if encoded else pixels), device=META),
        reference=torch.empty(size, 1, *reference, device=META),
        captions=words,
        objects=words,
        seeds=torch.arange(size),
        keys=[""] * size,
        text=torch.empty(text, device=META) if encoded else None,
        encoded_by=encoded["base"] if encoded else None,
    )


def memory_table(
    module: PersonalisationModule,
    data: PersonalisationData,
    *,
    precision: str = "32-true",
    device: str = "cpu",
    processes: int = 1,
    ema: bool = False,
) -> dict[str, int]:
    """Bytes in each process: weights, gradients, optimizer, activations (of a micro-batch, at the peak), inputs, all.

    By count, without `torch.compile`; what libraries take for themselves is not in it (CUDA: some 0.5 GB).
    """
    _ = module.encoders_digest
    share = largest_share(data.batch_size, processes)
    micro = module.micro_size(share)
    with on_meta(module):
        lay_out(module, precision, torch.device(device))
        kept = [*module.parameters(), *module.buffers()]
        weights = sum(one.nbytes for one in kept)
        trained = list(module.trainable().values())
        gradients = sum(one.nbytes for one in trained)
        batch = blank_batch(module, data, micro)
        if micro < share:  # from the second micro-batch on, gradients are there all along
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                kept.append(parameter.grad)
        half = precision == "bf16-mixed"
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=half and device == "cpu")  # asked by `slow_backward`
        with autocast, Autocast(half, device == "cuda"), LiveBytes(kept) as live:
            with nothing_dropped(module):
                loss = module.losses(batch, training=True)[0].mean()
            # `backward` itself is a function that the mode would take, and be left for what runs again in there.
            engine, one = torch.autograd.Variable._execution_engine, torch.ones_like(loss)
            engine.run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)
        peak = live.peak if micro == share else live.peak + gradients
        optimizer = {
            "adamw": 2 * gradients,
            "adamw_8bit": sum(states_8bit(one) for one in trained),
            "adamw_sharded": 2 * gradients // processes,
        }[module.optimizer_name]
    inputs = [one for one in batch.tensors().values() if one is not None]
    rows = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": max(0, peak - gradients),
        "inputs": sum(one.nbytes for one in inputs) * share // micro,
    }
    if processes > 1:
        rows["gradients to exchange"] = gradients  # DistributedDataParallel's buckets
    if ema:
        rows["moving average"] = gradients
    return rows | {"all": sum(rows.values())}


def states_8bit(parameter: Tensor) -> int:
    """bitsandbytes: two states of a byte each, a float32 scale for 256 of them; small tensors stay float32."""
    count = parameter.numel()
    return 8 * count if count < 4096 else 2 * (count + 4 * -(-count // 256) + 4 * 256)


def print_memory(module: PersonalisationModule, data: PersonalisationData, trainer: Any) -> None:
    """The table for what `fit` is about to do, and what the device has."""
    if not trainer.is_global_zero:
        return
    device, processes = trainer.strategy.root_device, trainer.world_size
    ema = any(isinstance(callback, EMA) for callback in trainer.callbacks)
    rows = memory_table(module, data, precision=trainer.precision, device=device.type, processes=processes, ema=ema)
    share = largest_share(data.batch_size, processes)
    uncompiled = ", without torch.compile" if module.hparams.get("compile") else ""
    show(rows, f"memory in each process, micro-batch {module.micro_size(share)} of {share}{uncompiled}")
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        print(f"the device has {there / 2**30:.1f} GiB")


def show(rows: Mapping[str, int], title: str) -> None:
    table = Table("part", "MiB")
    for name, size in rows.items():
        table.add_row(name, f"{size / 2**20:,.0f}")
    console = Console(soft_wrap=True)
    console.print(title, highlight=False)
    console.print(table)
