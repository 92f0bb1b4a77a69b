"""Prometheus metrics of the tokenizer service."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["TokenizerMetrics"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class TokenizerMetrics:
    """The service's counts, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.encoded = Counter("penstock_tokenizer_encoded_tokens", "Tokens that texts were encoded to.", registry=self.registry)
        self.encode_seconds = Histogram(
            "penstock_tokenizer_encode_seconds", "Time to render and encode one prompt.", buckets=_SECONDS, registry=self.registry
        )
        self.refused = Counter("penstock_tokenizer_refused_prompts", "Prompts that could not be encoded.", registry=self.registry)
        self.decoded = Counter("penstock_tokenizer_decoded_tokens", "Tokens taken on decoding streams.", registry=self.registry)
        self.decodings = Gauge("penstock_tokenizer_decodings", "Decodings that are open on all streams.", registry=self.registry)
        self.streams = Gauge("penstock_tokenizer_decode_streams", "Decoding streams that are open.", registry=self.registry)
