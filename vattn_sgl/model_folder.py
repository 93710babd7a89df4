"""A model's folder that a person named: what is read of it, and what is wrong with it in one line."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vattn_sgl import compat, support
from vattn_sgl.model import ModelError

# SGLang reads the first kind that a folder holds.
WEIGHTS = (".safetensors", ".bin", ".pt")
PICKLE = b"\x80"


class FolderError(ModelError):
    """A folder that a person named holds no model that can be read and served."""


def check(path: Path) -> Any:
    """Refuse a folder that SGLang or transformers could not load, or whose model cannot be served.

    Parameters
    ----------
    path : pathlib.Path
        Folder that a person named.

    Returns
    -------
    SimpleNamespace
        From `describe`.

    Raises
    ------
    FolderError
        From `describe`, `load_tokenizer` or `check_weights`, or with all of `reasons`.
    """
    described = describe(path)
    load_tokenizer(path)
    check_weights(path)
    if found := reasons(described):
        raise FolderError(f"{path} cannot be served: {'; '.join(found)}")
    return described


def describe(path: Path) -> Any:
    """A model's configuration as `vattn_sgl.support.model_reasons` looks at it, named as in SGLang's ``ModelConfig``.

    Parameters
    ----------
    path : pathlib.Path
        Folder.

    Raises
    ------
    FolderError
        From `check_config` or `load_config`, or if it names no known architecture or no attention heads.
    """
    check_config(path)
    config = load_config(path)
    try:
        return _described(config)
    # Whatever stands in a configuration reaches this arithmetic.
    except Exception as error:
        raise FolderError(f"{path / 'config.json'}: {error}") from error


def _described(config: Any) -> Any:
    architectures = getattr(config, "architectures", None) or []
    if not architectures:
        raise ValueError("it names no architectures, from which SGLang chooses the model's class")
    if not compat.knows(config):
        raise ValueError(f"architectures {', '.join(architectures)}: expected a class of SGLang or transformers")
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        raise ValueError(f"a {text.model_type} has no attention heads")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    latent = getattr(text, "kv_lora_rank", None) is not None
    kinds = set(getattr(text, "layer_types", None) or [])
    return SimpleNamespace(
        attention_arch=SimpleNamespace(name="MLA" if latent else "MHA"),
        is_encoder_decoder=getattr(config, "is_encoder_decoder", False),
        is_generation=compat.generates(architectures),
        is_hybrid_swa="sliding_attention" in kinds,
        hf_text_config=text,
        head_dim=head_dim,
        v_head_dim=getattr(text, "v_head_dim", None) or head_dim,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
    )


def reasons(described: Any) -> list[str]:
    """Why this machine cannot serve a model.

    Parameters
    ----------
    described : SimpleNamespace
        From `describe`.
    """
    import torch

    found = list(support.model_reasons(described))
    if not torch.cuda.is_available():
        return found
    of_device = support.gpu_device_reasons(torch.cuda.get_device_capability())
    return [*found, *of_device, *support.gpu_model_reasons(described)]


def check_config(path: Path) -> None:
    """Refuse what is not a model's folder.

    Parameters
    ----------
    path : pathlib.Path
        Folder.

    Raises
    ------
    FolderError
        If it holds no ``config.json``, or one that is no JSON object.
    """
    file = path / "config.json"
    if not file.is_file():
        raise FolderError(f"{path} is not a model's folder: it holds no config.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise FolderError(f"{file}: a mapping was expected, not a {type(content).__name__}")


def load_config(path: Path) -> Any:
    """A `transformers.PretrainedConfig`.

    Parameters
    ----------
    path : pathlib.Path
        Folder.

    Raises
    ------
    FolderError
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
    FolderError
        If its configuration cannot be read or does not say.
    """
    found = getattr(load_config(path).get_text_config(), "max_position_embeddings", None)
    if type(found) is not int or found < 1:
        what = f"max_position_embeddings is {found!r}, expected a number of tokens, 1 or more"
        raise FolderError(f"{path / 'config.json'}: {what}")
    return found


def load_tokenizer(path: Path) -> Any:
    """A `transformers.PreTrainedTokenizerBase`.

    Parameters
    ----------
    path : pathlib.Path
        Folder.

    Raises
    ------
    FolderError
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
        raise FolderError(f"{what}: {reason}") from error


def check_weights(path: Path) -> int:
    """Count the files of weights: all that an index names, and none that SGLang reads cut short or of another kind.

    Parameters
    ----------
    path : pathlib.Path
        Folder.

    Returns
    -------
    int
        Number of files that SGLang reads, at least 1.

    Raises
    ------
    FolderError
        If one is missing or broken.
    """
    from sglang.srt.model_loader.weight_utils import filter_files_not_needed_for_inference

    found = {file.name for file in path.iterdir() if file.suffix in WEIGHTS and file.is_file() and file.stat().st_size}
    named: set[str] = set()
    for index in path.glob("*.index.json"):
        try:
            named |= {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FolderError(f"{index} is no index of weights ({error}): copy or download it again") from error
    if missing := sorted(named - found):
        raise FolderError(f"{path} lacks {', '.join(missing)}: give a folder with all of the model's weights")
    kinds = ([name for name in sorted(found) if name.endswith(suffix)] for suffix in WEIGHTS)
    read = filter_files_not_needed_for_inference(next(filter(None, kinds), []))
    if not read:
        raise FolderError(f"{path} holds no weights ({', '.join(WEIGHTS)}): give a folder with the model's weights")
    for name in read:
        _check_file(path / name)
    return len(read)


def _check_file(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif not zipfile.is_zipfile(file):
            with file.open("rb") as opened:
                if opened.read(1) != PICKLE:
                    raise ValueError("neither a zip archive nor a pickle, which torch writes")
    except (SafetensorError, OSError, ValueError) as error:
        raise FolderError(f"{file} is broken or cut short ({error}): copy or download it again") from error
