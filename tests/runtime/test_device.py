"""How `auto` settings become a frozen config, and what is refused on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from toptwo.errors import StartupError
from toptwo.models.mixtral import MixtralConfig, read_config
from toptwo.runtime.device import GIB, available_memory, resolve
from toptwo.runtime.kv_cache import kv_bytes_per_token
from toptwo.settings import Settings

MIXTRAL: MixtralConfig = read_config(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
    }
)


def test_kv_bytes_per_token() -> None:
    assert kv_bytes_per_token(MIXTRAL, torch.bfloat16) == 128 * 1024


def test_defaults_take_the_whole_context_and_a_share_of_memory() -> None:
    config = resolve(Settings(), MIXTRAL, weight_bytes=20 * GIB, memory=120 * GIB)
    assert (config.device, config.dtype, config.quantization) == ("cpu", torch.float32, "none")
    assert config.max_model_len == 32768
    assert config.kv_cache_bytes == pytest.approx(40 * GIB, rel=1e-3)
    assert config.num_threads >= 1


def test_no_more_blocks_than_all_sequences_can_use() -> None:
    settings = Settings(max_num_seqs=2, max_model_len=1000)
    config = resolve(settings, MIXTRAL, weight_bytes=0, memory=1000 * GIB)
    assert config.num_blocks == 2 * 63


def test_an_automatic_context_shrinks_to_what_fits() -> None:
    config = resolve(Settings(kv_cache_gib=1.0), MIXTRAL, weight_bytes=0, memory=100 * GIB)
    assert config.max_model_len == 4096  # 256 KiB per token in float32
    assert config.num_blocks == 256


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_model_len": 40000}, "--max-model-len 40000 is over the model's 32768"),
        ({"max_model_len": 8192, "kv_cache_gib": 1.0}, "needs 2.00 GiB and 1.00 GiB"),
        ({"kv_cache_gib": 1e-6}, "raise --kv-cache-gib"),
        ({"kv_cache_gib": 200}, "200.0 GiB would be used and 100.0 GiB are left"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, object], words: str) -> None:
    with pytest.raises(StartupError, match=words):
        resolve(Settings(**settings), MIXTRAL, weight_bytes=0, memory=100 * GIB)  # type: ignore[arg-type]


def test_weights_larger_than_memory_are_refused_before_loading() -> None:
    with pytest.raises(StartupError, match=r"the weights need 174\.0 GiB as torch.float32 and 21\.0 GiB"):
        resolve(Settings(), MIXTRAL, weight_bytes=174 * GIB, memory=21 * GIB)


def test_memory_of_this_machine_is_known() -> None:
    assert GIB // 4 < available_memory() < 1 << 50


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 20 * GIB),
        ({"memory.max": "max", "memory.current": str(GIB)}, 20 * GIB),
        ({"memory.max": str(4 * GIB), "memory.current": str(GIB)}, 3 * GIB),
        # File cache counts as used, and is there for the taking.
        (
            {
                "memory.max": str(4 * GIB),
                "memory.current": str(3 * GIB),
                "memory.stat": f"anon 5\ninactive_file {2 * GIB}\n",
            },
            3 * GIB,
        ),
        (
            {
                "memory/memory.limit_in_bytes": str(8 * GIB),
                "memory/memory.usage_in_bytes": str(3 * GIB),
                "memory/memory.stat": f"cache 1\ntotal_inactive_file {GIB}\n",
            },
            6 * GIB,
        ),
    ],
)
def test_a_containers_limit_is_obeyed(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {20 * GIB // 1024} kB\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert available_memory(tmp_path) == expected
