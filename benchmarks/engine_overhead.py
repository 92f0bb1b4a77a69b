"""What the engine itself costs: steps per second at a batch, with a backend that computes nothing.

python benchmarks/engine_overhead.py [--batch 64] [--tokens 500]
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

from penstock.backends.architectures.spec import DecoderSpec, LayerWeights, Rope, WeightNames
from penstock.backends.contract import DeviceConfig, ModelSpec
from penstock.backends.fake import FakeModel
from penstock.executor.engine import Engine, EngineConfig
from penstock.executor.sampling import SamplingParameters
from penstock.executor.sequence import Frame, SequenceRequest


def model_spec(vocabulary_size: int, context_length: int) -> ModelSpec:
    """A model of which nothing but these two counts."""
    layer = LayerWeights("", "", "", "", "", "", "", "", "")
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
        weights=WeightNames("", "", None, layer),
    )
    return ModelSpec("fake", Path(), "", decoder, ())


def run(batch: int, tokens: int, temperature: float) -> dict[str, float]:
    """Decode `batch` sequences of `tokens` tokens, all at once."""
    spec = model_spec(512, 8192)
    engine = Engine(FakeModel(spec, DeviceConfig()), EngineConfig(vocabulary_size=512, context_length=8192, max_batch_size=batch))
    left, done = batch, threading.Event()

    def sink(frame: Frame) -> None:
        nonlocal left
        left -= len(frame.finished)
        if not left:
            done.set()

    engine.start()
    began = time.perf_counter()
    for i in range(batch):
        prompt = [(i * 31 + j) % 512 for j in range(16)]
        sampling = SamplingParameters(temperature=temperature, seed=i)
        engine.submit(SequenceRequest(sequence_id=i, prompt=prompt, max_tokens=tokens, sampling=sampling), sink)
    done.wait()
    seconds = time.perf_counter() - began
    steps = engine.meter.steps
    engine.close()
    return {
        "batch": batch,
        "temperature": temperature,
        "steps_per_s": round(steps / seconds),
        "tok_per_s": round(batch * tokens / seconds),
    }


def main() -> None:
    """Print one JSON line for greedy decoding and one for sampling."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500)
    options = parser.parse_args()
    for temperature in (0.0, 0.8):
        print(json.dumps(max((run(options.batch, options.tokens, temperature) for _ in range(3)), key=lambda r: r["tok_per_s"])))


if __name__ == "__main__":
    main()
