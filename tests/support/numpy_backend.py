"""A right backend in numpy alone: paged, batched, float32. What an author's first version may look like, and what mutants spoil."""

from dataclasses import replace
from itertools import pairwise

import numpy as np

from penstock.backends.contract import Available, Capabilities, DType, KvChunk, KvSpec, Registration, StepOutput, TopOutput
from penstock.backends.kv_blocks import check_chunk, check_copy, slots_of, transfer_slots
from penstock.backends.kv_copies import native_layout, read_blocks, write_blocks
from penstock.backends.kv_memory import count_blocks, free_memory
from penstock.backends.safetensors import Weights
from penstock.backends.step_limits import StepLimits
from penstock.common.service import StartError

BLOCK_SIZE = 16


class NumpyModel:
    """A `GenerativeModel`; its cache is [layer, 2 (key, value), slot, kv head, head dim]."""

    dtype, device = DType.F32, "cpu"
    most_top = 40

    def __init__(self, spec, config):
        self.spec, self.config = spec.decoder, config
        self.check_settings()
        with Weights(spec) as weights:
            self.weights = {name: weights[name].astype(np.float32) for name in spec.decoder.weight_shapes()}
        self.kv = self.make_kv()
        self.cache = np.zeros(
            (self.spec.layers, 2, self.kv.blocks * BLOCK_SIZE, self.spec.kv_heads, self.spec.head_dim), np.float32
        )

    def check_settings(self):
        if self.config.dtype not in {None, DType.F32}:
            raise StartError(f"dtype: {self.config.dtype} is none of this backend's; it has f32")

    def make_kv(self):
        size = self.spec.layers * 2 * BLOCK_SIZE * self.spec.kv_heads * self.spec.head_dim * 4
        blocks = count_blocks(self.spec, self.config, BLOCK_SIZE, size, free_memory())
        kv = KvSpec(BLOCK_SIZE, blocks, size, "plain", "f32", (self.spec.layers, self.spec.kv_heads, self.spec.head_dim))
        return replace(kv, native_layout=native_layout("layer.kv.token.head.dim", kv, "float32"))

    def check(self, batch):
        StepLimits.of(self.spec, self.config, self.kv).check(batch)

    def step(self, batch):
        self.check(batch)
        names = self.spec.weights
        sequences = [self.tables(batch, s) for s in range(len(batch.past_lengths))]
        x = self.weights[names.embedding][batch.token_ids]
        angles = self.positions(batch)[:, None].astype(np.float32) * self.spec.rope.inverse_frequencies()
        for layer in range(self.spec.layers):
            h = self.norm(x, names.layer.input_norm.format(layer=layer))
            q, k, v = self.heads(h, "q", layer), self.heads(h, "k", layer), self.heads(h, "v", layer)
            q, k = self.rotate(q, angles), self.rotate(k, angles)
            for rows, past, slots in sequences:
                self.write(layer, slots[past:], k[rows], v[rows])
            attended = [self.attend(q[rows], past, self.cache[layer][:, slots]) for rows, past, slots in sequences]
            x = x + self.linear(np.concatenate(attended), "o", layer)
            h = self.norm(x, names.layer.post_attention_norm.format(layer=layer))
            gate = self.linear(h, "gate", layer)
            x = x + self.linear(gate / (1 + np.exp(-gate)) * self.linear(h, "up", layer), "down", layer)
        x = self.norm(x[self.rows(batch)], names.final_norm)
        return StepOutput(self.told(x @ self.weights[names.lm_head or names.embedding].T))

    def step_top(self, batch, request):
        logits = self.top_logits = self.step(batch).logits.copy()
        told = [self.tell(row, *asked) for row, asked in zip(logits, self.asked(request), strict=True) if asked[0]]
        whole = np.where(request.counts == 0, np.cumsum(request.counts == 0) - 1, -1)
        lengths = np.zeros(len(logits) + 1, np.int64)
        lengths[1:][request.counts > 0] = [len(ids) for ids, *_ in told]
        masses = np.full((len(logits), 2), np.nan)
        masses[request.counts > 0] = np.reshape([masses for *_, masses in told], (-1, 2))
        ids, values, named = (
            np.concatenate([empty, *(one[i] for one in told)]) for i, empty in enumerate((whole[:0], logits[:0, 0], logits[:0, 0]))
        )
        return TopOutput(np.cumsum(lengths), ids, values, named, masses, whole, logits[request.counts == 0])

    def asked(self, request):
        """Of each row how many tokens, which beside them, and at what temperature."""
        named = [request.named[start:end] for start, end in pairwise(request.named_starts)]
        return zip(request.counts, named, np.where(request.temperatures > 0, request.temperatures, 1.0), strict=True)

    def tell(self, row, count, named, temperature):
        others = row.copy()
        others[named] = -np.inf
        ids = self.likeliest(others, count)
        return ids, row[ids], row[named], [self.log_mass(others), self.log_mass(others / np.float64(temperature))]

    def log_mass(self, row):
        return row.max() + np.log(np.exp(row.astype(np.float64) - row.max()).sum())

    def rows_of_top(self, rows):
        return self.top_logits[rows]

    def likeliest(self, row, count):
        return np.flatnonzero(row >= np.sort(row)[-count])

    def tables(self, batch, s):
        """Where a sequence's new tokens stand in the batch, how many are past, and the cache's slots of all."""
        past, start, end = int(batch.past_lengths[s]), int(batch.starts[s]), int(batch.starts[s + 1])
        blocks = batch.block_ids[batch.block_starts[s] : batch.block_starts[s + 1]]
        return slice(start, end), past, slots_of(blocks, np.arange(past + end - start), BLOCK_SIZE)

    def positions(self, batch):
        return batch.positions

    def rows(self, batch):
        return batch.logits_rows

    def told(self, logits):
        return logits

    def write(self, layer, slots, keys, values):
        self.cache[layer, 0, slots], self.cache[layer, 1, slots] = keys, values

    def attend(self, queries, past, kv):
        """[T, heads x dim] of T queries behind `past` tokens over kv, [2, past + T, kv head, dim]."""
        shared = self.spec.heads // self.spec.kv_heads
        keys, values = (part.repeat(shared, 1).transpose(1, 0, 2) for part in kv)
        scores = queries.transpose(1, 0, 2) @ keys.transpose(0, 2, 1) / np.sqrt(np.float32(self.spec.head_dim))
        distance = np.arange(past, past + len(queries))[:, None] - np.arange(kv.shape[1])
        seen = (distance >= 0) & (distance < (self.spec.sliding_window or kv.shape[1]))
        scores = np.where(seen, scores, -np.inf)
        likely = np.exp(scores - scores.max(-1, keepdims=True))
        attended = likely / likely.sum(-1, keepdims=True) @ values
        return attended.transpose(1, 0, 2).reshape(len(queries), -1)

    def heads(self, x, role, layer):
        x = self.linear(x, role, layer).reshape(len(x), -1, self.spec.head_dim)
        norm = getattr(self.spec.weights.layer, f"{role}_norm", None)
        return x if norm is None else self.norm(x, norm.format(layer=layer))

    def rotate(self, x, angles):
        low, high = np.split(x, 2, -1)
        cos, sin = (np.float32(self.spec.rope.magnitude) * turn(angles)[:, None] for turn in (np.cos, np.sin))
        return np.concatenate((low * cos - high * sin, high * cos + low * sin), -1)

    def linear(self, x, role, layer):
        names = self.spec.weights.layer
        bias = getattr(names, f"{role}_bias", None)
        y = x @ self.weights[getattr(names, role).format(layer=layer)].T
        return y if bias is None else y + self.weights[bias.format(layer=layer)]

    def norm(self, x, name):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.spec.norm_epsilon) * self.weights[name]

    def export_kv(self, blocks, tokens):
        return KvChunk(tokens, self.cache[:, :, transfer_slots(self.kv, blocks, tokens)])

    def import_kv(self, blocks, chunk):
        slots = transfer_slots(self.kv, blocks, chunk.tokens)
        check_chunk(self.kv, chunk)
        self.cache[:, :, slots] = chunk.data

    def export_blocks(self, blocks):
        return read_blocks(self.raw(), self.kv, blocks)

    def import_blocks(self, blocks, data):
        write_blocks(self.raw(), self.kv, blocks, data)

    def raw(self):
        """The cache's bytes, [layer and kind, block, bytes]."""
        return self.cache.view(np.uint8).reshape(self.spec.layers * 2, self.kv.blocks, -1)

    def close(self):
        self.weights, self.cache = {}, np.empty((0, 2, 0, 0, 0), np.float32)


class CopiesPrefixes(NumpyModel):
    """Lets no sequences share a block."""

    def make_kv(self):
        return replace(super().make_kv(), copies_prefixes=True)

    def copy_prefix(self, source, target):
        check_copy(self.kv, source, target)
        self.import_blocks(target, self.export_blocks(source))
        return len(source)


def registration(model=NumpyModel, **claims):
    """A backend of this model, which claims what it can do unless told otherwise."""
    claims = {"export_kv": True, "import_kv": True} | claims
    return Registration(
        name="numpy",
        probe=lambda: Available(("cpu",), np.__version__),
        capabilities=lambda _: Capabilities(dtypes=(DType.F32,), **claims),
        create=model,
    )
