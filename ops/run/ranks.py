"""The processes of a learner that is several: forked from its own on one machine, or started by torchrun.

Rank 0 is the learner as everyone knows it: it alone has the lease, Redis and the run's folder. The other ranks do what
it tells (`learner.sharded.follow`) and end with it, however it ends; if one of them ends, the learner does too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from actors.placing import with_learner_here
from common.config import Config, ConfigError, parse
from common.pretrained import check_pair
from ops.reach.children import ask_for_signal
from ops.run.forking import retitle

if TYPE_CHECKING:
    from learner.student import TrainableStudent

log = logging.getLogger("katana.ranks")
TITLE = "learner-rank"
"""The word in the command line of a forked rank, where rank 0 has `learner`."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_CONFIG = "katana/config"  # key of torchrun's store: the run's config, empty if there is nothing to do
_MEET_S = 600.0  # for the other processes to begin
_GRACE_S = 30.0  # after the death of a rank, for rank 0 to end by itself; an operation of NCCL waits longer
_END_S = 15.0  # for the other ranks to end when they are told
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class Others:
    """The ranks beside this process, which is rank 0. `meet` gives the store by which they find each other; `pids`: of
    those that this process has forked, by rank."""

    def __init__(self, size: int, meet: Callable[[Config], Any], pids: dict[int, int]) -> None:
        self.size, self._meet, self.pids = size, meet, pids
        self._left = dict(pids)
        self._lock = threading.Lock()
        self._closing, self._ended = threading.Event(), threading.Event()
        self._lost = ""

    @contextlib.contextmanager
    def lead(self, config: Config, stop: threading.Event) -> Iterator[Callable[[Path, Config], TrainableStudent]]:
        """Meet them; yields what makes rank 0's student. On leaving they end.

        If one of them ends before, `stop` is set, and RankFailed is raised on leaving, if not within.
        """
        from learner.ranks import RankFailed, Ranks
        from learner.sharded import ShardedStudent

        ranks = None
        watch = threading.Thread(target=self._watch, args=(stop,), name="ranks", daemon=True)
        watch.start()
        try:
            ranks = Ranks(
                self._meet(config),
                0,
                self.size,
                device=config.learner.device_of(0),
                timeout_s=config.liveness.busy_s,
                lost=self._wait,
            )
            log.info("%d ranks", self.size)
            try:
                yield lambda folder, config: ShardedStudent(folder, config, ranks)
            finally:
                self._closing.set()
                ranks.close()
            if self._lost:
                raise RankFailed(self._lost)
        finally:
            self._closing.set()
            watch.join(_END_S if ranks and not ranks.broken else 0.0)
            with self._lock:
                for pid in self._left.values():
                    os.kill(pid, signal.SIGKILL)
            watch.join()

    def _wait(self, seconds: float) -> str:
        """Which rank has ended, for `Ranks.lost`."""
        self._ended.wait(seconds if self.pids else 0.0)
        return self._lost

    def _watch(self, stop: threading.Event) -> None:
        """Until all have ended. If one does that should not, ask the learner's loop to end, and after a while make it:
        it may be waiting for the dead."""
        deadline = float("inf")
        while self._left:
            self._reap()
            if self._lost and not self._ended.is_set():
                self._ended.set()
                stop.set()
                deadline = time.monotonic() + _GRACE_S
            if time.monotonic() > deadline and not self._closing.is_set():
                log.error("error: %s", self._lost)
                os._exit(1)
            time.sleep(0.05)

    def _reap(self) -> None:
        with self._lock:
            for rank, pid in list(self._left.items()):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    del self._left[rank]
                    if not self._closing.is_set() and not self._lost:
                        code = os.waitstatus_to_exitcode(status)
                        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                        self._lost = f"rank {rank} of the learner {how}"


def ranks_beside(config: Config, others: Others | None) -> Others | None:
    """The ranks that a learner's config asks for, forked unless torchrun has started `others`. Raises ConfigError if
    torchrun has started another number, in a run that depends on it."""
    wanted = config.learner.nproc_per_node
    if others is None:
        return fork_others(config) if wanted > 1 else None
    if others.size != wanted and (wanted > 1 or config.deterministic):
        raise ConfigError(f"learner.nproc_per_node is {wanted}, but torchrun has started {others.size} processes")
    return others


# --- forked ---------------------------------------------------------------------------------------------------------


