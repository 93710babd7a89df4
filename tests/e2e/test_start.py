"""What must stop a server at start, and the ways to start one."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vattn_sgl.server import Server, ServerError

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def test_unsupported_arguments_are_refused_with_every_reason(model_path):
    arguments = ("--dtype", "float32", "--page-size", "16", "--kv-cache-dtype", "fp8_e4m3")
    server = Server(model_path, "vattention", arguments)
    with pytest.raises(ServerError), server:
        pass
    log = server.log.read_text(errors="replace")
    assert "--page-size 16" in log and "use --page-size 1" in log
    assert "--kv-cache-dtype fp8_e4m3" in log and "leave it at auto" in log


def test_a_dtype_that_the_kernels_do_not_read_is_refused_at_start(model_path):
    server = Server(model_path, "vattention", ("--dtype", "float16"))
    with pytest.raises(ServerError), server:
        pass
    assert "KV cache of torch.float16: the CPU kernels read float32 and bfloat16" in server.log.read_text("utf-8")


def test_wrong_settings_stop_the_server(model_path):
    server = Server(model_path, "vattention", ("--dtype", "float32"), {"VATTN_EPSILON": "7", "VATTN_WINDOWS": "3"})
    with pytest.raises(ServerError), server:
        pass
    log = server.log.read_text(errors="replace")
    assert "VATTN_EPSILON: got 7" in log
    assert "did you mean 'VATTN_WINDOW'?" in log


def test_a_hook_that_does_not_take_stops_the_server(model_path, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import vattn_sgl.plugin as p\np.SET_STATE = 'sglang.srt.managers.scheduler.Scheduler.no_such_method'\n"
    )
    server = Server(model_path, "vattention", ("--dtype", "float32"), {"PYTHONPATH": str(tmp_path)})
    with pytest.raises(ServerError), server:
        pass
    assert "did not apply these hooks" in server.log.read_text(errors="replace")


def test_launch_server_in_the_checkout_imports_hugging_faces_kernels():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['launch_server', '--help']\n"
        "try:\n    runpy.run_module('sglang.launch_server', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "import kernels\n"
        "print('KERNELS', kernels.__file__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180)
    found = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("KERNELS")]
    assert len(found) == 1, result.stderr[-2000:]
    package = importlib.metadata.distribution("kernels").locate_file("kernels/__init__.py")
    assert Path(found[0]) == Path(str(package))


def test_engine_without_radix_cache(model_path, tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(
        "import sglang, sys\n"
        "if __name__ == '__main__':\n"
        "    engine = sglang.Engine(model_path=sys.argv[1], attention_backend='vattention', dtype='float32',\n"
        "                           disable_radix_cache=True, log_level='error', max_total_tokens=4000)\n"
        "    prompt = '<|im_start|>user\\nWhat is the capital of France?<|im_end|>\\n<|im_start|>assistant\\n'\n"
        "    print('ANSWER', engine.generate(prompt, {'temperature': 0, 'max_new_tokens': 12})['text'])\n"
        "    engine.shutdown()\n"
    )
    env = {**os.environ, "VATTN_CACHE": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(script), str(model_path)], capture_output=True, text=True, timeout=300, env=env
    )
    assert "Paris" in result.stdout, result.stderr[-2000:]
