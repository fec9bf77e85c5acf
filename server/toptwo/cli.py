"""The command `toptwo`: parse arguments into Settings, nothing else.

The options of `serve` are made from the fields of `Settings`, so that a setting is declared once; those
of `bench` from the fields of `BenchOptions`.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.console import Console

from toptwo import __version__
from toptwo.account_commands.accounts_cli import accounts_cli, prices_cli
from toptwo.account_commands.keys_cli import keys_cli, usage
from toptwo.bench.options import BenchOptions, load_options
from toptwo.errors import StartupError
from toptwo.model_commands.upcycle_options import UpcycleOptions
from toptwo.option_groups import grouped
from toptwo.settings import Settings, load_settings

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="OpenAI-compatible inference server for Mixture-of-Experts language models.",
)


@cli.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"toptwo {__version__}")
        raise typer.Exit


def serve(**options: Any) -> None:
    """Serve a model on an OpenAI-compatible HTTP API.

    Every option can also be set in the environment: --max-model-len as TOPTWO_MAX_MODEL_LEN, and so on.
    An option on the command line wins.
    """
    from toptwo.launch import serve as run_server  # its imports take a second that --help can do without

    settings, sources = load_settings(_given(options))
    run_server(settings, sources, Console())


def bench(context: typer.Context, **options: Any) -> None:
    """Measure an OpenAI-compatible server: throughput, latencies and errors under load.

    Without a URL the embedded server is measured: toptwo bench --concurrency 1,4,16 -- MODEL --threads 2
    """
    from toptwo.bench.command import run_bench

    serve_arguments = context.meta.get(_SERVE_ARGUMENTS, [])
    raise typer.Exit(run_bench(load_options(_given(options)), serve_arguments, Console()))


_SERVE_ARGUMENTS = "toptwo.serve_arguments"


class _BeforeServeArguments(typer.core.TyperCommand):
    """A command whose own arguments end at --; what follows is meant for `toptwo serve`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = args.index("--") if "--" in args else len(args)
        ctx.meta[_SERVE_ARGUMENTS] = args[own + 1 :]
        return super().parse_args(ctx, args[:own])


def _given(options: dict[str, Any]) -> dict[str, object]:
    """The options that were given on the command line."""
    return {name: value for name, value in options.items() if value not in (None, [], ())}


def _option_of(name: str, field: FieldInfo, argument: str) -> inspect.Parameter:
    """A command-line option for a field; None when it is not given. argument: the field without a flag."""
    unsaid = field.default is None or field.default == () or isinstance(field.default, bool)
    text = f"{field.description}" if unsaid else f"{field.description} (default: {field.default})"
    kind: Any = str  # the model checks the value, so that flag and environment fail alike
    name = field.alias or name
    flag = "--" + name.replace("_", "-")
    if name == argument:
        declared: Any = typer.Argument(help=text, metavar=name.upper(), show_default=False)
    elif field.annotation is bool:
        # What is on by default needs a way to switch it off.
        flags = f"{flag}/--no-{flag.removeprefix('--')}" if field.default else flag
        kind, declared = bool, typer.Option(flags, help=text, show_default=False)
    else:
        kind = list[str] if get_origin(field.annotation) is tuple else str
        declared = typer.Option(flag, help=text, show_default=False, metavar=_metavar(field.annotation))
    annotation = Annotated[kind | None, declared]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(annotation: Any) -> str:
    choices = [choice for choice in getattr(annotation, "__args__", ()) if isinstance(choice, str)]
    if choices:
        return "|".join(choices)
    text = str(annotation)
    names = {"Length": "N[:N]", "int": "N", "float": "X", "Path": "PATH"}
    return next((shown for key, shown in names.items() if key in text), "TEXT")


