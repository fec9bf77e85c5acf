"""`toptwo model upcycle`: the mixture computes what the dense model does, whichever experts are chosen."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fakes
from tiny import FAMILIES, forward_all
from toptwo.cli import cli
from toptwo.errors import StartupError
from toptwo.model_commands import upcycle as upcycle_module
from toptwo.models.registry import read_config

TARGETS = {"llama": "mixtral", "qwen3": "qwen3_moe"}
IDS = [7, 200, 12, 99, 258, 1, 44, 181, 90, 13, 17, 250]


def write_dense(directory: Path, family: str, **shape: Any) -> Path:
    """A tiny dense checkpoint with words."""
    tokenizer = fakes.byte_level_vocabulary()
    FAMILIES[family].write(directory, vocab_size=tokenizer.get_vocab_size(), **shape)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = write_dense(tmp_path_factory.mktemp("dense") / family, family)
        return made[family]

    return get


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    """Three languages that even a random model tells apart: each has letters of its own."""
    rng = random.Random(0)
    for name, letters in (("vowels", "aeiou "), ("digits", "0123456789 "), ("signs", "+-*/=() ")):
        folder = tmp_path / "domains" / name
        folder.mkdir(parents=True)
        for number in range(10):
            (folder / f"{number}.txt").write_text("".join(rng.choices(letters, k=400)))
    return tmp_path / "domains"


def run(*arguments: object) -> str:
    """What the command says. Errors are raised."""
    done = CliRunner().invoke(cli, ["model", "upcycle", *map(str, arguments)], catch_exceptions=False)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (3, 1), (4, 4)])
def test_equal_experts_are_the_dense_model(
    dense: Callable[[str], Path], tmp_path: Path, family: str, experts: int, top_k: int
) -> None:
    out = tmp_path / "moe"
    said = run(dense(family), out, "--experts", experts, "--top-k", top_k)
    assert "likeliest token is the same for 100.0%" in said
    config = read_config(out)[1]
    assert config.architecture == TARGETS[family]
    assert config.num_experts == experts  # type: ignore[attr-defined]
    expected = forward_all(dense(family), IDS, backend="reference")
    assert (forward_all(out, IDS, backend="reference") - expected).abs().max() < 1e-4
    assert (forward_all(out, IDS) - expected).abs().max() < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {"moe"}


@pytest.mark.parametrize("family", TARGETS)
def test_transformers_reads_it_alike(dense: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    import transformers

    run(dense(family), tmp_path / "moe", "--experts", 4, "--no-check")
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        expected, found = (
            transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
            for directory in (dense(family), tmp_path / "moe")
        )
    assert (found - expected).abs().max() < 1e-4


def test_the_number_format_is_kept(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense", "llama", dtype="bfloat16")
    weights = {name: value.bfloat16() for name, value in load_file(dense / "model.safetensors").items()}
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    said = run(dense, tmp_path / "moe")
    assert "100.0%" in said
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"
    shard = load_file(tmp_path / "moe" / "model-00002-of-00004.safetensors")
    assert {value.dtype for value in shard.values()} == {torch.bfloat16}


def test_domains_make_a_router(dense: Callable[[str], Path], domains: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    said = run(dense("llama"), out, "--domains", domains, "--tokens", 2560)
    for name in ("digits", "signs", "vowels", "load entropy"):
        assert name in said
    share = next(line for line in said.splitlines() if "top-1 = own expert" in line)
    assert min(float(word) for word in share.split() if word[:2] in ("0.", "1.")) > 0.6  # chance is 0.33
    assert read_config(out)[1].num_experts == 3  # type: ignore[attr-defined]
    expected = forward_all(dense("llama"), IDS)
    assert (forward_all(out, IDS) - expected).abs().max() < 1e-4


def test_what_was_interrupted_goes_on(
    dense: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, partial = tmp_path / "moe", tmp_path / ".moe.partial"
    written: list[str] = []
    real_save = upcycle_module._save

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(path.name)
        real_save(tensors, path)

    monkeypatch.setattr(upcycle_module, "_save", save)
    with pytest.raises(StartupError, match="No space left on device"):
        run(dense("llama"), out)
    assert not out.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("model-*")}
    assert len(kept) == 2  # beside the routers
    written.clear()
    run(dense("llama"), out)
    assert len(written) == 2
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in out.iterdir()}.items()
    assert not partial.exists()
    assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors"}


def test_what_is_left_of_another_plan_is_not_used(
    dense: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(upcycle_module.shutil, "copyfile", fail)
        with pytest.raises(StartupError, match="Input/output error"):
            run(dense("llama"), tmp_path / "moe")
    assert "4 experts" in run(dense("llama"), tmp_path / "moe", "--experts", 4)
    assert (forward_all(tmp_path / "moe", IDS) - forward_all(dense("llama"), IDS)).abs().max() < 1e-4


def test_a_mixture_that_is_another_model_is_found_out(
    dense: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = upcycle_module.mixture_config
    monkeypatch.setattr(upcycle_module, "mixture_config", lambda *args: real(*args) | {"rms_norm_eps": 0.5})
    with pytest.raises(StartupError, match="does not compute"):
        run(dense("llama"), tmp_path / "moe")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--router", "ridge"], "--domains"),
        (["--router", "best"], "there is ridge, random"),
        (["--top-k", "9"], "there are 8 experts"),
        (["--domains", "nowhere"], "no such directory"),
        (["--experts", "8", "--domains", "{domains}"], "has 3 folders"),
        (["--router", "random", "--domains", "{domains}"], "no use"),
        (["--domains", "{domains}", "--tokens", "1280"], "too little text"),
    ],
)
def test_what_cannot_be_done_is_said(
    dense: Callable[[str], Path], domains: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    for path in (domains / "signs").iterdir():
        if "too little" in words:
            path.write_text("+")
    given = [argument.format(domains=domains) for argument in arguments]
    with pytest.raises(StartupError, match=words):
        run(dense("llama"), tmp_path / "moe", *given)
    assert not (tmp_path / "moe").exists()


def test_a_disk_that_is_too_small_is_said_before(
    dense: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(upcycle_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StartupError, match="of free disk"):
        run(dense("llama"), tmp_path / "moe")


def test_other_models_are_refused(tmp_path: Path) -> None:
    FAMILIES["mixtral"].write(tmp_path / "mixtral")
    with pytest.raises(StartupError, match="mixtral cannot be upcycled"):
        run(tmp_path / "mixtral", tmp_path / "out")
    dense = write_dense(tmp_path / "biased", "llama", attention_bias=True)
    with pytest.raises(StartupError, match="biases"):
        run(dense, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(StartupError, match="exists"):
        run(dense, tmp_path / "there")


def test_text_that_is_none_is_named(dense: Callable[[str], Path], domains: Path, tmp_path: Path) -> None:
    (domains / "signs" / "0.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(StartupError, match=r"signs/0\.txt"):
        run(dense("llama"), tmp_path / "moe", "--domains", domains)
    shutil.rmtree(tmp_path / ".moe.partial")
