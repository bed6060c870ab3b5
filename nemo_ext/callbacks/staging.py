"""Checkpoints copied to host memory behind the next training step, and written from there by a process of their own.

Megatron's asynchronous save copies a GPU's part to host memory, allocated for it, and forks a writer; training waits for all
three. What is saved does not change before the next optimizer step. So a thread copies it, on a stream of its own, into
page-locked memory that stays, while forward and backward passes run; the optimizer step waits for it, and then the thread forks
the writer.

With one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1) a copy that waits for the one before it also holds up every kernel that
was launched after it. So the thread starts one at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import multiprocessing
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncCallsQueue, AsyncRequest

from nemo_ext.errors import RunError
from nemo_ext.platform.hardware import free_memory, has_cuda

LOCKED_AT_ONCE = 256 << 20  # bytes: CUDA's other calls wait meanwhile
ALIGNMENT = 256  # of a tensor in host memory
MADV_POPULATE_WRITE = 23  # Linux 5.14; before, page-locking brings the pages
LIBC = ctypes.CDLL(None)
GIB = 2**30


class Memory:
    """`size` bytes of host memory, zero at first, that processes forked later share; with CUDA page-locked for its copies."""

    def __init__(self, size: int):
        piece = LOCKED_AT_ONCE if has_cuda() else mmap.PAGESIZE
        size = max(1, math.ceil(size / piece)) * piece
        if (free := free_memory()) < size:
            raise RunError(f"a checkpoint passes through host memory: this process needs {size / GIB:.1f} GiB for its part, and "
                           f"{free / GIB:.1f} are free on its node, or left of what its job or container may have")  # fmt: skip
        self.bytes = mmap.mmap(-1, size)
        self._locked: list[int] = []
        if has_cuda():
            start = torch.frombuffer(self.bytes, dtype=torch.uint8).data_ptr()
            for address in range(start, start + len(self.bytes), LOCKED_AT_ONCE):
                LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(LOCKED_AT_ONCE), MADV_POPULATE_WRITE)
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, LOCKED_AT_ONCE, 0))
                self._locked.append(address)

    def unlock(self) -> None:
        """Before the memory is let go of."""
        while self._locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._locked.pop()))

    def tensor(self, like: torch.Tensor, offset: int) -> torch.Tensor:
        """The bytes from `offset` as a tensor of the shape and dtype of another, with a storage of its own size."""
        if not like.numel():
            return torch.empty_like(like, device="cpu")
        return torch.frombuffer(self.bytes, dtype=like.dtype, count=like.numel(), offset=offset).view(like.shape)


class Staging:
    """A process's memory for checkpoints, and the thread that forks its writers: one checkpoint at a time.

    The thread lives as long as the process, because Linux would kill the writers with the thread that forked them
    (`launchers.worker.die_with_parent`).
    """

    def __init__(self) -> None:
        self.size = 0  # bytes of the last checkpoint's part
        self.copy_seconds = 0.0
        self._memory: Memory | None = None
        self._copies: Future | None = None
        self._tasks: queue.SimpleQueue[tuple[Future, Callable, tuple]] = queue.SimpleQueue()
        self._device = torch.cuda.current_device() if has_cuda() else None
        threading.Thread(target=self._work, name="checkpoints", daemon=True).start()

    def submit(self, task: Callable, *arguments: Any) -> Future:
        """Call `task(*arguments)` in the thread."""
        future: Future = Future()
        self._tasks.put((future, task, arguments))
        return future

    def _work(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while True:
            future, task, arguments = self._tasks.get()
            try:
                future.set_result(task(*arguments))
            except BaseException as error:
                traceback.print_exc()
                future.set_exception(error)
            del future, task, arguments

    def hold(self, size: int) -> Memory:
        """Memory for at least `size` bytes. Called in the thread."""
        if self._memory is None or len(self._memory.bytes) < size:
            if self._memory is not None:
                self._memory.unlock()
            self._memory = None  # before the new one is made
            self._memory = Memory(size)
        return self._memory

    def copy(self, buckets: list) -> list:
        """Megatron's write buckets with their tensors in host memory, where they are once `wait` has returned."""
        tensors = [tensor.detach() for _, _, (_, data) in buckets for _, tensor in data]
        offsets, self.size = [], 0
        for tensor in tensors:
            offsets.append(self.size)
            self.size += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        memory = self.submit(self.hold, self.size).result()
        ready = None
        if has_cuda():
            ready = torch.cuda.Event(blocking=True)
            ready.record()
        self._copies = self.submit(self._copy_all, memory, tensors, offsets, ready)
        places = iter(offsets)
        return [
            (file, key, (data, [(item, memory.tensor(tensor, next(places))) for item, tensor in held]))
            for file, key, (data, held) in buckets
        ]

    def _copy_all(self, memory: Memory, tensors: list[torch.Tensor], offsets: list[int], ready: torch.cuda.Event | None) -> None:
        if ready is not None:
            ready.synchronize()
        begun = time.monotonic()
        whole = torch.frombuffer(memory.bytes, dtype=torch.uint8)
        with torch.cuda.stream(torch.cuda.Stream()) if has_cuda() else contextlib.nullcontext():
            for tensor, offset in zip(tensors, offsets, strict=True):
                _copy(tensor, whole, offset)
        self.copy_seconds = time.monotonic() - begun

    def wait(self) -> None:
        """Wait for the copies: what was saved may change then."""
        if self._copies is not None:
            self._copies.result()

    def written(self) -> None:
        """The last checkpoint is on the disk. Memory that is not page-locked is given back: making it again costs little."""
        if not has_cuda():
            self._memory = None