def _declare(command: Any, options: list[inspect.Parameter]) -> None:
    """Give a function that takes **options the parameters that typer is to see."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    command.__signature__ = inspect.Signature([*own, *options])
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *options]}


_declare(serve, [_option_of(name, field, "model") for name, field in Settings.model_fields.items()])
cli.command()(serve)
_declare(bench, [_option_of(name, field, "url") for name, field in BenchOptions.model_fields.items()])
cli.command(cls=_BeforeServeArguments)(bench)


cli.add_typer(accounts_cli, name="accounts")
cli.add_typer(keys_cli, name="keys")
cli.add_typer(prices_cli, name="prices")
cli.command("usage")(usage)


model_cli = typer.Typer(no_args_is_help=True, help="Work with a checkpoint.")
cli.add_typer(model_cli, name="model")


@model_cli.command("export")
def export_model(
    *,
    model: Annotated[list[str] | None, typer.Argument(metavar="MODEL", show_default=False)] = None,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write, like out.gguf.")],
    kind: Annotated[
        str, typer.Option("--type", metavar="bf16|q8_0|q4_0", help="Number format of the weights.")
    ] = "q8_0",
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
) -> None:
    """Write a model as a GGUF file that llama.cpp runs.

    MODEL is a checkpoint directory or hub id; without it, the embedded default model is exported.
    """
    from toptwo.model_commands.export import export  # it brings torch, which the API process does without

    if len(model or ()) > 1:
        raise typer.BadParameter("give one MODEL and one OUT")
    export(model[0] if model else None, out, kind, force, Console())


@model_cli.command("convert")
def convert_model(
    *,
    release: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT_DIR", help="The release's directory, or its ckpt-0.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Directory to make.", show_default=False)],
) -> None:
    """Turn xai-org's release of Grok-1 into a checkpoint that can be served.

    CKPT_DIR holds the 770 pickles tensor00000_000 and so on (318 GB); nothing in them is run. OUT_DIR gets
    safetensors in bfloat16 (633 GB) and a config.json; a tokenizer.json has to be added.

    Tested on small imitations of the release only, never on the release itself: which file holds which
    parameter follows from how JAX numbers them, and every shape is checked.
    """
    from toptwo.model_commands.convert import convert  # it brings torch, like the other commands

    convert(release, out, Console())


@model_cli.command("upcycle")
@grouped
def upcycle_model(
    *,
    dense: Annotated[
        str, typer.Argument(metavar="DENSE", help="Checkpoint, GGUF file or hub id.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Directory to make.", show_default=False)],
    options: UpcycleOptions,
) -> None:
    """Turn a dense Llama or Qwen3 into a Mixture of Experts that computes the same.

    Every expert is a copy of the dense MLP, so nothing is lost, and nothing gained before training. OUT_DIR
    is a Mixtral checkpoint (of a Qwen3 a Qwen3-MoE) in the dense model's number format. An interrupted run
    goes on where it was.
    """
    from toptwo.model_commands.upcycle import upcycle

    upcycle(dense, out, options, Console())


@model_cli.command("inspect")
def inspect_model(
    *,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(metavar="GB/S", help="Read bandwidth of another machine; by default this one's."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Tokens in the KV cache for the speeds (default: 4096, or all)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Say what a model is, what it costs in each number format, and what serve would choose here.

    Headers alone are read and nothing is downloaded. MODEL is a checkpoint directory, which needs no weights
    beside its config.json, a GGUF file, or a hub id that was downloaded before; without it, the embedded
    default model.
    """
    from toptwo.model_commands.inspect import InspectOptions
    from toptwo.model_commands.inspect import inspect as inspect_headers

    inspect_headers(InspectOptions(model, bandwidth, context, as_json), Console())


@model_cli.command("quality")
def measure_quality(
    *,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", show_default=False)] = None,
    quantization: Annotated[
        str, typer.Option(metavar="int8,int4", help="Weight formats to compare with float32.")
    ] = "int8,int4",
    text: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Text to measure on; by default one that is built in.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Write the figures to this file as well.")
    ] = None,
) -> None:
    """Measure what quantising a model costs: divergence from float32, agreement, perplexity.

    MODEL is a checkpoint directory or hub id; without it, the embedded default model is measured.
    """
    from toptwo.model_commands.quality import QualityOptions, quality

    names = [name.strip() for name in quantization.split(",") if name.strip()]
    quality(QualityOptions(model, names, text, json_file), Console())


def main() -> None:
    """Entry point; what cannot run ends with one line, and status 2 if the model is to blame, else 1."""
    try:
        cli()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except StartupError as error:
        Console(stderr=True).print(f"toptwo: {error}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(error.exit_code) from None
