"""The command `toptwo`: parse arguments into Settings, nothing else.

The options of `serve` are made from the fields of `Settings`, so that a setting is declared once.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from rich.console import Console

from toptwo import __version__
from toptwo.errors import StartupError
from toptwo.settings import Settings, flag_of, load_settings

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

    flags = {name: value for name, value in options.items() if value not in (None, [], ())}
    settings, sources = load_settings(flags)
    run_server(settings, sources, Console())


def _option_of(name: str) -> inspect.Parameter:
    """A command-line option for a field of Settings; None when it is not given."""
    field = Settings.model_fields[name]
    default = "" if field.default in (None, (), False) else f" (default: {field.default})"
    text = f"{field.description}{default}"
    kind: Any = str  # Settings checks the value, so that flag and environment fail alike
    if name == "model":
        declared: Any = typer.Argument(help=text, metavar="[MODEL]", show_default=False)
    elif field.annotation is bool:
        kind, declared = bool, typer.Option(flag_of(name), help=text, show_default=False)
    else:
        kind = list[str] if name == "api_key" else str
        declared = typer.Option(
            flag_of(name), help=text, show_default=False, metavar=_metavar(field.annotation)
        )
    annotation = Annotated[kind | None, declared]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(annotation: Any) -> str:
    choices = [choice for choice in getattr(annotation, "__args__", ()) if isinstance(choice, str)]
    if choices:
        return "|".join(choices)
    text = str(annotation)
    names = {"int": "N", "float": "X", "Path": "PATH"}
    return next((shown for key, shown in names.items() if key in text), "TEXT")


serve.__signature__ = inspect.Signature([_option_of(name) for name in Settings.model_fields])  # type: ignore[attr-defined]
serve.__annotations__ = {name: p.annotation for name, p in inspect.signature(serve).parameters.items()}
cli.command()(serve)


def main() -> None:
    """Entry point; ends with one line and status 1 when the server cannot run."""
    try:
        cli()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except StartupError as error:
        Console(stderr=True).print(f"toptwo: {error}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
