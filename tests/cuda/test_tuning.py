"""Which configuration a product gets: measured ones before guesses, kept from one start to the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from toptwo_kernels.cuda import tuning
from toptwo_kernels.cuda.tuning import Config, Key, Tuner, bucket, candidates

CARD = "NVIDIA H200"
KEY = Key("linear", "bfloat16", 4096, 4096, 16)
ALL = [
    Key(kind, weight_format, 4096, 14336, tokens)
    for kind in ("linear", "gate_up", "down")
    for weight_format in ("float32", "bfloat16", "float16", "int8", "int4", "fp8")
    for tokens in (16, 32, 64, 128, 256, 1024)
    if kind == "linear" or tokens <= (16 if weight_format == "float32" else 1024)
]


def slowest_guess(config: Config) -> float:
    """Milliseconds that make the last candidate the fastest."""
    return -float(candidates(KEY).index(config))


@pytest.mark.parametrize("key", ALL, ids=str)
def test_candidates_keep_bits_and_fit(key: Key) -> None:
    found = candidates(key)
    assert 1 <= len(found) <= 8
    assert len(set(found)) == len(found)
    for config in found:
        assert config.num_warps in (2, 4, 8)
        if key.kind != "linear":
            assert config.block_tokens == min(key.tokens, 128), "both products of an expert share its blocks"


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (512, 512), (5000, 1024)]
)
def test_buckets(tokens: int, expected: int) -> None:
    assert bucket(tokens) == expected


def test_the_fastest_is_chosen_and_kept(tmp_path: Path) -> None:
    tuner = Tuner(CARD, tmp_path / "new")
    assert tuner.choose(KEY) == candidates(KEY)[0]
    fastest = tuner.tune(KEY, slowest_guess)
    assert fastest == candidates(KEY)[-1] == tuner.choose(KEY)
    tuner.save()
    assert Tuner(CARD, tmp_path / "new").choose(KEY) == fastest
    assert Tuner("NVIDIA H100 PCIe", tmp_path / "new").choose(KEY) == candidates(KEY)[0]


def test_what_cannot_run_is_not_chosen(tmp_path: Path) -> None:
    tuner = Tuner(CARD, None)
    only = candidates(KEY)[2]
    assert tuner.tune(KEY, lambda config: 1.0 if config == only else None) == only
    assert tuner.tune(KEY._replace(tokens=32), lambda _: None) == candidates(KEY._replace(tokens=32))[0]


def test_own_measurements_come_before_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, own = Config(64, 16, 64, 8, 2), Config(128, 16, 64, 8, 3)
    (tmp_path / "shipped").mkdir()
    shipped = {str(KEY): ours.__dict__, str(KEY._replace(tokens=32)): ours.__dict__}
    (tmp_path / "shipped" / "nvidia-h200.json").write_text(json.dumps(shipped))
    monkeypatch.setattr(tuning, "_SHIPPED", tmp_path / "shipped")
    tuner = Tuner(CARD, tmp_path)
    assert tuner.choose(KEY) == ours
    tuner.tune(KEY, lambda config: 1.0)
    tuner.save()
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps({str(KEY): own.__dict__}))
    again = Tuner(CARD, tmp_path)
    assert again.choose(KEY) == own
    assert again.choose(KEY._replace(tokens=32)) == ours


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"block_rows": 1}}'])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    tuner = Tuner(CARD, tmp_path)
    tuner.tune(KEY, slowest_guess)
    tuner.save()
    (path,) = tmp_path.glob("*.json")
    path.write_text(content)
    assert Tuner(CARD, tmp_path).choose(KEY) == candidates(KEY)[0]


def test_a_directory_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tuner = Tuner(CARD, tmp_path / "file")
    tuner.tune(KEY, slowest_guess)
    tuner.save()
    assert tuner.choose(KEY) == candidates(KEY)[-1]


@pytest.mark.parametrize("path", sorted((Path(tuning.__file__).parent / "tuned").glob("*.json")), ids=str)
def test_what_we_ship_is_a_choice_of_ours(path: Path) -> None:
    shipped = json.loads(path.read_text())
    assert shipped
    for text, fields in shipped.items():
        kind, weight_format, rows, cols, tokens = text.split("/")
        key = Key(kind, weight_format, int(rows), int(cols), int(tokens))  # type: ignore[arg-type]
        assert Config(**fields) in candidates(key), key
