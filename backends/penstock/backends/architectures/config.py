"""Reading of a checkpoint's JSON: typed, with the key's name in every error, and nothing that changes the answer passed over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from penstock.backends.architectures.spec import DecoderSpec, LayerWeights, Rope, RopeScaling, WeightNames, Yarn

__all__ = ["Config", "UnsupportedConfig", "decoder_spec", "layer_weights"]

_MISSING: Any = object()


class UnsupportedConfig(ValueError):
    """A configuration is malformed, or asks for something that no backend computes. Names the key."""


class Config:
    """A checkpoint's config.json (or its like). A key that is absent or null takes the default; without one it is an error."""

    def __init__(self, values: Mapping[str, Any], path: str = "config.json: ") -> None:
        self._values = values
        self._path = path

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def is_null(self, key: str) -> bool:
        """Whether the key stands there with null, where that means something other than its absence."""
        return key in self._values and self._values[key] is None

    def integer(self, key: str, default: int = _MISSING) -> int:
        """A positive whole number."""
        value = self.whole(key, default)
        if value == 0:
            raise self.error(key, "must be a positive whole number")
        return value

    def whole(self, key: str, default: int = _MISSING) -> int:
        """A whole number, zero among them."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(key, "must be a whole number, not negative")
        return value

    def number(self, key: str, default: float = _MISSING) -> float:
        """A positive number."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(key, "must be a positive number")
        return float(value)

    def amount(self, key: str) -> float | None:
        """A number that is not negative; None where the key is absent."""
        value = self._get(key, None)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise self.error(key, "must be a number, not negative")
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, "must be a string")
        return value

    def section(self, key: str) -> Config | None:
        """The object under `key`; None where there is none."""
        value = self._get(key, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "must be an object")
        return Config(value, f"{self._path}{key}.")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of them; none where the key is absent."""
        value = self._get(key, None)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error(key, "must be a token id or a list of token ids")
        return tuple(ids)

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; none where the key is absent."""
        value = self._get(key, None)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "must be a list of strings")
        return tuple(value)

    def refuse(self, key: str, *, unless: Any, why: str) -> None:
        """Raise if `key` stands there with a value, other than null, that is not `unless`."""
        value = self._get(key, None)
        if value is not None and value != unless:
            raise self.error(key, why)

    def error(self, key: str, what: str) -> UnsupportedConfig:
        value = self._values.get(key, _MISSING)
        found = "is missing" if value is _MISSING else f"is {str(value)[:100]!r}"
        return UnsupportedConfig(f"{self._path}{key} {found}; it {what}")

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise self.error(key, "is required")
        return default


