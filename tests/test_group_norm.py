"""GroupNorm with SiLU by Triton is that of torch, forward and backward; Triton's interpreter runs the kernels here."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling.modules import conv, group_norm
from modeling.modules.conv import ConvDecoder
from modeling.modules.group_norm import norm_silu, plain_norm_silu
from utils.paths import ROOT

# (shape, groups, mean of the input, its type)
CASES = {
    "published": ((2, 128, 9, 8), 32, 0.0, torch.float32),
    "widest": ((1, 512, 3, 3), 32, 0.0, torch.float32),
    "several tiles, the last not full": ((1, 128, 10, 13), 32, 0.0, torch.float32),
    "several tiles a part": ((1, 4, 260, 260), 4, 0.0, torch.float32),
    "a channel a group": ((2, 8, 5, 7), 8, 0.0, torch.float32),
    "one position": ((2, 64, 1, 1), 8, 0.0, torch.float32),
    "far from zero": ((1, 32, 16, 16), 8, 100.0, torch.float32),
    "bfloat16": ((2, 64, 6, 7), 16, 0.0, torch.bfloat16),
}
INTERPRET = """
import sys, torch
from modeling.modules.group_norm_kernels import GroupNormSiLU

given, found = torch.load(sys.argv[1], weights_only=True), {}
for name, (groups, gradient, *tensors) in given.items():
    tensors = [tensor.requires_grad_() for tensor in tensors]
    y = GroupNormSiLU.apply(*tensors, groups, 1e-6)
    found[name] = [y.detach(), *torch.autograd.grad(y, tensors, gradient)]
torch.save(found, sys.argv[2])
"""
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from modeling.modules import group_norm_kernels

SIZES = {"C": 128, "G": 32, "ROWS": 32, "PARTS": 64}
KINDS = {"S": "i32", "PART": "i32", "parts": "i32", "eps": "fp32"}
KINDS |= dict.fromkeys(("x", "y", "gradient", "out"), "*bf16") | dict.fromkeys(SIZES, "constexpr")
kernels = [getattr(group_norm_kernels, name) for name in
           ("_moments", "_merge", "_normalise", "_sum_gradients", "_spread_gradients")]
for kernel in kernels:
    kinds = {name: KINDS.get(name, "*fp32") for name in kernel.arg_names}
    sizes = {name: SIZES[name] for name in kernel.arg_names if name in SIZES}
    made = triton.compile(ASTSource(kernel, kinds, sizes), target=GPUTarget("cuda", 90, 32))
    print(len(made.asm["cubin"]))
"""


def ran(code, *arguments, **environment):
    pytest.importorskip("triton")
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def case(name):
    """Number of groups, gradient of the result, input, weight and bias."""
    shape, groups, mean, dtype = CASES[name]
    random = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(shape, generator=random) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=random) for _ in range(2))
    return groups, gradient.to(dtype), (x + mean).to(dtype), weight, bias


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Result and gradients of every case by the kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    torch.save({name: case(name) for name in CASES}, folder / "given.pt")
    ran(INTERPRET, folder / "given.pt", folder / "found.pt", TRITON_INTERPRET="1")
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_compute_what_torch_does(interpreted, name):
    groups, gradient, *tensors = case(name)
    dtype = tensors[0].dtype
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    y = F.silu(F.group_norm(exact[0], groups, *exact[1:], eps=1e-6))
    expected = [y.detach(), *torch.autograd.grad(y, exact, gradient.double())]
    found = interpreted[name]
    assert [one.dtype for one in found] == [dtype, dtype, torch.float32, torch.float32]
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in found[:2])
    for one, goal in zip(found, expected, strict=True):
        tolerance = 1e-2 if one.dtype == torch.bfloat16 else 1e-4  # bfloat16's own rounding is 4e-3
        torch.testing.assert_close(one.double(), goal, rtol=tolerance, atol=tolerance)


def test_the_kernels_compile_for_an_h100():
    sizes = ran(COMPILE).split()
    assert len(sizes) == 5 and all(int(size) > 0 for size in sizes)


def test_on_a_cpu_torch_computes_and_the_kernels_are_not_asked_for(monkeypatch):
    monkeypatch.setattr(group_norm, "_kernels", lambda device: pytest.fail("the kernels are for CUDA"))
    norm, x = nn.GroupNorm(4, 8), torch.randn(2, 8, 3, 3)
    assert torch.equal(norm_silu(x, norm), F.silu(norm(x)))
    with torch.no_grad():
        assert torch.equal(norm_silu(x, norm), plain_norm_silu(x, norm))


@pytest.mark.parametrize("side, suits", [(2048, True), (4096, False)])
def test_images_of_more_numbers_than_the_kernels_can_index_are_for_torch(side, suits):
    shape = torch.Size((1, 128, side, side))
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=shape, numel=shape.numel)
    assert group_norm._suits(x, nn.GroupNorm(32, 128)) == suits


def test_without_kernels_one_sentence_says_so(monkeypatch, capsys):
    group_norm._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "modeling.modules.group_norm_kernels", None)  # the import fails
    try:
        device = torch.device("cuda")
        assert group_norm._kernels(device) is None and group_norm._kernels(device) is None
        assert not group_norm.has_kernels(device)
    finally:
        group_norm._kernels.cache_clear()
    assert capsys.readouterr().err.count("warning: GroupNorm runs by torch") == 1


# The convolution after an enlargement


@pytest.mark.parametrize("bias", [True, False])
def test_one_transposed_convolution_has_the_gradients_of_enlarging_and_convolving(bias):
    torch.manual_seed(0)
    layer = nn.Conv2d(5, 6, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 5, 4, 3, dtype=torch.double, requires_grad=True)
    plain = layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    folded = conv._enlarged_by_transposing(x, layer)
    torch.testing.assert_close(folded, plain)
    given = torch.randn_like(plain)
    ours, theirs = (torch.autograd.grad(one, [x, *layer.parameters()], given) for one in (folded, plain))
    for mine, goal in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, goal)


def test_training_on_a_cpu_enlarges_as_ever(monkeypatch):
    monkeypatch.setattr(conv, "_enlarged_by_transposing", lambda *_: pytest.fail("for CUDA and for inference"))
    decoder = ConvDecoder(channels=4, channel_multipliers=[1, 2], num_res_blocks=1, latent_channels=3, norm_groups=2)
    decoder(torch.randn(1, 3, 2, 2)).sum().backward()


def test_where_the_kernels_are_a_level_is_not_compiled(monkeypatch):
    for there in (True, False):
        monkeypatch.setattr(conv, "has_kernels", lambda device, there=there: there)
        level = conv.Level(4, 4, num_res_blocks=1, norm_groups=2)
        level.compile()
        assert (level._compiled_call_impl is None) == there
