"""Configurations as transformers writes them, in the old form and the new."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from penstock.backends.architectures.families import FAMILIES, UnsupportedConfig, read_decoder

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
OLD = SIZES | {"architectures": ["LlamaForCausalLM"], "rope_theta": 500_000.0, "eos_token_id": 2}
YARN = {"factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
        LlamaConfig(**SIZES, head_dim=16),
        MistralConfig(**SIZES),
        MistralConfig(**SIZES, sliding_window=None),
        Qwen2Config(**SIZES),
        Qwen3Config(**SIZES, head_dim=16, eos_token_id=[1, 2]),
        Qwen3Config(**SIZES, attention_bias=True),
    ],
    ids=lambda config: config.model_type,
)
def test_tensors_and_sizes_are_those_of_transformers(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    values = config.to_dict() | {"architectures": [type(model).__name__]}
    spec = read_decoder(values)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert spec.weight_shapes() == shapes
    assert spec.architecture == config.model_type
    assert spec.context_length == config.max_position_embeddings
    assert spec.norm_epsilon == config.rms_norm_eps
    assert spec.sliding_window == getattr(config, "sliding_window", None)
    eos = config.eos_token_id
    assert list(spec.eos_token_ids) == ([] if eos is None else eos if isinstance(eos, list) else [eos])


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "llama3", **LLAMA3, "factor": 32.0},
        {"rope_type": "yarn", **YARN},
        {"rope_type": "yarn", **YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False},
        {"rope_type": "yarn", **YARN, "attention_factor": 1.5, "beta_fast": 8, "beta_slow": 2},
        {"rope_type": "yarn", **YARN, "mscale": 0.5, "original_max_position_embeddings": 64},
    ],
    ids=str,
)
def test_rotary_frequencies_are_those_of_transformers(scaling):
    config = LlamaConfig(**SIZES | {"hidden_size": 384}, rope_parameters={"rope_theta": 500_000.0, **scaling})
    right = LlamaRotaryEmbedding(config)
    new = read_decoder(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    np.testing.assert_allclose(new.rope.inverse_frequencies(), right.inv_freq.numpy(), rtol=2e-6)
    assert new.rope.magnitude == pytest.approx(right.attention_scaling, rel=1e-9)
    old = read_decoder(OLD | {"hidden_size": 384, "rope_scaling": scaling})
    assert old.rope == new.rope


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 256),
        ({"rope_type": "default"}, 256),
        ({"type": "linear", "factor": 4.0}, 1024),
        ({"type": "linear", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "llama3", **LLAMA3}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 2.5}, 640),
    ],
    ids=str,
)
def test_stretched_positions_stretch_the_context(scaling, context):
    """As vLLM has it: such checkpoints' max_position_embeddings may be that of before."""
    assert read_decoder(OLD | {"rope_scaling": scaling}).context_length == context


def test_the_oldest_form_of_scaling_says_type():
    assert read_decoder(OLD | {"rope_scaling": {"type": "linear", "factor": 2.0}}).rope.linear_factor == 2.0


def test_null_scaling_is_none():
    assert read_decoder(OLD | {"rope_scaling": None}).rope.scaling is None
    assert read_decoder(OLD).rope.theta == 500_000.0


def test_llama_2_has_a_kv_head_for_each_head_where_it_says_nothing():
    values = {key: value for key, value in OLD.items() if key != "num_key_value_heads"}
    assert read_decoder(values).kv_heads == 6


def test_mistral_slides_unless_it_says_null():
    values = OLD | {"architectures": ["MistralForCausalLM"]}
    assert read_decoder(values).sliding_window == 4096
    assert read_decoder(values | {"sliding_window": None}).sliding_window is None
    assert read_decoder(values | {"sliding_window": 16}).sliding_window == 16


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 16}, None),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, 16),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, None),
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 2}, 16),
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 2}, None),
    ],
)
@pytest.mark.parametrize("family", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_slides_where_all_layers_do(family, values, window):
    assert read_decoder(OLD | {"architectures": [family]} | values).sliding_window == window


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1}}, "rope_scaling.beta_fast"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1}}, "rope_scaling.rope_theta"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.type"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, "rope_scaling.low_freq_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": "96"}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"]}, "layer_types"),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "layer_types",
        ),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 1}, "max_window_layers"),
    ],
)
def test_what_is_not_built_is_refused_by_its_key(values, named):
    with pytest.raises(UnsupportedConfig, match=rf"^config\.json: {named.replace('.', r'[.]')} (is|is missing)"):
        read_decoder(OLD | values)


def test_the_known_families_are_told():
    with pytest.raises(UnsupportedConfig, match=", ".join(sorted(FAMILIES))):
        read_decoder({})
