"""Run a script as one process a GPU of this machine: scripts/launch.sh starts one of these on every node of a job.

The processes learn who they are from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and so on, as under torchrun. Unlike
torchrun, which kills its workers half a minute after a SIGTERM and makes every bad exit status 1, this launcher hands
SIGTERM and SIGUSR1 on, lets the processes save for as long as that takes, and exits with their status.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import math
import os
import signal
import socket
import subprocess
import time

import torch

from utils.errors import UserError
from utils.processes import NOTICES, TIME_IS_UP, num_cores

GRACE = 10.0  # seconds that the others have to end by themselves when a process has failed


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own")
    arguments = parser.parse_args()
    sys.exit(Node([sys.executable, arguments.script, *arguments.arguments]).wait())


class Node:
    """The processes of this machine.

    Args:
        command: What each of them runs.
    """

    def __init__(self, command: list[str]):
        self.noticed = False
        self.processes: list[subprocess.Popen] = []
        for number in {*NOTICES, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.hand_on)
        for environment in environments(count_processes()):
            # A session each: what a terminal or Slurm sends to the whole group comes from here alone, once.
            self.processes.append(subprocess.Popen(command, env=os.environ | environment, start_new_session=True))

    def hand_on(self, number: int, frame) -> None:
        self.noticed = self.noticed or number in NOTICES
        for process in self.processes:
            process.send_signal(number)

    def wait(self) -> int:
        """The status of the first process that failed; else that of all."""
        failed, deadline = None, math.inf
        while None in [process.poll() for process in self.processes]:
            time.sleep(0.1)
            if failed is None and (failed := self.find_failed()) is not None:
                deadline = time.monotonic() + GRACE
            if time.monotonic() > deadline:
                for process in self.processes:
                    process.kill()
        failed = failed or self.find_failed()
        if failed is None:
            return TIME_IS_UP if any(process.returncode for process in self.processes) else 0
        if failed.returncode > 0:
            return failed.returncode
        name = signal.Signals(-failed.returncode).name
        print(f"error: process {self.processes.index(failed)} of this machine was ended by {name}", file=sys.stderr)
        return 128 - failed.returncode

    def find_failed(self) -> subprocess.Popen | None:
        return next((process for process in self.processes if self.has_failed(process)), None)

    def has_failed(self, process: subprocess.Popen) -> bool:
        # A notice that arrives before a script handles it ends the script: there is nothing to save yet.
        untouched = [-number for number in NOTICES] if self.noticed else []
        return process.returncode not in (None, 0, TIME_IS_UP, *untouched)


def count_processes() -> int:
    """NUM_PROCESSES, or one for each GPU, or one."""
    if asked := os.environ.get("NUM_PROCESSES"):
        if not asked.isdecimal() or int(asked) == 0:
            raise UserError(f"NUM_PROCESSES must be a whole number of at least 1, got {asked}")
        return int(asked)
    found = torch.cuda.device_count()
    granted = int(os.environ.get("SLURM_GPUS_ON_NODE") or found)
    if found != granted:
        raise UserError(
            f"Slurm has granted {granted} GPUs on {socket.gethostname()}, and PyTorch finds {found}: exclude this node "
            "(sbatch --exclude), or compare its `nvidia-smi` with torch.version.cuda"
        )
    if found == 0 and "SLURM_JOB_ID" in os.environ:
        print("this job has no GPU and runs on the CPU; `sbatch --gpus-per-node M` asks for some", file=sys.stderr)
    return max(1, found)


def environments(processes: int) -> list[dict[str, str]]:
    """What tells each process of this machine who it is; nothing where it is the only one."""
    nodes = int(os.environ.get("LAUNCHED_NODES", 1))
    if nodes * processes == 1:
        return [{}]
    node = int(os.environ["SLURM_NODEID"]) if nodes > 1 else 0
    shared = {"WORLD_SIZE": str(nodes * processes), "LOCAL_WORLD_SIZE": str(processes)}
    # Only where the job's launcher, or the user, has not said:
    if "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = str(max(1, num_cores() // processes))
    if "MASTER_ADDR" not in os.environ:
        shared["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_PORT" not in os.environ:
        with socket.create_server(("127.0.0.1", 0)) as server:
            shared["MASTER_PORT"] = str(server.getsockname()[1])
    return [shared | {"RANK": str(node * processes + local), "LOCAL_RANK": str(local)} for local in range(processes)]


if __name__ == "__main__":
    run(main)
