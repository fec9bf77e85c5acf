"""`toptwo model upcycle`: a dense model as a Mixture of Experts that computes the same.

Every expert begins as a copy of the dense MLP, so that whichever a router chooses, their weighted sum is what
the dense model would have said (Komatsuzaki et al., "Sparse Upcycling", arXiv 2212.05055). What the experts
become is training's business; with texts of domains, the router knows already which expert is for what.

Knows the order of the steps; names are in `upcycle_layout`, routers in `upcycle_router`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from toptwo.default_model.cache import flush
from toptwo.errors import CheckpointError, StartupError
from toptwo.model_commands.forward import TEXT, load, logits, read_windows
from toptwo.model_commands.staging import progress
from toptwo.model_commands.upcycle_layout import LAYOUTS, Experts, Json, Layout, layer_of, mixture_config
from toptwo.model_commands.upcycle_options import UpcycleOptions
from toptwo.model_commands.upcycle_router import Domains, random_routers, ridge_routers
from toptwo.models.decoder import DecoderConfig
from toptwo.models.registry import CONFIG, read_config, read_json
from toptwo.runtime.checkpoints.header import read_header
from toptwo.runtime.checkpoints.open import open_checkpoint
from toptwo.runtime.checkpoints.protocol import Checkpoint
from toptwo.runtime.loader import DERIVED_SUFFIXES
from toptwo.settings import load_settings
from toptwo.source import find_model

WORDS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
PLAN, ROUTER, LOCK = "upcycling.json", "router.safetensors", ".lock"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
CHECKED_TOKENS = 256
TOLERANCE = 1e-3  # of logits in float32, far above rounding and far below any mistake


@dataclass(frozen=True)
class _Plan:
    """Everything that decides what is written."""

    source: Path
    layout: Layout
    config: DecoderConfig
    mixture: Json
    experts: Experts
    domains: Domains | None
    tokens_per_domain: int

    def fingerprint(self, checkpoint: Checkpoint) -> str:
        """Changes with anything that would make another checkpoint of it."""
        files = [*checkpoint.paths, self.source / CONFIG, *(self.domains.files() if self.domains else ())]
        seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        words = (seen, self.experts, self.layout.model_type, self.tokens_per_domain if self.domains else 0)
        return hashlib.sha256(repr(words).encode()).hexdigest()


def upcycle(dense: str, out: Path, options: UpcycleOptions, console: Console) -> None:
    """Write the checkpoint directory `out`. Raises StartupError and CheckpointError.

    What was written before an interruption is kept beside `out`, and the same command goes on from there.
    """
    if out.exists():
        raise StartupError(f"{out}: exists; name a directory to make")
    if not out.parent.is_dir():
        raise StartupError(f"{out.parent}: no such directory")
    source = find_model(load_settings({"model": dense})[0], console).directory
    plan = _plan(options, source)
    architecture, config = read_config(source)
    with open_checkpoint(source, architecture.weight_map(config)) as checkpoint:
        ignored = set(architecture.ignored_tensors(config))
        names = sorted(name for name in checkpoint.names - ignored if not name.endswith(DERIVED_SUFFIXES))
        with _staged(out, plan.fingerprint(checkpoint)) as staged, progress(console) as bar:
            _require_room(out, staged, _size(plan, checkpoint, names))
            routers = _routers(plan, staged, bar, console)
            _write(_Job(plan, checkpoint, names, routers), staged, bar)
    words = f"{out}: {plan.experts.count} experts, of which a token visits {plan.experts.top_k}"
    console.print(words, markup=False, highlight=False, soft_wrap=True)
    if options.check:
        _check(source, out, console)


def _plan(options: UpcycleOptions, source: Path) -> _Plan:
    if options.router not in (None, "ridge", "random"):
        raise StartupError(f"--router {options.router}: there is ridge, random")
    if options.router == "ridge" and options.domains is None:
        raise StartupError("--router ridge: it is told from texts; name their directory with --domains")
    if options.router == "random" and options.domains is not None:
        raise StartupError("--router random: it has no use for --domains")
    domains = None if options.domains is None else Domains.of(options.domains)
    count = options.experts or (len(domains.folders) if domains else 8)
    if domains and count != len(domains.folders):
        raise StartupError(f"--experts {count}: {options.domains} has {len(domains.folders)} folders")
    if not 1 <= options.top_k <= count:
        raise StartupError(f"--top-k {options.top_k}: there are {count} experts")
    config = read_config(source)[1]
    layout = LAYOUTS.get(config.architecture)
    if layout is None or not isinstance(config, DecoderConfig):
        raise StartupError(
            f"{source}: {config.architecture} cannot be upcycled; there is {', '.join(LAYOUTS)}"
        )
    experts = Experts(count, options.top_k)
    try:
        mixture = mixture_config(read_json(source), layout, experts)
    except StartupError as error:
        raise StartupError(f"{source}: {error}") from None
    return _Plan(source, layout, config, mixture, experts, domains, options.tokens)


def _size(plan: _Plan, checkpoint: Checkpoint, names: Sequence[str]) -> int:
    """Bytes of the mixture's tensors."""
    item = checkpoint.tensor(names[0]).dtype.itemsize
    copies = {name: len([*plan.layout.names(name, plan.experts)]) for name in names}
    return sum(item * count * math.prod(checkpoint.shape(name)) for name, count in copies.items())


