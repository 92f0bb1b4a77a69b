"""Backends that are wrong in one way each: what the conformance suite is there to catch."""

import os
import threading
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy_backend import BLOCK_SIZE, CopiesPrefixes, NumpyModel

from penstock.backends.contract import KvChunk
from penstock.backends.kv_blocks import check_copy, slots_of

# --- what a step computes


class TurnsNeighbours(NumpyModel):
    """Rotary positions over neighbouring dimensions, as some checkpoints want it, and not over halves."""

    def rotate(self, x, angles):
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.stack((even * cos - odd * sin, odd * cos + even * sin), -1).reshape(x.shape)


class DecodesOneTooFar(NumpyModel):
    """Positions of tokens behind a past are one too high; a prompt alone is right, for rotation is relative."""

    def positions(self, batch):
        past = np.repeat(batch.past_lengths, np.diff(batch.starts))
        return batch.positions + (past > 0)


class SharpensLogits(NumpyModel):
    def told(self, logits):
        return logits * np.float32(1.2)


class IgnoresThePast(NumpyModel):
    def attend(self, queries, past, kv):
        return super().attend(queries, 0, kv[:, past:])


class IgnoresThePastOfChunks(NumpyModel):
    """Right for decodes, and for prompts that come whole."""

    def attend(self, queries, past, kv):
        return super().attend(queries, past, kv) if len(queries) == 1 else super().attend(queries, 0, kv[:, past:])


class ReadsTheFirstTable(NumpyModel):
    """Sequences of a batch read the past of the first one, as far as that goes."""

    def step(self, batch):
        self.first = self.tables(batch, 0)[2]
        return super().step(batch)

    def tables(self, batch, s):
        rows, past, slots = super().tables(batch, s)
        if s:
            shared = min(past, len(self.first))
            slots = np.concatenate((self.first[:shared], slots[shared:]))
        return rows, past, slots


class OtherBitsInCompany(NumpyModel):
    """Claims to be batch invariant, and is off by a rounding in a batch."""

    def step(self, batch):
        output = super().step(batch)
        return replace(output, logits=output.logits * np.float32(1 + 1e-6 * (len(batch.past_lengths) > 1)))


class TellsEveryRow(NumpyModel):
    def rows(self, batch):
        return np.arange(len(batch.token_ids))


class AddsToWhatItGaveOut(NumpyModel):
    """Clears the buffer of its last logits by multiplying it, which keeps what is no number."""

    last = None

    def told(self, logits):
        if self.last is not None and self.last.shape == logits.shape:
            self.last *= 0
            self.last += logits
            return self.last
        self.last = logits
        return logits


# --- blocks


class BlocksInARow(NumpyModel):
    """Takes a sequence's blocks for neighbours of its first one."""

    def tables(self, batch, s):
        rows, past, slots = super().tables(batch, s)
        return rows, past, (slots[0] + np.arange(len(slots))) % self.cache.shape[2]


class AddsToBlocks(NumpyModel):
    def write(self, layer, slots, keys, values):
        self.cache[layer, 0, slots] += keys
        self.cache[layer, 1, slots] += values


class ClearsByMultiplying(AddsToBlocks):
    """Clears what a slot held by multiplying it, which keeps what is no number."""

    def write(self, layer, slots, keys, values):
        self.cache[layer, 0, slots] *= 0
        self.cache[layer, 1, slots] *= 0
        super().write(layer, slots, keys, values)


class WritesBlocksOnce(NumpyModel):
    """Keeps what a slot was first given: right until blocks go to another sequence."""

    def write(self, layer, slots, keys, values):
        empty = ~self.cache[layer, 0, slots].any((-1, -2))
        super().write(layer, slots[empty], keys[empty], values[empty])


