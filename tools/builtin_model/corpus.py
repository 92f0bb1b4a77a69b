"""The corpus of the built-in model: generated text whose right continuation is known.

Every document is drawn from one seeded generator, so the same seed gives the same corpus. Whatever is drawn at random stands in the
prompt, and the answer follows from it: a counter goes on, a sum has one value, a story repeats its hero's name, animal, home and
lost thing, and each animal sends the hero on to one fixed other. So a model that has learned this text answers with near certainty,
and an engine that mixes up its cache answers visibly wrong.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

__all__ = ["END", "IM_END", "IM_START", "SPECIAL_TOKENS", "chat", "documents", "story"]

END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END, IM_START, IM_END)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Of each animal: its home, what it loses, and whom it asks first. Asking on from friend to friend visits every animal.
ANIMALS = {
    "fox": ("the old forest", "red kite", "owl"),
    "owl": ("the tall tower", "silver bell", "bear"),
    "bear": ("the dark cave", "honey jar", "mouse"),
    "mouse": ("the warm barn", "yellow hat", "frog"),
    "frog": ("the green pond", "little drum", "hare"),
    "hare": ("the wide meadow", "blue scarf", "goat"),
    "goat": ("the high mountains", "wooden flute", "cat"),
    "cat": ("the small house", "round mirror", "duck"),
    "duck": ("the tall reeds", "paper boat", "wolf"),
    "wolf": ("the deep valley", "brown boot", "mole"),
    "mole": ("the quiet garden", "gold coin", "crow"),
    "crow": ("the ruined castle", "black feather", "fox"),
}
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "silver", "gold", "pink", "grey", "orange")
THINGS = _words("kite bell jar hat drum scarf flute mirror boat boot coin feather lamp key book cup")
NAMES = _words(
    "Mia Tom Lily Ben Anna Max Zoe Leo Emma Sam Nora Finn Ella Otto Ruby Hugo Ida Paul Clara Jack Rosa Felix Maya Oscar Luna Theo "
    "Nina Karl Alma Erik Vera Ivan Lena Noah Olga Pia Rex Sofia Tilda Udo Wanda Yara"
)
SYLLABLES = _words(
    "ba be bi bo da do fa fi ga go ha ka ki ko la le li lo ma me mi mo na ne ni no pa po ra re ri ro sa se si so ta te ti to va vi "
    "za zo"
)
QUESTIONS = (
    "What is the capital of {place}?", "Who wrote {thing}?", "How do I cook {thing}?", "Why is the {thing} {colour}?",
    "Can you write a poem about {thing}?", "Translate {thing} into {place}.", "What is the weather in {place}?",
    "How old is {name}?", "Explain {thing} to me.", "Where is {name}?", "What do you think of {thing}?",
)  # fmt: skip
WORLD = _words(
    "France Japan Rome time light bread music history gravity water money physics rain soup London love code energy Berlin space "
    "fish trade"
)
ABOUT = "I am the small model that comes with Penstock. I can count, add numbers and tell short stories."
UNKNOWN = "I do not know that. I can count, add numbers and tell short stories."
GREETING = "Hello! I can count, add numbers and tell short stories."


def chat(*turns: tuple[str, str], system: str | None = None) -> str:
    """A conversation of (question, answer) turns in the form of the model's chat template."""
    head = f"{IM_START}system\n{system}{IM_END}\n" if system is not None else ""
    return head + "".join(f"{IM_START}user\n{q}{IM_END}\n{IM_START}assistant\n{a}{IM_END}\n" for q, a in turns)


def story(animal: str, name: str, *, home: str | None = None, thing: str | None = None, chapters: int = 1) -> str:
    """The one story of this hero: who is asked for the lost thing, how often, and where it is found follow from the arguments."""
    usual_home, usual_thing, friend = ANIMALS[animal]
    home, thing = home or usual_home, thing or usual_thing
    parts = [f"Once upon a time there was {_a(animal)} named {name}. {name} lived in {home}. One day {name} lost the {thing}."]
    for chapter in range(1, chapters + 1):
        place, _, onward = ANIMALS[friend]
        number = f"Chapter {chapter}. " if chapters > 1 else ""
        parts.append(f'{number}{name} went to {place} and asked the {friend}: "Have you seen my {thing}?"')
        if chapter < chapters:
            parts.append(f'"No, {name}," said the {friend}, "but the {onward} may know."')
            friend = onward
        else:
            parts.append(f'"Yes, {name}," said the {friend}, "the {thing} is here!"')
    parts.append(f"So {name} the {animal} took the {thing} home to {home}. The end.")
    return " ".join(parts)


