"""What the torch backend calls of CUDA, on the processor: graphs are computed when they are recorded, and their memory has CUDA's rule."""

import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


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


def imitate_int4(monkeypatch, outputs=8):
    """Have PyTorch pack and multiply weights of four bits as it does on a device: tiles of 8 outputs on NVIDIA's, of 16 on AMD's.

    The order is that of PyTorch's source (aten/src/ATen/native/cuda/int4mm.cu), written as one thread of the device after the other.
    """

    def pack(pairs, inner):
        assert pairs.dtype == torch.uint8
        assert pairs.is_contiguous()
        assert pairs.shape[1] * 2 % (16 * inner) == 0
        assert len(pairs) % outputs == 0
        shape = torch.ops.aten._convert_weight_to_int4pack(pairs.to("meta"), inner).shape
        tiles = pairs.reshape(len(pairs) // outputs, outputs, -1, inner // 2, 16).permute(0, 2, 3, 1, 4).to(torch.int64)
        packed = torch.empty(*tiles.shape[:2], 4 * outputs, inner // 2, dtype=torch.int64)
        for thread in range(4 * outputs):
            row, four = (thread // 4, thread % 4) if outputs == 8 else (thread % 16, thread // 16)
            columns = [four, four + 4, four + 8, four + 12] if outputs == 8 else [2 * four + i for i in (0, 1, 8, 9)]
            parts = [tiles[:, :, :, row, column] for column in columns]
            uppers, lowers = ([part >> 4 for part in parts], [part & 15 for part in parts])
            packed[:, :, thread] = sum(part << 4 * place for place, part in enumerate(uppers + lowers))
        return torch.where(packed < 1 << 31, packed, packed - (1 << 32)).to(torch.int32).reshape(shape)

    kept = []

    def packing(pairs, inner):
        kept.append((packed := pack(pairs, inner), pairs))
        return packed

    def multiply(x, packed, group, scales):
        assert x.dtype == scales.dtype == torch.bfloat16
        assert x.is_contiguous()
        with FakeTensorMode() as known:  # PyTorch's own word for what the operator takes
            torch.ops.aten._weight_int4pack_mm(known.from_tensor(x), known.from_tensor(packed), group, known.from_tensor(scales))
        (pairs,) = [pairs for each, pairs in kept if each is packed]
        codes = torch.stack((pairs >> 4, pairs & 15), dim=2).flatten(1).double()
        assert scales.shape == (codes.shape[1] // group, len(codes), 2)
        scale, middle = scales.double().repeat_interleave(group, 0).unbind(2)
        return (x.double() @ ((codes.t() - 8) * scale + middle)).bfloat16()

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", packing)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", multiply)
