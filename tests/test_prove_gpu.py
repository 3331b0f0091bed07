"""scripts/prove_gpu.py writes what it could measure, and says what it could not."""

import argparse
import contextlib
import json
import sys
import time

import psutil
import pytest
import torch

from modeling import benchmark_closeness
from modeling.benchmark_closeness import EXACT, VARIANTS, compared
from scripts import prove_gpu
from utils.benchmark import peers
from utils.benchmark.items import Setting
from utils.benchmark.peers import SCRIPT, checkout
from utils.errors import UserError

RESULT = {"model": "S", "item": "decode 256", "batch_size": 64, "seconds": 0.04, "seconds_there": 0.1}
RESULT |= {"ratio": 2.5, "peak_memory": 2**30, "peak_memory_there": 3 * 2**30}


def python(code):
    return [sys.executable, "-c", code]


def prove(monkeypatch, folder, parts, seconds=60):
    monkeypatch.setattr(prove_gpu, "parts", lambda arguments: parts)
    flags = ["--device=cpu", f"--seconds={seconds}", "--against=plain"]
    monkeypatch.setattr(sys, "argv", ["prove_gpu.py", f"--output_dir={folder}", *flags])
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
    assert "## broken\n\n```\nno such thing\n```" in report


def test_what_takes_too_long_is_cut_off_with_all_that_it_started(monkeypatch, tmp_path):
    child = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'"
    parts = [("slow", python(f"{child}]).pid); time.sleep(600)"), 0.5), ("next", python("print(1)"), 1.0)]
    began = time.monotonic()
    report = prove(monkeypatch, tmp_path, parts, seconds=20)
    assert "- slow, cut off after 10 s" in report and "- next, " in report and time.monotonic() - began < 60
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(int((tmp_path / "slow.txt").read_text().split()[0]))
        while child.status() != psutil.STATUS_ZOMBIE:  # as it stays where nobody asks for it
            assert time.monotonic() - began < 120
            time.sleep(0.05)


def test_a_report_is_there_after_every_part_and_holds_nothing_of_an_earlier_run(monkeypatch, tmp_path):
    for name in ("table.json", "table-one.json"):
        (tmp_path / name).write_text(json.dumps({"results": [RESULT]}))
    copies = f"import shutil; shutil.copy({str(tmp_path / 'report.md')!r}, {str(tmp_path / 'copy.md')!r})"
    prove(monkeypatch, tmp_path, [("table", python("1"), 1.0), ("table-one", python(copies), 1.0)])
    assert (
        "- table, " in (tmp_path / "copy.md").read_text() and "S decode 256" not in (tmp_path / "report.md").read_text()
    )


def test_some_parts_can_be_asked_for(monkeypatch, tmp_path):
    parts = [("one", python("1"), 1.0), ("two", python("1"), 1.0)]
    monkeypatch.setattr(prove_gpu, "parts", lambda arguments: parts)
    flags = [f"--output_dir={tmp_path}", "--device=cpu", "--against=plain", "--only"]
    monkeypatch.setattr(sys, "argv", ["prove_gpu.py", *flags, "two"])
    prove_gpu.main()
    assert "- two, " in (tmp_path / "report.md").read_text() and not (tmp_path / "one.txt").exists()
    monkeypatch.setattr(sys, "argv", ["prove_gpu.py", *flags, "three"])
    with pytest.raises(UserError, match="--only takes one, two, got three"):
        prove_gpu.main()


def test_without_the_default_revision_all_is_compared_with_plain_float32(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prove_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = argparse.Namespace(against=prove_gpu.AGAINST)
    prove_gpu.choose_other_side(arguments)
    assert arguments.against == "plain" and "warning: compared with plain float32" in capsys.readouterr().err
    with pytest.raises(UserError):
        prove_gpu.choose_other_side(argparse.Namespace(against="HEAD~3"))
    there = tmp_path / prove_gpu.AGAINST / SCRIPT
    there.parent.mkdir(parents=True)
    there.touch()
    arguments = argparse.Namespace(against=prove_gpu.AGAINST)
    prove_gpu.choose_other_side(arguments)
    assert arguments.against == str(tmp_path / prove_gpu.AGAINST)


def test_float32_that_others_are_compared_with_is_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(benchmark_closeness, "images", lambda setting: torch.backends.cudnn.allow_tf32)
    monkeypatch.setattr(benchmark_closeness.benchmark_items, "compute_plainly", lambda: None)
    setting = Setting("tiny", torch.device("cpu"), "bf16", 1, lengths=[1])
    assert next(benchmark_closeness.variant(setting, EXACT, 1)) == ("images", False)


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


def test_what_one_side_had_no_time_for_is_not_compared():
    found = {name: {"images": torch.ones(2), "stage1": torch.ones(3)} for name in VARIANTS}
    del found[EXACT]["stage1"]
    text = "\n".join(compared(found))
    assert "| images |" in text and "stage1" not in text and "stage2" not in text


def test_a_folder_is_as_good_as_a_revision(tmp_path):
    (tmp_path / SCRIPT).parent.mkdir()
    (tmp_path / SCRIPT).touch()
    with checkout(str(tmp_path)) as folder:
        assert folder == tmp_path
    assert tmp_path.is_dir()
