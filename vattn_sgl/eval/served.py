"""Agreement, divergence and perplexity through a real SGLang server, forced on dense's tokens."""

from __future__ import annotations

import math
import secrets
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vattn_sgl import model_folder, texts
from vattn_sgl.server import Server, ServerError

CONTEXT = 8192
ARGUMENTS = ("--dtype", "float32", "--context-length", str(CONTEXT))
PROMPT_TOKENS = 4000
POSITIONS = 96
QUICK_POSITIONS = 16
EPSILONS = (0.05, 0.1, 0.2)
TOP = 20
WORKERS = 8
LEAST_PROBABILITY = 1e-9
console = Console(stderr=True)


@dataclass(frozen=True)
class Step:
    """One decode step of the server.

    Attributes
    ----------
    index : int
        The cache held the prompt and ``dense[: index + 1]``.
    token : int
        Most likely next token.
    log_probs : dict
        Log-probability of each token that was asked for.
    """

    index: int
    token: int
    log_probs: dict[int, float]


def check_positions(path: Path) -> None:
    """Refuse a model that `ARGUMENTS` do not suit.

    Parameters
    ----------
    path : pathlib.Path
        Folder of the model.

    Raises
    ------
    vattn_sgl.model_folder.FolderError
        If it has fewer positions than the servers' context.
    """
    positions = model_folder.positions(path)
    if positions < CONTEXT:
        raise model_folder.FolderError(
            f"{path} has {positions} positions: give a model of at least {CONTEXT}, the servers' context"
        )


def forced_steps(
    server: Server,
    prompt: list[int],
    dense: list[int],
    positions: int,
    answered: Callable[[int], None] = lambda count: None,
    asked: list[list[int]] | None = None,
    workers: int = WORKERS,
) -> list[Step]:
    """Decode steps of the backend, each forced on dense's tokens.

    Position j is decoded by a request of its own whose prompt is followed by dense's tokens up to j: the first of its
    two new tokens comes from prefill, which is exact, and the second from a decode step of the backend.

    Parameters
    ----------
    server : Server
        Running with this backend.
    prompt, dense : list of int
        Prompt and dense's greedy continuation, longer than ``positions + 1``.
    positions : int
        Number of positions.
    answered : callable
        Told how many have been answered.
    asked : list of list of int, optional
        ``asked[j + 1]`` are tokens whose log-probabilities at position j + 1 are wanted.
    workers : int
        Requests at a time.

    Returns
    -------
    list of Step
        Without those positions whose prefill differs from dense's token by rounding.
    """

    def step(j: int) -> Step | None:
        fields = {} if asked is None else {"return_logprob": True, "token_ids_logprob": asked[j + 1]}
        answer = server.generate(prompt + dense[:j], 2, **fields)
        first, second = answer["output_ids"]
        wanted = [] if asked is None else answer["meta_info"]["output_token_ids_logprobs"][1]
        return Step(j, second, {int(token): float(value) for value, token, *_ in wanted}) if first == dense[j] else None

    steps = []
    with ThreadPoolExecutor(workers) as pool:
        for count, found in enumerate(pool.map(step, range(positions)), start=1):
            answered(count)
            steps.append(found)
    return [found for found in steps if found is not None]


def forced_runs(
    server: Server, prompt: list[int], dense: list[int], positions: int, length: int, skip: int, workers: int = WORKERS
) -> list[bool]:
    """Whether the backend's next tokens are dense's, in runs of several decode steps.

    A run starts from dense's text and is compared until its first token that is not dense's. On a GPU a request's first
    decode step is exact, so that `forced_steps` would see nothing else.

    Parameters
    ----------
    server : Server
        Running with this backend.
    prompt, dense : list of int
        Prompt and dense's greedy continuation, longer than ``positions + length``.
    positions : int
        Number of positions.
    length : int
        Compared decode steps of a run; a run starts every ``length`` positions.
    skip : int
        Decode steps of a run that are not compared.
    workers : int
        Requests at a time.

    Returns
    -------
    list of bool
        One for each compared position.
    """

    def run_from(start: int) -> list[bool]:
        count = 1 + skip + length
        tokens = server.generate(prompt + dense[:start], count)["output_ids"]
        same = [token == wanted for token, wanted in zip(tokens, dense[start : start + count], strict=True)]
        until = same.index(False) + 1 if False in same else count
        return same[1 + skip : until]

    with ThreadPoolExecutor(workers) as pool:
        return [agrees for run in pool.map(run_from, range(0, positions, length)) for agrees in run]


