"""What is installed, and which package may import which."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "vattn_sgl": "vattn_sgl",
    "vattn_kernels": "kernels/vattn_kernels",
    "vattn_telemetry": "telemetry/vattn_telemetry",
}
FORBIDDEN = {
    "vattn_kernels": {"vattn_sgl", "vattn_telemetry", "sglang"},
    "vattn_telemetry": {"vattn_sgl", "vattn_kernels", "sglang", "triton"},
}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_run_one_way(package):
    files = list((ROOT / FOLDERS[package]).rglob("*.py"))
    assert files
    wrong = {str(f): names for f in files if (names := set(imported(f)) & FORBIDDEN[package])}
    assert wrong == {}


def test_sglang_finds_the_plugin_and_the_platform():
    groups = {"sglang.srt.plugins": "vattention", "sglang.srt.platforms": "vattn_cpu", "console_scripts": "vattn"}
    for group, name in groups.items():
        entry = next(e for e in importlib.metadata.entry_points(group=group) if e.name == name)
        assert callable(entry.load())


@pytest.mark.parametrize("folder", ["kernels", "telemetry"])
def test_our_folders_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()
    found = importlib.util.find_spec(folder)
    assert found is None or found.origin is None or not Path(found.origin).is_relative_to(ROOT / folder)


def test_every_data_file_is_packaged():
    import tomllib

    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    for folder in FOLDERS.values():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and file.suffix not in (".py", ".pyc"):
                assert any(file.match(pattern) for pattern in patterns), file


def test_no_machine_path_in_the_repository():
    import subprocess

    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.splitlines() if name != "tests/vattn_sgl/test_packaging.py"]
    assert len(files) > 80
    for file in files:
        if file.exists():
            text = file.read_text(errors="replace")
            assert not any(needle in text for needle in ("/work/", "/root/", "pypi" + ".org", "pythonhosted")), file
