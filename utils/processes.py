"""Commands that several processes do together: `torchrun --nproc_per_node N scripts/X.py ...`, or accelerate launch."""

import os
from datetime import timedelta

import torch
import torch.distributed

from utils.cli import pick_device

# Processes wait for the slowest, whose share of the work may take hours longer.
PATIENCE = timedelta(days=7)


class Processes:
    """The processes of one command, as the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK) says; one without it.

    Args:
        device: Name for `pick_device`. Of several GPUs each process of a machine takes its own.
    """

    def __init__(self, device: str = "auto"):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        if self.world_size > 1:
            if self.device.type == "cuda" and self.device.index is None:
                local = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
                self.device = torch.device("cuda", local)
            # They only wait for each other, so gloo does on every device.
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        if self.world_size > 1:
            torch.distributed.destroy_process_group()
