"""What the torch backend calls of CUDA, on the processor: graphs are computed when they are recorded, and their memory has CUDA's rule."""

import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch


class Graph:
    """A recorded graph. Its memory lives as long as any graph in it: what was everybody's last is nobody's again."""

    def pool(self):
        return self.memory

    def replay(self):
        pass


class Memory:
    def __init__(self):
        self.graphs = weakref.WeakSet()


def imitate(monkeypatch):
    """Have torch.cuda record and measure on the processor."""
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextmanager
    def graph(recorded, pool=None):
        assert pool is None or len(pool.graphs), "no graph is left whose memory this is"
        recorded.memory = pool or Memory()
        recorded.memory.graphs.add(recorded)
        yield

    for name, value in {
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "device": lambda _: nullcontext(),
        "get_device_properties": lambda _: SimpleNamespace(multi_processor_count=4),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
