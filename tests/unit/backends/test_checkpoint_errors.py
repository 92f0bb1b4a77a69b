"""Each way a checkpoint can be wrong is one line that names the file and what would be right."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from penstock.backends.checkpoint import CheckpointError, read_model
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.common.service import StartError


def refusal(folder):
    with pytest.raises(CheckpointError) as raised:
        read_model(folder, "m")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def rewrite(folder, change):
    """Change the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_no_such_folder(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_it_ends_the_start_of_a_service():
    assert issubclass(CheckpointError, StartError)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    assert f"{name} is missing" in refusal(checkpoint)


def test_no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(checkpoint)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_read(checkpoint, pickle):
    (checkpoint / "model.safetensors").rename(checkpoint / pickle)
    assert pickle in refusal(checkpoint)
    assert "safetensors are needed" in refusal(checkpoint)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_none(checkpoint, name, text):
    (checkpoint / name).write_bytes(text.encode(errors="surrogateescape"))
    assert name in refusal(checkpoint)


def test_an_unknown_architecture_names_the_known_ones(checkpoint):
    configure(checkpoint, architectures=["MambaForCausalLM"])
    assert "MambaForCausalLM" in refusal(checkpoint)
    assert "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM" in refusal(checkpoint)


def test_a_missing_tensor(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "tensor model.layers.1.mlp.up_proj.weight [128, 64] is missing" in refusal(checkpoint)


def test_a_wrong_shape(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({"model.norm.weight": np.ones(63, np.float32)}))
    assert "tensor model.norm.weight is [63]; config.json says [64]" in refusal(checkpoint)


def test_a_wrong_type(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({"model.norm.weight": np.ones(64, np.int8)}))
    assert "tensor model.norm.weight is I8; expected one of F32, BF16, F16" in refusal(checkpoint)


def test_a_tensor_that_the_model_would_not_use(checkpoint):
    configure(checkpoint, attention_bias=False)
    assert "_proj.bias has no place" in refusal(checkpoint)


def test_old_buffers_and_tied_projections_are_let_be(checkpoint):
    rewrite(checkpoint, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))
    configure(checkpoint, tie_word_embeddings=True)  # lm_head.weight stands in the file all the same
    assert read_model(checkpoint, "m").decoder.tied_embeddings


def test_an_untied_projection_must_be_there(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight [320, 64] is missing" in refusal(checkpoint)
    configure(checkpoint, tie_word_embeddings=True)
    assert read_model(checkpoint, "m").decoder.weights.lm_head is None


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1])
def test_a_truncated_file(checkpoint, kept):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "truncated" in refusal(checkpoint) or "not a safetensors file" in refusal(checkpoint)
    if kept in {100, -1}:
        assert "truncated" in refusal(checkpoint)


def test_bytes_behind_the_last_tensor(checkpoint):
    with (checkpoint / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "4 bytes stand behind" in refusal(checkpoint)


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"\x80\x04garbage.",
        b"[]",
        b'{"a": 1}',
        json.dumps({"a": TENSOR | {"dtype": "F99"}}).encode(),
        json.dumps({"a": TENSOR | {"shape": [3]}}).encode(),
        json.dumps({"a": TENSOR | {"shape": [-2]}}).encode(),
        json.dumps({"a": TENSOR | {"data_offsets": [8, 0]}}).encode(),
        json.dumps({"a": TENSOR | {"data_offsets": [4, 12]}}).encode(),
        json.dumps({"a": TENSOR, "b": TENSOR}).encode(),
        b'{"a": %b, "a": %b}' % ((json.dumps(TENSOR).encode(),) * 2),
    ],
)
def test_headers_that_are_garbage(checkpoint, header):
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "not a safetensors file" in refusal(checkpoint)


def test_a_length_that_is_absurd_takes_no_memory(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + bytes(100))
    assert "not a safetensors file" in refusal(checkpoint)


