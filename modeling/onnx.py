"""A tokenizer as two ONNX graphs, which run without PyTorch: image to tokens, and a prefix of them to an image."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from modeling.titok import TiTok
from modeling.tokenizers import encode_tokens
from utils.errors import UserError
from utils.files import replacing
from utils.result_folder import ResultFolder

OPSET = 18
ENCODER, DECODER = "encoder", "decoder"
LARGE = 256  # values that a tensor has before half precision is worth a node


class EncoderGraph(nn.Module):
    """pixels (B, 3, P, P) float32 in [0, 1] -> tokens (B, N) int64."""

    inputs, outputs = ("pixels",), ("tokens",)

    def __init__(self, tokenizer: TiTok):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tokenizer.encode(pixels)[1]["min_encoding_indices"][:, 0]

    def examples(self) -> tuple[Tensor, ...]:
        """What the graph is traced with; a batch of 2, because a size of 1 would be taken for a constant."""
        return (torch.rand(2, 3, self.tokenizer.image_size, self.tokenizer.image_size),)


class DecoderGraph(nn.Module):
    """tokens (B, N) int64, length (B,) int64 in 1..N -> image (B, 3, P, P) float32 in [0, 1].

    All N tokens are always given; those from `length` on are masked, and may be anything in 0..V-1. So one graph of
    fixed size serves every length.
    """

    inputs, outputs = ("tokens", "length"), ("image",)

    def __init__(self, tokenizer: TiTok):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, tokens: Tensor, length: Tensor) -> Tensor:
        z_quantized = self.tokenizer.quantize.lookup(tokens[:, None]).movedim(-1, 1)  # (B, C, 1, N)
        features = self.tokenizer.decoder(z_quantized, length)
        return self.tokenizer._from_features(features).clamp(0, 1)

    def examples(self) -> tuple[Tensor, ...]:
        total = self.tokenizer.num_latent_tokens
        return torch.randint(self.tokenizer.codebook_size, (2, total)), torch.tensor([max(1, total // 2), total])


def write_onnx(tokenizer: TiTok, folder: Path | ResultFolder, halved: bool = False) -> dict[str, Path]:
    """Write `encoder.onnx` and `decoder.onnx`, each whole or not at all.

    Args:
        tokenizer: In evaluation mode, on the CPU, and one that decodes to pixels.
        halved: Store weights in float16 (`encoder_fp16.onnx`, ...), half the bytes; the runtime widens them when it
            loads the file, and computes in float32.

    Raises:
        UserError: The packages of the extra `onnx` are missing.
    """
    if not tokenizer.finetune_decoder:
        raise UserError("only a stage-2 tokenizer decodes to pixels: this one holds stage-1 weights")
    paths = {}
    for name, graph in ((ENCODER, EncoderGraph(tokenizer)), (DECODER, DecoderGraph(tokenizer))):
        model = _exported(graph.eval())
        if halved:
            halve(model)
        paths[name] = folder / onnx_name(name, halved)
        with replacing(paths[name]) as aside:
            aside.write_bytes(model.SerializeToString())
    return paths


def onnx_name(name: str, halved: bool) -> str:
    """The file of a graph."""
    return f"{name}{'_fp16' if halved else ''}.onnx"


def _exported(graph: nn.Module):
    """The ONNX model of a graph, of any batch size."""
    try:
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise UserError("ONNX needs three packages more: pip install -c constraints.txt -e '.[onnx]'") from error
    dynamic = {name: {0: torch.export.Dim.DYNAMIC} for name in graph.inputs}
    with torch.no_grad():
        program = torch.onnx.export(
            graph,
            graph.examples(),
            input_names=graph.inputs,
            output_names=graph.outputs,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            dynamo=True,
            verbose=False,
        )
    return program.model_proto


def halve(model) -> None:
    """Store every large float32 tensor of an ONNX model as float16, widened by a Cast where it is used."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < LARGE:
            continue
        with np.errstate(over="ignore"):
            half = numpy_helper.to_array(tensor).astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(f"the weights {tensor.name} do not fit float16 (up to 65,504): export in fp32 alone")
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_fp16"))
        casts.append(helper.make_node("Cast", [f"{name}_fp16"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


class OnnxTokenizer:
    """The two graphs in onnxruntime, on the CPU.

    Args:
        paths: As `write_onnx` returns them.
    """

    def __init__(self, paths: dict[str, Path]):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.sessions = {
            name: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for name, path in paths.items()
        }

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Tokens (B, N) int64 of pixels (B, 3, P, P) float32 in [0, 1]."""
        return self.sessions[ENCODER].run(None, {"pixels": pixels})[0]

    def decode(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """Images (B, 3, P, P) float32 in [0, 1] of the first `length` of the tokens (B, N) int64."""
        lengths = np.full(len(tokens), length, dtype=np.int64)
        return self.sessions[DECODER].run(None, {"tokens": tokens, "length": lengths})[0]


def as_halved(tokenizer: TiTok) -> None:
    """Round a tokenizer's weights to float16, in place: what `write_onnx(..., halved=True)` stores."""
    for value in tokenizer.state_dict().values():
        if value.is_floating_point() and value.numel() >= LARGE:
            value.copy_(value.half())


def differences(
    tokenizer: TiTok, exported: OnnxTokenizer, pixels: Tensor, lengths: Sequence[int]
) -> Iterator[tuple[int, float]]:
    """How far the exported decoder is from the tokenizer at each length: yields (length, most grey levels of 255).

    Args:
        pixels: (B, 3, P, P) in [0, 1].

    Raises:
        UserError: The exported encoder gives other tokens.
    """
    tokens = encode_tokens(tokenizer, pixels)
    found = exported.encode(pixels.numpy())
    if wrong := int((found != tokens.numpy()).sum()):
        raise UserError(
            f"the exported encoder gives {wrong} of {found.size} tokens otherwise than PyTorch: keep to PyTorch"
        )
    for length in lengths:
        with torch.no_grad():
            expected = tokenizer.decode_tokens(tokens, length=length).clamp(0, 1).numpy()
        got = exported.decode(tokens.numpy(), length)
        yield length, float(np.abs(got - expected).max() * 255)
