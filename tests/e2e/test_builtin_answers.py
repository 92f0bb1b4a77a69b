"""The built-in model's answers from the engine, on each backend and precision: batched, chunked, preempted, with and without cached prefixes."""

import json
import queue

import pytest
from tokenizers import Tokenizer

from penstock.backends.checkpoint import read_model
from penstock.backends.contract import Available, DeviceConfig, DType
from penstock.backends.registry import backends
from penstock.common.sources import BUILTIN_FOLDER
from penstock.executor.engine import Engine, EngineConfig
from penstock.executor.sampling import SamplingParameters
from penstock.executor.sequence import Finish, SequenceRequest

ANSWERS = json.loads((BUILTIN_FOLDER / "answers.json").read_text())
SPEC = read_model(BUILTIN_FOLDER, "builtin")
TOKENIZER = Tokenizer.from_file(str(BUILTIN_FOLDER / "tokenizer.json"))
# Precision by backend: those that each has for this model.
KINDS = [
    (name, dtype)
    for name, registration in backends().items()
    if name in {"openvino", "torch"} and isinstance(registration.probe(), Available)
    for dtype in registration.capabilities(SPEC).dtypes
    if dtype is not DType.INT4  # four bits are too few for a model this small
]


def prompt_ids(answer):
    if "prompt" in answer:
        text = answer["prompt"]
    else:
        turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in answer["messages"])
        text = "".join(turns) + "<|im_start|>assistant\n"
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def answers_of(engine):
    """What the engine answers to all prompts at once, by name: (token ids, why it ended)."""
    frames = queue.SimpleQueue()
    for number, answer in enumerate(ANSWERS):
        engine.submit(
            SequenceRequest(
                sequence_id=number,
                prompt=prompt_ids(answer),
                max_tokens=answer["max_tokens"],
                sampling=SamplingParameters(temperature=0.0),
                stop_ids=SPEC.decoder.eos_token_ids,
            ),
            frames.put,
        )
    ids = [[] for _ in ANSWERS]
    finished = {}
    while len(finished) < len(ANSWERS):
        frame = frames.get(timeout=120)
        for sequence_id, token in zip(frame.sequence_ids, frame.token_ids, strict=True):
            ids[sequence_id].append(token)
        finished |= {end.sequence_id: end.reason for end in frame.finished}
    return {a["name"]: (ids[n], finished[n]) for n, a in enumerate(ANSWERS)}


def expected():
    end = TOKENIZER.token_to_id("<|im_end|>")
    return {
        a["name"]: ([*a["token_ids"], end], Finish.STOP) if a["finish"] == "stop" else (a["token_ids"], Finish.LENGTH)
        for a in ANSWERS
    }


@pytest.mark.parametrize(
    ("backend", "dtype", "cache_mib"),
    # A tight cache preempts and finds prefixes as well; a roomy one finds more of them, which no type of weights changes.
    [pytest.param(b, d, 10, id=f"tight-{b}-{d}") for b, d in KINDS]
    + [pytest.param(b, d, 64, id=f"roomy-{b}-{d}") for b, d in KINDS if d is DType.F32],
)
def test_right_answers(backend, dtype, cache_mib):
    limits = {"max_batch_tokens": 256, "max_batch_size": 16}
    model = backends()[backend].create(SPEC, DeviceConfig(dtype=dtype, kv_cache_bytes=cache_mib << 20, **limits))
    engine = Engine(
        model, EngineConfig(vocabulary_size=SPEC.decoder.vocabulary_size, context_length=SPEC.decoder.context_length, **limits)
    )
    engine.start()
    try:
        assert answers_of(engine) == expected()
        assert answers_of(engine) == expected()  # again, now with what the first round left in the cache
    finally:
        engine.close()
