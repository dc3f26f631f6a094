"""The ranks of one tensor-parallel model, and the sums and gathers between them."""

# torch declares neither the methods of its process groups nor their options.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d

from ...errors import PipelineError, first_line


class TensorGroup:
    """A process group beside any WORLD: NCCL between GPUs, gloo between CPUs.

    Its operations may be compiled. If a rank dies or misses the deadline, they raise ``RuntimeError`` in the other
    ranks (``lost``). All operations take and return tensors on ``device`` and keep the dtype.

    Args:
        ordered: sums add the ranks' parts in rank order and in float32. An all-reduce adds in an order that depends
            on the place of a number in the buffer (rings work in chunks), so the last bit of a row could differ
            with its place in the batch. Ordered sums move ``size`` times the bytes, which are few in a decode
            forward.
        timeout_s: longest wait for the other ranks, here and in every operation until ``limit``.
        host: address to listen on; None for the address of this machine's name.

    Raises:
        PipelineError: the other ranks did not come within ``timeout_s``.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        device: torch.device,
        timeout_s: float,
        ordered: bool,
        host: str | None = None,
    ):
        self.rank, self.size, self._ordered = rank, size, ordered
        self.name: Any = f"ssd-ranks-{rank}"
        store, timeout = dist.PrefixStore("ranks", store), datetime.timedelta(seconds=timeout_s)
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
                backend, kind = _nccl(store, rank, size, timeout), dist.ProcessGroup.BackendType.NCCL
            else:
                backend, kind = _gloo(store, rank, size, timeout, host), dist.ProcessGroup.BackendType.GLOO
        except RuntimeError as error:
            raise PipelineError(
                f"the {size} ranks of the verifier did not all come in {timeout_s:g} s: {first_line(error)}"
            ) from error
        self._backend: Any = backend
        self._group: Any = dist.ProcessGroup(store, rank, size)
        self._group._register_backend(device, kind, backend)
        self._group._set_group_name(self.name)
        # Functional collectives, the only ones that can be compiled, find groups by name.
        _distributed_c10d._register_process_group(self.name, self._group)

    def parts(self, own: Tensor) -> Tensor:
        """Returns every rank's ``own [*S]`` in rank order: ``[size, *S]``."""
        ops = torch.ops._c10d_functional
        flat = ops.wait_tensor(ops.all_gather_into_tensor(own.reshape(1, -1), self.size, self.name))
        return flat.view(self.size, *own.shape)

    def sum(self, own: Tensor) -> Tensor:
        """Returns the sum of every rank's ``own [*S]``: ``[*S]``, the same bits in every rank."""
        if not self._ordered:
            ops = torch.ops._c10d_functional
            return ops.wait_tensor(ops.all_reduce(own, "sum", self.name))
        first, *others = self.parts(own).unbind()
        total = first.float()
        for part in others:
            total = total + part.float()
        return total.to(own.dtype)

    def join(self, own: Tensor) -> Tensor:
        """Returns every rank's ``own [*S, n]`` side by side: ``[*S, size * n]``."""
        return self.parts(own).movedim(0, -2).flatten(-2)

    def limit(self, timeout_s: float) -> None:
        """Sets how long an operation may wait for the other ranks from now on."""
        self._backend._set_default_timeout(datetime.timedelta(seconds=timeout_s))

    def close(self) -> None:
        """Leaves the group. May be called twice."""
        if self._group is not None:
            _distributed_c10d._unregister_process_group(self.name)
            self._group = self._backend = None


def lost(error: RuntimeError) -> bool:
    """Returns whether an operation failed because another rank is gone or late."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _gloo(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta, host: str | None) -> Any:
    backend, options = dist.ProcessGroupGloo, dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [backend.create_device(hostname=host) if host else backend.create_default_device()]
    return backend(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)
