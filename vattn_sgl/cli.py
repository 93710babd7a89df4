"""Console script ``vattn``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Decode attention with a stated error.")
config_app = typer.Typer(no_args_is_help=True, help="Settings: show them, check a file.")
model_app = typer.Typer(no_args_is_help=True, help="The demonstration model.")
eval_app = typer.Typer(no_args_is_help=True, help="Measurements against dense attention.")
app.add_typer(config_app, name="config")
app.add_typer(model_app, name="model")
app.add_typer(eval_app, name="eval")

MISTAKE = 2


class Text(StrEnum):
    """Shipped texts that nothing was calibrated on."""

    ALICE = "alice"
    CONSTITUTION = "us-constitution"


def _fail(error: Exception, status: int = 1) -> NoReturn:
    typer.echo(str(error), err=True)
    raise typer.Exit(status)


@contextmanager
def _ending(*mistakes: type[Exception]) -> Iterator[None]:
    """Tell what went wrong, with exit status `MISTAKE` if it was what a person gave."""
    from vattn_sgl.config import ConfigError
    from vattn_sgl.model import ModelError
    from vattn_sgl.model_folder import FolderError
    from vattn_sgl.server import PortError, ServerError
    from vattn_sgl.support import Unsupported

    given: tuple[type[Exception], ...] = (ConfigError, FolderError, PortError, Unsupported, *mistakes)
    try:
        yield
    except given as error:
        _fail(error, MISTAKE)
    except (ModelError, ServerError) as error:
        _fail(error)


@app.callback()
def _end_by_signal() -> None:
    from vattn_sgl.server import end_by_signal

    end_by_signal()


@config_app.command("show")
def config_show() -> None:
    """Print the settings in force at start and where each comes from."""
    import yaml

    from vattn_sgl.config import ConfigError, load_with_sources

    try:
        settings, sources = load_with_sources()
    except ConfigError as error:
        _fail(error, MISTAKE)
    for name, value in settings.model_dump(exclude_none=False, mode="json").items():
        scalar = yaml.safe_dump(value, default_flow_style=True, sort_keys=False).removesuffix("...\n").rstrip()
        line = f"{name}: {scalar}"
        typer.echo(f"{line:<32}  # {sources[name]}")


@config_app.command("check")
def config_check(file: Annotated[Path, typer.Argument(help="YAML file of settings")]) -> None:
    """Name every mistake of a settings file with its line; exit status 2 when there is one."""
    from vattn_sgl.config import check_file

    mistakes = check_file(file)
    for mistake in mistakes:
        typer.echo(f"{file}: {mistake}")
    if mistakes:
        raise typer.Exit(MISTAKE)
    typer.echo(f"{file}: fine")


@model_app.command("fetch")
def model_fetch() -> None:
    """Make the model's folder in the cache, and print its path last."""
    from vattn_sgl import model

    try:
        typer.echo(str(model.fetch()))
    except model.ModelError as error:
        _fail(error)


@app.command()
def demo(
    once: Annotated[bool, typer.Option(help="End by itself instead of serving until Ctrl-C.")] = False,
    json: Annotated[bool, typer.Option(help="Print one JSON object last, on standard output.")] = False,
    model: Annotated[Path | None, typer.Option(help="Folder of another model.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the server; default a free one.")] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(min=1e-6, max=1.0, help="Bound on the relative error at first; default the settings'."),
    ] = None,
) -> None:
    """Serve a real model on this CPU: what the bound costs per layer, agreement with dense, epsilon changed live."""
    from vattn_sgl import demo as demonstration

    with _ending():
        demonstration.run(once, json, model, port, epsilon)


@app.command()
def doctor(model: Annotated[Path | None, typer.Argument(help="Folder of a model.")] = None) -> None:
    """Say whether this machine and model can be served, and why not."""
    from vattn_sgl import doctor as checks

    if not checks.run(model):
        raise typer.Exit(1)


@app.command()
def calibrate(model: Annotated[Path, typer.Argument(help="Folder of a model.")]) -> None:
    """Calibrate the selector for a model ahead of its first traffic, anew if it was calibrated already."""
    from vattn_sgl import calibrate as calibration

    with _ending():
        calibration.run(model)


@eval_app.command("fidelity")
def eval_fidelity(
    quick: Annotated[bool, typer.Option(help="A small run of a few minutes.")] = False,
    context: Annotated[list[int] | None, typer.Option(min=512, help="Tokens; may be given several times.")] = None,
    text: Annotated[Text | None, typer.Option(help="Another shipped text to measure on.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for fidelity.md and its plots.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for every figure.")] = None,
    server: Annotated[bool, typer.Option(help="Compare through a real server too.")] = False,
    model: Annotated[Path | None, typer.Option(help="Folder of another model.")] = None,
    hash_weights: Annotated[Path | None, typer.Option(help="HashAttention's weights, else nets trained here.")] = None,
) -> None:
    """Error, violations and divergence on a real model's queries, keys and values, against dense attention."""
    from vattn_sgl.eval import command

    if out is None and json is None:
        _fail(ValueError("nothing would be written: pass --out DIR or --json FILE"), MISTAKE)
    with _ending(command.FidelityError):
        command.run(quick, tuple(context or ()), text and text.value, out, json, server, model, hash_weights)


if __name__ == "__main__":
    app()
