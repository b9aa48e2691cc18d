"""Where and how to compute: device, precision, compilation, and several processes that train together.

Methods are plain PyTorch. Mixed precision and compilation are put into the networks' ``forward``,
the average over processes into the optimisers' ``step``, so that methods need no code for them.
(DistributedDataParallel needs a backward pass through all parameters after every forward pass;
adversaries that are frozen in turn do not have one.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from histostream.training.choices import PRECISIONS
from histostream.training.state import State
from histostream.wsi.errors import HistoError

TIMEOUT = timedelta(hours=2)  # the other processes wait while the first validates


class ComputeError(HistoError, RuntimeError):
    """The machine has no such device or precision."""


@dataclass(frozen=True, slots=True)
class Compute:
    """How to compute. It does not define a run, which may be continued with other settings.

    Attributes
    ----------
    device
        "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N".
    precision
        "fp32", or "bf16": networks in bfloat16 where that is safe (torch.autocast), weights and
        losses in float32.
    compiled
        Compile the networks (torch.compile); the first steps take minutes.
    deterministic
        Refuse operations whose result differs from run to run (on GPUs); slower.
    """

    device: str = "auto"
    precision: str = "fp32"
    compiled: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ComputeError(f"precision {self.precision!r}: use {' or '.join(PRECISIONS)}")


def rank() -> int:
    """Return the number of this process, 0 where there is one only."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def open_device(compute: Compute) -> torch.device:
    """Find the device, and join the other processes where torchrun started several.

    Raises
    ------
    ComputeError
        If there is no such device, or it has no bfloat16.
    """
    name = compute.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ComputeError(f"device {name!r}: use auto, cpu, cuda, or cuda:0 and up") from error
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device.type == "cuda":
        device = _cuda(device, distributed)
    if compute.precision == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise ComputeError(f"{torch.cuda.get_device_name()} has no bf16: use fp32")
    if distributed and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not compute.deterministic
    return device


def _cuda(device: torch.device, distributed: bool) -> torch.device:
    if not torch.cuda.is_available():
        raise ComputeError("device 'cuda': torch sees no GPU here; use --device cpu")
    index = int(os.environ["LOCAL_RANK"]) if distributed else (device.index or 0)
    if index >= torch.cuda.device_count():
        raise ComputeError(f"GPU {index}: there are {torch.cuda.device_count()}; use cuda:0 and up")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def close_device() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare(state: State, device: torch.device, compute: Compute) -> None:
    """Move networks to the device; add precision, compilation and the average over processes to them."""
    for module in state.modules.values():
        # Channels last is how tensor cores and oneDNN want convolutions.
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compute.precision == "bf16":
            _autocast(module, device.type)
        if compute.compiled:
            module.compile()
    for optimizer in state.optimizers.values():
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if processes() > 1:
            optimizer.register_step_pre_hook(_average_gradients)


def _autocast(module: nn.Module, device_type: str) -> None:
    """Run ``forward`` in bfloat16, and return its results in float32, for losses."""
    forward: Callable[..., Any] = module.forward

    def mixed(*inputs: Tensor) -> Any:
        with torch.autocast(device_type, torch.bfloat16):
            out = forward(*inputs)
        return tree_map(lambda t: t.float() if isinstance(t, Tensor) else t, out)

    module.forward = mixed


def _average_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Average the gradients of all processes, which drew different crops of one batch."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not grads:
        return
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= processes()
    start = 0
    for grad in grads:
        grad.copy_(flat[start : start + grad.numel()].view(grad.shape))
        start += grad.numel()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any of the processes."""
    if processes() == 1:
        return flag
    highest = torch.tensor([float(flag)], device=device)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return bool(highest.item())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the host had no memory left."""
    host_messages = ("not enough memory", "can't allocate memory")  # of torch's allocator on the host
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in host_messages)
