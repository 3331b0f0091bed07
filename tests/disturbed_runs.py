"""Training runs of two processes that are killed, signalled or starved: a program for tests/test_disturbed.py.

python tests/disturbed_runs.py FOLDER NUMBER_OF_KILLS [SCENARIO ...]

One interpreter imports everything and forks the ranks, because starting Python takes longer than such a run. Prints as
JSON what happened in each scenario; what the ranks print is in FOLDER/*.log.
"""

import json
import math
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from data.batches import check_count
from data.loaders import loaders
from modeling.tasks.teacher import TeacherTask
from tests.slurm_cluster import free_ports
from tests.training_runs import differences, job_config, make_images
from utils.checkpoint import checkpoints, find_damage, latest_checkpoint
from utils.cli import run
from utils.training.loop import make_accelerator, train

GRACE = 60.0  # seconds that the others have to end by themselves: longer than the launcher's, on a busy machine
SAVE_EVERY = 2
SMALL = [
    "dataset.params.num_workers_per_gpu=1",
    "experiment.eval_every=0",
    "experiment.generate_every=0",
    "experiment.log_every=1",
    f"experiment.save_every={SAVE_EVERY}",
    "experiment.keep_last=2",
    "losses.discriminator_start=100000",
    "training.per_gpu_batch_size=2",
]


class Disturbed:
    """Batches of a rank which does something before it takes a certain one."""

    def __init__(self, batches, number: int, act: Callable[[], None]):
        self.batches, self.number, self.act = batches, number, act
        self.expected = getattr(batches, "expected", None)

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            if number == self.number:
                self.act()
            yield batch


class Ranks:
    """The processes of one run.

    Args:
        world: How many.
        disturb: (ranks, "training" or "evaluation", batch number, what they do before that batch).
    """

    def __init__(self, folder: Path, name: str, *overrides: str, world: int = 2, disturb=None):
        self.output_dir = folder / name
        config = job_config("teacher", folder, self.output_dir, *SMALL, *overrides)
        port = free_ports(1)[0]
        self.pids = [self.fork(config, rank, world, port, disturb) for rank in range(world)]

    def fork(self, config, rank: int, world: int, port: int, disturb) -> int:
        if pid := os.fork():
            return pid
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            log = os.open(f"{self.output_dir}-{rank}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            torch.set_num_threads(1)
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in (place | {"MASTER_PORT": port}).items()}
            run(lambda: self.train(config, rank, world, disturb))
            status = 0
        except SystemExit as end:
            status = end.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    @staticmethod
    def train(config, rank: int, world: int, disturb) -> None:
        accelerator = make_accelerator(config)
        training, evaluation = loaders(config, rank=rank, world_size=world)
        makers = {"training": training, "evaluation": evaluation}
        if disturb is not None and rank in disturb[0]:
            _, phase, number, act = disturb
            make = makers[phase]
            makers[phase] = lambda *start: Disturbed(make(*start), number, act)
        train(TeacherTask(config), config, accelerator, makers["training"], makers["evaluation"], check_count)

    def wait(self) -> list[int]:
        """Exit statuses by rank, negative for a signal; as the launcher, kills who is left when one has ended badly."""
        statuses: dict[int, int] = {}
        deadline = math.inf
        while len(statuses) < len(self.pids):
            time.sleep(0.01)
            for pid in set(self.pids) - set(statuses):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    if statuses[pid]:
                        deadline = min(deadline, time.monotonic() + GRACE)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
        return [statuses[pid] for pid in self.pids]

    def printed(self, rank: int = 0) -> str:
        return Path(f"{self.output_dir}-{rank}.log").read_text()


def kills(folder: Path, number: int) -> dict:
    """SIGKILL so many times, half of them while a checkpoint is being written."""
    chance = random.Random(0)
    killed, lost, while_saving, last = 0, [], 0, 0
    output = folder / "killed"

    def die(when_saving: bool, seconds: float) -> None:
        """Sooner or later: within a step, or within a checkpoint."""
        began = time.time()
        while when_saving and not is_saving(output, began):
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    for index in range(number):
        began, when_saving = time.time(), index % 2 == 1
        step = 0 if when_saving else chance.randrange(2 * SAVE_EVERY)
        act = threading.Thread(target=die, args=(when_saving, chance.uniform(0, 0.03)), daemon=True).start
        ranks = Ranks(folder, output.name, disturb=(chance.choice([[0], [1], [0, 1]]), "training", step, act))
        killed += -signal.SIGKILL in ranks.wait()
        while_saving += is_saving(output, began)
        lost += [path.name for _, path in checkpoints(output) if find_damage(path)]
        newest = latest_checkpoint(output)
        if (newest[0] if newest else 0) < last:
            lost.append(f"checkpoint-{last}")
        last = newest[0] if newest else 0
    statuses = Ranks(folder, "killed").wait()
    return {
        "kills": killed,
        "while_saving": while_saving,
        "lost": lost,
        "statuses": statuses,
        "differences": differences(folder / "undisturbed", folder / "killed"),
    }


