"""Compiles ``kernels.cpp`` once per machine and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from vattn_kernels.cache import cache_dir

SOURCE = Path(__file__).with_name("kernels.cpp")
# No -ffinite-math-only: log-sum-exp states start at minus infinity.
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-Wall"),
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-freciprocal-math", "-fno-signed-zeros"),
)


class BuildError(RuntimeError):
    """The CPU kernels could not be compiled."""


def compiler() -> str | None:
    """Path of the C++ compiler, ``$CXX`` or g++, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return "".join(line for line in lines[:40] if line.startswith(("model name", "flags"))) or platform.processor()


def build() -> Path:
    """Compile unless a library of this source, these flags and this CPU is in the cache.

    Returns
    -------
    pathlib.Path
        The shared library.

    Raises
    ------
    BuildError
        If there is no compiler or it fails; the message says how to mend it.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler found: the CPU kernels need g++ (Debian: apt-get install g++), or set CXX")
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True).stdout
    content = SOURCE.read_bytes() + " ".join(FLAGS).encode() + version.encode() + _cpu_model().encode()
    target = cache_dir() / "kernels" / f"vattn-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        draft = Path(folder) / target.name
        result = subprocess.run([cxx, *FLAGS, str(SOURCE), "-o", str(draft)], capture_output=True, text=True)
        if result.returncode:
            raise BuildError(f"{cxx} failed on {SOURCE.name}:\n{result.stderr[-2000:]}")
        draft.rename(target)
    return target


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, built at the first call (about 6 s)."""
    loaded = ctypes.CDLL(str(build()))
    loaded.vattn_args_size.restype = ctypes.c_int64
    return loaded
