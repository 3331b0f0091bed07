"""The launchers, without Slurm and with a stand-in for it."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from scripts import launch_node
from utils.errors import UserError
from utils.paths import ROOT

TEACHER = ROOT / "configs/fashion/teacher.yaml"
GENERATOR = ROOT / "configs/fashion/generator.yaml"
STAGE1 = ROOT / "configs/fashion/stage1.yaml"


@pytest.fixture
def launch(tmp_path):
    """Run a command in an empty folder, with `programs` first on the PATH."""

    def launch(*command, programs=(), **environment):
        bin_folder = tmp_path / "bin"
        bin_folder.mkdir(exist_ok=True)
        for name, text in dict(programs).items():
            (bin_folder / name).write_text("#!/usr/bin/env bash\n" + textwrap.dedent(text))
            (bin_folder / name).chmod(0o755)
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_", "PYTEST_"))
        }
        path = f"{bin_folder}:{os.environ['PATH']}"
        return subprocess.run(
            [str(part) for part in command],
            cwd=tmp_path,
            env=inherited | {"PATH": path, "ODP_ENV": sys.prefix} | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return launch


@pytest.fixture
def greet(tmp_path):
    """A script that meets the other processes, and says what it was given."""
    path = tmp_path / "greet.py"
    path.write_text(
        textwrap.dedent("""
            import os, sys
            import torch
            import utils
            world = int(os.environ.get("WORLD_SIZE", 1))
            total = torch.ones(1)
            if world > 1:
                torch.distributed.init_process_group("gloo")
                torch.distributed.all_reduce(total)
                torch.distributed.destroy_process_group()
            os.write(1, f"here {int(total)} of {world} {sys.argv[1:]} {utils.__file__}\\n".encode())
        """)
    )
    return path


@pytest.mark.parametrize("processes", [1, 2])
def test_a_script_runs_in_so_many_processes(launch, greet, processes):
    result = launch(ROOT / "scripts/launch.sh", greet, "a.b=c d", NUM_PROCESSES=str(processes))
    assert result.returncode == 0, result.stderr
    line = f"here {processes} of {processes} ['a.b=c d'] {ROOT / 'utils/__init__.py'}"
    assert result.stdout.count(line) == processes


def test_ranks_end_with_their_own_status(launch, tmp_path):
    """And are not aborted by the threads of a process group that is left open."""
    script = tmp_path / "meet.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            from utils.processes import Processes
            processes = Processes("cpu")
            assert processes.world_size == 2
            for _ in range(50):
                processes.meet()
            sys.exit(75)
        """)
    )
    result = launch(ROOT / "scripts/launch.sh", script, NUM_PROCESSES="2")
    assert result.returncode == 75 and "terminate" not in result.stderr, result.stderr


def test_processes_of_a_training_wait_for_the_slowest_for_days(launch, tmp_path):
    """Not gloo's 30 minutes: their own limit holds for every group, and ends the waiting when it is made short."""
    script = tmp_path / "wait.py"
    script.write_text(
        textwrap.dedent("""
            import datetime, pathlib, time
            import torch
            from utils import processes
            processes.PATIENCE = datetime.timedelta(seconds=10)
            torch.distributed.init_process_group("gloo")  # as Accelerate does
            ours = processes.Processes("cpu")
            ours.meet()
            over = pathlib.Path("over")
            if ours.is_main:
                try:
                    ours.meet()
                except RuntimeError as error:
                    assert "Timed out" in str(error), error
                    print("out of patience", flush=True)
                over.touch()
            else:
                for _ in range(600):
                    if over.exists():
                        break
                    time.sleep(0.1)
                else:
                    ours.meet()
        """)
    )
    result = launch(ROOT / "scripts/launch.sh", script, NUM_PROCESSES="2")
    assert "out of patience" in result.stdout, result.stderr