class ClearsTheBlockBefore(NumpyModel):
    """Writes into a block that others may share: the last slot behind which it begins."""

    def tables(self, batch, s):
        rows, past, slots = super().tables(batch, s)
        self.before = slots[past - 1] if past and past % BLOCK_SIZE == 0 and rows.stop - rows.start > 1 else None
        return rows, past, slots

    def step(self, batch):
        output = super().step(batch)
        if self.before is not None:
            self.cache[:, :, self.before] = 0
        return output


class CopiesNothing(CopiesPrefixes):
    def copy_prefix(self, source, target):
        check_copy(self.kv, source, target)
        return len(source)


class CopiesOneBlockAlone(CopiesPrefixes):
    def copy_prefix(self, source, target):
        return super().copy_prefix(source[:1], target[:1])


class MovesPrefixes(CopiesPrefixes):
    def copy_prefix(self, source, target):
        copied = super().copy_prefix(source, target)
        self.import_blocks(source, np.zeros_like(self.export_blocks(source)))
        return copied


class CopiesWhateverIsAsked(CopiesPrefixes):
    def copy_prefix(self, source, target):
        count = min(len(source), len(target))
        self.cache[:, :, slots_of(target, np.arange(count * BLOCK_SIZE), BLOCK_SIZE)] = self.cache[
            :, :, slots_of(source, np.arange(count * BLOCK_SIZE), BLOCK_SIZE) % self.cache.shape[2]
        ]
        return count


# --- KV that leaves and enters


class SwapsKeysAndValues(NumpyModel):
    """Exports values first, and takes them so again: nothing but another backend, or the formulas, tells."""

    def export_kv(self, blocks, tokens):
        chunk = super().export_kv(blocks, tokens)
        return KvChunk(tokens, chunk.data[:, ::-1].copy())

    def import_kv(self, blocks, chunk):
        super().import_kv(blocks, KvChunk(chunk.tokens, chunk.data[:, ::-1]))


