"""A model's folder that a person named: what is read of it, and what is wrong with it in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vattn_sgl.model import ModelError

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def check(path: Path) -> None:
    """Refuse a folder that SGLang or transformers could not load.

    Parameters
    ----------
    path : pathlib.Path
        Folder that a person named.

    Raises
    ------
    ModelError
        From `check_config`, `load_config`, `load_tokenizer` or `check_weights`.
    """
    check_config(path)
    load_config(path)
    load_tokenizer(path)
    check_weights(path)


def check_config(path: Path) -> None:
    """Refuse what is not a model's folder.

    Parameters
    ----------
    path : pathlib.Path
        Folder.

    Raises
    ------
    ModelError
        If it holds no ``config.json``, or one that is no JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path} is not a model's folder: it holds no config.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: a mapping was expected, not a {type(content).__name__}")


def load_config(path: Path) -> Any:
    """A `transformers.PretrainedConfig`.

    Parameters
    ----------
    path : pathlib.Path
        Folder.

    Raises
    ------
    ModelError
        If transformers cannot read ``config.json``.
    """
    from transformers import AutoConfig

    return _read(AutoConfig.from_pretrained, path, f"{path / 'config.json'}")


def positions(path: Path) -> int:
    """Longest context of a model, in tokens.

    Parameters
    ----------
    path : pathlib.Path
        Folder.

    Raises
    ------
    ModelError
        If its configuration cannot be read or does not say.
    """
    found = getattr(load_config(path).get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int):
        raise ModelError(f"{path / 'config.json'}: max_position_embeddings is {found!r}, expected a number of tokens")
    return found


def load_tokenizer(path: Path) -> Any:
    """A `transformers.PreTrainedTokenizerBase`.

    Parameters
    ----------
    path : pathlib.Path
        Folder.

    Raises
    ------
    ModelError
        If transformers finds no tokenizer there, or cannot read it.
    """
    from transformers import AutoTokenizer

    return _read(AutoTokenizer.from_pretrained, path, f"the tokenizer of {path} (tokenizer.json and beside it)")


def _read(load: Callable[..., Any], path: Path, what: str) -> Any:
    try:
        # Else transformers asks at the terminal whether to run a model's own code.
        return load(path, trust_remote_code=False)
    # Whatever stands in a file reaches transformers, which raises accordingly.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{what}: {reason}") from error


def check_weights(path: Path) -> int:
    """Count the files of weights: all that an index names, none of safetensors cut short.

    Parameters
    ----------
    path : pathlib.Path
        Folder.

    Returns
    -------
    int
        Number of files, at least 1.

    Raises
    ------
    ModelError
        If one is missing or broken.
    """
    from safetensors import SafetensorError, safe_open

    found = {file.name for file in path.iterdir() if file.suffix in WEIGHTS and file.is_file() and file.stat().st_size}
    named: set[str] = set()
    for index in path.glob("*.index.json"):
        try:
            named |= {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index} is no index of weights ({error}): copy or download it again") from error
    if missing := sorted(named - found):
        raise ModelError(f"{path} lacks {', '.join(missing)}: give a folder with all of the model's weights")
    if not found:
        raise ModelError(f"{path} holds no weights ({', '.join(WEIGHTS)}): give a folder with the model's weights")
    for name in sorted(found):
        if name.endswith(".safetensors"):
            try:
                with safe_open(path / name, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path / name} is broken or cut short ({error}): copy or download it again"
                ) from error
    return len(found)
