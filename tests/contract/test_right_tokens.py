"""Greedy tokens and log-probabilities of the engine against transformers, prompts of many lengths batched together."""

import queue
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from penstock.backends.checkpoint import read_model
from penstock.backends.contract import Available, Capabilities, DeviceConfig, DType
from penstock.backends.registry import backends, select
from penstock.executor.engine import Engine, EngineConfig
from penstock.executor.sampling import SamplingParameters
from penstock.executor.sequence import Finish, SequenceRequest

NEW = 32
LENGTHS = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 40, 64, 65, 90, 128, 150)
SHARED = 70  # the prompts that are longer begin with the same tokens, so that they share blocks
CLEAR = 2e-3  # a choice by less than this may go either way in float32, and proves nothing

SETTINGS = {
    "prefix cache": {},
    "no prefix cache": {"prefix_cache": False},
    "small chunks": {"max_batch_tokens": 24, "prefill_chunk": 5},
    "few at a time": {"max_batch_size": 3, "prefix_cache": False},
}


@dataclass(frozen=True)
class Expected:
    """What transformers says: a prompt, what follows it, and log-probabilities of the prompt from its second token and of that."""

    prompt: list[int]
    ids: list[int]
    prompt_logprobs: np.ndarray
    logprobs: np.ndarray


@pytest.fixture(scope="session")
def expected(checkpoints):
    known = {}

    def get(name):
        if name not in known:
            known[name] = expect(checkpoints(name).model)
        return known[name]

    return get


def expect(model):
    """Random prompts of each length at which every greedy choice is clear, and what transformers makes of them."""
    random = np.random.default_rng(7)
    vocabulary = model.config.vocab_size
    shared = random.integers(0, vocabulary, SHARED)
    found = {}
    while pending := [length for length in LENGTHS if length not in found]:
        prompts = [random.integers(0, vocabulary, length) for length in pending]
        for prompt in prompts:
            if len(prompt) > SHARED:
                prompt[:SHARED] = shared
        for prompt, ids in zip(prompts, generate(model, prompts), strict=True):
            with torch.inference_mode():
                logits = model(torch.from_numpy(np.concatenate((prompt, ids)))[None]).logits[0, :-1].double()
            best = logits[len(prompt) - 1 :].topk(2)
            if (best.values[:, 0] - best.values[:, 1] > CLEAR).all():
                assert best.indices[:, 0].tolist() == ids.tolist()
                told = logits.log_softmax(-1).numpy()
                told = told[np.arange(len(told)), np.concatenate((prompt, ids))[1:]]
                found[len(prompt)] = Expected(prompt.tolist(), ids.tolist(), told[: len(prompt) - 1], told[len(prompt) - 1 :])
    return [found[length] for length in LENGTHS]


def generate(model, prompts):
    """Greedy continuations [prompts, NEW], the prompts padded on their left so that all go together."""
    longest = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    with torch.inference_mode():
        out = model.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
    return out[:, longest:].numpy()


class Answers:
    """A sink that gathers what the engine tells of each sequence."""

    def __init__(self, count):
        self.ids = [[] for _ in range(count)]
        self.logprobs = [[] for _ in range(count)]
        self.prompt_logprobs = [[] for _ in range(count)]
        self.cached = [0] * count
        self.reasons = [None] * count
        self._finished = queue.Queue()

    def __call__(self, frame):
        for which, token, position in zip(frame.sequence_ids, frame.token_ids, frame.positions, strict=True):
            assert position == len(self.ids[which])
            self.ids[which].append(token)
        for which, _, told in frame.logprobs:
            self.logprobs[which].append(told.logprob)
        for which, told in frame.prompt_logprobs:
            self.prompt_logprobs[which] += [entry.logprob for entry in told]
        for started in frame.started:
            self.cached[started.sequence_id] = started.cached_tokens
        for finished in frame.finished:
            self.reasons[finished.sequence_id] = finished.reason
            self._finished.put(finished)

    def wait(self):
        for _ in self.ids:
            self._finished.get(timeout=60)


def ask(engine, prompts, **asked):
    answers = Answers(len(prompts))
    for i, prompt in enumerate(prompts):
        sampling = SamplingParameters(temperature=0.0)
        engine.submit(
            SequenceRequest(sequence_id=i, prompt=prompt, max_tokens=NEW, sampling=sampling, logprobs=0, **asked), answers
        )
    answers.wait()
    return answers


@pytest.fixture
def engines(checkpoints):
    """Makes engines that are closed at the end."""
    made = []

    def make(backend, name, **settings):
        spec = read_model(checkpoints(name).folder, name)
        selection = select(spec, backend, DType.F32)
        settings = {"max_batch_tokens": 512, "max_batch_size": 16, "prefix_cache": selection.capabilities.prefix_cache} | settings
        sizes = {key: settings[key] for key in ("max_batch_tokens", "max_batch_size")}
        model = selection.registration.create(spec, DeviceConfig(dtype=DType.F32, kv_cache_bytes=8 << 20, **sizes))
        engine = Engine(
            model,
            EngineConfig(vocabulary_size=spec.decoder.vocabulary_size, context_length=spec.decoder.context_length, **settings),
        )
        made.append(engine)
        engine.start()
        return engine

    yield make
    for engine in made:
        engine.close()


VARIANTS = (
    "llama",
    "llama-tied",
    "llama-3-rope",
    "llama-linear-rope",
    "llama-sharded",
    "mistral",
    "mistral-window",
    "qwen2",
    "qwen2-yarn",
    "qwen3",
)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch"])
def test_tokens_are_those_of_transformers(backend, name, settings, engines, expected):
    right = expected(name)
    engine = engines(backend, name, **settings)
    rounds = [ask(engine, [e.prompt for e in right]) for _ in range(1 if settings else 2)]  # the second finds prefixes cached
    for answers in rounds:
        assert answers.reasons == [Finish.LENGTH] * len(right)
        assert answers.ids == [e.ids for e in right]
        np.testing.assert_allclose(answers.logprobs, [e.logprobs for e in right], atol=1e-3, rtol=0)
    if not settings:
        assert (sum(rounds[-1].cached) > SHARED * 4) == engine.blocks.caching


@pytest.mark.parametrize("name", VARIANTS)
def test_backends_give_identical_ids(name, checkpoints, engines, expected):
    spec = read_model(checkpoints(name).folder, name)
    judged = {r.name: r.capabilities(spec) for r in backends().values() if isinstance(r.probe(), Available) and r.name != "fake"}
    able = [backend for backend, answer in judged.items() if isinstance(answer, Capabilities) and DType.F32 in answer.dtypes]
    assert {"openvino", "onnxruntime", "torch"} <= set(able)
    prompts = [e.prompt for e in expected(name)]
    told = {backend: ask(engines(backend, name), prompts).ids for backend in able}
    assert told == dict.fromkeys(able, told["openvino"])


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "torch"])
def test_logprobs_of_prompts_are_those_of_transformers(backend, engines, expected):
    right = expected("llama-3-rope")
    answers = ask(engines(backend, "llama-3-rope", max_batch_tokens=60), [e.prompt for e in right], prompt_logprobs=0)
    for found, e in zip(answers.prompt_logprobs, right, strict=True):
        np.testing.assert_allclose(found, e.prompt_logprobs, atol=1e-3, rtol=0)
