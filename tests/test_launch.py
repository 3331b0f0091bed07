"""The launchers, without Slurm and with a stand-in for it."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from utils.cli import ROOT

TEACHER = ROOT / "configs/fashion/teacher.yaml"
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
            timeout=120,
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


def test_a_slurm_job_has_one_launcher_a_node(launch, greet):
    programs = {
        "scontrol": "echo 127.0.0.1; echo another-node",
        "srun": """
            while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#*=}; shift; done
            for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & done
            wait
        """,
    }
    job = {"SLURM_JOB_ID": "74321", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    result = launch(ROOT / "scripts/launch.sh", greet, programs=programs, NUM_PROCESSES="1", **job)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("here 2 of 2") == 2


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
    model = "pixel_vqgan" if config == TEACHER else "one_d_piece"
    python.write_text(f'#!/usr/bin/env bash\n[[ $1 == -c ]] && echo {model} || echo "$@"\n')
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


@pytest.mark.parametrize("launcher", ["train_tokenizer.sh", "train_generator.sh"])
def test_a_launcher_without_a_configuration_shows_its_usage(launch, launcher):
    result = launch("bash", ROOT / launcher)
    assert result.returncode == 2 and "usage: bash" in result.stderr
