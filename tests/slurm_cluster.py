"""A real Slurm of two virtual nodes on this machine, in a temporary folder: for tests/test_slurm.py.

Debian's packages slurm-wlm and munge; needs root, without systemd. Ends every daemon by its own process id.
"""

import contextlib
import itertools
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "setpriv")
NODES = ("n1", "n2")
CANDIDATES = itertools.count(random.SystemRandom().randrange(10_000, 20_000))  # for `free_ports`

CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits until its old credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=15
KillWait=10
MinJobAge=3600
SchedulerParameters=sched_min_interval=200000
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2} CPUs=1 RealMemory=1000
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge"
    return None if os.geteuid() == 0 else "needs root: munge and slurmd change users"


class SlurmCluster:
    """Use as a context: its daemons run inside.

    Args:
        folder: For configuration, state and logs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment = inherited | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "SlurmCluster":
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        ports = dict(zip(("controller", *NODES), free_ports(3), strict=True))
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, **ports))
        self.start_munge()
        try:
            self.start("slurmctld", "slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            self.wait_for(lambda: self.ask("sinfo", "-h", "-o", "%T %D") == "idle 2", 60, "two idle nodes")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir()
        (folder / "key").write_bytes(secrets.token_bytes(128))
        for path in (folder, folder / "key"):
            shutil.chown(path, "munge", "munge")
        (folder / "key").chmod(0o600)
        files = [f"--{name}={folder / name}" for name in ("key-file", "log-file", "pid-file", "seed-file")]
        files[0] = f"--key-file={folder / 'key'}"
        # Others may use the socket, but its folder is munge's own.
        socket_file = f"--socket={self.folder}/munge.socket"
        user = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
        shutil.chown(self.folder, "munge", "munge")
        self.start("munged", *user, "munged", "--foreground", socket_file, *files)
        self.wait_for((self.folder / "munge.socket").exists, 60, "munge's socket")

    def start_node(self, node: str) -> None:
        self.start(node, "slurmd", "-D", "-N", node)

    def start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.output", "a") as output:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    def kill(self, name: str) -> None:
        """A daemon disappears, as with its machine."""
        self.daemons[name].send_signal(signal.SIGKILL)
        self.daemons.pop(name).wait()

    def stop(self) -> None:
        if "slurmctld" in self.daemons:
            subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=30, check=False)
            time.sleep(2)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def ask(self, *command: str, **environment: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, timeout=60, cwd=self.folder
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job`: JobState, Restarts, ExitCode, ..."""
        words = self.ask("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, ready, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.output"))
                raise TimeoutError(f"no {what} after {seconds} s\n{logs}")
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that are free until they are used: the kernel gives others, from 32768 on, to whoever asks for any."""
    found: list[int] = []
    while len(found) < count:
        port = next(CANDIDATES)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return found
