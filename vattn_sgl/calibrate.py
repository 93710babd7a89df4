"""``vattn calibrate``: make a model's calibration ahead of its first traffic."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from rich.console import Console

from vattn_sgl import model_folder, texts
from vattn_sgl.server import Server

RESERVE = 8
console = Console(stderr=True)


class CalibrationError(RuntimeError):
    """The server did not calibrate itself on the text."""


def default_arguments() -> tuple[str, ...]:
    """Arguments of ``sglang serve`` here; the calibration serves servers of every other dtype too."""
    import torch

    return ("--dtype", "bfloat16" if torch.cuda.is_available() else "float32")


def run(model_path: Path, arguments: tuple[str, ...] | None = None) -> int:
    """Serve the model once, let it calibrate itself on the shipped text, and keep the result.

    Parameters
    ----------
    model_path : pathlib.Path
        Folder of the model; must be the path that the later server is given.
    arguments : tuple of str, optional
        Of ``sglang serve``; default `default_arguments`.

    Returns
    -------
    int
        Longest context that the calibration covers, in tokens.

    Raises
    ------
    CalibrationError
        If nothing was calibrated.
    vattn_sgl.model.ModelError
        If the model's folder cannot be read.
    """
    began = time.monotonic()
    limit = model_folder.positions(model_path) - RESERVE
    ids = model_folder.load_tokenizer(model_path)(texts.load(texts.CALIBRATION), verbose=False).input_ids[:limit]
    server = Server(model_path, "vattention", arguments or default_arguments(), admin_key=secrets.token_urlsafe(12))
    with console.status("starting SGLang") as status:
        server.start(lambda seconds: status.update(f"starting SGLang: {seconds:.0f} s"))
    with server, console.status(f"prefilling {len(ids)} tokens"):
        server.generate([int(i) for i in ids], 4)
        covered = int(server.admin("GET", "status")["ranks"][0]["calibrated_positions"])
        if covered < len(ids):
            raise CalibrationError(
                f"{len(ids)} tokens were prefilled but contexts up to {covered} are covered; "
                f"the server's log:\n{server.tail()}"
            )
    console.print(f"covers contexts up to {covered} tokens; {time.monotonic() - began:.0f} s")
    return covered
