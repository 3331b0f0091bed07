"""The commands of README and docs: every script, flag and configuration in them exists; the cheap ones are run."""

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from PIL import Image

from utils.config import load_config
from utils.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]
TOKENIZE = "python3 scripts/inference_tokenizer.py --image"
INFERENCE = f"{TOKENIZE} assets/fashion/sneaker.png"
ON_THE_HUB = [
    f"{TOKENIZE} assets/photos/chelsea.png --config configs/eval/one-d-piece_s256.yaml",
    "python3 data/convert_imagenet_to_wds.py --output_dir ./imagenet_sharded",
    "bash train_tokenizer.sh configs/training/stage1/one-d-piece_s256.yaml",
]


def blocks(language, page=README):
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def commands(pages=PAGES):
    """Every command of ours in the shell blocks, comments removed, continued lines joined, each once."""
    lines = "\n".join(block for page in pages for block in blocks("bash", page)).replace("\\\n", " ").splitlines()
    words = (shlex.split(line, comments=True) for line in lines)
    return list(
        dict.fromkeys(shlex.join(some) for some in words if any(word.endswith((".py", ".sh")) for word in some))
    )


def script_and_arguments(words):
    """The file of ours that a command starts, and what it is given."""
    place = next(index for index, word in enumerate(words) if word.endswith((".py", ".sh")))
    return words[place], words[place + 1 :]


@cache
def help_of(script):
    """What `script --help` prints; in this process, where torch is loaded once."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0, f"{script} --help"
    return printed.getvalue()


@pytest.mark.parametrize("command", commands())
def test_a_command_names_what_there_is(command):
    words = shlex.split(command)
    words = words[3:] if words[0] == "taskset" else words[2:] if words[0] == "/usr/bin/time" else words
    assert words[0] in ("python3", "bash", "sbatch", "accelerate", "torchrun"), f"how is {words[0]} to be checked?"
    script, arguments = script_and_arguments(words)
    assert (ROOT / script).is_file(), f"{script} does not exist"
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    for flag in flags:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(script)), f"{script} has no flag {flag}"
    if script.endswith(".sh"):  # the launchers take CONFIG a.b=c, the scripts config=CONFIG a.b=c
        arguments = [f"config={arguments[0]}", *arguments[1:]]
    arguments = [word for word in arguments if not word.startswith("$")]  # values kept in a variable
    overrides = [word for word in arguments if re.match(r"[\w.]+=", word)]
    for path in [word.removeprefix("config=") for word in overrides if word.startswith("config=")]:
        load_config(ROOT / path, [word for word in overrides if not word.startswith("config=")])
    for word in arguments:
        if re.match(r"(assets|configs)/", word) and not re.search("[A-Z]{3}", word):  # CONFIG stands for one of a table
            assert (ROOT / word).exists(), f"{word} does not exist"


def test_make_has_the_documented_targets():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make ([\w-]+)", "\n".join(PAGES), re.MULTILINE)) <= set(targets)


def test_the_published_commands_are_there():
    shown = commands()
    for command in (INFERENCE, *ON_THE_HUB):
        assert command in shown or command.replace("bash", "sbatch") in shown, command


@pytest.fixture
def run_as_written(tmp_path):
    """Run a command of the README in a folder that looks like the repository and keeps what it writes."""
    for path in ROOT.iterdir():
        if path.name not in ("output", "checkpoints", "imagenet_sharded", "fashion_mnist") and path.name[0] != ".":
            (tmp_path / path.name).symlink_to(path)

    def run_as_written(*words):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HF_"))}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "WANDB_MODE": "disabled"}
        environment |= {"ODP_ENV": sys.prefix, "NUM_PROCESSES": "1", "OMP_NUM_THREADS": "1"}
        words = [sys.executable if word == "python3" else word for word in words]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    return run_as_written


def test_the_first_command_shows_an_image_at_every_length(run_as_written, tmp_path):
    result = run_as_written(*shlex.split(INFERENCE))
    assert result.returncode == 0, result.stderr
    out = tmp_path / "output/inference_tokenizer"
    assert sorted(int(path.stem.removeprefix("sneaker_")) for path in out.glob("sneaker_*.png")) == [1, 2, 4, 8, 16, 32]
    assert np.load(out / "tokens.npz")["tokens"].shape == (1, 32)
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 7 * 128
    rows = [line.split() for line in result.stdout.splitlines() if re.match(r" *\d+ ", line)]
    quality = {int(row[0]): float(row[3]) for row in rows}
    assert quality[32] > quality[1]


@pytest.mark.parametrize("command", ON_THE_HUB)
def test_what_needs_the_hub_says_so_where_there_is_none(run_as_written, command):
    result = run_as_written(*shlex.split(command))
    assert result.returncode == 1, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    assert "hub" in errors[0].lower()


@pytest.mark.parametrize(
    ("example", "file"), list(zip(blocks("python"), ["sneaker_4_tokens.png", "dress.png"], strict=True))
)
def test_the_python_examples_run(run_as_written, tmp_path, example, file):
    result = run_as_written("python3", "-c", example)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / file) as image:
        assert image.size == (32, 32)
