"""An engine over the fake backend, stepped by hand."""

from dataclasses import replace
from pathlib import Path

from penstock.backends.architectures.spec import DecoderSpec, LayerWeights, Rope, WeightNames
from penstock.backends.contract import DeviceConfig, ModelSpec
from penstock.backends.fake import BLOCK_SIZE, FakeModel, next_token
from penstock.backends.kv_blocks import check_copy
from penstock.executor.engine import Engine, EngineConfig
from penstock.executor.sampling import SamplingParameters
from penstock.executor.sequence import SequenceRequest

VOCABULARY = 97
GREEDY = SamplingParameters(temperature=0)


def fake_spec(vocabulary_size=VOCABULARY, context_length=1024):
    decoder = DecoderSpec(
        architecture="llama",
        vocabulary_size=vocabulary_size,
        hidden_size=8,
        intermediate_size=8,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=8,
        context_length=context_length,
        norm_epsilon=1e-5,
        rope=Rope(10_000, 8),
        weights=WeightNames("", "", None, LayerWeights("", "", "", "", "", "", "", "", "")),
    )
    return ModelSpec("fake", Path(), "", decoder, ())


def expected(prompt, count):
    """The greedy answer of the fake model."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, VOCABULARY))
    return ids[len(prompt) :]


class CopyingModel(FakeModel):
    """Lets no two sequences share a block. What `gone` tells of a number of blocks, so many of them can not be copied any more."""

    def __init__(self, blocks, gone=lambda blocks: 0):
        super().__init__(fake_spec(), DeviceConfig(kv_cache_bytes=blocks * BLOCK_SIZE * 8))
        self.kv = replace(self.kv, copies_prefixes=True)
        self.gone = gone

    def step(self, batch):
        assert len(set(batch.block_ids.tolist())) == len(batch.block_ids)
        return super().step(batch)

    def copy_prefix(self, source, target):
        check_copy(self.kv, source, target)
        copied = len(source) - self.gone(len(source))
        self.storage[target[:copied]] = self.storage[source[:copied]]
        self.storage[target[copied:]] = -1
        return copied


class Bench:
    """An engine, and what it told of each sequence."""

    def __init__(self, blocks=256, model=None, **config):
        model = self.model = model or FakeModel(fake_spec(), DeviceConfig(kv_cache_bytes=blocks * BLOCK_SIZE * 8))
        self.engine = Engine(model, EngineConfig(**{"vocabulary_size": VOCABULARY, "context_length": 1024} | config))
        self.tokens: dict[int, list[int]] = {}
        self.finished = {}
        self.started = {}
        self.frames = []

    def sink(self, frame):
        self.frames.append(frame)
        for sequence_id, token in zip(frame.sequence_ids, frame.token_ids, strict=True):
            self.tokens.setdefault(sequence_id, []).append(token)
        for told in frame.finished:
            assert told.sequence_id not in self.finished
            self.finished[told.sequence_id] = told
        self.started |= {told.sequence_id: told for told in frame.started}

    def submit(self, sequence_id, prompt, max_tokens, **fields):
        self.engine.submit(
            SequenceRequest(sequence_id=sequence_id, prompt=prompt, max_tokens=max_tokens, **{"sampling": GREEDY} | fields),
            self.sink,
        )

    def run(self):
        while not self.engine.idle:
            self.engine.step()
            self.check()
        return self.tokens

    def check(self):
        counts = self.engine.blocks.counts()
        assert counts.used + counts.cached + counts.free == self.engine.blocks.count
        planner = self.engine.planner
        holding = [*planner.running, *planner.receiving, *planner.sending]
        held = {b for s in holding for b in s.table[: s.blocks].tolist()}
        assert counts.used == len(held)
        if isinstance(self.model, FakeModel):  # what is free holds nothing that anyone may count on
            self.model.storage[self.engine.blocks._free] = -1

    @property
    def logprobs(self):
        """What was told of each place: of the output by (sequence id, position), of the prompt by (sequence id, "prompt")."""
        told = {(i, position): logprob for frame in self.frames for i, position, logprob in frame.logprobs}
        return told | {(i, "prompt"): places for frame in self.frames for i, places in frame.prompt_logprobs}
