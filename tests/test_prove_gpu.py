"""scripts/prove_gpu.py writes what it could measure, and says what it could not."""

import contextlib
import json
import sys
import time

import psutil
import torch

from modeling.benchmark_closeness import VARIANTS, compared
from scripts import prove_gpu
from utils.benchmark.peers import SCRIPT, checkout

RESULT = {"model": "S", "item": "decode 256", "batch_size": 64, "seconds": 0.04, "seconds_there": 0.1}
RESULT |= {"ratio": 2.5, "peak_memory": 2**30, "peak_memory_there": 3 * 2**30}


def python(code):
    return [sys.executable, "-c", code]


def prove(monkeypatch, folder, parts, seconds=60):
    monkeypatch.setattr(prove_gpu, "parts", lambda arguments: parts)
    monkeypatch.setattr(sys, "argv", ["prove_gpu.py", f"--output_dir={folder}", "--device=cpu", f"--seconds={seconds}"])
    prove_gpu.main()
    return (folder / "report.md").read_text()


def test_the_report_has_what_was_measured_and_says_what_was_not(monkeypatch, tmp_path):
    written = f"open({str(tmp_path / 'table.json')!r}, 'w').write({json.dumps({'results': [RESULT]})!r})"
    parts = [
        ("table", python(written), 1.0),
        ("broken", python("raise SystemExit('no such thing')"), 1.0),
    ]
    report = prove(monkeypatch, tmp_path, parts)
    assert "| S decode 256, 64 | 40.00 | 100.00 | 2.50 | 42 | 1,024 | 3,072 |" in report
    assert "- broken, failed after" in report and "see broken.txt" in report
    assert (tmp_path / "broken.txt").read_text() == "no such thing\n"


def test_what_takes_too_long_is_cut_off_with_all_that_it_started(monkeypatch, tmp_path):
    child = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'"
    parts = [("slow", python(f"{child}]).pid, flush=True); time.sleep(600)"), 0.5), ("next", python("print(1)"), 1.0)]
    began = time.monotonic()
    report = prove(monkeypatch, tmp_path, parts, seconds=20)
    assert "- slow, cut off after 10 s" in report and "- next, " in report and time.monotonic() - began < 40
    with contextlib.suppress(psutil.NoSuchProcess):  # a zombie where nobody asks for it
        assert psutil.Process(int((tmp_path / "slow.txt").read_text().split()[0])).status() == psutil.STATUS_ZOMBIE


def test_when_time_is_up_the_rest_is_left_out(monkeypatch, tmp_path):
    assert "- late, left out, time is up" in prove(monkeypatch, tmp_path, [("late", python("1"), 1.0)], seconds=0)


def test_every_part_is_a_command_of_this_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["prove_gpu.py", f"--output_dir={tmp_path}"])
    parts = prove_gpu.parts(prove_gpu.parse_arguments())
    assert len({name for name, _, _ in parts}) == len(parts)
    assert all(command[0] == sys.executable for _, command, _ in parts)


def test_differences_are_relative_to_the_second_of_a_pair():
    found = {
        name: {"images": torch.full((2,), value), "stage1": torch.ones(3), "stage2": torch.ones(3)}
        for name, value in zip(VARIANTS, (1.02, 1.01, 1.0), strict=True)
    }
    assert "| images | 2.00% | 1.00% | 0.99% |" in compared(found)


def test_a_folder_is_as_good_as_a_revision(tmp_path):
    (tmp_path / SCRIPT).parent.mkdir()
    (tmp_path / SCRIPT).touch()
    with checkout(str(tmp_path)) as folder:
        assert folder == tmp_path
    assert tmp_path.is_dir()