def test_a_slurm_job_has_one_launcher_a_node(launch, greet):
    programs = {
        "scontrol": "echo 127.0.0.1; echo another-node",
        "srun": """
            while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#*=}; shift; done
            for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & done
            wait
        """,
    }
    # The processes meet at a port that is made of the job's number: another one for other tests of this machine.
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    result = launch(ROOT / "scripts/launch.sh", greet, programs=programs, NUM_PROCESSES="1", **job)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("here 2 of 2") == 2


@pytest.mark.parametrize(("step", "shared"), [({}, False), ({"SLURM_STEP_ID": "0"}, True)])
def test_a_shell_that_is_a_step_of_its_job_shares_what_it_holds(launch, greet, step, shared):
    """Or srun would wait for ever."""
    result = launch(ROOT / "scripts/launch.sh", greet, programs={"srun": "echo $@"}, SLURM_JOB_ID="7", **step)
    assert result.returncode == 0, result.stderr
    assert ("--overlap" in result.stdout.split()) == shared


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("RUNNING None", ["job 7 is queued again, to go on where it was", "scontrol requeue 7"]),
        ("COMPLETING TimeLimit", ["job 7 is queued again, to go on where it was", "scontrol requeue 7"]),
        ("COMPLETING None", ["job 7 was cancelled, and has saved: to go on, start the same command once more"]),
    ],
)
def test_a_slurm_job_that_has_saved_is_queued_again_unless_it_was_cancelled(launch, tmp_path, state, said):
    """By the exit status of its script, which heeds a signal that only the batch script was sent."""
    script = tmp_path / "save.py"
    script.write_text(
        textwrap.dedent("""
            import os, signal, sys, time
            signal.signal(signal.SIGUSR1, lambda *_: (print("saved", flush=True), sys.exit(os.EX_TEMPFAIL)))
            os.kill(int(os.environ["BATCH"]), signal.SIGTERM)
            time.sleep(60)
        """)
    )
    programs = {
        "scontrol": "echo scontrol $@",
        "squeue": f"echo {state}",
        "srun": 'export BATCH=$PPID; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    }
    result = launch(ROOT / "scripts/launch.sh", script, programs=programs, SLURM_JOB_ID="7", NUM_PROCESSES="1")
    assert result.returncode == os.EX_TEMPFAIL, result.stderr
    assert result.stdout.splitlines() == ["saved", *said]


@pytest.fixture
def node(monkeypatch):
    """Run Python programs as the processes of a machine, which a notice may reach as they start: exit status."""
    monkeypatch.setattr(launch_node, "GRACE", 0.3)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}

    def node(program: str, processes: int, notice: int | None = None) -> int:
        monkeypatch.setenv("NUM_PROCESSES", str(processes))
        started = launch_node.Node([sys.executable, "-S", "-c", "import os, signal, time\n" + program])
        if notice is not None:
            os.kill(os.getpid(), notice)
        return started.wait()

    yield node
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_process_that_fails_ends_the_others(node, capsys):
    began = time.monotonic()
    assert node("os._exit(3) if os.environ['RANK'] == '1' else time.sleep(60)", 2) == 3
    assert node("os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)", 2) == 128 + 9
    assert capsys.readouterr().err == "error: process 1 of this machine was ended by SIGKILL\n"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_before_a_script_heeds_it_is_no_failure(node, number):
    assert node("time.sleep(60)", 2, notice=number) == os.EX_TEMPFAIL


def test_a_node_that_lacks_a_gpu_is_named(node, monkeypatch):
    monkeypatch.delenv("NUM_PROCESSES", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "999")
    with pytest.raises(UserError, match="granted 999 GPUs on .*PyTorch finds"):
        launch_node.count_processes()


@pytest.mark.parametrize("asked", ["0", "-1", "two"])
def test_a_number_of_processes_is_one_or_more(node, monkeypatch, asked):
    monkeypatch.setenv("NUM_PROCESSES", asked)
    with pytest.raises(UserError, match=f"NUM_PROCESSES must be a whole number of at least 1, got {asked}"):
        launch_node.count_processes()


