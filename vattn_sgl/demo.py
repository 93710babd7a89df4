"""``vattn demo``: the main job end to end on this machine, with a real model and real requests."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vattn_sgl import model, model_folder, preflight, texts
from vattn_sgl.eval.served import ARGUMENTS, check_positions, forced_steps, started, totals
from vattn_sgl.server import Server, check_port

PROMPT_TOKENS = 4000
POSITIONS = 320
SPEED_TOKENS = 64
EPSILON_AFTER = 0.2
QUESTION = "What is the capital of France?"
console = Console(stderr=True)


def run(once: bool, as_json: bool, model_path: Path | None, port: int | None, epsilon: float | None) -> None:
    """Serve the demonstration.

    Parameters
    ----------
    once : bool
        End by itself; otherwise the server stays up until Ctrl-C.
    as_json : bool
        Print one JSON object last, on standard output.
    model_path : pathlib.Path, optional
        Another model's folder.
    port : int, optional
        Of the server that stays up.
    epsilon : float, optional
        Bound before the change; default that of the settings.

    Raises
    ------
    vattn_sgl.config.ConfigError, vattn_sgl.support.Unsupported, vattn_sgl.model_folder.FolderError
        From `vattn_sgl.preflight`, or if the model has fewer positions than the servers' context.
    vattn_sgl.server.PortError
        If the port is in use.
    vattn_sgl.model.ModelError
        If the model cannot be made.
    vattn_sgl.server.ServerError
        If a server does not start or fails.
    """
    settings = preflight.check_settings()
    if port is not None:
        check_port(port)
    path = model_path or model.fetch()
    preflight.check_model(path, settings)
    check_positions(path)
    prompt = prompt_tokens(path)
    dense = _dense_text(path, prompt)
    env = {} if epsilon is None else {"VATTN_EPSILON": str(epsilon)}
    server = Server(path, "vattention", ARGUMENTS, env, port, admin_key=secrets.token_urlsafe(12))
    with _started(server, "SGLang with attention backend vattention"):
        result = _measure(server, prompt, dense)
        _show(result)
        if as_json:
            print(json.dumps(result), flush=True)
        if not once:
            _stay(server)


def prompt_tokens(path: Path) -> list[int]:
    """First `PROMPT_TOKENS` tokens of the demonstration text."""
    ids = model_folder.load_tokenizer(path)(texts.load(texts.DEMONSTRATION), verbose=False).input_ids
    return [int(i) for i in ids[:PROMPT_TOKENS]]


def agreement(server: Server, prompt: list[int], dense: list[int], positions: int) -> tuple[float, int]:
    """Share of next tokens that equal dense's, each forced on dense's text.

    Parameters
    ----------
    server : Server
        Running with this backend.
    prompt, dense : list of int
        Prompt and dense's greedy continuation, longer than ``positions + 1``.
    positions : int
        Number of positions to compare.

    Returns
    -------
    float
        Share of equal tokens.
    int
        Positions compared; those whose prefill differs from dense's token by rounding are left out.
    """
    with console.status("comparing with dense") as status:

        def answered(count: int) -> None:
            status.update(f"comparing with dense: {count}/{positions} positions")

        forced = forced_steps(server, prompt, dense, positions, answered)
    equal = [step.token == dense[step.index + 1] for step in forced]
    return sum(equal) / max(1, len(equal)), len(equal)


def _dense_text(path: Path, prompt: list[int]) -> list[int]:
    server = Server(path, "torch_native", ARGUMENTS)
    with _started(server, "SGLang with a dense backend, for comparison"):
        with console.status(f"prefill of {len(prompt)} tokens and {POSITIONS + 2} dense tokens"):
            began = time.perf_counter()
            tokens = server.generate(prompt, POSITIONS + 2)["output_ids"]
        console.print(f"dense text of {len(tokens)} tokens in {time.perf_counter() - began:.1f} s")
    return [int(t) for t in tokens]


def _measure(server: Server, prompt: list[int], dense: list[int]) -> dict[str, Any]:
    console.print(f"chat: {QUESTION} -> [bold]{server.chat(QUESTION)}[/bold]")
    with console.status(f"prefill of {len(prompt)} tokens; the sketch calibrates itself on them"):
        server.generate(prompt, 2)
    config = server.admin("GET", "config")
    start = totals(server.admin("GET", "status"))
    arrivals = list(server.stream(prompt, SPEED_TOKENS))
    speed = (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])
    share, compared = agreement(server, prompt, dense, POSITIONS)
    status = server.admin("GET", "status")
    before = totals(status)
    server.admin("PATCH", "config", {"epsilon": EPSILON_AFTER})
    server.generate(prompt, SPEED_TOKENS)
    after = totals(server.admin("GET", "status"))
    rank = status["ranks"][0]
    return {
        "tokens_per_second": speed,
        "density": (before[0] - start[0]) / (before[1] - start[1]),
        "estimated_error_p95": rank["total"]["error_p95"],
        "agreement_with_dense": share,
        "positions_compared": compared,
        "prompt_tokens": len(prompt),
        "epsilon_before": config["in_force"]["epsilon"],
        "epsilon_after": EPSILON_AFTER,
        "density_after": (after[0] - before[0]) / (after[1] - before[1]),
        "calibrated_positions": rank["calibrated_positions"],
        "layers": [
            {
                "layer": row["layer"],
                "density": row["density"],
                "budget": row["budget_mean"],
                "estimated_error": row["error_mean"],
                "certified": row["certified_ratio"],
            }
            for row in rank["layers"]
        ],
    }


def _show(result: dict[str, Any]) -> None:
    table = Table(title=f"Cost of the bound, per layer, at epsilon {result['epsilon_before']}")
    for column in ("layer", "density", "budget (tokens)", "estimated error", "certified"):
        table.add_column(column, justify="right")
    formats = {"density": ".3f", "budget": ".0f", "estimated_error": ".4f", "certified": ".1%"}
    for row in result["layers"]:
        # A layer whose steps were all dense has no budget.
        cells = ("-" if row[name] is None else format(row[name], how) for name, how in formats.items())
        table.add_row(str(row["layer"]), *cells)
    console.print(table)
    console.print(
        f"agreement with dense: [bold]{result['agreement_with_dense']:.3f}[/bold] "
        f"of {result['positions_compared']} next tokens, each forced on dense's text\n"
        f"density {result['density']:.3f} at epsilon {result['epsilon_before']}, "
        f"{result['density_after']:.3f} at epsilon {result['epsilon_after']} (changed on the running server)\n"
        f"decode {result['tokens_per_second']:.1f} tokens/s at {result['prompt_tokens']} tokens of context, one request"
    )


def _stay(server: Server) -> None:
    key = f'-H "Authorization: Bearer {server.admin_key}"'
    console.print(
        f"\nThe server stays up; Ctrl-C ends it. Its log: {server.log}\n"
        f"  {server.url}/v1/chat/completions\n"
        f"  {server.url}/metrics\n"
        f"  curl {key} {server.url}/vattention/config\n"
        f"  curl {key} {server.url}/vattention/status\n"
        f"  curl -X PATCH {key} -d '{{\"epsilon\": 0.1}}' {server.url}/vattention/config",
        soft_wrap=True,
        highlight=False,
    )
    try:
        while server.process is not None and server.process.poll() is None:
            time.sleep(1)
        console.print(f"the server has ended:\n{server.tail()}")
    except KeyboardInterrupt:
        console.print("stopping")


def _started(server: Server, what: str) -> Server:
    """Start with a progress line and say where it answers."""
    started(server, what)
    console.print(f"{what}: {server.url}")
    return server
