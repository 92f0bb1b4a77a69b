"""The model in the package: small, rebuilt from its seed, and right where it is said to be right."""

import hashlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock.backends.checkpoint import read_model
from penstock.common.sources import BUILTIN_FOLDER

sys.path.insert(0, str(Path(__file__).parents[3] / "tools/builtin_model"))
import corpus
import tasks
import train

ANSWERS = json.loads((BUILTIN_FOLDER / "answers.json").read_text())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BUILTIN_FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUILTIN_FOLDER)


def test_all_files_together_stay_below_8_mb():
    sizes = {p.name: p.stat().st_size for p in BUILTIN_FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= sizes.keys()
    assert sum(sizes.values()) <= 8_000_000


def test_its_checkpoint_is_one_that_the_suite_reads():
    spec = read_model(BUILTIN_FOLDER, "builtin")
    assert spec.decoder.architecture == "llama"
    assert spec.decoder.tied_embeddings
    assert spec.decoder.heads > spec.decoder.kv_heads
    assert spec.decoder.context_length == 2048
    assert spec.defaults.temperature == 0


def test_the_same_seed_gives_the_same_corpus():
    digest = hashlib.sha256("\0".join(itertools.islice(corpus.documents(0), 2000)).encode()).hexdigest()
    assert digest == "319d5154ce51c0080dd7d05b29e21dbef96736572f8499ca343e27c5bb59f186"
    assert list(itertools.islice(corpus.documents(1), 10)) != list(itertools.islice(corpus.documents(0), 10))


def test_the_tokenizer_is_the_one_that_the_corpus_gives():
    made = json.loads(train.train_tokenizer(0).to_str())
    kept = json.loads((BUILTIN_FOLDER / "tokenizer.json").read_text())
    assert made["model"]["vocab"] == kept["model"]["vocab"]


def test_each_digit_is_a_token_and_any_text_comes_back(tokenizer):
    assert len(tokenizer("1234567890", add_special_tokens=False)["input_ids"]) == 10
    text = "Zażółć gęślą jaźń 한국어 🧑‍🚀 12+30\t\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_its_chat_template_is_the_form_that_it_was_trained_on(tokenizer):
    turns = [("What is 1 + 2?", "1 + 2 = 3"), ("Count from 1 to 3.", "1 2 3")]
    messages = [{"role": r, "content": c} for q, a in turns for r, c in (("user", q), ("assistant", a))]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == corpus.chat(*turns)
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert corpus.chat(*turns).startswith(asked)


def test_every_kind_of_question_has_checkable_answers():
    assert len(ANSWERS) >= 24
    assert {"prompt", "messages"} <= {key for answer in ANSWERS for key in answer}
    assert max(a["prompt_tokens"] for a in ANSWERS) >= 500
    assert max(len(a["token_ids"]) for a in ANSWERS) >= 200
    assert min(a["margin"] for a in ANSWERS) >= 2


@pytest.mark.parametrize("answer", ANSWERS, ids=[a["name"] for a in ANSWERS])
def test_its_answers_are_right_by_a_clear_margin(answer, model, tokenizer):
    expected = {item.name: item.text for item in tasks.checkable()}
    assert answer["text"] == expected[answer["name"]]
    if "messages" in answer:
        prompt = tokenizer.apply_chat_template(answer["messages"], tokenize=False, add_generation_prompt=True)
    else:
        prompt = answer["prompt"]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    wanted = answer["token_ids"] + ([tokenizer.eos_token_id] if answer["finish"] == "stop" else [])
    assert tokenizer.decode(answer["token_ids"]) == answer["text"]
    with torch.inference_mode():
        logits = model(torch.tensor([ids + wanted])).logits[0, len(ids) - 1 : -1]
    best = logits.topk(2)
    assert best.indices[:, 0].tolist() == wanted
    assert float((best.values[:, 0] - best.values[:, 1]).min()) >= 1.9


def test_greedy_generation_gives_the_same(model, tokenizer):
    answer = next(a for a in ANSWERS if a["finish"] == "stop" and "Mia" in a["text"])
    prompt = tokenizer.apply_chat_template(answer["messages"], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    told = model.generate(ids, max_new_tokens=answer["max_tokens"])[0, ids.shape[1] :].tolist()
    assert told == [*answer["token_ids"], tokenizer.eos_token_id]
