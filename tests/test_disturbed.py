"""Nothing is lost: training through kills, signals, one rank's error and a full disk, on two processes."""

import json
import os
import subprocess
import sys

import pytest

from tests.disturbed_runs import SCENARIOS
from utils.paths import ROOT

pytestmark = pytest.mark.xdist_group("disturbed")


def disturb(folder, kills: int, *scenarios: str) -> dict:
    command = [sys.executable, ROOT / "tests/disturbed_runs.py", folder, kills, *scenarios]
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))
    assert done.returncode == 0, f"{done.stderr[-3000:]}\n{logs}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return disturb(tmp_path_factory.mktemp("disturbed"), 2, *SCENARIOS)


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="for tests that run side by side")
def test_the_tests_of_a_group_are_kept_together(request):
    assert request.node.nodeid.endswith("@disturbed"), "else each worker sets up what they share"


def check_kills(found: dict, number: int) -> None:
    assert found["kills"] == number
    assert found["lost"] == []
    assert found["statuses"] == [0, 0]
    assert found["differences"] == []


@pytest.mark.long
def test_fifty_kills_lose_no_checkpoint_and_change_no_weight(tmp_path):
    found = disturb(tmp_path, 50)["kills"]
    check_kills(found, 50)
    assert found["while_saving"] >= 10


def test_two_kills_lose_no_checkpoint_and_change_no_weight(found):
    check_kills(found["kills"], 2)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(found):
    """In training; in the last evaluation, which is then owed; in the owed one; and then the run ends."""
    notices = found["notices"]
    assert notices["statuses"] == [[75, 75], [75, 75], [75, 75], [0, 0]]
    assert notices["steps"] == [4, 7, 7, 7]
    assert notices["evaluations"] == [[], [], [], [7]]
    assert notices["differences"] == []


def test_ctrl_c_saves_and_says_so_and_a_second_one_stops_at_once(found):
    interrupts = found["interrupts"]
    assert interrupts["statuses"] == [130, 130] and interrupts["step"] == 4
    assert "stopping after this step, to save it; press Ctrl-C again" in interrupts["printed"]
    assert "interrupted: step 4 is saved; run the same command again to continue" in interrupts["printed"]
    assert interrupts["impatient"] == [130] and interrupts["last_words"].endswith("interrupted\n")


def test_another_number_of_processes_goes_on_and_says_what_differs(found):
    other = found["other_worlds"]
    assert other["statuses"] == [[75, 75], [75], [0, 0]]
    for then, now in ((2, 1), (1, 2)):
        assert f"written by {then} processes, now there are {now}: training continues" in other["printed"]
        assert f"the global batch was {2 * then} images and is {2 * now} now" in other["printed"]
    assert other["images_seen"] == [4, 8, 12, 16, 18, 20, 22, 24, *range(28, 28 + 4 * 10, 4)]


def test_the_error_of_one_rank_ends_all_with_one_sentence(found):
    broken = found["broken_data"]
    assert broken["statuses"] == [1, 1]
    assert broken["printed"][0].endswith("error: rank 1: too many broken samples\n")
    assert broken["printed"][1] == ""


def test_a_full_disk_leaves_the_last_checkpoint_and_the_log(found):
    full = found["full_disk"]
    assert full["statuses"] == [1, 1]
    assert full["left"] == ["checkpoint-2", "checkpoint-4", "config.yaml", "metrics.jsonl"] and full["last_step"] == 6
    sentence = full["printed"].splitlines()[-1]
    assert sentence.startswith("error: rank 0: cannot write to") and "File too large" in sentence
    assert sentence.endswith("free space there; the same command then continues from checkpoint-4")
    assert full["fixed"] == [0, 0] and full["differences"] == []
