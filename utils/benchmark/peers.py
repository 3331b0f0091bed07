"""Processes that time the same item: at the same time, as ranks, or in turns with another revision.

Each is a server: scripts/benchmark.py with --serve, of this checkout or of another. One line of JSON says what the
next work is ("model", "item", "batch_size", "flops", "counts", "peak_memory", ...); then every line "NAME COUNT" that
it reads, NAME a key of "counts", is answered with the seconds a turn of COUNT turns, and "next" with the next work.
Revisions are compared by this protocol, so it must stay as it is; it exists since da24e9c.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from utils.benchmark.items import Items, settings
from utils.benchmark.measure import Products, ceiling_timers, timed_works
from utils.errors import UserError
from utils.paths import ROOT

SCRIPT = "scripts/benchmark.py"
PLAIN = "plain"


def serve(arguments: argparse.Namespace, items: Items, products: Products) -> None:
    """Be a server: say what the work is, then time as many turns as asked for, until the next work is asked for."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        beside = {} if arguments.against else ceiling_timers(settings(arguments)[0], products)
        for about, timers in timed_works(arguments, items, beside):
            print(json.dumps(about), file=answers, flush=True)
            while (request := sys.stdin.readline().split()) and request != ["next"]:
                name, count = request
                timers[name].count = int(count)
                print(json.dumps(timers[name]()), file=answers, flush=True)


# ------------------------------------------------------------------------------------------- the other end


def start(tree: Path, *flags: str, world: Mapping[str, Any] | None = None) -> subprocess.Popen:
    """A server of the checkout `tree`; it has this command's own flags, and `flags` after them.

    Args:
        world: The environment by which processes know each other.
    """
    command = [sys.executable, str(tree / SCRIPT), *sys.argv[1:], *flags, "--serve"]
    environment = os.environ | {name: str(value) for name, value in (world or {}).items()}
    environment["PYTHONPATH"] = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextlib.contextmanager
def running(servers: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Servers that end at the latest when the `with` block does."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        for server in servers:
            stack.callback(server.kill)
        yield


def receive(server: subprocess.Popen) -> Any:
    """What a server says next; None at its end."""
    line = server.stdout.readline()
    if not line and server.wait():
        raise UserError(
            "a process could not do this item (see above): name with --only what it can, with --against what both can"
        )
    return json.loads(line) if line else None


def ask(servers: Sequence[subprocess.Popen], request: str) -> list[Any]:
    """What servers answer to a request that they get at the same time."""
    for server in servers:
        server.stdin.write(request + "\n")
        server.stdin.flush()
    return [receive(server) for server in servers]


def together(num_processes: int) -> Iterator[tuple[dict[str, Any], dict[str, Callable[[], float]]]]:
    """`timed_works` of several processes at the same time: the slowest's seconds, and the memory of all."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    servers = [start(ROOT, world=world | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(num_processes)]
    with running(servers):
        found = [receive(server) for server in servers]
        while found[0] is not None:
            # Ranks that train must do the same number of turns: the first one's.
            requests = {name: f"{name} {count}" for name, count in found[0]["counts"].items()}
            timers = {name: lambda request=request: max(ask(servers, request)) for name, request in requests.items()}
            yield found[0] | {"peak_memory": sum(one["peak_memory"] for one in found)}, timers
            found = ask(servers, "next")


# ------------------------------------------------------------------------------------------- against something else


@dataclass(frozen=True)
class Comparison:
    """An item here and there: seconds, the ratio there / here (how many times as fast it is here), peak bytes."""

    model: str
    item: str
    batch_size: int
    seconds: float
    seconds_there: float
    ratio: float
    flops: int
    flops_there: int
    peak_memory: int
    peak_memory_there: int


def compare(against: str, only: Sequence[str], num_repeats: int) -> Iterator[Comparison]:
    """Items in turns in two processes: this checkout's, and one of the revision `against`, or of `PLAIN`."""
    items = ("--only", *only)  # by name, because another revision may have other defaults
    with contextlib.ExitStack() as stack:
        if against == PLAIN:
            there = start(ROOT, *items, "--plain", "--precision=fp32")
        else:
            there = start(stack.enter_context(checkout(against)), *items)
        both = [start(ROOT, *items), there]
        stack.enter_context(running(both))
        found = [receive(server) for server in both]
        while found != [None, None]:
            check_pair(*found)
            yield _compared(both, found, num_repeats)
            found = ask(both, "next")


def check_pair(here: dict[str, Any] | None, there: dict[str, Any] | None) -> None:
    """Refuse to compare two items, of revisions whose items or protocol differ."""
    names = [about and f"{about['model']} {about['item']}" for about in (here, there)]
    if names[0] != names[1]:
        raise UserError(
            f"--against needs the same items in both revisions, got {names[0] or 'the end'} here and "
            f"{names[1] or 'the end'} there: name with --only what both have"
        )
    if "counts" not in there:
        raise UserError(f"--against needs a revision whose {SCRIPT} answers as this one does: take a later one")


def _compared(both: Sequence[subprocess.Popen], found: Sequence[dict[str, Any]], num_repeats: int) -> Comparison:
    """Time the works that both have built."""
    requests = [f"work {about['counts']['work']}" for about in found]
    times = [
        [ask([server], request)[0] for server, request in zip(both, requests, strict=True)] for _ in range(num_repeats)
    ]
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    flops = [sum(about["flops"]["work"].values()) for about in found]
    here, there = found
    return Comparison(
        model=here["model"],
        item=here["item"],
        batch_size=here["batch_size"],
        seconds=seconds[0],
        seconds_there=seconds[1],
        ratio=seconds[1] / seconds[0],
        flops=flops[0],
        flops_there=flops[1],
        peak_memory=here["peak_memory"],
        peak_memory_there=there["peak_memory"],
    )


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The files of a revision of this repository, which must have `SCRIPT`; or a folder that holds them."""
    if (Path(revision) / SCRIPT).is_file():
        yield Path(revision).resolve()
        return

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)

    with tempfile.TemporaryDirectory() as folder:
        added = git("worktree", "add", "--detach", folder, revision)
        if added.returncode:
            raise UserError(
                f"--against must be {PLAIN} or a revision of the git repository {ROOT}, got {revision}: "
                f"{added.stderr.strip().splitlines()[-1]}"
            )
        try:
            if not (Path(folder) / SCRIPT).is_file():
                raise UserError(
                    f"--against needs a revision that has {SCRIPT}, and {revision} has none: take a later one"
                )
            yield Path(folder)
        finally:
            git("worktree", "remove", "--force", folder)
