"""When a block is recorded and replayed; what records here is a double, since there is no CUDA."""

import contextlib

import pytest
import torch
from torch import nn

from utils import replay
from utils.benchmark.measure import count_flops
from utils.replay import MOST_KINDS, SMALL_BATCH, Replayed, record_graph, replay_blocks


class Double:
    """Records nothing, and counts: (recordings, replays)."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, forward, inputs):
        self.recorded += 1

        def replay(*given):
            self.replayed += 1
            return forward(*given)

        return replay

    @property
    def counts(self):
        return self.recorded, self.replayed


@pytest.fixture
def double():
    return Double()


@pytest.fixture
def block(double):
    """A layer that is replayed on the CPU, in evaluation mode."""
    block = nn.Linear(3, 3).eval()
    block.forward = Replayed(block, double, device_type="cpu")
    return block


def test_the_first_call_is_as_ever_and_the_second_is_recorded(block, double):
    x = torch.rand(2, 3)
    with torch.no_grad():
        for counts in ((0, 0), (1, 1), (1, 2), (1, 3)):
            assert torch.equal(block(x), nn.functional.linear(x, block.weight, block.bias))
            assert double.counts == counts


def test_each_kind_of_input_is_recorded_by_itself(block, double):
    with torch.no_grad():
        for _ in range(3):
            for x in (torch.rand(2, 3), torch.rand(4, 3), torch.rand(3, 2).mT):
                block(x)
    assert double.recorded == 3 - 1 + 1


def test_new_weights_are_recorded_anew(block, double):
    x = torch.rand(2, 3)
    with torch.no_grad():
        for _ in range(3):
            block(x)
        block.weight = nn.Parameter(torch.zeros(3, 3))
        assert torch.equal(block(x), block.bias.expand(2, 3)) and double.recorded == 1
        block(x)
    assert double.recorded == 2


def test_new_buffers_are_recorded_anew(double):
    block = nn.BatchNorm1d(3).eval()
    block.forward = Replayed(block, double, device_type="cpu")
    x = torch.rand(2, 3)
    with torch.no_grad():
        for _ in range(3):
            block(x)
        block.running_mean = torch.ones(3)
        block(x)
        assert double.recorded == 1
        block(x)
    assert double.recorded == 2


def test_inference_mode_is_recorded_by_itself(block, double):
    """Its tensors may not be written to outside it, as replaying does to a recording's inputs."""
    x = torch.rand(2, 3)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            block(x)
            block(x)
    assert double.recorded == 2


def test_operations_are_counted_as_if_nothing_were_replayed(block, double):
    x = torch.rand(2, 3)
    with torch.no_grad():
        for _ in range(3):
            assert sum(count_flops(lambda: [block(x) for _ in range(5)]).values()) == 5 * 2 * 2 * 3 * 3
    assert double.counts == (0, 0)


def test_a_recording_is_made_on_a_stream_of_its_device_and_that_of_before_comes_back(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def context(*given, **options):
        name = str(options.get("stream", given[0]))
        seen.append(name)
        try:
            yield
        finally:
            seen.append(f"end of {name}")

    def failing(x, nothing):
        raise ValueError

    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, context)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"side stream of {device}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "memory")
    monkeypatch.setattr(replay, "_autocast_without_cache", contextlib.nullcontext)
    replay._side.cache_clear()
    try:
        with pytest.raises(ValueError):
            record_graph(failing, (torch.rand(1, device="meta"), None))
    finally:
        replay._side.cache_clear()
    entered = ["meta", "stream of meta", "side stream of meta"]
    assert seen == [*entered, *(f"end of {name}" for name in reversed(entered))]


def test_training_gradients_and_large_batches_are_as_ever(block, double):
    for _ in range(3):
        block(torch.rand(2, 3))  # with gradients
    with torch.no_grad():
        for _ in range(3):
            block(torch.rand(SMALL_BATCH + 1, 3))
            block.train()(torch.rand(2, 3))
            block.eval()
    assert double.counts == (0, 0)


def test_only_so_many_kinds_are_remembered(block, double):
    with torch.no_grad():
        for _ in range(3):
            for length in range(MOST_KINDS + 5):
                block(torch.rand(1, length + 1, 3))
    assert double.recorded == MOST_KINDS


def test_what_cannot_be_recorded_runs_as_ever_and_says_so_once(block, capsys):
    def failing(forward, inputs):
        raise RuntimeError("operation not permitted\nwhen capturing")

    replay._warn.cache_clear()
    block.forward.record = failing
    with torch.no_grad():
        for size in (1, 2):
            for _ in range(3):
                assert block(torch.rand(size, 3)).shape == (size, 3)
    said = capsys.readouterr().err
    assert said == (
        "warning: one image at a time is slower than it could be: no CUDA graph (operation not permitted)\n"
    )


def test_every_repeated_block_is_replayed_and_on_a_cpu_nothing_changes():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(3, 3) for _ in range(2)), "head": nn.Linear(3, 3)}).eval()
    names = list(model.state_dict())
    replay_blocks(model)
    replay_blocks(model)
    assert all(isinstance(block.forward, Replayed) for block in model["blocks"])
    assert not isinstance(model["blocks"][0].forward.forward, Replayed) and list(model.state_dict()) == names
    with torch.no_grad():
        for _ in range(3):
            model["blocks"][0](torch.rand(1, 3))
    assert not model["blocks"][0].forward.replays