class StagedCaller(AsyncCaller):
    """One checkpoint of Megatron's asynchronous save, through `Staging`. `group` is of all processes, on gloo."""

    def __init__(self, staging: Staging, group: torch.distributed.ProcessGroup | None = None):
        self.staging, self.group, self._writing = staging, group, None

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Start the copies, and let the writer be forked when they are done."""
        if async_req.async_fn is None:
            return  # nothing of it is this process's
        buckets = async_req.async_fn_args[1]
        buckets[:] = self.staging.copy(buckets)  # in place: whoever else holds them keeps nothing else alive
        self._writing = self.staging.submit(self._write, async_req.async_fn, async_req.async_fn_args)

    def _write(self, function: Callable, arguments: tuple) -> None:
        self.staging.wait()  # what was not copied is not written
        writer = multiprocessing.get_context("fork").Process(target=function, args=arguments)
        forking = time.monotonic()
        writer.start()
        forked = time.monotonic()
        writer.join()
        print(
            f"checkpoint: {self.staging.size / 1e9:.2f} GB copied in {self.staging.copy_seconds:.2f} s, writer forked in "
            f"{forked - forking:.2f} s, written in {time.monotonic() - forked:.2f} s",
            flush=True,
        )
        self.staging.written()
        if writer.exitcode:
            raise RuntimeError(f"the process that writes a checkpoint ended with {writer.exitcode}")

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Whether every process has written its part, or, `blocking`, wait for this one's. Collective unless `no_dist`.

        A writer that failed has left no result, or its error, which Megatron's finalization raises on every process.
        """
        alive = int(self._writing is not None and not self._writing.done())
        done = not alive if no_dist else self.sync_all_async_calls(alive)
        if (done or blocking) and self._writing is not None:
            self._writing.exception()
            self._writing = None
        return done or blocking

    def sync_all_async_calls(self, is_alive: int) -> bool:
        """Whether no process is `is_alive`. Asked after every step: on the hosts, behind none of the GPU's work."""
        alive = torch.tensor([is_alive], dtype=torch.int32)
        torch.distributed.all_reduce(alive, group=self.group)
        return alive.item() == 0

    def close(self, abort: bool = False) -> None:
        """Nothing is left open: the writer ends by itself, or with this process."""

    def __del__(self) -> None:
        pass


class StagedCalls(AsyncCallsQueue):
    """Megatron's queue of asynchronous saves, each by a `StagedCaller`. `seconds` is what the last one took to schedule.

    Made on all processes together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.staging, self.seconds = Staging(), 0.0
        self.group = torch.distributed.new_group(backend="gloo")

    def prepare(self, size: int) -> Future:
        """Have memory for `size` bytes, and the queue of what the writers report, made ready while training goes on. The result
        is for the memory, which there may not be enough of (RunError)."""
        memory = self.staging.submit(self.staging.hold, size)
        self.staging.submit(filesystem_async._get_write_results_queue)
        return memory

    def _get_async_caller(self) -> AsyncCaller:
        return StagedCaller(self.staging, self.group)

    def schedule_async_request(self, async_request: AsyncRequest) -> int:
        """As upstream's."""
        started = time.monotonic()
        try:
            return super().schedule_async_request(async_request)
        finally:
            self.seconds = time.monotonic() - started


def _copy(tensor: torch.Tensor, into: torch.Tensor, offset: int) -> None:
    """Copy a tensor's bytes into `into` [bytes] from `offset`. No copy crosses from one page-locked piece into the next."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    done = 0
    while done < len(flat):
        here = offset + done
        size = min(len(flat) - done, LOCKED_AT_ONCE - here % LOCKED_AT_ONCE)
        into[here : here + size].copy_(flat[done : done + size], non_blocking=True)
        if flat.is_cuda:
            copied = torch.cuda.Event(blocking=True)
            copied.record()
            copied.synchronize()
        done += size