def test_the_sites_settings_are_read(launch, tmp_path, greet):
    """Modules, a container and options for srun, from scripts/site.env of a copy of the launchers."""
    copy = tmp_path / "repository"
    for name in ("scripts/launch.sh", "scripts/launch_node.py", "scripts/environment.sh", "scripts/site.env.example"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    lines = [line.removeprefix("# ") for line in (copy / "scripts/site.env.example").read_text().splitlines()]
    kept = [line for line in lines if line.startswith(("export SBATCH", "export ODP_SRUN", "export GLOO"))]
    assert len(kept) == 7
    container = f'export ODP_CONTAINER="env INSIDE=1" PYTHONPATH={ROOT}'
    (copy / "scripts/site.env").write_text("\n".join([*kept, "false", "echo $UNSET", container]))
    greet.write_text("import os\nprint(os.environ['INSIDE'], os.environ['GLOO_SOCKET_IFNAME'], os.environ['OPTIONS'])")
    srun = """
        while [[ $1 == --* ]]; do options="$options $1"; shift; done
        OPTIONS=$options exec "$@"
    """
    job = {"SLURM_JOB_ID": "7", "NUM_PROCESSES": "1"}
    result = launch(copy / "scripts/launch.sh", greet, programs={"srun": srun}, **job)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith("1 ib0  --nodes=1")
    assert "--container-image=/projects/my_project/pytorch.sqsh --container-mounts=/projects" in result.stdout


@pytest.mark.parametrize(("config", "script"), [(TEACHER, "train_teacher.py"), (STAGE1, "train_tokenizer.py")])
@pytest.mark.parametrize("spooled", [False, True])
def test_the_tokenizer_launcher_picks_the_script_that_the_config_needs(launch, tmp_path, config, script, spooled):
    """sbatch runs a copy of the launcher, and says where it was submitted."""
    launcher, slurm = ROOT / "train_tokenizer.sh", {}
    if spooled:
        launcher = shutil.copy(launcher, tmp_path / "slurm_script")
        slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    programs = {
        "srun": "echo srun $@",
        "scontrol": f'echo "   Command={ROOT}/train_tokenizer.sh configs/x.yaml"',
    }
    # Stands in for the environment: answers what the launcher asks, and shows what would be run.
    python = tmp_path / "environment/bin/python"
    python.parent.mkdir(parents=True)
    kind = script.removeprefix("train_").removesuffix(".py")
    python.write_text(f'#!/usr/bin/env bash\n[[ $1 == -c ]] && echo {kind} || echo "$@"\n')
    python.chmod(0o755)
    slurm |= {"ODP_ENV": str(tmp_path / "environment"), "NUM_PROCESSES": "1"}
    result = launch("bash", launcher, config, "training.seed=3", programs=programs, **slurm)
    assert result.returncode == 0, result.stderr
    assert f"{ROOT}/scripts/{script} config={config} training.seed=3" in result.stdout
    assert result.stdout.startswith("srun") == spooled


def test_a_mistake_in_the_configuration_shows_before_anything_starts(launch):
    result = launch("bash", ROOT / "train_tokenizer.sh", STAGE1, "training.sed=3")
    assert result.returncode == 1
    assert result.stderr == (
        "error: override training.sed=3: unknown key training.sed; did you mean training.seed or training.use_ema?\n"
    )


def test_the_tokenizer_launcher_refuses_a_generators_configuration_before_anything_starts(launch):
    result = launch("bash", ROOT / "train_tokenizer.sh", GENERATOR)
    assert result.returncode == 1
    assert result.stderr == (
        f"error: {GENERATOR} describes a generator, and this command needs a teacher or a tokenizer: a generator is "
        "trained by scripts/train_generator.py\n"
    )


@pytest.mark.parametrize("launcher", ["train_tokenizer.sh", "train_generator.sh"])
def test_a_launcher_without_a_configuration_shows_its_usage(launch, launcher):
    result = launch("bash", ROOT / launcher)
    assert result.returncode == 2 and "usage: bash" in result.stderr
