import pytest

from penstock.backends.architectures.families import read_decoder
from penstock.backends.conformance.checkpoints import CONFIGS
from penstock.backends.contract import DeviceConfig
from penstock.backends.kv_memory import count_blocks, free_memory
from penstock.common.service import StartError

DECODER = read_decoder(CONFIGS["llama"])  # 512 tokens of context: 32 blocks of 16


def test_the_operators_size_is_filled():
    assert count_blocks(DECODER, DeviceConfig(kv_cache_bytes=1000), 16, 100, free=1) == 10


def test_no_more_than_the_largest_batch_can_fill():
    assert count_blocks(DECODER, DeviceConfig(max_batch_size=4), 16, 100, free=1 << 40) == 4 * 32
    assert count_blocks(DECODER, DeviceConfig(max_batch_size=4, max_context=100), 16, 100, free=1 << 40) == 4 * 7


def test_free_memory_is_shared_with_the_rest():
    assert 1 <= count_blocks(DECODER, DeviceConfig(), 16, 100, free=10_000) < 100
    assert count_blocks(DECODER, DeviceConfig(kv_cache_share=0.25), 16, 100, free=10_000) == 25


@pytest.mark.parametrize("config", [DeviceConfig(kv_cache_bytes=99), DeviceConfig()])
def test_too_little_for_one_block_is_told(config):
    with pytest.raises(StartError, match="hold no KV block of 100 bytes"):
        count_blocks(DECODER, config, 16, 100, free=50)


def cgroup(folder, limit, used, inactive):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")
    return folder


def test_a_containers_limit_counts_less_what_can_be_reclaimed(tmp_path):
    assert free_memory(cgroup(tmp_path, 10_000, 6_000, 1_000)) == 5_000


@pytest.mark.parametrize("limit", ["max", 1 << 60])
def test_no_limit_is_the_machines_memory(tmp_path, limit):
    assert free_memory(cgroup(tmp_path, limit, 1, 1)) > 1 << 20
    assert free_memory(tmp_path / "none") > 1 << 20