def decoder_spec(
    config: Config,
    architecture: str,
    layer: LayerWeights,
    *,
    sliding_window: int | None = None,
    head_dim: int | None = None,
) -> DecoderSpec:
    """What all families share; the rest is the caller's.

    Args:
        config: the whole configuration.
        architecture: the family's name.
        layer: names of a layer's tensors.
        sliding_window: as `DecoderSpec.sliding_window`.
        head_dim: what the family takes where `head_dim` is absent; None: the hidden size split among the heads.

    Raises:
        UnsupportedConfig: naming the key.
    """
    _refuse_what_no_backend_computes(config)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"must divide num_attention_heads, {heads}")
    dim = config.integer("head_dim", head_dim or hidden // heads)
    if dim % 2:
        raise config.error("head_dim", "must be even, for rotary positions")
    tied = config.boolean("tie_word_embeddings")
    rope = _rope(config, dim)
    return DecoderSpec(
        architecture=architecture,
        vocabulary_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        layers=config.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        context_length=_context_length(config, rope),
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        rope=rope,
        weights=WeightNames(
            embedding="model.embed_tokens.weight",
            final_norm="model.norm.weight",
            lm_head=None if tied else "lm_head.weight",
            layer=layer,
        ),
        sliding_window=sliding_window,
        eos_token_ids=config.token_ids("eos_token_id"),
    )


def layer_weights(*, qkv_bias: bool = False, o_bias: bool = False, qk_norm: bool = False) -> LayerWeights:
    """Names of a layer's tensors as Llama has them, and the families that followed it."""
    at, attention, mlp = "model.layers.{layer}.", "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
    return LayerWeights(
        input_norm=f"{at}input_layernorm.weight",
        q=f"{attention}q_proj.weight",
        k=f"{attention}k_proj.weight",
        v=f"{attention}v_proj.weight",
        o=f"{attention}o_proj.weight",
        post_attention_norm=f"{at}post_attention_layernorm.weight",
        gate=f"{mlp}gate_proj.weight",
        up=f"{mlp}up_proj.weight",
        down=f"{mlp}down_proj.weight",
        q_bias=f"{attention}q_proj.bias" if qkv_bias else None,
        k_bias=f"{attention}k_proj.bias" if qkv_bias else None,
        v_bias=f"{attention}v_proj.bias" if qkv_bias else None,
        o_bias=f"{attention}o_proj.bias" if o_bias else None,
        q_norm=f"{attention}q_norm.weight" if qk_norm else None,
        k_norm=f"{attention}k_norm.weight" if qk_norm else None,
    )


def _refuse_what_no_backend_computes(config: Config) -> None:
    config.refuse("hidden_act", unless="silu", why="must be silu: no other activation is built")
    config.refuse("mlp_bias", unless=False, why="must be false: biases of the feed-forward are not built")
    config.refuse("partial_rotary_factor", unless=1, why="must be 1: rotation of a part of a head is not built")
    config.refuse("quantization_config", unless=None, why="must be absent: take the checkpoint as it was before quantisation")


def _rope_parameters(config: Config) -> Config:
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` (before)."""
    return config.section("rope_parameters") or config.section("rope_scaling") or Config({})


def _context_length(config: Config, rope: Rope) -> int:
    """As vLLM has it: ``max_position_embeddings`` tells what was there before positions were stretched, but with Llama 3's way.

    With YaRN, and wherever ``original_max_position_embeddings`` stands, that one tells it.
    """
    told = config.integer("max_position_embeddings")
    factor = rope.yarn.factor if rope.yarn else rope.linear_factor
    if factor == 1:
        return told
    return int(factor * _rope_parameters(config).integer("original_max_position_embeddings", told))


def _rope(config: Config, head_dim: int) -> Rope:
    """Rotary positions, with ``rope_theta`` beside their parameters or among them."""
    parameters = _rope_parameters(config)
    theta = parameters.number("rope_theta", config.number("rope_theta", 10_000.0))
    parameters.refuse("partial_rotary_factor", unless=1, why="must be 1: rotation of a part of a head is not built")
    kind_key = "rope_type" if "rope_type" in parameters else "type"
    match parameters.text(kind_key, "default"):
        case "default":
            return Rope(theta, head_dim)
        case "linear":
            return Rope(theta, head_dim, linear_factor=parameters.number("factor"))
        case "llama3":
            scaling = RopeScaling(
                factor=parameters.number("factor"),
                low_frequency_factor=parameters.number("low_freq_factor"),
                high_frequency_factor=parameters.number("high_freq_factor"),
                original_context_length=parameters.integer("original_max_position_embeddings"),
            )
            if scaling.low_frequency_factor >= scaling.high_frequency_factor:
                raise parameters.error("low_freq_factor", "must be less than high_freq_factor")
            return Rope(theta, head_dim, scaling)
        case "yarn":
            return _yarn(parameters, theta, head_dim, config.integer("max_position_embeddings"))
        case _:
            raise parameters.error(kind_key, "must be one of default, linear, llama3, yarn: no other scaling of positions is built")


def _yarn(parameters: Config, theta: float, head_dim: int, max_position_embeddings: int) -> Rope:
    """YaRN, with the defaults that transformers takes."""
    scaling = Yarn(
        factor=parameters.number("factor"),
        fast=parameters.number("beta_fast", 32.0),
        slow=parameters.number("beta_slow", 1.0),
        original_context_length=parameters.integer("original_max_position_embeddings", max_position_embeddings),
        whole_dimensions=parameters.boolean("truncate", default=True),
    )
    if scaling.fast <= scaling.slow:
        raise parameters.error("beta_fast", f"must be more than beta_slow, {scaling.slow:g}")
    if theta <= 1:
        raise parameters.error("rope_theta", "must be more than 1, for YaRN")
    mscale, all_dim = parameters.amount("mscale"), parameters.amount("mscale_all_dim")
    inferred = _magnitude(scaling.factor, mscale) / _magnitude(scaling.factor, all_dim) if mscale and all_dim else None
    magnitude = parameters.number("attention_factor", inferred or _magnitude(scaling.factor, 1.0))
    return Rope(theta, head_dim, yarn=scaling, magnitude=magnitude)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
