"""Starts a real SGLang server as a child process, for the demonstration, calibration and benchmarks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import psutil
import requests

START_LIMIT_S = 300.0
# torch.compile takes minutes for each batch size, and for each twice: sampled steps and steps that read all.
COMPILE_LIMIT_S = 1800.0
REQUEST_LIMIT_S = 600.0
# SGLang takes further ports near the one it is given.
PORT_SPAN = 20
# Characters of an answer in a message.
MOST_SHOWN = 500


class ServerError(RuntimeError):
    """The server did not start, died or did not answer; the message ends with the last lines of its log."""


class PortError(ServerError):
    """Another program listens on the port that was asked for."""


def check_port(port: int) -> None:
    """Refuse a port of 127.0.0.1 on which another program listens.

    Parameters
    ----------
    port : int
        Number.

    Raises
    ------
    PortError
        If one does.
    """
    if not _is_free(port):
        raise PortError(f"port {port} of 127.0.0.1 is in use: give another one, or leave it out")


def sglang_command() -> str:
    """SGLang's command of this Python's environment, or else the one on PATH.

    Raises
    ------
    ServerError
        If there is none.
    """
    # A system's Python may lie elsewhere than the scripts that pip installs for it.
    beside, scripts = str(Path(sys.executable).parent), sysconfig.get_path("scripts")
    found = shutil.which("sglang", path=os.pathsep.join((beside, scripts, os.environ.get("PATH", ""))))
    if found is None:
        raise ServerError(
            f"no command sglang in {beside}, in {scripts} or on PATH: install SGLang for {sys.executable}"
        )
    return found


def free_port() -> int:
    """A port on 127.0.0.1 behind which some more are free too."""
    for _ in range(50):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port + PORT_SPAN < 65536 and all(_is_free(port + i) for i in range(1, PORT_SPAN)):
            return port
    raise ServerError("no free ports found on 127.0.0.1")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def end_by_signal() -> None:
    """Leave by an exception on SIGTERM and SIGHUP, unless they are ignored.

    Servers run in sessions of their own and are stopped on the way out, which a signal would cut short.
    """
    ending = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]

    def end(number: int, frame: object) -> NoReturn:
        for other in ending:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in ending:
        signal.signal(number, end)


class Server:
    """``sglang serve`` on 127.0.0.1; a context manager that stops the whole process tree.

    Parameters
    ----------
    model_path : pathlib.Path or str
        Folder of the model.
    backend : str
        Attention backend.
    arguments : sequence of str
        Further arguments of ``sglang serve``.
    env : dict
        Added to the environment.
    port : int, optional
        Default: a free one.
    admin_key : str, optional
        Of the admin routes.
    metrics : bool
        Whether it serves ``/metrics``.
    """

    def __init__(
        self,
        model_path: Path | str,
        backend: str,
        arguments: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        port: int | None = None,
        admin_key: str | None = None,
        metrics: bool = True,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin_key = admin_key
        self.log = Path(tempfile.mkstemp(prefix=f"vattn-{backend}-", suffix=".log")[1])
        self.command = [sglang_command(), "serve", "--model-path", str(model_path), "--attention-backend", backend]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port)]
        if metrics:
            self.command.append("--enable-metrics")
        # Otherwise an idle server keeps a core busy.
        self.command += ["--sleep-on-idle", *arguments]
        if admin_key is not None:
            # One word, because a key may begin with a dash.
            self.command.append(f"--admin-api-key={admin_key}")
        self.env = {**os.environ, **(env or {})}
        self.start_limit_s = COMPILE_LIMIT_S if "--enable-torch-compile" in arguments else START_LIMIT_S
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, waiting: Callable[[float], None] | None = None) -> None:
        """Start and wait until the server answers.

        Parameters
        ----------
        waiting : callable, optional
            Called now and then with the seconds waited.

        Raises
        ------
        PortError
            From `check_port`.
        ServerError
            If the server exits or is not ready in time.
        """
        check_port(self.port)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self.env, start_new_session=True
            )
        try:
            self._wait(waiting or (lambda seconds: None))
        except BaseException:
            self.stop()
            raise

    def _wait(self, waiting: Callable[[float], None]) -> None:
        assert self.process is not None
        began = time.monotonic()
        while True:
            elapsed = time.monotonic() - began
            waiting(elapsed)
            if self.process.poll() is not None:
                raise ServerError(f"the server exited with {self.process.returncode}:\n{self.tail()}")
            if elapsed > self.start_limit_s:
                raise ServerError(f"the server was not ready after {self.start_limit_s:.0f} s:\n{self.tail()}")
            try:
                if requests.get(f"{self.url}/health", timeout=25).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.5)

    def tail(self, lines: int = 30) -> str:
        """Last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Stop the process and its children by their process ids."""
        if self.process is None:
            return
        try:
            tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            tree = []
        for process in tree:
            _signal(process, signal.SIGTERM)
        for process in psutil.wait_procs(tree, timeout=5)[1]:
            _signal(process, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def __enter__(self) -> Server:
        if self.process is None:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def generate(self, input_ids: list[int], max_new_tokens: int, **fields: Any) -> dict[str, Any]:
        """Greedy continuation by ``/generate``, past any end token; SGLang's answer.

        Parameters
        ----------
        input_ids : list of int
            The prompt.
        max_new_tokens : int
            Tokens to generate.
        **fields
            Further fields of the request, such as ``return_logprob``.

        Raises
        ------
        ServerError
            If the server refuses or does not answer; so for the other requests.
        """
        body = _request(input_ids, max_new_tokens) | fields
        with self._answering(), requests.post(f"{self.url}/generate", json=body, timeout=REQUEST_LIMIT_S) as answer:
            answer.raise_for_status()
            return dict(answer.json())

    def stream(self, input_ids: list[int], max_new_tokens: int) -> Iterator[float]:
        """Times at which the tokens of a greedy continuation arrive, in seconds of `time.perf_counter`."""
        body = _request(input_ids, max_new_tokens) | {"stream": True}
        url = f"{self.url}/generate"
        with self._answering(), requests.post(url, json=body, stream=True, timeout=REQUEST_LIMIT_S) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith(b'data: {"error"'):
                    raise ServerError(f"{line.decode(errors='replace')[:MOST_SHOWN]}\nend of the log:\n{self.tail()}")
                if line.startswith(b"data:") and not line.endswith(b"[DONE]"):
                    yield time.perf_counter()

    def chat(self, question: str, max_tokens: int = 48) -> str:
        """Greedy answer by the OpenAI route."""
        body: dict[str, Any] = {
            "model": "default",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        url = f"{self.url}/v1/chat/completions"
        with self._answering(), requests.post(url, json=body, timeout=REQUEST_LIMIT_S) as answer:
            answer.raise_for_status()
            return str(answer.json()["choices"][0]["message"]["content"])

    def admin(self, method: str, route: str, body: Any = None) -> dict[str, Any]:
        """Call ``/vattention/<route>`` with the admin key."""
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        url = f"{self.url}/vattention/{route}"
        with self._answering(), requests.request(method, url, headers=headers, json=body, timeout=60) as answer:
            answer.raise_for_status()
            return dict(answer.json())

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Turn what goes wrong with a request into a `ServerError`."""
        try:
            yield
        except requests.RequestException as error:
            said = "" if error.response is None else f": {error.response.text[:MOST_SHOWN]}"
            raise ServerError(f"{error}{said}\nend of the server's log:\n{self.tail()}") from error


def _request(input_ids: list[int], max_new_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    return {"input_ids": input_ids, "sampling_params": sampling}


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
