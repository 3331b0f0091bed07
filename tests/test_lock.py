"""Two commands at once in one output folder are impossible, and a dead one keeps nobody out."""

import importlib
import os
import platform
import subprocess
import sys

import pytest

from data.make_shards import make_shards
from tests.evaluation_data import command
from tests.shard_data import png
from tests.training_runs import make_images, run_job
from utils.errors import UserError
from utils.lock import LOCK, FolderLock
from utils.parts import Parts
from utils.paths import ROOT
from utils.processes import Processes

HOLD = """
import sys
from pathlib import Path
from utils.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Start a process that holds a folder's lock."""
    started = []

    def hold(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_in_use_is_refused_with_process_and_host(tmp_path, holder):
    process = holder(tmp_path / "run")
    with pytest.raises(UserError, match=f"run is in use by process {process.pid} on {platform.node()}: wait for it"):
        FolderLock(tmp_path / "run")


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, holder):
    process = holder(tmp_path)
    process.kill()
    process.wait()
    assert (tmp_path / LOCK).exists()
    with FolderLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert not (tmp_path / LOCK).exists()


def test_a_released_folder_is_free(tmp_path, holder):
    process = holder(tmp_path)
    process.communicate()
    FolderLock(tmp_path).release()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="cannot write to .*file/run .*a file is where a folder is needed: name another path"
    ):
        FolderLock(tmp_path / "file/run")


def test_work_in_parts_is_done_once_at_a_time(tmp_path, holder):
    holder(tmp_path)
    with pytest.raises(UserError, match="is in use by process"):
        Parts(tmp_path, {}, 2, Processes("cpu"))


def test_a_run_is_trained_once_at_a_time(tmp_path, holder):
    make_images(tmp_path, count=4)
    holder(tmp_path / "run")
    with pytest.raises(UserError, match="run is in use by process"):
        run_job("teacher", tmp_path, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("inference_tokenizer", ["--image", str(ROOT / "assets/fashion/bag.png")]),
        ("inference_generator", []),
        ("evaluate_reconstruction", ["--original", "a", "--target", "b", "--features", "none"]),
    ],
)
def test_results_are_written_once_at_a_time(tmp_path, holder, monkeypatch, capsys, script, words):
    holder(tmp_path)
    main = importlib.import_module(f"scripts.{script}").main
    status, _, said = command(monkeypatch, capsys, main, *words, "--output_dir", tmp_path)
    assert status == 1 and f"{tmp_path} is in use by process" in said
    assert {path.name for path in tmp_path.iterdir()} == {LOCK}


def test_shards_are_made_once_at_a_time(tmp_path, holder):
    class Images:
        classes = []

        def __len__(self):
            return 2

        def fingerprint(self):
            return "two"

        def name(self, index):
            return str(index)

        def read(self, index):
            return png(index), None

    holder(tmp_path)
    settings = {"prefix": "s", "max_samples_per_shard": 1, "num_workers": 0, "seed": 0}
    with pytest.raises(UserError, match="is in use by process"):
        make_shards(Images(), tmp_path, **settings)
    assert make_shards(Images(), tmp_path / "other", **settings)["num_samples"] == 2
    assert not (tmp_path / "other" / LOCK).exists()
