"""Examines a built-in model: ``python tools/builtin_model/evaluate.py [--model FOLDER]``.

Prints how often each task's whole answer is right, and writes two files into the model's folder: ``answers.json``, the fixed
prompts whose answer is right by a clear margin, for tests; and ``README.md``, the card. An answer counts as right when every
token of it is the most likely one behind the right ones before, which is the same as greedy decoding giving it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tasks import TASKS, Item, checkable
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "services/penstock/common/builtin_model"
CARD = Path(__file__).parent / "card.md"
# Logits: what bf16, int8 and another order of additions move is well below.
MIN_MARGIN = 2.0


@dataclass(frozen=True)
class Result:
    """How an item went: whether it is right, and the smallest lead of a right token over the best other, in logits."""

    prompt_ids: list[int]
    answer_ids: list[int]
    right: bool
    margin: float


class Examiner:
    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def prompt_ids(self, item: Item) -> list[int]:
        if item.messages is None:
            return self.ids(item.prompt or "")
        messages = [{"role": role, "content": content} for role, content in item.messages]
        return self.ids(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def examine(self, item: Item) -> Result:
        prompt, answer = self.prompt_ids(item), self.ids(item.text)
        wanted = [*answer, self.tokenizer.eos_token_id] if item.ends else answer
        logits = self.model(torch.tensor([[*prompt, *wanted]])).logits[0, len(prompt) - 1 : -1]
        target = torch.tensor(wanted)
        chosen = logits.gather(1, target[:, None])[:, 0]
        others = logits.scatter(1, target[:, None], float("-inf")).amax(1)
        lead = float((chosen - others).min())
        return Result(prompt, answer, lead > 0, lead)


def accuracies(examiner: Examiner, items: int, seed: int) -> Mapping[str, float]:
    rng = random.Random(seed)
    return {name: sum(examiner.examine(draw(rng)).right for _ in range(items)) / items for name, draw in TASKS.items()}


def answer_of(item: Item, result: Result) -> dict[str, Any]:
    given: dict[str, Any] = (
        {"prompt": item.prompt}
        if item.messages is None
        else {"messages": [{"role": role, "content": content} for role, content in item.messages]}
    )
    return {
        "name": item.name,
        **given,
        "prompt_tokens": len(result.prompt_ids),
        "max_tokens": len(result.answer_ids) + (8 if item.ends else 0),
        "text": item.text,
        "token_ids": result.answer_ids,
        "finish": "stop" if item.ends else "length",
        "margin": round(result.margin, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--items", type=int, default=200, help="questions per task")
    parser.add_argument("--seed", type=int, default=12345)
    arguments = parser.parse_args()
    examiner = Examiner(arguments.model)
    answers = []
    for item in checkable():
        result = examiner.examine(item)
        print(f"{item.name:28} {'right' if result.right else 'WRONG'} by {result.margin:6.2f}", flush=True)
        if result.right and result.margin >= MIN_MARGIN:
            answers.append(answer_of(item, result))
    (arguments.model / "answers.json").write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    shares = accuracies(examiner, arguments.items, arguments.seed)
    table = "\n".join(
        ["| task | right |", "| --- | --- |", *(f"| {name} | {100 * share:.1f} % |" for name, share in shares.items())]
    )
    print(table)
    card = CARD.read_text().format(
        table=table,
        items=arguments.items,
        answers=len(answers),
        margin=MIN_MARGIN,
        parameters=f"{examiner.model.num_parameters():,}",
    )
    (arguments.model / "README.md").write_text(card)


if __name__ == "__main__":
    main()