def is_saving(output: Path, began: float) -> bool:
    """Whether there is half a checkpoint, of a run that has begun since."""
    try:
        return any(path.stat().st_ctime > began for path in output.glob(".checkpoint-*.part"))
    except FileNotFoundError:  # just renamed
        return False


def last_step(output: Path) -> int:
    """Of the log, whose last line may be half written."""
    log = output / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def signal_family() -> None:
    """As Slurm's linuxproc does, which signals the loader's workers too."""
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def notices(folder: Path) -> dict:
    """SIGTERM to one rank: in training, in an evaluation that it then owes, and once more in the owed evaluation."""
    settings = ["training.max_train_steps=7", "experiment.save_every=100", "experiment.eval_every=7"]
    assert Ranks(folder, "unsignalled", *settings).wait() == [0, 0]
    found = {"statuses": [], "steps": [], "evaluations": []}
    for disturb in (
        ([1], "training", 3, signal_family),
        ([0], "evaluation", 1, signal_family),
        ([1], "evaluation", 1, signal_family),
        None,
    ):
        ranks = Ranks(folder, "signalled", *settings, disturb=disturb)
        found["statuses"].append(ranks.wait())
        found["steps"].append(latest_checkpoint(ranks.output_dir)[0])
        lines = [json.loads(line) for line in (ranks.output_dir / "metrics.jsonl").read_text().splitlines()]
        found["evaluations"].append([line["step"] for line in lines if "eval/psnr" in line])
    return found | {"differences": differences(folder / "unsignalled", folder / "signalled")}


def interrupts(folder: Path) -> dict:
    """Ctrl-C, which the terminal sends to both ranks and their workers, and a launcher to the ranks once more."""

    def press() -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    ranks = Ranks(folder, "interrupted", disturb=([0, 1], "training", 3, press))
    found = {"statuses": ranks.wait(), "step": latest_checkpoint(ranks.output_dir)[0], "printed": ranks.printed()}

    def press_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)

    impatient = Ranks(folder, "impatient", world=1, disturb=([0], "training", 3, press_twice))
    return found | {"impatient": impatient.wait(), "last_words": impatient.printed()}


def other_worlds(folder: Path) -> dict:
    """Two processes take four steps, one takes four, and two do the rest."""
    name = "other_worlds"
    statuses = [
        Ranks(folder, name, disturb=([1], "training", 3, signal_family)).wait(),
        Ranks(folder, name, world=1, disturb=([0], "training", 3, signal_family)).wait(),
    ]
    last = Ranks(folder, name)
    statuses.append(last.wait())
    lines = (last.output_dir / "metrics.jsonl").read_text().splitlines()
    return {
        "statuses": statuses,
        "printed": last.printed(),
        "images_seen": [json.loads(line)["images_seen"] for line in lines],
    }


def broken_data(folder: Path) -> dict:
    """One rank meets too many broken images."""
    from data import DataError

    def fail():
        raise DataError("too many broken samples")

    began = time.monotonic()
    ranks = Ranks(folder, "broken", disturb=([1], "training", 2, fail))
    return {"statuses": ranks.wait(), "seconds": time.monotonic() - began, "printed": [*map(ranks.printed, (0, 1))]}


def full_disk(folder: Path) -> dict:
    """As of the sixth step no file can grow as large as a checkpoint's; then there is room again."""

    def fill():
        # The soft limit: what it hits gets an error, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    starved = Ranks(folder, "starved", disturb=([0], "training", 5, fill))
    return {
        "statuses": starved.wait(),
        "left": sorted(path.name for path in starved.output_dir.iterdir()),
        "last_step": last_step(starved.output_dir),
        "printed": starved.printed(),
        "fixed": Ranks(folder, "starved").wait(),
        "differences": differences(folder / "undisturbed", folder / "starved"),
    }


SCENARIOS = {function.__name__: function for function in (notices, interrupts, other_worlds, broken_data, full_disk)}

if __name__ == "__main__":
    folder, number, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    make_images(folder, count=8)
    # More steps than so many kills let pass.
    SMALL.append(f"training.max_train_steps={12 + 3 * number}")
    assert Ranks(folder, "undisturbed").wait() == [0, 0]
    print(json.dumps({"kills": kills(folder, number)} | {name: SCENARIOS[name](folder) for name in names}))
