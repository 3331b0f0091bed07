"""Compiled networks are the same networks; what torch keeps private is no condition."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from modeling.modules import blocks
from modeling.modules.blocks import TransformerBlock
from modeling.one_d_piece import OneDPiece
from tests.fill import fill
from utils.config import load_config
from utils.errors import UserError
from utils.paths import ROOT
from utils.speed import (
    LONG_WORK,
    asked_to_compile,
    compile_blocks,
    cpu_has_bfloat16,
    cpu_has_float16,
    pays_to_compile,
)


def tiny_tokenizer():
    config = load_config(ROOT / "configs/fashion/eval.yaml")
    OmegaConf.update(config, "model.pixel_vqgan.channels", 32)
    return fill(OneDPiece(config), 0).eval()


class Counter:
    """A backend of torch.compile that counts the graphs it is given and runs them as they are."""

    def __init__(self):
        self.num_graphs = 0

    def __call__(self, graph, inputs):
        self.num_graphs += 1
        return graph.forward


def test_compiled_blocks_compute_the_same_and_keep_their_names():
    eager, compiled, counter = tiny_tokenizer(), tiny_tokenizer(), Counter()
    compile_blocks(compiled, backend=counter)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images)[0], eager(images)[0], rtol=1e-3, atol=1e-4)
    assert counter.num_graphs > 0


def test_what_does_not_compile_runs_eagerly_and_says_so_once(monkeypatch, capsys):
    def failing(name):
        def backend(graph, inputs):
            raise RuntimeError("no compiler\nand a long explanation")

        return backend

    torch.compiler.reset()
    monkeypatch.setattr("torch._dynamo.lookup_backend", failing)
    eager, compiled = tiny_tokenizer(), tiny_tokenizer()
    compile_blocks(compiled)
    images = torch.rand(2, 3, 32, 32)
    for _ in range(2):
        result = compiled(images)[0]
        torch.testing.assert_close(result, eager(images)[0], rtol=1e-3, atol=1e-4)
    result.sum().backward()
    said = capsys.readouterr().err
    assert said == "warning: torch.compile failed, so what it could not compile runs eagerly (no compiler)\n"


@pytest.mark.parametrize(
    ("asked", "device", "num_passes", "expected"),
    [
        (None, "cuda", LONG_WORK, True),
        (None, "cuda", LONG_WORK - 1, False),
        (None, "cpu", 10 * LONG_WORK, False),
        (None, "mps", 10 * LONG_WORK, False),
        (True, "cpu", 1, True),
        (False, "cuda", 10 * LONG_WORK, False),
    ],
)
def test_compiling_is_for_long_work_on_cuda_unless_asked_otherwise(asked, device, num_passes, expected):
    assert pays_to_compile(asked, torch.device(device), num_passes) == expected


def test_a_config_says_true_false_or_auto():
    assert [asked_to_compile(value) for value in (True, "False", "auto")] == [True, False, None]
    with pytest.raises(UserError, match="training.compile must be True, False or auto, got on"):
        asked_to_compile("on")


def test_a_block_compiles_as_one_graph():
    counter, block = Counter(), TransformerBlock(width=16, num_heads=2)
    x = torch.rand(2, 5, 16)
    torch.testing.assert_close(torch.compile(block, backend=counter, fullgraph=True)(x), block(x))
    assert counter.num_graphs == 1


def test_tail_drop_compiles_a_bounded_number_of_times():
    torch.compiler.reset()
    model, counter = tiny_tokenizer(), Counter()
    compile_blocks(model.decoder, backend=counter)
    z_quantized = torch.rand(2, model.quantize.embedding.embedding_dim, 1, 32)
    with torch.no_grad():
        for length in (32, 5, 17, 9, 24, 3):
            model.decoder(z_quantized[..., :length])
    assert counter.num_graphs <= 2  # for the first length, and for any


@pytest.mark.parametrize(
    ("line", "bfloat16", "float16"),
    [
        ("flags\t\t: fpu avx2 fma", False, False),
        ("flags\t\t: fpu avx512f avx512bw avx512vl avx512dq avx512_vnni", False, False),  # a common cloud machine
        ("flags\t\t: fpu avx512f avx512bw avx512vl avx512_bf16", True, False),
        ("flags\t\t: fpu avx512f avx512_fp16 amx_bf16 amx_tile", True, True),
        ("Features\t: fp asimd fphp asimdhp", False, True),
        ("Features\t: fp asimd fphp asimdhp i8mm bf16", True, True),
        ("processor\t: 0", False, False),
    ],
)
def test_half_precision_is_taken_where_the_processor_has_instructions_for_it(
    monkeypatch, tmp_path, line, bfloat16, float16
):
    """oneDNN says yes on every processor with AVX-512, and emulates bfloat16 at a third of float32's speed."""
    names = ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")
    monkeypatch.setattr("torch.ops.mkldnn", SimpleNamespace(**dict.fromkeys(names, lambda: True)))
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr("utils.speed.CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: any\n{line}\nbugs\t: bf16\n")
    assert (cpu_has_bfloat16(), cpu_has_float16()) == (bfloat16, float16)


def test_without_a_list_of_instructions_torch_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.ops.mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True))
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr("utils.speed.CPU_INFO", tmp_path / "there is none")
    for answer in (True, False):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda answer=answer: answer, raising=False)
        assert cpu_has_bfloat16() == answer


@pytest.mark.parametrize("missing", ["torch.cpu._is_avx512_supported", "torch.ops.mkldnn"])
def test_without_a_private_function_of_torch_linear_layers_take_the_plain_path(monkeypatch, missing):
    layer, x = blocks.Linear(8, 8), torch.rand(2, 8)
    if missing == "torch.ops.mkldnn":
        monkeypatch.setattr(missing, SimpleNamespace())
        assert not cpu_has_bfloat16() and not cpu_has_float16()
    else:
        monkeypatch.delattr(missing)
    assert blocks.faster_in_onednn() == ()
    monkeypatch.setattr(blocks, "ONEDNN_DTYPES", ())
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_a_torch_without_any_of_them_compiles_and_encodes():
    code = """
import types, torch
from utils.speed import compile_blocks

class Settings:
    def __getattr__(self, name, real=torch._dynamo.config):
        if name == "recompile_limit":
            raise AttributeError(name)
        return getattr(real, name)

torch._dynamo.config = Settings()
compile_blocks(torch.nn.ModuleList([torch.nn.Linear(1, 1)]))
del torch.cpu._is_avx512_supported
torch.ops.mkldnn = types.SimpleNamespace()
from modeling.modules.blocks import ONEDNN_DTYPES
from modeling.one_d_piece import OneDPiece
with torch.no_grad():
    z_quantized, _ = OneDPiece.from_pretrained("one-d-piece_fashion").encode(torch.rand(1, 3, 32, 32))
print(ONEDNN_DTYPES, z_quantized.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "() torch.Size([1, 12, 1, 32])\n", done.stderr
