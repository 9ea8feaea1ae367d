"""The processes of one learner, a rank each: how they meet, and how rank 0 has the others do what it does.

Invariant: the ranks call the same collective operations in the same order, because every one of them follows from a
word of rank 0, which alone decides. A rank that leaves this order (it dies, or its part of a step raises an error)
ends the whole learner: RankFailed. The next learner continues from the checkpoint.

torch.distributed's own way to send objects is pickle; here words are msgpack, and tensors safetensors.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common.failing import brief
from common.wire.lease import LeaseLost
from common.wire.plane import RedisUnavailable, RunGone, Stopping

log = logging.getLogger("katana.ranks")
NOT_THE_STEP = (LeaseLost, RunGone, RedisUnavailable, Stopping)
"""Errors that end a learner and that no computation causes."""

_PATIENCE = timedelta(days=365)  # for a word of rank 0, which waits for batches as long as it takes
_DEATH_S = 2.0  # after its connections are closed, until its parent knows of the death of a rank
_FAILED, _FAILURES = "failed", "failures"  # keys of the store


class RankFailed(RuntimeError):
    """A rank ended, or its part of the work failed: this learner cannot go on. The message names the rank."""


class Ranks:
    """This process's place among the ranks of a learner. Raises RankFailed if they do not meet.

    store: where they meet. device: this rank's, such as `cpu` or `cuda:1`; collectives are NCCL's on CUDA, gloo's
    elsewhere.
    timeout_s: for a collective operation. lost: which rank has ended, as far as this process knows within so many
    seconds; '' if none.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        *,
        device: str,
        timeout_s: float,
        lost: Callable[[float], str] = lambda _: "",
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.broken = False
        """Whether the ranks have left their common order: RankFailed was raised here."""
        self._store, self._timeout, self._lost = store, timedelta(seconds=timeout_s), lost
        kind = torch.device(device).type
        if kind == "cuda":
            torch.cuda.set_device(device)
        with self.together("meeting"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=self._timeout,
            )
            self.mesh: DeviceMesh = init_device_mesh(kind, (size,))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # --- words -------------------------------------------------------------------------------------------------

    def tell(self, what: str, *args: Any, shares: Sequence[bytes] = ()) -> None:
        """On rank 0: have the other ranks do `what`; each gets its own of `shares`, if there are any. On the others
        nothing: they call the same method because they were told."""
        if not self.leads:
            return
        with self.together(what):
            if self.broken or (lost := self._lost(0.0)):
                raise RuntimeError(lost if not self.broken else "the ranks have failed before")
            for rank in range(1, self.size):
                own = [shares[rank - 1]] if shares else []
                self._send(msgpack.packb([what, *args, *own]), rank)

    def hear(self) -> list[Any]:
        """On the others: what rank 0 tells next, and its arguments."""
        with self.together("waiting for rank 0"):
            size = torch.empty(1, dtype=torch.int64)
            _sent(dist.irecv(size, 0), _PATIENCE)
            words = torch.empty(int(size), dtype=torch.uint8)
            _sent(dist.irecv(words, 0), self._timeout)
            told: list[Any] = msgpack.unpackb(words.numpy().tobytes())
            return told

    def _send(self, words: bytes, rank: int) -> None:
        for tensor in (torch.tensor([len(words)]), torch.frombuffer(bytearray(words), dtype=torch.uint8)):
            _sent(dist.isend(tensor, rank), self._timeout)

    # --- collective operations -----------------------------------------------------------------------------------

    def all_gather(self, figures: Sequence[float]) -> list[list[float]]:
        """The figures of every rank, equally many each, on every rank."""
        own = torch.tensor(figures, dtype=torch.float64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [row.tolist() for row in found]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with rank 0's."""
        dist.broadcast(tensor, 0)
        return tensor

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Work in which all ranks take part. An error in it is RankFailed, with the words of the rank that failed
        first; this process must not take part in anything after that."""
        try:
            yield
        except (RankFailed, *NOT_THE_STEP):
            self.broken = True
            raise
        except Exception as error:
            self.broken = True
            raise RankFailed(f"{what}: {self._first_failure(error)}") from error

    def _first_failure(self, error: Exception) -> str:
        """Who failed first: the others then see a connection that was closed, which says nothing."""
        own = f"rank {self.rank}: {brief(error)}"
        try:
            if self._store.add(_FAILURES, 1) == 1:  # nobody before this rank, or one that was killed
                self._store.set(_FAILED, own := self._lost(_DEATH_S) or own)
            return str(self._store.get(_FAILED).decode())
        except RuntimeError:  # the store has ended too
            return own

    def close(self) -> None:
        """Let the others end, and leave. If the ranks are broken there is nothing to say: the others wait in operations
        that will never be complete, until the connections of this process are closed."""
        if not self.broken:
            with contextlib.suppress(RankFailed):
                self.tell("end")
        if not self.broken:
            dist.destroy_process_group()


def _sent(work: dist.Work | None, timeout: timedelta) -> None:
    assert work is not None  # only for a process outside the group
    work.wait(timeout)
