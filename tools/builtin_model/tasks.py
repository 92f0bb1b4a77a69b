"""What the built-in model is asked in its examination: questions with one right answer, apart from the corpus' own generator."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from corpus import ABOUT, ANIMALS, GREETING, NAMES, UNKNOWN, story

__all__ = ["TASKS", "Item", "checkable"]


@dataclass(frozen=True)
class Item:
    """A prompt and its right continuation.

    Attributes:
        messages: the conversation to answer; or None where `prompt` is continued as it is.
        ends: whether the answer is followed by the end token; a completion may go on, and is cut.
    """

    name: str
    text: str
    prompt: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    ends: bool = False


def ask(name: str, question: str, answer: str, *before: tuple[str, str]) -> Item:
    turns = [m for q, a in before for m in (("user", q), ("assistant", a))]
    return Item(name, answer, messages=(*turns, ("user", question)), ends=True)


def carry_on(name: str, start: int, given: int, wanted: int) -> Item:
    numbers = range(start, start + given)
    answer = "".join(f" {n}" for n in range(start + given, start + given + wanted))
    return Item(name, answer, prompt=f"Count from {start}: {' '.join(map(str, numbers))}")


def add(name: str, a: int, b: int) -> Item:
    return Item(name, f" {a + b}\n", prompt=f"{a} + {b} =")


def ask_sum(name: str, a: int, b: int) -> Item:
    return ask(name, f"What is {a} + {b}?", f"{a} + {b} = {a + b}")


def ask_count(name: str, start: int, stop: int) -> Item:
    return ask(name, f"Count from {start} to {stop}.", " ".join(map(str, range(start, stop + 1))))


def ask_story(name: str, animal: str, hero: str, size: str = "a story", chapters: int = 1, thing: str | None = None) -> Item:
    article = "an" if animal[0] in "aeiou" else "a"
    lost = f" who lost the {thing}" if thing else ""
    question = f"Tell me {size} about {article} {animal} named {hero}{lost}."
    return ask(name, question, story(animal, hero, thing=thing, chapters=chapters))


def ask_price(name: str, things: int, rng: random.Random) -> Item:
    names = [f"{c} {t}" for c in ("red", "blue", "green", "white", "gold", "pink") for t in ("kite", "hat", "lamp", "cup")]
    held = {thing: rng.randrange(10, 100) for thing in rng.sample(names, things)}
    asked = rng.choice(list(held))
    facts = " ".join(f"The {thing} costs {price}." for thing, price in held.items())
    return ask(name, f"{facts} What does the {asked} cost?", f"The {asked} costs {held[asked]}.")


def _story(rng: random.Random, size: str = "a story", chapters: int = 1, *, new_name: bool = False) -> Item:
    syllables = ("ba", "lo", "mi", "ra", "ten", "vi", "su", "ko")
    hero = "".join(rng.choices(syllables, k=2)).capitalize() if new_name else rng.choice(NAMES)
    return ask_story("", rng.choice(list(ANIMALS)), hero, size, chapters)


def _sums(numbers: range) -> str:
    return "".join(f"{n} + {2 * n + 3} = {3 * n + 3}\n" for n in numbers)


def _count_to(rng: random.Random) -> Item:
    start = rng.randrange(900)
    return ask_count("", start, start + rng.randint(3, 20))


TASKS: Mapping[str, Callable[[random.Random], Item]] = {
    "sum of one digit, continued": lambda r: add("", r.randrange(10), r.randrange(10)),
    "sum of two digits, continued": lambda r: add("", r.randrange(10, 100), r.randrange(10, 100)),
    "sum of two digits, asked": lambda r: ask_sum("", r.randrange(10, 100), r.randrange(10, 100)),
    "16 numbers, continued": lambda r: carry_on("", r.randrange(900), 4, 16),
    "100 numbers, continued": lambda r: carry_on("", r.randrange(800), 4, 100),
    "16 numbers behind 350": lambda r: carry_on("", r.randrange(500), 350, 16),
    "count to a number": _count_to,
    "story, a name of the corpus": _story,
    "story, a name that is mostly new": lambda r: _story(r, new_name=True),
    "story of three chapters": lambda r: _story(r, "a long story", 3),
    "story of six chapters": lambda r: _story(r, "a very long story", 6),
    "price among 4": lambda r: ask_price("", 4, r),
    "price among 24": lambda r: ask_price("", 24, r),
}


def checkable() -> list[Item]:
    """Fixed prompts, short and long, for tests of whatever runs the model."""
    rng = random.Random(7)
    return [
        add("add-3-4", 3, 4),
        add("add-12-30", 12, 30),
        add("add-47-38", 47, 38),
        add("add-99-99", 99, 99),
        Item("add-after-examples", " 90\n", prompt="2 + 2 = 4\n15 + 17 = 32\n60 + 41 = 101\n34 + 56 ="),
        carry_on("count-on-7", 7, 4, 16),
        carry_on("count-on-95", 95, 3, 24),
        carry_on("count-on-188", 188, 4, 100),
        carry_on("count-on-200-behind-300", 200, 300, 30),
        Item("count-on-commas", ", 34, 35, 36, 37, 38, 39, 40, 41, 42", prompt="30, 31, 32, 33"),
        ask_sum("ask-12-30", 12, 30),
        ask_sum("ask-58-67", 58, 67),
        ask_sum("ask-5-8", 5, 8),
        ask_count("ask-count-5-12", 5, 12),
        ask_count("ask-count-97-104", 97, 104),
        ask_count("ask-count-300-316", 300, 316),
        ask_count("ask-count-1-60", 1, 60),
        ask_story("story-fox-mia", "fox", "Mia"),
        ask_story("story-owl-tom", "owl", "Tom"),
        ask_story("story-bear-zola", "bear", "Zola"),
        ask_story("story-mouse-leo", "mouse", "Leo"),
        ask_story("story-frog-emma", "frog", "Emma"),
        ask_story("story-goat-hugo", "goat", "Hugo"),
        ask_story("story-crow-ruby-blue-book", "crow", "Ruby", thing="blue book"),
        ask_story("story-cat-luna-green-lamp", "cat", "Luna", thing="green lamp"),
        ask_story("long-story-duck-otto", "duck", "Otto", "a long story", 3),
        ask_story("very-long-story-wolf-nora", "wolf", "Nora", "a very long story", 6),
        ask_price("price-4", 4, rng),
        ask_price("price-8", 8, rng),
        ask_price("price-24", 24, rng),
        ask("hello", "Hello!", GREETING),
        ask("who-are-you", "Who are you?", ABOUT),
        ask("unknown", "What is the capital of France?", UNKNOWN),
        ask("second-turn", "What is 20 + 22?", "20 + 22 = 42", ("Count from 3 to 6.", "3 4 5 6")),
        ask("after-story", "What is 31 + 9?", "31 + 9 = 40", ("Tell me a story about a hare named Ben.", story("hare", "Ben"))),
        ask_sum("ask-77-24", 77, 24),
        ask_sum("ask-90-10", 90, 10),
        Item("add-after-40-examples", " 121\n", prompt=f"{_sums(range(40))}64 + 57 ="),
        ask(
            "ninth-turn",
            "What is 46 + 25?",
            "46 + 25 = 71",
            *((f"What is {n} + {3 * n}?", f"{n} + {3 * n} = {4 * n}") for n in range(11, 19)),
        ),
        ask("repeat", "Repeat: kite owl 17 Mia blue 250 drum", "kite owl 17 Mia blue 250 drum"),
    ]
