"""The launchers in a real Slurm of two virtual nodes: training on both, through preemption and the loss of a node."""

import json
import subprocess
import sys

import pytest

from tests.slurm_cluster import SlurmCluster, why_not
from tests.training_runs import differences, job_overrides, make_images
from utils.checkpoint import checkpoints
from utils.paths import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(why_not() is not None, reason=f"no Slurm here: it {why_not()}"),
    # One cluster for all tests of this file.
    pytest.mark.xdist_group("slurm"),
]
STEPS = 60
SETTINGS = [
    "dataset.params.num_workers_per_gpu=1",
    "experiment.eval_every=0",
    "experiment.generate_every=0",
    "experiment.log_every=1",
    "losses.discriminator_start=100000",
    "training.per_gpu_batch_size=2",
    f"training.max_train_steps={STEPS}",
]


class Jobs:
    """Training jobs on both nodes of a cluster."""

    def __init__(self, cluster: SlurmCluster, folder):
        self.cluster, self.folder = cluster, folder

    def submit(self, name: str, *overrides: str) -> str:
        settings = [*job_overrides("teacher", self.folder, self.folder / name), *SETTINGS, *overrides]
        answer = self.cluster.ask(
            *("sbatch", "--nodes=2", f"--output={self.folder}/{name}.log"),
            *(str(ROOT / "train_tokenizer.sh"), str(ROOT / "configs/fashion/teacher.yaml"), *settings),
            ODP_ENV=sys.prefix,
            GLOO_SOCKET_IFNAME="lo",
        )
        return answer.split()[-1]

    def step(self, name: str) -> int:
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)

    def wait_for_step(self, name: str, step: int) -> None:
        self.cluster.wait_for(lambda: self.step(name) >= step, 600, f"step {step} of {name}: {self.log(name)[-3000:]}")

    def wait_for_state(self, job: str, state: str, name: str) -> None:
        self.cluster.wait_for(
            lambda: self.cluster.job(job)["JobState"] == state, 600, f"{state} job {job}: {self.log(name)[-3000:]}"
        )

    def wait_for_end(self, job: str, name: str) -> None:
        """Until nothing of the job is left on any node."""
        self.cluster.wait_for(
            lambda: not self.cluster.ask("squeue", "--noheader", f"--jobs={job}").strip(),
            600,
            f"the end of job {job}: {self.log(name)[-3000:]}",
        )

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else "nothing"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    for path in (folder, *folder.parents[:2]):  # munge and the jobs look inside
        path.chmod(0o755)
    make_images(folder)
    with SlurmCluster(folder / "cluster") as cluster:
        yield Jobs(cluster, folder)


@pytest.fixture(scope="module")
def undisturbed(jobs):
    job = jobs.submit("undisturbed", "experiment.save_every=1000")
    jobs.wait_for_state(job, "COMPLETED", "undisturbed")
    assert "2 processes x 1 accumulated" in jobs.log("undisturbed")
    return jobs.folder / "undisturbed"


def test_a_job_that_is_preempted_twice_ends_with_the_same_weights(jobs, undisturbed):
    job = jobs.submit("preempted", "experiment.save_every=1000")
    jobs.wait_for_step("preempted", 10)
    jobs.cluster.ask("scancel", "--signal=TERM", job)  # as --signal=TERM@300 and preemption do: to the tasks
    jobs.wait_for_step("preempted", 30)
    assert jobs.cluster.job(job)["Restarts"] == "1"
    jobs.cluster.ask("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@300 does: to the batch script
    jobs.wait_for_state(job, "COMPLETED", "preempted")
    assert jobs.cluster.job(job)["Restarts"] == "2"
    log = jobs.log("preempted")
    assert log.count("time is up: step") == 2 and log.count("resuming after step") == 2, log
    assert differences(undisturbed, jobs.folder / "preempted") == []


def test_a_job_that_loses_a_node_goes_on_when_it_is_back(jobs, undisturbed):
    job = jobs.submit("node_lost", "experiment.save_every=5", "experiment.keep_last=2")
    jobs.wait_for_step("node_lost", 12)
    jobs.cluster.kill("n2")
    jobs.wait_for_state(job, "PENDING", "node_lost")
    jobs.cluster.start_node("n2")
    jobs.wait_for_state(job, "COMPLETED", "node_lost")
    assert jobs.cluster.job(job)["Restarts"] == "1"
    assert "resuming after step" in jobs.log("node_lost")
    assert [step for step, _ in checkpoints(jobs.folder / "node_lost")] == [STEPS - 5, STEPS]
    assert differences(undisturbed, jobs.folder / "node_lost") == []


def test_a_cancelled_job_saves_and_does_not_come_back(jobs):
    job = jobs.submit("cancelled", "experiment.save_every=1000")
    jobs.wait_for_step("cancelled", 10)
    jobs.cluster.ask("scancel", job)
    jobs.wait_for_end(job, "cancelled")
    described = jobs.cluster.job(job)
    assert (described["JobState"], described["Restarts"]) == ("CANCELLED", "0"), jobs.log("cancelled")
    assert "was cancelled, and has saved" in jobs.log("cancelled")


def test_a_shell_that_is_a_step_of_its_job_trains(jobs):
    """As `srun --pty bash` gives one."""
    settings = [*job_overrides("teacher", jobs.folder, jobs.folder / "shell"), *SETTINGS, "training.max_train_steps=2"]
    train = [str(ROOT / "train_tokenizer.sh"), str(ROOT / "configs/fashion/teacher.yaml"), *settings]
    environment = jobs.cluster.environment | {"ODP_ENV": sys.prefix}
    subprocess.run(["srun", "--nodes=1", "bash", *train], env=environment, cwd=jobs.folder, timeout=600, check=True)
    assert (jobs.folder / "shell/model.safetensors").is_file()


def test_a_mistake_in_the_configuration_ends_the_job_before_any_step(jobs):
    job = jobs.submit("mistake", "training.sed=3")
    jobs.wait_for_state(job, "FAILED", "mistake")
    assert jobs.log("mistake").startswith("error: override training.sed=3: unknown key")
    steps = subprocess.run(
        ["scontrol", "show", "step", job], env=jobs.cluster.environment, capture_output=True, text=True
    )
    assert f"{job}.0" not in steps.stdout