def fork_others(config: Config) -> Others:
    """Fork the other ranks from this process, which must not have begun anything: no thread, no CUDA. They meet on an
    address of this machine that nobody else reaches. Raises ConfigError."""
    size = config.learner.nproc_per_node
    if sys.platform != "linux":
        raise ConfigError(f"learner.nproc_per_node: {size} processes on Linux only; elsewhere start them with torchrun")
    import learner.sharded  # noqa: F401  once, not in each rank

    for name, value in _LOOPBACK.items():
        os.environ.setdefault(name, value)
    parent, pids = os.getpid(), {}
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    sys.stdout.flush()
    for rank in range(1, size):
        pid = os.fork()
        if not pid:
            listening.close()
            _be(rank, config, port, parent)
        pids[rank] = pid
    return Others(size, lambda _: _store(port, size, listening), pids)


def _store(port: int, size: int, listening: socket.socket | None) -> Any:
    import torch.distributed

    store: Any = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1",
        port,
        size,
        is_master=listening is not None,
        timeout=timedelta(seconds=_MEET_S),
        wait_for_workers=False,
        master_listen_fd=listening.detach() if listening else None,
    )
    return store


def _follow(config: Config, store: Any, rank: int, size: int, device: str) -> int:
    """Be a rank until rank 0 ends it; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # of a learner that is stopped, rank 0 writes a checkpoint first
    form = f"%(asctime)s learner, rank {rank} %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, force=True)
    import torch

    from learner.ranks import RankFailed, Ranks
    from learner.sharded import ShardedStudent, follow

    torch.set_num_threads(config.learner.threads)
    torch.manual_seed(config.seed)
    try:
        ranks = Ranks(store, rank, size, device=device, timeout_s=config.liveness.busy_s)
        with ranks.together("loading the student"):
            pair = check_pair(config)
            student = ShardedStudent(pair.student.folder, config, ranks)
        follow(student, pair, ranks)
        ranks.close()
    except RankFailed as failure:
        log.warning("ended: %s", failure)
        return 1
    return 0


def _be(rank: int, config: Config, port: int, parent: int) -> NoReturn:
    """Make this fork a rank. A signal to the learner is for rank 0, which then ends the others."""
    code = 1
    try:
        ask_for_signal(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        retitle([TITLE if word == "learner" else word for word in sys.orig_argv])
        size = config.learner.nproc_per_node
        code = _follow(config, _store(port, size, None), rank, size, config.learner.device_of(rank))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# --- by torchrun ----------------------------------------------------------------------------------------------------


def rank_of_torchrun() -> int | None:
    """This process's rank if torchrun has started it as one of several."""
    if any(name not in os.environ for name in _TORCHRUN) or os.environ["WORLD_SIZE"] == "1":
        return None
    return int(os.environ["RANK"])


@contextlib.contextmanager
def others_of_torchrun() -> Iterator[Others]:
    """For rank 0."""
    store, _, size = _meet_by_torchrun()
    told = False

    def meet(config: Config) -> Any:
        nonlocal told
        store.set(_CONFIG, config.to_yaml())
        told = True
        return store

    try:
        yield Others(size, meet, {})
    finally:
        if not told:
            store.set(_CONFIG, "")


def follow_torchrun() -> int:
    """Be a rank beside 0; returns the exit code."""
    store, rank, size = _meet_by_torchrun()
    store.wait([_CONFIG], timedelta(days=365))
    text = store.get(_CONFIG)
    if not text:
        return 0
    config = with_learner_here(parse(text, source="config of rank 0"))
    return _follow(config, store, rank, size, config.learner.device_of(int(os.environ["LOCAL_RANK"])))


def _meet_by_torchrun() -> tuple[Any, int, int]:
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=_MEET_S)))
    return unused_part(store, rank, size), rank, size


def unused_part(store: Any, rank: int, size: int) -> Any:
    """A part of a store which nobody but these processes has written to: torchrun keeps its store when it starts the
    ranks anew, with the addresses of those that died. All ranks call this. Raises torch's DistError if one does not.

    The others say hello by names of their own, which no rank 0 before has answered; rank 0 answers until all heard.
    """
    from torch.distributed import DistStoreError, PrefixStore  # type: ignore[attr-defined]

    hello, answer, heard = "katana/hello/{}", "katana/answer/{}", "katana/heard/{}"
    own = uuid.uuid4().hex
    if rank:
        store.set(hello.format(rank), own)
        meeting = store.get(answer.format(own)).decode()
        store.add(heard.format(meeting), 1)
        return PrefixStore(f"katana/{meeting}", store)
    deadline = time.monotonic() + _MEET_S
    while store.add(heard.format(own), 0) < size - 1:
        if time.monotonic() > deadline:
            raise DistStoreError(f"the {size} ranks of the learner have not met within {_MEET_S:.0f} s")
        for other in range(1, size):
            if store.check([hello.format(other)]):
                store.set(answer.format(store.get(hello.format(other)).decode()), own)
        time.sleep(0.05)
    return PrefixStore(f"katana/{own}", store)
