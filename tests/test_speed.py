"""Compiled networks are the same networks."""

import torch
from omegaconf import OmegaConf

from modeling.modules.blocks import TransformerBlock
from modeling.one_d_piece import OneDPiece
from tests.fill import fill
from utils.config import load_config
from utils.paths import ROOT
from utils.speed import compile_blocks


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
