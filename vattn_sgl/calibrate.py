"""``vattn calibrate``: make a model's calibration ahead of its first traffic."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from vattn_kernels.cache import cache_dir
from vattn_sgl import model_folder, preflight, texts
from vattn_sgl.config import ConfigError, Mistake, Settings
from vattn_sgl.server import Server, ServerError

RESERVE = 8
console = Console(stderr=True)


class CalibrationError(ServerError):
    """The server did not calibrate itself on the text, or what it made could not be kept."""


def default_arguments() -> tuple[str, ...]:
    """Arguments of ``sglang serve`` here; the calibration serves servers of every other dtype too."""
    import torch

    return ("--dtype", "bfloat16" if torch.cuda.is_available() else "float32")


def run(model_path: Path, arguments: tuple[str, ...] | None = None) -> int:
    """Serve the model once, let it calibrate itself on the shipped text, and keep the result in place of an older one.

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
    vattn_sgl.config.ConfigError, vattn_sgl.support.Unsupported, vattn_sgl.model_folder.FolderError
        From `vattn_sgl.preflight`, or if the text is too short for the settings.
    CalibrationError
        If nothing was calibrated or kept; then an older calibration stays.
    vattn_sgl.server.ServerError
        If the server does not start or fails.
    """
    began = time.monotonic()
    settings = preflight.check_settings()
    preflight.check_model(model_path, settings)
    ids = _tokens(model_path, settings)
    with _writing():
        cache_dir().mkdir(parents=True, exist_ok=True)
        # A cache of its own: a stored calibration would be loaded instead.
        own = tempfile.TemporaryDirectory(prefix=".calibrate-", dir=cache_dir())
    with own as cache:
        covered = _calibrate(model_path, arguments or default_arguments(), ids, cache)
        with _writing():
            kept = _keep(Path(cache))
    console.print(
        f"covers contexts up to {covered} tokens; {time.monotonic() - began:.0f} s; kept at {kept}", soft_wrap=True
    )
    return covered


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{cache_dir()} cannot be written ({error}); VATTN_CACHE may name another folder"
        raise CalibrationError(message) from error


def _tokens(model_path: Path, settings: Settings) -> list[int]:
    """Tokens of the shipped text, as many as the model has positions for and no fewer than the settings ask for."""
    if settings.selector == "oracle":
        raise ConfigError(
            "the settings", [Mistake("selector", "oracle", "one that is calibrated; oracle needs nothing")]
        )
    limit = max(0, model_folder.positions(model_path) - RESERVE)
    ids = model_folder.load_tokenizer(model_path)(texts.load(texts.CALIBRATION), verbose=False).input_ids[:limit]
    if settings.calibration_tokens > len(ids):
        most = f"at most {len(ids)}, the tokens of the shipped text that this model has positions for"
        wrong = Mistake("calibration_tokens (VATTN_CALIBRATION_TOKENS)", settings.calibration_tokens, most)
        raise ConfigError("the settings", [wrong])
    return [int(i) for i in ids]


def _calibrate(model_path: Path, arguments: tuple[str, ...], ids: list[int], cache: str) -> int:
    """Longest context that the calibration covers which a server leaves in ``cache``."""
    env = {"VATTN_CACHE": cache}
    server = Server(model_path, "vattention", arguments, env, admin_key=secrets.token_urlsafe(12))
    with console.status("starting SGLang") as status:
        server.start(lambda seconds: status.update(f"starting SGLang: {seconds:.0f} s"))
    with server, console.status(f"prefilling {len(ids)} tokens"):
        server.generate(ids, 4)
        covered = int(server.admin("GET", "status")["ranks"][0]["calibrated_positions"])
        if covered < len(ids):
            raise CalibrationError(
                f"{len(ids)} tokens were prefilled but contexts up to {covered} are covered; "
                f"the server's log:\n{server.tail()}"
            )
    return covered


def _keep(cache: Path) -> Path:
    """Move what a server left in a cache of its own to the one that later servers read."""
    made = next(cache.glob("calibration/*.safetensors"), None)
    if made is None:
        raise CalibrationError(f"the server calibrated itself but kept nothing: make room on the disk of {cache_dir()}")
    target = cache_dir() / made.relative_to(cache)
    target.parent.mkdir(exist_ok=True)
    return made.replace(target)