def run(path: Path, quick: bool) -> list[dict[str, Any]]:
    """Compare a server with this backend to one with a dense backend, at several epsilons.

    Parameters
    ----------
    path : pathlib.Path
        Folder of the model.
    quick : bool
        Fewer positions and only the first epsilon.

    Returns
    -------
    list of dict
        ``epsilon, positions, density, agreement, kl, perplexity, dense_perplexity``; perplexities are of dense's
        tokens.

    Raises
    ------
    ServerError
        If a server does not start, or the two do not run one model.
    """
    from vattn_sgl.eval.capture import token_ids

    positions = QUICK_POSITIONS if quick else POSITIONS
    prompt = token_ids(path, texts.EVALUATION)[:PROMPT_TOKENS]
    other = token_ids(path, texts.CALIBRATION)[: PROMPT_TOKENS + positions]
    with started(Server(path, "torch_native", ARGUMENTS), "SGLang with a dense backend") as server:
        answer = server.generate(prompt, positions + 2, return_logprob=True, top_logprobs_num=TOP)
    dense = [int(t) for t in answer["output_ids"]]
    top = [{int(t): float(x) for x, t, *_ in row} for row in answer["meta_info"]["output_top_logprobs"]]
    rows = []
    with tempfile.TemporaryDirectory(prefix="vattn-eval-") as cache:
        # A cache of its own: a calibration kept from earlier traffic would not be on another text.
        server = Server(path, "vattention", ARGUMENTS, {"VATTN_CACHE": cache}, admin_key=secrets.token_urlsafe(12))
        with started(server, "SGLang with attention backend vattention"):
            server.generate(other, 2)
            for epsilon in EPSILONS[:1] if quick else EPSILONS:
                rows.append(_at(server, epsilon, prompt, dense, top, positions))
    return rows


def _at(
    server: Server,
    epsilon: float,
    prompt: list[int],
    dense: list[int],
    top: list[dict[int, float]],
    positions: int,
) -> dict[str, Any]:
    server.admin("PATCH", "config", {"epsilon": epsilon})
    server.generate(prompt, 2)
    before = totals(server.admin("GET", "status"))
    with console.status(f"epsilon {epsilon}") as status:

        def answered(count: int) -> None:
            status.update(f"epsilon {epsilon}: {count}/{positions} positions")

        steps = forced_steps(server, prompt, dense, positions, answered, [list(row) for row in top])
    after = totals(server.admin("GET", "status"))
    if not steps:
        raise ServerError("no position's prefill gave dense's token; the two servers do not run one model")
    return {
        "epsilon": epsilon,
        "positions": len(steps),
        "density": (after[0] - before[0]) / (after[1] - before[1]),
        **compared(steps, dense, top),
    }


def compared(steps: list[Step], dense: list[int], top: list[dict[int, float]]) -> dict[str, float]:
    """Agreement, mean KL and perplexities of steps against dense.

    Parameters
    ----------
    steps : list of Step
        With the log-probabilities of dense's most likely tokens.
    dense : list of int
        Dense's tokens.
    top : list of dict
        Dense's log-probabilities of its most likely tokens at each position.
    """
    count = len(steps)
    own = [top[s.index + 1] for s in steps]
    targets = [dense[s.index + 1] for s in steps]
    return {
        "agreement": sum(s.token == t for s, t in zip(steps, targets, strict=True)) / count,
        "kl": sum(divergence(t, s.log_probs) for s, t in zip(steps, own, strict=True)) / count,
        "perplexity": math.exp(-sum(s.log_probs[t] for s, t in zip(steps, targets, strict=True)) / count),
        "dense_perplexity": math.exp(-sum(row[t] for row, t in zip(own, targets, strict=True)) / count),
    }


def divergence(dense: dict[int, float], other: dict[int, float]) -> float:
    """KL in nats over dense's most likely tokens and the rest as one outcome; a lower bound of the whole KL.

    Parameters
    ----------
    dense, other : dict
        Log-probabilities by token, of the same tokens.
    """
    total = sum(math.exp(p) * (p - other[token]) for token, p in dense.items())
    rest, other_rest = (
        max(LEAST_PROBABILITY, 1 - sum(math.exp(row[token]) for token in dense)) for row in (dense, other)
    )
    return total + rest * math.log(rest / other_rest)


def totals(status: dict[str, Any]) -> tuple[float, float]:
    """Tokens read and tokens in context over all layers since the server's start.

    Parameters
    ----------
    status : dict
        Answer of ``/vattention/status``.
    """
    layers = status["ranks"][0]["layers"]
    return sum(sum(row["read"].values()) for row in layers), sum(row["context_tokens"] for row in layers)


def started(server: Server, what: str) -> Server:
    """Start a server with a progress line and leave stopping to the context manager.

    Parameters
    ----------
    server : Server
        Not started yet.
    what : str
        Its name in the line.
    """
    with console.status(f"starting {what}") as status:
        server.start(lambda seconds: status.update(f"starting {what}: {seconds:.0f} s (about 30)"))
    return server
