"""Small tokenizers of every kind, built here."""

from __future__ import annotations

from functools import cache

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "한국어 문장은 음절이 여러 바이트로 나뉩니다. 안녕하세요!",
    "👩‍👩‍👧‍👦 👍🏽 🇰🇷 e\u0301 ñ n\u0303 Ω\n\tdef f(x):\n    return x ** 2\n",
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def _special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    tokenizer.add_tokens([AddedToken("two words", special=False), AddedToken("é", special=False)])
    return tokenizer


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|bos|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return _special(tokenizer)


def _byte_fallback(steps: list) -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
    letters = sorted({c for c in TEXT[0] + "안녕하세요" if c != " "} | {"▁"})
    pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("a", "n"), ("안", "녕")]
    vocabulary = {word: i for i, word in enumerate([*words, *letters, *("".join(pair) for pair in pairs)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return _special(tokenizer)


@cache
def llama() -> Tokenizer:
    return _byte_fallback([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


@cache
def gemma() -> Tokenizer:
    return _byte_fallback([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


@cache
def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁the", -2.0), *((c, -3.0) for c in sorted(set(TEXT[0] + TEXT[1])))], 0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _special(tokenizer)


@cache
def word_piece() -> Tokenizer:
    words = ["[UNK]", "the", "fox", "##es", ",", ".", "'", "n't", "##한", "한", "##é", *"abcxyz", *(f"##{c}" for c in "abcxyz")]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return _special(tokenizer)


@cache
def no_decoder() -> Tokenizer:
    return _special(Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "한글": 3}, unk_token="<unk>")))


@cache
def suffixed() -> Tokenizer:
    """A decoder that tables can not stand for: the last token reads differently."""
    tokenizer = Tokenizer(models.WordLevel({"lo": 0, "w</w>": 1, "er</w>": 2, "한</w>": 3}, unk_token="lo"))
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return _special(tokenizer)


@cache
def by_pattern() -> Tokenizer:
    return _byte_fallback([decoders.Replace(Regex("▁+"), " "), decoders.Fuse()])


TABLES = {f.__name__: f for f in (byte_level, llama, gemma, metaspace, word_piece, no_decoder)}
OTHERS = {f.__name__: f for f in (suffixed, by_pattern)}


@pytest.fixture(scope="session")
def kinds():
    """Builders of tokenizers by name."""
    return TABLES | OTHERS
