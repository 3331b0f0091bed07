"""What belongs to the project as a whole: one version, and no trap in a wheel."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from utils.paths import ROOT

PACKAGES = ("modeling", "data", "codec", "scripts", "utils")


def test_there_is_one_version():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


@pytest.mark.parametrize("module", ["modeling.one_d_piece", "data.transforms", "scripts.inference_tokenizer"])
def test_a_copy_without_configurations_says_to_use_a_clone(tmp_path, module):
    for package in PACKAGES:  # what a wheel holds
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", f"import {module}"], cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: One-D-Piece runs from a clone"), done.stderr


@pytest.mark.parametrize(
    "name, words",
    [
        ("data", ["-c", "import modeling.one_d_piece"]),
        ("modeling", ["-c", "import codec.files"]),
        ("utils", ["-c", "import codec.files"]),
        ("utils", ["-c", "import modeling.one_d_piece"]),
        ("utils", ["-c", "import data.transforms"]),
    ],
)
@pytest.mark.parametrize("is_file", [True, False])
def test_another_projects_package_of_our_names_is_said(tmp_path, name, words, is_file):
    place = tmp_path / f"{name}.py" if is_file else tmp_path / name / "__init__.py"
    place.parent.mkdir(exist_ok=True)
    place.touch()
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith(f"ImportError: Python finds {place} instead of"), done.stderr


COMMANDS = [
    "data/make_shards.py",
    "scripts/benchmark.py",
    "scripts/compress.py",
    "scripts/launch_node.py",
    "scripts/train_generator.py",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_finds_our_packages_before_another_projects(tmp_path, command):
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, ROOT / command, "--help"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "usage: " in done.stdout