def shard(folder, names_of_second):
    """Split a checkpoint in two."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        parts["b.safetensors" if names_of_second in name else "a.safetensors"][name] = tensor
    for file, part in parts.items():
        save_file(part, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_read_and_a_missing_one_is_named(checkpoint):
    shard(checkpoint, "layers.1")
    assert [s.name for s in read_model(checkpoint, "m").shards] == ["a.safetensors", "b.safetensors"]
    (checkpoint / "b.safetensors").unlink()
    assert "b.safetensors of 2 shards missing" in refusal(checkpoint)


def test_a_tensor_in_two_shards(checkpoint):
    shard(checkpoint, "layers.1")
    save_file(
        load_file(checkpoint / "b.safetensors") | {"model.norm.weight": np.ones(64, np.float32)}, checkpoint / "b.safetensors"
    )
    assert "model.norm.weight stands in a.safetensors and in b.safetensors" in refusal(checkpoint)


@pytest.mark.parametrize("weight_map", [None, {}, {"a": "../other.safetensors"}, {"a": "/etc/passwd"}, {"a": 1}])
def test_an_index_names_files_of_its_own_folder(checkpoint, weight_map):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map must say the file" in refusal(checkpoint)


class TestFingerprint:
    """The same model, however it lies on disk, and no other."""

    def test_is_the_same_for_shards_and_other_versions_of_the_writer(self, checkpoint):
        before = read_model(checkpoint, "m").fingerprint
        configure(checkpoint, transformers_version="9.9")
        shard(checkpoint, "layers.1")
        assert read_model(checkpoint, "another name").fingerprint == before

    def test_tells_configurations_apart(self, checkpoint):
        before = read_model(checkpoint, "m").fingerprint
        configure(checkpoint, rope_theta=20_000.0)
        assert read_model(checkpoint, "m").fingerprint != before

    def test_tells_a_fine_tune_from_its_base(self, checkpoint):
        before = read_model(checkpoint, "m").fingerprint

        def tune(tensors):
            tensors["model.layers.1.self_attn.q_proj.weight"] *= 1.01

        rewrite(checkpoint, tune)
        assert read_model(checkpoint, "m").fingerprint != before

    def test_tells_a_single_element_anywhere(self, checkpoint):
        found = {read_model(checkpoint, "m").fingerprint}
        for place in (-1, 1000):

            def edit(tensors, place=place):
                tensors["model.embed_tokens.weight"].flat[place] += 1

            rewrite(checkpoint, edit)
            found.add(read_model(checkpoint, "m").fingerprint)
        assert len(found) == 3

    def test_reads_what_it_has_read_before_only_if_it_was_written_to(self, checkpoint, tmp_path, monkeypatch):
        cache = tmp_path / "cache"
        before = read_model(checkpoint, "m", cache=cache).fingerprint
        assert before == read_model(checkpoint, "m").fingerprint
        with monkeypatch.context() as patch:
            patch.setattr("penstock.backends.fingerprint._digest", None)
            assert read_model(checkpoint, "m", cache=cache).fingerprint == before

        def tune(tensors):
            tensors["model.embed_tokens.weight"].flat[-1] += 1

        rewrite(checkpoint, tune)
        after = read_model(checkpoint, "m", cache=cache).fingerprint
        assert after == read_model(checkpoint, "m").fingerprint != before

    @pytest.mark.parametrize("content", [b"", b"[]", b'{"state": 1}', b"\xff", b"[" * 100_000])
    def test_is_right_whatever_was_kept(self, checkpoint, tmp_path, content):
        before = read_model(checkpoint, "m", cache=tmp_path / "cache").fingerprint
        (kept,) = (tmp_path / "cache" / "digests").iterdir()
        kept.write_bytes(content)
        assert read_model(checkpoint, "m", cache=tmp_path / "cache").fingerprint == before
        (tmp_path / "file").touch()
        assert read_model(checkpoint, "m", cache=tmp_path / "file").fingerprint == before  # where nothing can be kept

    def test_does_not_depend_on_where_it_lies(self, tmp_path):
        one, two = (write_checkpoint(tmp_path / name, CONFIGS["qwen3"]) for name in ("one", "two"))
        assert one.fingerprint == two.fingerprint
        assert write_checkpoint(tmp_path / "three", CONFIGS["qwen3"], seed=1).fingerprint != one.fingerprint


class TestGenerationDefaults:
    def read(self, folder, **values):
        (folder / "generation_config.json").write_text(json.dumps(values))
        return read_model(folder, "m")

    def test_absent_file_says_nothing(self, checkpoint):
        defaults = read_model(checkpoint, "m").defaults
        assert defaults.temperature is None
        assert defaults.top_k is None

    def test_values_and_end_ids(self, checkpoint):
        configure(checkpoint, eos_token_id=1)
        spec = self.read(checkpoint, do_sample=True, temperature=0.6, top_p=0.95, top_k=20, eos_token_id=[7, 9])
        assert (spec.defaults.temperature, spec.defaults.top_p, spec.defaults.top_k) == (0.6, 0.95, 20)
        assert spec.decoder.eos_token_ids == (7, 9)

    def test_end_ids_of_the_configuration_hold_where_the_other_names_none(self, checkpoint):
        configure(checkpoint, eos_token_id=1)
        assert self.read(checkpoint, temperature=0.6).decoder.eos_token_ids == (1,)

    def test_no_sampling_is_greedy(self, checkpoint):
        assert self.read(checkpoint, do_sample=False, temperature=0.6).defaults.temperature == 0

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ({"temperature": 101}, "from 0 to 100"),
            ({"top_p": 0}, "to 1"),
            ({"top_p": 1e-50}, "to 1"),
            ({"top_p": 1.01}, "to 1"),
            ({"top_k": 2**32}, "from 0 to 4294967295"),
            ({"min_p": 2}, "from 0 to 1"),
            ({"repetition_penalty": 0}, "from 0.01 to 10"),
            ({"repetition_penalty": 11}, "from 0.01 to 10"),
        ],
    )
    def test_what_nothing_can_be_sampled_by_is_refused_with_its_range(self, checkpoint, values, told):
        (checkpoint / "generation_config.json").write_text(json.dumps(values))
        said = refusal(checkpoint)
        assert f"generation_config.json: {next(iter(values))}" in said
        assert told in said

    @pytest.mark.parametrize(
        "values", [{"temperature": "hot"}, {"top_p": -1}, {"eos_token_id": "end"}, {"top_k": 1.5}, {"do_sample": 1}]
    )
    def test_nonsense_is_refused(self, checkpoint, values):
        (checkpoint / "generation_config.json").write_text(json.dumps(values))
        assert f"generation_config.json: {next(iter(values))}" in refusal(checkpoint)


def test_bfloat16_and_float16_weights_are_read(checkpoint):
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    path = checkpoint / "model.safetensors"
    save_torch({name: t.to(torch.bfloat16 if "mlp" in name else torch.float16) for name, t in load_torch(path).items()}, path)
    assert read_model(checkpoint, "m")
