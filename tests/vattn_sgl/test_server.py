"""The command by which a server is started, and how it ends."""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
import serve
from sglang.srt.server_args import ServerArgs

from vattn_sgl.server import Server, ServerError


def test_a_key_that_begins_with_a_dash_is_still_a_key(tmp_path):
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    program, verb, *arguments = Server(tmp_path, "torch_native", admin_key="-k3y").command
    assert (program.rpartition("/")[2], verb) == ("sglang", "serve")
    assert parser.parse_args(arguments).admin_api_key == "-k3y"


def test_metrics_are_served_unless_they_are_not_wanted(tmp_path):
    assert "--enable-metrics" in Server(tmp_path, "torch_native").command
    assert "--enable-metrics" not in Server(tmp_path, "torch_native", metrics=False).command


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = Server(tmp_path, "torch_native", port=taken.getsockname()[1])
        with pytest.raises(ServerError, match="in use: give another"):
            server.start()
    assert server.process is None


def refuse(self):
    self.send_error(503, "the scheduler is gone")


def hang_up(self):
    self.send_response(200)
    self.send_header("Content-Length", "100")
    self.end_headers()
    self.wfile.write(b"data: {}\n\n")


def answer_no_json(self):
    self.send_response(200)
    self.end_headers()
    self.wfile.write(b"<html>")


def tell_an_error_in_the_stream(self):
    self.send_response(200)
    self.end_headers()
    self.wfile.write(b'data: {"error": {"message": "too long"}}\n\ndata: [DONE]\n\n')


@pytest.mark.parametrize(
    ("arguments", "limit"), [((), "START_LIMIT_S"), (("--enable-torch-compile",), "COMPILE_LIMIT_S")]
)
def test_a_server_that_does_not_get_ready_is_given_up_at_its_limit(arguments, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(f"vattn_sgl.server.{limit}", 1.5)
    server = Server(tmp_path, "torch_native", arguments)
    server.command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(ServerError, match="not ready after 2 s"):
        server.start()
    assert server.process is None


CALLS = {
    "generate": lambda server: server.generate([1], 1),
    "stream": lambda server: list(server.stream([1], 1)),
    "chat": lambda server: server.chat("?"),
    "admin": lambda server: server.admin("POST", "config"),
}


@pytest.mark.parametrize(
    ("name", "answer"),
    # A stream is not parsed.
    [(n, a) for n in CALLS for a in (refuse, hang_up, answer_no_json, None) if (n, a) != ("stream", answer_no_json)]
    + [("stream", tell_an_error_in_the_stream)],
)
def test_a_request_that_fails_is_told_with_the_log(name, answer, tmp_path):
    server = Server(tmp_path, "torch_native", admin_key="key")
    server.log.write_text("why it failed\n")
    handler = type("Handler", (BaseHTTPRequestHandler,), {"do_POST": answer, "log_message": lambda *a: None})
    if answer is not None:
        http = HTTPServer(("127.0.0.1", server.port), handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
    with pytest.raises(ServerError, match="why it failed") as caught:
        CALLS[name](server)
    if answer is refuse:
        assert "503" in str(caught.value) and "the scheduler is gone" in str(caught.value)
    if answer is not None:
        http.shutdown()
        http.server_close()


STAND_IN = """
import signal, sys, time
from vattn_sgl import cli, demo
from vattn_sgl.server import Server

def begun(server):
    print(server.process.pid, flush=True)
    time.sleep(60)

def wait(server, waiting):
    if {starting}:
        begun(server)

def made(server, *arguments, **named):
    make(server, *arguments, **named)
    server.command = [sys.executable, "-c", "import time; time.sleep(60)"]

def run(*arguments):
    with Server("model", "torch_native") as server:
        begun(server)

make = Server.__init__
Server.__init__, Server._wait, demo.run = made, wait, run
Server.generate = lambda server, *arguments: begun(server)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # Under nohup it is inherited as ignored.
{command}
"""
COMMANDS = {
    "vattn demo": 'cli.app(["demo"])',
    "serve_cpu.py": "import serve_cpu as s; sys.argv[1:] = []; s.model.fetch = s.bandwidth = run; s.main()",
    "serve.py": "import serve; sys.argv[1:] = []; serve.device_name = lambda: 'a GPU'; serve.main()",
}


@pytest.mark.parametrize("starting", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_signal_to_a_command_ends_its_server(command, number, starting, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(serve.__file__).parent))
    command = [sys.executable, "-c", STAND_IN.format(starting=starting, command=command)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        server = psutil.Process(int(process.stdout.readline()))
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert not server.is_running()


def script(folder: Path) -> str:
    folder.mkdir()
    path = folder / "sglang"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_sglang_is_found_where_a_systems_pip_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python3"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "scripts"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    with pytest.raises(ServerError, match=f"no command sglang in {tmp_path}.*: install SGLang for"):
        Server("model", "vattention")
    for folder in ("path", "scripts", "bin"):
        path = script(tmp_path / folder)
        assert Server("model", "vattention").command[:2] == [path, "serve"]
