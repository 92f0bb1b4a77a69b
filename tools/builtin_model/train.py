"""Trains the built-in model and writes its folder: ``python tools/builtin_model/train.py [--out FOLDER]``, minutes on two cores.

A Llama of 1.8 million parameters in float32, matrices by Muon (Jordan et al., 2024), the rest by AdamW, over text of `corpus`. Rows
grow from 256 tokens to the whole context, so that most of the work is done where attention is cheap.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from corpus import END, IM_END, IM_START, SPECIAL_TOKENS, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[2] / "services/penstock/common/builtin_model"
CONTEXT = 2048
VOCABULARY = 768
TOKENS_PER_STEP = 8192
# (row length, steps) one after the other.
STAGES = ((256, 420), (1024, 95), (CONTEXT, 45))
STEPS = sum(steps for _, steps in STAGES)
MUON_RATE, ADAM_RATE = 0.01, 0.01
# What a user says can not be foretold: little is learned from it.
PROMPT_WEIGHT = 0.1

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(documents(seed), 20_000), trainer)
    return tokenizer


def weights_of(ids: list[int], turn: int, answerer: int) -> list[float]:
    """How much each token counts as a target: little in turns (they begin with `turn` and a role) that are not the answerer's."""
    weights, weight = [], 1.0
    for token, following in itertools.zip_longest(ids, ids[1:]):
        if token == turn:
            weight = 1.0 if following == answerer else PROMPT_WEIGHT
        weights.append(weight)
    return weights


def rows(tokenizer: Tokenizer, length: int, seed: int) -> Iterator[tuple[list[int], list[float]]]:
    """Rows of `length` + 1 tokens, each beginning with the beginning of a document, and the weight of each token."""
    end, turn = tokenizer.token_to_id(END), tokenizer.token_to_id(IM_START)
    answerer = tokenizer.encode("assistant").ids[0]
    ids: list[int] = []
    weights: list[float] = []
    source = documents(seed)
    while True:
        for encoding in tokenizer.encode_batch(list(itertools.islice(source, 256))):
            ids += [*encoding.ids, end]
            weights += [*weights_of(encoding.ids, turn, answerer), 1.0]
            if len(ids) > length:
                yield ids[: length + 1], weights[: length + 1]
                ids, weights = [], []


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    end, im_end = tokenizer.token_to_id(END), tokenizer.token_to_id(IM_END)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=192,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=[im_end, end],
            pad_token_id=end,
        )
    )


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def scale(step: int) -> float:
    """Share of the full rate: a short rise, level, and a fall to nothing over the last half."""
    return min(1.0, (step + 1) / 50, 2 * (1 - step / STEPS))


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int) -> None:
    tools = optimizers(model)
    step, began = 0, time.monotonic()
    for number, (length, steps) in enumerate(STAGES):
        source = rows(tokenizer, length, seed + number)
        for _ in range(steps):
            loss = advance(model, tools, itertools.islice(source, TOKENS_PER_STEP // length), scale(step))
            if step % 25 == 0:
                took = time.monotonic() - began
                print(f"step {step} of {STEPS}, rows of {length}: loss {loss:.4f}, {took:.0f} s", flush=True)
            step += 1


def advance(
    model: LlamaForCausalLM,
    tools: list[torch.optim.Optimizer],
    batch: Iterable[tuple[list[int], list[float]]],
    share: float,
) -> float:
    """One step at this share of the full rates; returns its loss."""
    ids, weights = (torch.tensor(column) for column in zip(*batch, strict=True))
    loss = weighted_loss(model, ids, weights[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for tool in tools:
        for group in tool.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * share
        tool.step()
        tool.zero_grad()
    return loss.item()


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint as any Llama's is written: bfloat16 weights, greedy by default."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": CONTEXT,
                "eos_token": IM_END,
                "pad_token": END,
                "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
        )
        + "\n"
    )
    (folder / "model.safetensors").chmod(0o644)
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["do_sample"] = False
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    tokenizer = train_tokenizer(arguments.seed)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, vocabulary of {tokenizer.get_vocab_size()}", flush=True)
    train(model, tokenizer, arguments.seed + 1)
    save(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
