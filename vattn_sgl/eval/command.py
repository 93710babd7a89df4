"""What ``vattn eval fidelity`` does: run, write, say where."""

from __future__ import annotations

import datetime
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vattn_sgl import model, model_folder, preflight
from vattn_sgl.eval import capture, fidelity, report, served

console = Console(stderr=True)


class FidelityError(ValueError):
    """The run that was asked for is not possible."""


def run(
    quick: bool,
    contexts: tuple[int, ...],
    text: str | None,
    out: Path | None,
    json_file: Path | None,
    server: bool,
    path: Path | None,
    hash_weights: Path | None = None,
) -> None:
    """Measure and write.

    Parameters
    ----------
    quick : bool
        A smaller run, a few minutes.
    contexts : tuple of int
        Contexts in tokens; empty takes the plan's.
    text : str, optional
        Another shipped text than the plan's, see `vattn_sgl.texts`; as many pieces of it are used as it holds.
    out : pathlib.Path, optional
        Folder of the Markdown page and its plots; None writes none.
    json_file : pathlib.Path, optional
        Where the whole result goes.
    server : bool
        Also compare through a real server.
    path : pathlib.Path, optional
        Folder of another model.
    hash_weights : pathlib.Path, optional
        HashAttention's weights for the model; without them nets are trained, but not in a quick run.

    Raises
    ------
    FidelityError
        If the model or the texts are too short for a context, or nothing can be written.
    vattn_sgl.config.ConfigError, vattn_sgl.support.Unsupported, vattn_sgl.model_folder.FolderError
        From `vattn_sgl.preflight`, or if the weights cannot be read or do not fit the model.
    vattn_sgl.model.ModelError
        If the demonstration model cannot be made.
    vattn_sgl.server.ServerError
        If a server does not start or fails.
    """
    plan = fidelity.QUICK if quick else fidelity.Plan()
    if hash_weights is not None:
        plan = replace(plan, hash_weights=str(hash_weights))
    if contexts:
        sweep = plan.sweep_context if plan.sweep_context in contexts else min(contexts)
        plan = replace(plan, contexts=tuple(sorted(set(contexts))), sweep_context=sweep)
    settings = preflight.check_settings() if server else None
    folder = path or model.fetch()
    if settings is None:
        model_folder.check(folder)
    else:
        preflight.check_model(folder, settings)
        served.check_positions(folder)
    _check_places(out, json_file)
    if text is not None:
        held = len(capture.token_ids(folder, text)) // plan.longest
        others = tuple(name for name in plan.other_texts if name != text)
        plan = replace(plan, text=text, pieces=max(1, min(plan.pieces, held)), other_texts=others)
    try:
        fidelity.check(folder, plan)
    except ValueError as error:
        raise FidelityError(str(error)) from error
    about = {
        "model": folder.name,
        "command": shlex.join(["vattn", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("fidelity", total=fidelity.steps(plan))

        def step(what: str) -> None:
            progress.update(task, advance=1, description=what)

        def keep(result: dict[str, Any]) -> None:
            result |= about
            if json_file is not None:
                report.write_json(result, json_file)

        result = fidelity.Fidelity(folder, plan, step, keep).run()
    if server:
        result["server"] = served.run(folder, quick)
    if json_file is not None:
        report.write_json(result, json_file)
        console.print(f"wrote {json_file}")
    if out is not None:
        for file in report.write(result, out):
            console.print(f"wrote {file}")


def _check_places(out: Path | None, json_file: Path | None) -> None:
    """Refuse before the long run what would fail it at its start or end."""
    if json_file is not None and json_file.is_dir():
        raise FidelityError(f"cannot write to {json_file} (it is a folder): give the name of a file")
    for place in (out, json_file.parent if json_file else None):
        try:
            if place is not None:
                place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FidelityError(
                f"cannot write to {place} ({error.strerror}): give a folder that may be made"
            ) from error