class ExportsAView(NumpyModel):
    def export_kv(self, blocks, tokens):
        super().export_kv(blocks, tokens)
        first = blocks[tokens.start // BLOCK_SIZE] * BLOCK_SIZE + tokens.start % BLOCK_SIZE
        return KvChunk(tokens, self.cache[:, :, first : first + len(tokens)])


class TakesFloat32Alone(NumpyModel):
    def import_kv(self, blocks, chunk):
        if chunk.data.dtype != np.float32:
            raise RuntimeError("float32 alone")
        super().import_kv(blocks, chunk)


class TakesAnyType(NumpyModel):
    def import_kv(self, blocks, chunk):
        super().import_kv(blocks, KvChunk(chunk.tokens, chunk.data.astype(np.float32)))


class CutsHalvesOff(NumpyModel):
    """Keeps 16 bits of what it imports, the lower ones dropped."""

    def import_kv(self, blocks, chunk):
        whole = np.ascontiguousarray(chunk.data).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        super().import_kv(blocks, KvChunk(chunk.tokens, whole.view(np.float32)))


class SaysAnotherType(NumpyModel):
    def make_kv(self):
        return replace(super().make_kv(), canonical_dtype="bfloat16")


class ForgetsWhatItImports(NumpyModel):
    def import_kv(self, blocks, chunk):
        kept = self.cache.copy()
        super().import_kv(blocks, chunk)
        self.cache = kept


class TakesWhatDoesNotFit(NumpyModel):
    def import_kv(self, blocks, chunk):
        slots = slots_of(np.resize(blocks, 99) % self.kv.blocks, np.arange(chunk.tokens.start, chunk.tokens.stop), BLOCK_SIZE)
        fitting = min(len(slots), chunk.data.shape[2])
        self.cache[:, :, slots[:fitting]] = chunk.data[: self.spec.layers, :, :fitting]


class ClearsForImports(NumpyModel):
    """The first chunk of a sequence empties the cache, of all that runs."""

    def import_kv(self, blocks, chunk):
        if chunk.tokens.start == 0:
            self.cache[:] = 0
        super().import_kv(blocks, chunk)


# --- the likeliest tokens in place of rows


class TellsByLikelihood(NumpyModel):
    """The right tokens, the likeliest first."""

    def likeliest(self, row, count):
        return np.argsort(-row, kind="stable")[:count]


class RoundsWhatItTells(NumpyModel):
    def step_top(self, batch, request):
        found = super().step_top(batch, request)
        return replace(found, values=found.values.astype(np.float16).astype(np.float32))


class TellsNoRowWhole(NumpyModel):
    def step_top(self, batch, request):
        return super().step_top(batch, replace(request, counts=np.maximum(request.counts, 1)))


class NamesAmongTheLikeliest(NumpyModel):
    """Tokens that are told because they are named take the places of likely ones."""

    def tell(self, row, count, named, temperature):
        ids = self.likeliest(row, count)
        return ids, row[ids], *super().tell(row, count, named, temperature)[2:]


class MixesUpTheNamed(NumpyModel):
    def step_top(self, batch, request):
        found = super().step_top(batch, request)
        return replace(found, named=found.named[::-1])


class WeighsTheNamedToo(NumpyModel):
    """The mass of a row is that of all its tokens."""

    def tell(self, row, count, named, temperature):
        masses = [self.log_mass(row), self.log_mass(row / np.float64(temperature))]
        return *super().tell(row, count, named, temperature)[:3], masses


class WeighsAtOneTemperature(NumpyModel):
    def tell(self, row, count, named, temperature):
        return super().tell(row, count, named, 1.0)


class GivesOtherRowsLater(NumpyModel):
    def rows_of_top(self, rows):
        return super().rows_of_top(np.sort(rows))


class ForgetsWhatItTold(NumpyModel):
    """Steps that tell the likeliest tokens leave nothing in the cache."""

    def step_top(self, batch, request):
        before = self.cache.copy()
        found = super().step_top(batch, request)
        self.cache[...] = before
        return found


# --- blocks as they are


class SendsValuesFirst(NumpyModel):
    """Swaps keys and values of a block both ways, under the name of a form that has keys first."""

    def export_blocks(self, blocks):
        return self.swapped(super().export_blocks(blocks))

    def import_blocks(self, blocks, data):
        super().import_blocks(blocks, self.swapped(data))

    def swapped(self, data):
        return data.reshape(len(data), self.spec.layers, 2, -1)[:, :, ::-1].reshape(data.shape)


class SendsBlocksOfZeros(NumpyModel):
    def export_blocks(self, blocks):
        return np.zeros_like(super().export_blocks(blocks))


class SendsWholeBlocksAlone(NumpyModel):
    """Leaves out the last block, which is filled in part."""

    def export_blocks(self, blocks):
        data = super().export_blocks(blocks)
        data[-1] = 0
        return data


class SendsBlocksInRisingOrder(NumpyModel):
    def export_blocks(self, blocks):
        return super().export_blocks(sorted(blocks))


class SendsAViewOfBlocks(NumpyModel):
    """Its cache is a block behind the other, and what it sends lies in it."""

    def export_blocks(self, blocks):
        data = super().export_blocks(blocks)
        self.sent.append((list(blocks), data))
        return data

    def step(self, batch):
        output = super().step(batch)
        for blocks, data in self.sent:
            data[...] = super().export_blocks(blocks)
        return output

    def __init__(self, spec, config):
        super().__init__(spec, config)
        self.sent = []


class WritesTheBlockBefore(NumpyModel):
    """Clears the block before the first one that is imported."""

    def import_blocks(self, blocks, data):
        super().import_blocks(blocks, data)
        self.raw()[:, blocks[0] - 1 if len(blocks) else 0] = 0


class NamesEveryFormAlike(NumpyModel):
    def make_kv(self):
        return replace(super().make_kv(), native_layout="mine")


class NamesTheSizeOfItsCache(NumpyModel):
    def make_kv(self):
        kv = super().make_kv()
        return replace(kv, native_layout=f"{kv.native_layout};blocks={kv.blocks}")


class TakesBlocksAsTheyCome(NumpyModel):
    """Writes what fits, where it can."""

    def import_blocks(self, blocks, data):
        for block, row in zip(np.array(blocks) % self.kv.blocks, data.reshape(-1), strict=False):
            self.raw()[:, block] = np.uint8(row)


# --- limits


class TakesTwiceTheMemory(NumpyModel):
    def make_kv(self):
        kv = super().make_kv()
        return replace(kv, blocks=2 * kv.blocks)


class SevenAtMost(NumpyModel):
    """Tells zeros of what is beyond its seventh sequence."""

    def step(self, batch):
        output = super().step(batch)
        output.logits[7:] = 0
        return output


class ShortSighted(NumpyModel):
    """Sees no more than the last 256 tokens of a sequence, whose window is not meant to end."""

    def attend(self, queries, past, kv):
        hidden = max(0, kv.shape[1] - 256 - len(queries))
        return super().attend(queries, past - hidden, kv[:, hidden:])


class ChecksNoStep(NumpyModel):
    def check(self, batch):
        pass


class HasEveryType(NumpyModel):
    def check_settings(self):
        pass


# --- life


class ClosesOnce(NumpyModel):
    def close(self):
        del self.weights


class StepsWhenClosed(NumpyModel):
    def close(self):
        pass


class FailsForAll(NumpyModel):
    """A start that fails closes the models that run."""

    running: ClassVar = []

    def __init__(self, spec, config):
        try:
            super().__init__(spec, config)
        except BaseException:
            for model in self.running:
                model.cache[:] = 0
            raise
        self.running.append(self)

    def close(self):
        super().close()
        self.running.clear()


# --- company


class SharesItsCache(NumpyModel):
    """Two models of one shape write into the same blocks."""

    caches: ClassVar = {}

    def __init__(self, spec, config):
        super().__init__(spec, config)
        self.cache = self.caches.setdefault(self.cache.shape, self.cache)


class OfOneThread(NumpyModel):
    """Wants every call from the thread that made it."""

    def __init__(self, spec, config):
        super().__init__(spec, config)
        self.thread = threading.get_ident()

    def step(self, batch):
        if threading.get_ident() != self.thread:
            raise RuntimeError("called from another thread")
        return super().step(batch)


class FourAtMost(NumpyModel):
    """A process has memory for four."""

    models = threading.Semaphore(4)

    def __init__(self, spec, config):
        super().__init__(spec, config)
        if not self.models.acquire(blocking=False):
            raise RuntimeError("no fifth model")
        self.open = True

    def close(self):
        super().close()
        if self.open:
            self.open = False
            self.models.release()


# --- what is left behind


class KeepsItsCache(NumpyModel):
    def close(self):
        self.weights = {}


class KeepsItsWeights(NumpyModel):
    def close(self):
        self.weights, self.kept = {}, self.weights
        self.cache = np.empty((0, 2, 0, 0, 0), np.float32)


class KeepsADescriptor(NumpyModel):
    """Opens one for each model; `opened` is for the test to close."""

    opened: ClassVar = []

    def __init__(self, spec, config):
        self.opened.append(os.open(spec.folder, os.O_RDONLY))
        super().__init__(spec, config)


class KeepsAThread(NumpyModel):
    """Starts one for each model; `over` is for the test to end them."""

    over = threading.Event()

    def __init__(self, spec, config):
        super().__init__(spec, config)
        threading.Thread(target=self.over.wait, daemon=True).start()


class KeepsWhatFailed(NumpyModel):
    """Weights of starts that failed stay; `kept` is for the test to clear."""

    kept: ClassVar = []

    def make_kv(self):
        try:
            return super().make_kv()
        except BaseException:
            self.kept.append(self.weights)
            raise