def _require_room(out: Path, staged: Path, size: int) -> None:
    """Raises StartupError where the disk has too little for what is not written yet."""
    needed = size - sum(path.stat().st_size for path in staged.iterdir())
    free = shutil.disk_usage(staged).free
    if free < needed:
        raise StartupError(
            f"{out}: needs {needed / 1e9:.1f} GB of free disk, and there are {free / 1e9:.1f} GB"
        )


@contextmanager
def _staged(out: Path, fingerprint: str) -> Iterator[Path]:
    """A directory beside `out` that becomes it. What an earlier attempt at the same left there is kept."""
    staged = out.with_name(f".{out.name}.partial")
    try:
        staged.mkdir(exist_ok=True)
        with (staged / LOCK).open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StartupError(f"{out}: another process is at it") from None
            _start_anew_unless(staged, fingerprint)
            yield staged
            for name in (PLAN, ROUTER, LOCK):
                (staged / name).unlink(missing_ok=True)
            for path in (*staged.iterdir(), staged):
                flush(path)
            staged.rename(out)
            flush(out.parent)
    except OSError as error:
        raise StartupError(f"{out}: could not be written: {error.strerror or error}") from error


def _start_anew_unless(staged: Path, fingerprint: str) -> None:
    plan = staged / PLAN
    if not plan.exists() or plan.read_text() != fingerprint:
        for path in staged.iterdir():
            if path.name != LOCK:
                path.unlink()
        plan.write_text(fingerprint)


def _routers(plan: _Plan, staged: Path, bar: Progress, console: Console) -> Tensor:
    kept = staged / ROUTER
    if kept.exists():
        return load_file(kept)["routers"]
    if plan.domains is None:
        routers = random_routers(plan.config, plan.experts.count)
    else:
        tokenizer = Tokenizer.from_file(str(plan.source / "tokenizer.json"))
        pieces = plan.domains.pieces(tokenizer, plan.tokens_per_domain)
        routers, table = ridge_routers(
            plan.source, plan.config, plan.domains, pieces, plan.experts.top_k, bar
        )
        console.print(table)
    _save({"routers": routers}, kept)
    return routers


@dataclass(frozen=True)
class _Job:
    plan: _Plan
    checkpoint: Checkpoint
    names: Sequence[str]
    routers_LEH: Tensor

    def shard(self, layer: int | None) -> dict[str, Tensor]:
        """The tensors of a layer, or of all that is in none."""
        plan = self.plan
        tensors: dict[str, Tensor] = {}
        for name in self.names:
            if layer_of(name) == layer:
                tensor = self.checkpoint.tensor(name)
                tensors |= {new: tensor.clone() for new in plan.layout.names(name, plan.experts)}
                self.checkpoint.release(name)
        if layer is not None:
            dtype = next(iter(tensors.values())).dtype
            tensors[plan.layout.router_name(layer)] = self.routers_LEH[layer].to(dtype).contiguous()
        return tensors


def _write(job: _Job, staged: Path, bar: Progress) -> None:
    plan = job.plan
    layers: list[int | None] = [None, *range(plan.config.num_layers)]
    task = bar.add_task("Writing", total=None)
    weight_map: dict[str, str] = {}
    total, dtype = 0, "float32"
    for number, layer in enumerate(layers, 1):
        path = staged / f"model-{number:05d}-of-{len(layers):05d}.safetensors"
        if not path.exists():
            _save(job.shard(layer), path)
        stored = read_header(path)
        weight_map |= dict.fromkeys(stored, path.name)
        total += path.stat().st_size
        dtype = DTYPES[next(iter(stored.values())).dtype]
        bar.update(task, completed=total, total=total * len(layers) // number)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for name, content in (("model.safetensors.index.json", index), (CONFIG, plan.mixture | {"dtype": dtype})):
        (staged / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    for name in WORDS:
        if (plan.source / name).exists():
            shutil.copyfile(plan.source / name, staged / name)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """A file that is there whole or not at all."""
    draft = path.with_suffix(".draft")
    try:
        save_file(tensors, draft, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{error}") from None  # it wraps those of the disk
    flush(draft)
    draft.rename(path)


def _check(dense: Path, mixture: Path, console: Console) -> None:
    """Print how far the two are apart on some text. Raises CheckpointError if they are not the same model."""
    if not (dense / "tokenizer.json").exists():
        console.print("not checked: the dense model has no tokenizer.json to read a text with")
        return
    window = read_windows(dense, TEXT)[0][:CHECKED_TOKENS]
    found = [_logits(directory, window) for directory in (dense, mixture)]
    difference = float((found[0] - found[1]).abs().max())
    agreement = float((found[0].argmax(-1) == found[1].argmax(-1)).float().mean())
    words = (
        f"checked on {len(window)} tokens in float32: logits differ by {difference:.1e} at most, and the "
        f"likeliest token is the same for {agreement:.1%}"
    )
    console.print(words, highlight=False, soft_wrap=True)
    if not difference < TOLERANCE:
        raise CheckpointError(f"{mixture}: it does not compute what {dense} does")


def _logits(directory: Path, window: list[int]) -> Tensor:
    runtime = load(directory, CHECKED_TOKENS, dtype="float32", quantization="none")
    return logits(runtime, window).clone()
