"""The processes of a command: who each of them is, how they wait for one another, and how they stop together."""

import atexit
import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from utils.cli import pick_device
from utils.errors import UserError

# Processes wait for the slowest, whose share of the work may take hours longer.
PATIENCE = timedelta(days=7)
# By which Slurm says that a job's time is nearly up (sbatch --signal=TERM@300).
NOTICES = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # Windows has one
TIME_IS_UP, INTERRUPTED = 75, 130  # exit statuses: EX_TEMPFAIL, and that of Ctrl-C


_opened: list["Processes"] = []


@atexit.register
def _leave() -> None:
    """A process that ends with its groups open is now and then aborted by their threads, after all is done.

    A group's threads end with its last reference, so nobody may keep one.
    """
    for processes in _opened:
        processes.group = None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Processes:
    """The processes of one command, as the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK) says; one without it.

    `scripts/launch.sh scripts/X.py ...`, torchrun or accelerate launch. They meet over gloo, which works from host to
    host, so a meeting never waits for an accelerator.

    In training they stop together, when one has an error or when the cluster wants its nodes. A process that left
    alone would keep the others waiting in their next collective operation, so it keeps its error (`careful`) until all
    of them `meet`.

    Args:
        device: Name for `pick_device`. Of several GPUs each process of a machine takes its own.

    Attributes:
        noticed: This process knows that time is up; others may not yet.
        interrupted: It was Ctrl-C.
        called_off: All processes have agreed to stop.
    """

    def __init__(self, device: str | torch.device = "auto"):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        if self.device.type == "cuda" and self.device.index is None and self.world_size > 1:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)
        self.group = self._open_group() if self.world_size > 1 else None
        _opened.append(self)
        self.error: UserError | None = None
        self.noticed = self.interrupted = self.called_off = False

    @staticmethod
    def _open_group() -> Any:
        if torch.distributed.is_initialized():  # by Accelerate, on GPUs over NCCL
            return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        return torch.distributed.group.WORLD

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.group is not None:
            torch.distributed.barrier(self.group)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, in order of rank, on every process."""
        if self.group is None:
            return [value]
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor, which is on the CPU."""
        if self.group is not None:
            torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def close(self) -> None:
        if self.group is not None:
            torch.distributed.destroy_process_group()

    @contextlib.contextmanager
    def noticing_signals(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1 and Ctrl-C are noticed, instead of ending the process; a second Ctrl-C does end it."""
        pressed = math.inf

        def notice(number, frame):
            nonlocal pressed
            self.noticed = True
            if number == signal.SIGINT:
                if time.monotonic() > pressed + 1:  # launchers may hand on what the terminal has sent already
                    raise KeyboardInterrupt
                if not self.interrupted and self.is_main:
                    os.write(2, b"\nstopping after this step, to save it; press Ctrl-C again to stop at once\n")
                self.interrupted, pressed = True, min(pressed, time.monotonic())

        heard = [*NOTICES, *([signal.SIGINT] if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else [])]
        before = {number: signal.signal(number, notice) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def careful(self) -> Iterator[None]:
        """Keep a `UserError` of what stands inside for the next meeting."""
        try:
            yield
        except UserError as error:
            self.error = self.error or error

    def meet(self) -> None:
        """Wait for every process, and learn of their errors and whether time is up: three bytes over the network.

        Raises:
            UserError: On the main process, where any process has kept an error; the others exit quietly.
        """
        news = torch.tensor([self.error is not None, self.noticed, self.interrupted], dtype=torch.uint8)
        if self.group is not None:
            torch.distributed.all_reduce(news, torch.distributed.ReduceOp.MAX, group=self.group)
        failed, self.called_off, self.interrupted = map(bool, news.tolist())
        self.noticed = self.noticed or self.called_off
        if not failed:
            return
        errors = self.gather(None if self.error is None else str(self.error))
        if not self.is_main:
            sys.exit(1)
        rank, text = next((rank, text) for rank, text in enumerate(errors) if text is not None)
        raise UserError(text if len(set(errors)) == 1 else f"rank {rank}: {text}")


def num_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS and Windows have none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def obey_only_the_parent(worker_id: int = 0) -> None:
    """Let a loader's worker go on when a terminal or Slurm signals all processes: its batches are wanted until the end.

    PyTorch's handler would end it, and then the training process, which loses a worker. Pass as `worker_init_fn`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to the workers too
    if sys.platform != "linux":  # where there is Slurm, and sigwaitinfo
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)

    def wait():
        while signal.sigwaitinfo(NOTICES).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