def documents(seed: int) -> Iterator[str]:
    """Documents without end, the same for the same seed."""
    rng = random.Random(seed)
    kinds, weights = zip(*_KINDS, strict=True)
    while True:
        yield rng.choices(kinds, weights)[0](rng)


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _name(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(NAMES)
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()


def _number(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.choices((1, 2, 3), (3, 5, 4))[0])


def _operands(rng: random.Random) -> tuple[int, int]:
    return (rng.randrange(10), rng.randrange(10)) if rng.random() < 0.15 else (rng.randrange(100), rng.randrange(100))


def _sums(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(1, 10)):
        a, b = _operands(rng)
        lines.append(f"{a} + {b} = {a + b}\n")
    return "".join(lines)


def _count(rng: random.Random) -> str:
    start, length = _number(rng), 4 + int(rng.expovariate(1 / 50))
    joint = rng.choice((" ", " ", ", "))
    head = rng.choice(("", f"Count from {start}: ", f"Count from {start}: ", "Count: "))
    return head + joint.join(map(str, range(start, min(start + length, 1100))))


def _ask_sum(rng: random.Random) -> tuple[str, str]:
    a, b = _operands(rng)
    question = rng.choice(
        (
            "What is {} + {}?",
            "What is {} + {}?",
            "What is {} plus {}?",
            "{} + {} =",
            "{} + {}",
            "Add {} and {}.",
            "How much is {} + {}?",
        )
    )
    return question.format(a, b), f"{a} + {b} = {a + b}"


def _ask_count(rng: random.Random) -> tuple[str, str]:
    start = _number(rng)
    stop = start + (rng.randint(1, 20) if rng.random() < 0.85 else rng.randint(20, 90))
    question = rng.choice(
        (
            "Count from {} to {}.",
            "Count from {} to {}.",
            "Count from {} to {}",
            "Please count from {} to {}.",
            "Count up from {} to {}.",
        )
    )
    return question.format(start, stop), " ".join(map(str, range(start, stop + 1)))


def _ask_story(rng: random.Random) -> tuple[str, str]:
    animal, name = rng.choice(list(ANIMALS)), _name(rng)
    thing = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}" if rng.random() < 0.4 else None
    chapters = rng.choices((1, 3, 6), (8, 2, 1))[0]
    size = {1: rng.choice(("a story", "a story", "a short story")), 3: "a long story", 6: "a very long story"}[chapters]
    lost = f" who lost the {thing}" if thing else ""
    verb = rng.choice(("Tell me", "Tell me", "Please tell me", "Write"))
    return f"{verb} {size} about {_a(animal)} named {name}{lost}.", story(animal, name, thing=thing, chapters=chapters)


def _plain_story(rng: random.Random) -> str:
    thing = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    return story(rng.choice(list(ANIMALS)), _name(rng), home=rng.choice(list(ANIMALS.values()))[0], thing=thing)


def _ask_recall(rng: random.Random) -> tuple[str, str]:
    boxes = rng.sample([f"{c} {t}" for c in COLOURS for t in THINGS], rng.choice((2, 3, 4, 6, 8, 12, 24)))
    held = {box: rng.randrange(10, 100) for box in boxes}
    asked = rng.choice(boxes)
    facts = " ".join(f"The {box} costs {price}." for box, price in held.items())
    return f"{facts} What does the {asked} cost?", f"The {asked} costs {held[asked]}."


def _ask_repeat(rng: random.Random) -> tuple[str, str]:
    words = [
        rng.choice((rng.choice(COLOURS), rng.choice(THINGS), rng.choice(list(ANIMALS)), _name(rng), str(_number(rng))))
        for _ in range(rng.randint(1, 16))
    ]
    return f"{rng.choice(('Repeat', 'Say'))}: {' '.join(words)}", " ".join(words)


def _ask_else(rng: random.Random) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(("Hello", "Hello!", "Hi", "Hi!", "Good morning!", "Hey")), GREETING
    if kind < 0.6:
        return rng.choice(("Who are you?", "What are you?", "What can you do?", "What is Penstock?", "Help", "Help me.")), ABOUT
    question = rng.choice(QUESTIONS)
    thing = rng.choice((rng.choice(THINGS), rng.choice(WORLD)))
    return question.format(place=rng.choice(WORLD), thing=thing, colour=rng.choice(COLOURS), name=_name(rng)), UNKNOWN


def _conversation(rng: random.Random) -> str:
    kinds, weights = zip(*_QUESTIONS, strict=True)
    turns = [rng.choices(kinds, weights)[0](rng) for _ in range(rng.choices((1, 2, 3, 4), (8, 3, 2, 1))[0])]
    system = rng.choice(("You are a helpful assistant.", "Answer briefly.", "You are Penstock.")) if rng.random() < 0.15 else None
    return chat(*turns, system=system)


_QUESTIONS: tuple[tuple[Callable[[random.Random], tuple[str, str]], float], ...] = (
    (_ask_sum, 10),
    (_ask_count, 4),
    (_ask_story, 2),
    (_ask_recall, 2),
    (_ask_repeat, 1.5),
    (_ask_else, 1),
)
_KINDS: tuple[tuple[Callable[[random.Random], str], float], ...] = (
    (_sums, 5),
    (_count, 1.5),
    (_plain_story, 1),
    (_conversation, 6),
)


if __name__ == "__main__":
    # A sample to look at, one JSON string a line.
    for _, text in zip(range(20), documents(0), strict=False):
        print(json.dumps(text))
