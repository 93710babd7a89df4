"""``vattn eval fidelity``: the op on a real model's queries, keys and values, against float64 dense attention."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vattn_sgl import model_folder, texts
from vattn_sgl.eval import capture, forced, methods, selectors, train_hash
from vattn_sgl.eval.inefficiency import inefficiency
from vattn_sgl.eval.methods import Attention, Method, certified
from vattn_sgl.eval.metrics import Tally, each_head
from vattn_sgl.eval.selectors import Adapter
from vattn_sgl.selectors import hash_weights

# Positions are an even spread over the last eighth of a context.
TAIL = 8
# Distance of the seeds by which heads are judged.
HEAD_SEEDS = 1000
# First position of the next tokens, and how many are decoded at once.
LEAST_AGREEMENT = 1536
BATCH = 128
# The product's own selector and its ideal; the others are for comparison and measured at fewer positions.
MAIN_SELECTORS = (methods.DEFAULTS.selector, "oracle")
DEFAULT_SELECTOR = (methods.DEFAULTS.selector, methods.DEFAULTS.sketch_bits)
# Those told apart by more queries: the product's own, and methods that have none.
COMPARED_TARGETS = ("output", "")
# Targets that differ once a cap ends the sample: ``sdpa`` draws as ``numerator``, and ``uniform`` always alike; but
# ``output`` shrinks its estimate.
CAPPED_TARGETS = {"proportional": ("output", "denominator", "numerator"), "uniform": ("output", "denominator")}
PUBLISHED_EPSILONS = (0.05, 0.1, 0.2)
PUBLISHED_SETTINGS = {"sink": 128, "window": 128, "top_k": 0.025}
Step = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes
    ----------
    contexts : tuple of int
        Tokens.
    pieces : int
        Disjoint pieces of the evaluation text, each as long as the longest context.
    positions : int
        Queries per piece and context.
    other_positions : int
        Likewise, of selectors that are not in `MAIN_SELECTORS`.
    epsilons : tuple of float
        Bounds of the main rows.
    delta : float
        Their probability of failure.
    densities : tuple of float
        Of the comparison at equal density.
    compared_densities : tuple of float
        Further ones, at which methods of target ``output`` are told apart by more queries.
    sweep_context : int
        Context of the comparison.
    sweep_pieces, sweep_positions, compared_positions : int
        Its pieces, and queries per piece.
    forced_positions : int
        Of the queries per piece and context, how many are decoded through the whole model by every row.
    agreement_positions : int
        Further positions per piece, all over it, decoded through the whole model at the product's default.
    prompts, prompt_tokens, continuation : int
        Prompts whose greedy dense continuations are decoded again by the product's default, their length, and how many
        tokens each is continued by.
    inefficiency_positions : int
        Queries per piece and context.
    seed : int
        Of the samples; piece i uses ``seed + i``.
    text : str
        Evaluation text, see `vattn_sgl.texts.load`.
    other_texts : tuple of str
        Further texts, on a piece of which the product's own rows are measured again.
    head_samples : int
        Samples of each query, at the context of the comparison, by which heads are judged one by one.
    hash_weights : str or None
        File of HashAttention's weights for this model; without one nets are trained on the calibration text.
    hash_steps : int
        Of that training; 0 leaves selector ``hash`` out.
    """

    contexts: tuple[int, ...] = (2048, 4096, 8192)
    pieces: int = 2
    positions: int = 128
    other_positions: int = 32
    epsilons: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    delta: float = 0.05
    densities: tuple[float, ...] = (0.01, 0.02, 0.05, 0.2)
    compared_densities: tuple[float, ...] = (0.1, 0.15)
    sweep_context: int = 4096
    sweep_pieces: int = 2
    sweep_positions: int = 16
    compared_positions: int = 128
    forced_positions: int = 16
    agreement_positions: int = 1024
    prompts: int = 9
    prompt_tokens: int = 4096
    continuation: int = 256
    inefficiency_positions: int = 4
    seed: int = 0
    text: str = texts.EVALUATION
    other_texts: tuple[str, ...] = (texts.DEMONSTRATION, *texts.EVALUATION_CODE, texts.EVALUATION_MANUAL)
    head_samples: int = 8
    hash_weights: str | None = None
    hash_steps: int = 600

    @property
    def longest(self) -> int:
        """Tokens of one piece."""
        return max(self.contexts)


QUICK = Plan((2048,), 1, 12, 6, (0.05, 0.2), densities=(), compared_densities=(0.1,), sweep_context=2048,
             sweep_pieces=1, sweep_positions=4, compared_positions=4, forced_positions=6, agreement_positions=8,
             prompts=1, prompt_tokens=2048, continuation=8, inefficiency_positions=1, head_samples=1,
             hash_steps=0)  # fmt: skip


@dataclass
class Cell:
    """One row in the making.

    Attributes
    ----------
    method : Method
        How it attends.
    adapter : Adapter
        Selector.
    context : int
        Tokens.
    tally : Tally
        Head-steps on captured queries.
    forced : list of forced.Forced
        Positions decoded through the whole model.
    """

    method: Method
    adapter: Adapter
    context: int
    tally: Tally
    forced: list[forced.Forced] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """The row as the report gives it."""
        m, blind = self.method, self.method.sampler in ("window", "random")
        kl, agreement = None, None
        if self.forced:
            kl, agreement = self.divergence()
        return {
            "sampler": m.sampler,
            "selector": None if blind else self.adapter.name,
            "target": m.target or None,
            "bound": m.bound or None,
            "epsilon": None if m.density else m.epsilon,
            "delta": None if m.density else m.delta,
            "context": self.context,
            "bits": None if blind else self.adapter.bits,
            **self.tally.row(m.delta),
            # Nothing is claimed where no epsilon decides.
            **(dict.fromkeys(("violation_rate", "binding_violation_rate", "heads_over_delta")) if m.density else {}),
            "kl": kl,
            "agreement": agreement,
        }

    def divergence(self) -> tuple[float, float]:
        """Mean KL to dense and share of equal next tokens."""
        kl, agrees = (torch.cat([getattr(f, name) for f in self.forced]).double() for name in ("kl", "agrees"))
        return float(kl.mean()), float(agrees.mean())

    def kl_less(self, other: Cell) -> dict[str, float]:
        """Mean difference of the KL to dense at the same positions, with its standard error."""
        ours, others = (torch.cat([f.kl for f in cell.forced]).double() for cell in (self, other))
        less = ours - others
        return {"kl": float(less.mean()), "kl_standard_error": float(less.std() / math.sqrt(less.numel()))}

    def decoded(self) -> dict[str, Any]:
        """What the positions decoded through the whole model add to the row."""
        loss, dense = (torch.cat([getattr(f, name) for f in self.forced]) for name in ("loss", "dense_loss"))
        return {
            "positions": loss.numel(),
            "decoded_density": float(torch.cat([f.density for f in self.forced]).mean()),
            "perplexity": math.exp(float(loss.nanmean())),
            "dense_perplexity": math.exp(float(dense.nanmean())),
        }

    def next_tokens(self) -> dict[str, Any]:
        """Figures of positions that were only decoded through the whole model."""
        kl, agreement = self.divergence()
        about = {"selector": self.adapter.name, "bits": self.adapter.bits, "epsilon": self.method.epsilon}
        return about | {"kl": kl, "agreement": agreement} | self.decoded()


class Fidelity:
    """Measures a model by a plan.

    Parameters
    ----------
    path : pathlib.Path
        Folder of the model.
    plan : Plan
        How much.
    step : callable
        Told what begins; called `steps` times.
    keep : callable
        Given the result so far after every piece.
    """

    def __init__(
        self, path: Path, plan: Plan, step: Step = lambda what: None, keep: Keep = lambda result: None
    ) -> None:
        self.path, self.plan, self.step, self.keep = path, plan, step, keep
        self.cells: list[Cell] = []
        self.sweep: list[tuple[float, Cell]] = []
        self.published: list[Cell] = []
        self.others: list[list[Cell]] = [[] for _ in plan.other_texts]
        self.heads: dict[tuple[str, int], list[Cell]] = {}
        self.agreement: list[Cell] = []
        self.inefficiencies: dict[tuple[int, int], list[torch.Tensor]] = {}

    @torch.inference_mode()
    def run(self) -> dict[str, Any]:
        """Everything but the server; the report's contents."""
        plan, began = self.plan, time.monotonic()
        self.step("loading the model")
        self.model = capture.load_model(self.path)
        self.geometry = capture.geometry(self.model)
        self.step("calibrating on another text")
        calibration = capture.token_ids(self.path, texts.CALIBRATION, texts.CALIBRATION_MORE)[: plan.longest]
        self.calibration_tokens = len(calibration)
        calibrator = selectors.Calibrator(self.model, self.geometry, calibration)
        self.step("nets of hash")
        self.hash_weights = plan.hash_weights
        if self.hash_weights is None and plan.hash_steps:
            self.hash_weights = train_hash.weights(self.path, self.model, self.geometry, calibration, plan.hash_steps)
        self.adapters = selectors.adapters(self.geometry, calibrator, self.hash_weights)
        tokens = capture.token_ids(self.path, plan.text)
        self._make_cells()
        for name, cells in zip(plan.other_texts, self.others, strict=True):
            self.step(f"{name}: captured queries")
            self._other_text(name, cells)
        for piece in range(plan.pieces):
            self.step(f"text {piece + 1}: capturing")
            self._piece(piece, tokens[piece * plan.longest : (piece + 1) * plan.longest])
            result = self._result(piece + 1, time.monotonic() - began)
            self.keep(result)
        self.step("dense's own tokens")
        return result | {"continued": self.continued(tokens)}

    def continued(self, tokens: list[int]) -> dict[str, Any]:
        """Next tokens of the product's default, forced on dense's greedy continuations of pieces of a text.

        Parameters
        ----------
        tokens : list of int
            The text; the prompts are spread over it.
        """
        plan = self.plan
        last = len(tokens) - plan.prompt_tokens
        starts = [last * i // max(1, plan.prompts - 1) for i in range(plan.prompts)]
        cell = Cell(methods.Method(), self._default_adapter(), plan.prompt_tokens, Tally(self.geometry, 1.0))
        for index, start in enumerate(starts):
            prompt = tokens[start : start + plan.prompt_tokens]
            captured = capture.continue_densely(self.model, prompt, plan.continuation)
            cell.adapter.attach(captured)
            attention = Attention(captured, self.geometry, plan.seed + index)
            for some in torch.arange(captured.positions.numel()).split(BATCH):
                cell.forced.append(self._forced(attention, cell, some))
        return cell.next_tokens()

    def _default_adapter(self) -> Adapter:
        return next(a for a in self.adapters if (a.name, a.bits) == DEFAULT_SELECTOR)

    def _make_cells(self) -> None:
        plan = self.plan
        for context in plan.contexts:
            for adapter in self.adapters:
                for epsilon in plan.epsilons:
                    method = certified("proportional", "output", epsilon, plan.delta)
                    self._cell(self.cells, method, adapter, context)
                    if adapter.name in MAIN_SELECTORS:
                        for cells in self.others:
                            self._cell(cells, method, adapter, context)
                if context != plan.sweep_context:
                    continue
                for sampler, target in (("proportional", "denominator"), ("uniform", "output")):
                    self._cell(self.cells, certified(sampler, target, 0.05, plan.delta), adapter, context)
        self._cell(self.agreement, methods.Method(), self._default_adapter(), plan.longest)
        oracle = next(a for a in self.adapters if a.name == "oracle")
        for epsilon in PUBLISHED_EPSILONS:
            method = replace(certified("uniform", "denominator", epsilon, 0.05, **PUBLISHED_SETTINGS), bound="clt")
            self._cell(self.published, method, oracle, plan.longest)

    def _cell(self, cells: list[Cell], method: Method, adapter: Adapter, context: int) -> Cell:
        cell = Cell(method, adapter, context, Tally(self.geometry, method.epsilon))
        cells.append(cell)
        return cell

    def _other_text(self, name: str, cells: list[Cell]) -> None:
        plan = self.plan
        tokens = capture.token_ids(self.path, name)[: plan.longest]
        attention = self._captured(tokens, self._positions(), plan.seed)
        for index, context in enumerate(plan.contexts):
            self._measure(attention, [c for c in cells if c.context == context], self._chosen(index))
        self._each_head(name, attention)

    def _each_head(self, name: str, attention: Attention) -> None:
        """The default of every size of the product's codes, with samples of other seeds than the rows have."""
        plan = self.plan
        if plan.sweep_context not in plan.contexts:
            return
        chosen = self._chosen(plan.contexts.index(plan.sweep_context))
        for adapter in self.adapters:
            if adapter.name != methods.DEFAULTS.selector:
                continue
            cell = self._cell(self.heads.setdefault((name, adapter.bits), []), Method(), adapter, plan.sweep_context)
            for sample in range(plan.head_samples):
                again = replace(attention, seed=attention.seed + (sample + 1) * HEAD_SEEDS)
                self._measure(again, [cell], chosen)

    def _positions(self) -> list[int]:
        return [p for context in self.plan.contexts for p in spread(context, self.plan.positions)]

    def _chosen(self, index: int) -> torch.Tensor:
        """Which of `_positions` belong to a context."""
        return torch.arange(index * self.plan.positions, (index + 1) * self.plan.positions)

    def _captured(self, tokens: list[int], positions: list[int], seed: int) -> Attention:
        """Queries, keys and values of a piece of text, which every adapter then knows."""
        captured = capture.capture(self.model, tokens, positions)
        for adapter in self.adapters:
            adapter.attach(captured)
        return Attention(captured, self.geometry, seed)

    def _least_agreement(self) -> int:
        return min(LEAST_AGREEMENT, self.plan.longest // 2)

    def _piece(self, piece: int, tokens: list[int]) -> None:
        plan = self.plan
        positions = self._positions()
        first = len(positions)
        positions += torch.linspace(self._least_agreement(), plan.longest - 2, plan.agreement_positions).long().tolist()
        attention = self._captured(tokens, positions, plan.seed + piece)
        for index, context in enumerate(plan.contexts):
            chosen = self._chosen(index)
            self.step(f"text {piece + 1}, {context} tokens: captured queries")
            cells = [c for c in (*self.cells, *self.published) if c.context == context]
            for is_main, some in ((True, chosen), (False, every(chosen, plan.other_positions))):
                self._measure(attention, [c for c in cells if is_main == (c.adapter.name in MAIN_SELECTORS)], some)
            self.step(f"text {piece + 1}, {context} tokens: whole model")
            for cell in cells:
                cell.forced.append(self._forced(attention, cell, every(chosen, plan.forced_positions)))
            self.step(f"text {piece + 1}, {context} tokens: inefficiency")
            few = every(chosen, plan.inefficiency_positions)
            for adapter in self.adapters:
                if adapter.name != "oracle":
                    found = inefficiency(attention.captured, self.geometry, adapter, few)
                    self.inefficiencies.setdefault((self.adapters.index(adapter), context), []).append(found)
            if context == plan.sweep_context and piece < plan.sweep_pieces:
                self._sweep(attention, chosen, piece)
        self.step(f"text {piece + 1}: heads one by one")
        self._each_head(plan.text, attention)
        self.step(f"text {piece + 1}: next tokens")
        for cell in self.agreement:
            for some in torch.arange(first, len(positions)).split(BATCH):
                cell.forced.append(self._forced(attention, cell, some))

    def _is_default(self, cell: Cell) -> bool:
        m, d = cell.method, methods.DEFAULTS
        same = (m.sampler, m.target, m.epsilon) == (d.sampler, d.target, d.epsilon)
        return same and (cell.adapter.name, cell.adapter.bits) == DEFAULT_SELECTOR

    def _measure(self, attention: Attention, cells: list[Cell], chosen: torch.Tensor) -> None:
        for layer in range(self.geometry.num_layers):
            rows = methods.causal_rows(attention.captured, layer, chosen)
            exact = methods.exact(attention.captured, self.geometry, rows)
            for cell in cells:
                cell.tally.add(layer, *attention.attend(cell.method, cell.adapter, rows), exact)

    def _forced(self, attention: Attention, cell: Cell, chosen: torch.Tensor) -> forced.Forced:
        return forced.run(self.model, attention, cell.method, cell.adapter, chosen)

    def _sweep(self, attention: Attention, chosen: torch.Tensor, piece: int) -> None:
        """Every method at every density, which each KV group reads of each request."""
        plan = self.plan
        for density in sorted({*plan.densities, *plan.compared_densities}):
            self.step(f"text {piece + 1}: comparing at density {density:.0%}")
            if piece == 0:
                for method, adapter in self._contenders(density):
                    cell = Cell(method, adapter, plan.sweep_context, Tally(self.geometry, 0.0))
                    self.sweep.append((density, cell))
            cells = [cell for at, cell in self.sweep if at == density]
            for is_compared, positions in ((True, plan.compared_positions), (False, plan.sweep_positions)):
                some = every(chosen, positions)
                group = [c for c in cells if self._is_compared(density, c.method) == is_compared]
                self._measure(attention, group, some)
                for cell in group:
                    cell.forced += [self._forced(attention, cell, part) for part in some.split(BATCH)]

    def _is_compared(self, density: float, method: Method) -> bool:
        return density in self.plan.compared_densities and method.target in COMPARED_TARGETS

    def _contenders(self, density: float) -> Iterator[tuple[Method, Adapter]]:
        fixed, small = small_settings(density, self.plan.sweep_context)
        share = fixed_share(density, self.plan.sweep_context, **fixed)
        for kind in ("window", "random"):
            yield methods.baseline(kind, density, **fixed), self.adapters[0]
        for adapter in self.adapters:
            yield methods.baseline("top_k", density, **fixed), adapter
            for target in CAPPED_TARGETS["proportional"]:
                yield methods.capped("proportional", target, density, cap=share, **fixed, **small), adapter
            for target in CAPPED_TARGETS["uniform"]:
                halves = {"cap": share / 2, "top_k": share / 2}
                yield methods.capped("uniform", target, density, **halves, **fixed, **small), adapter

    def _result(self, pieces: int, seconds: float) -> dict[str, Any]:
        groups = {"main": self.cells, "published": self.published, "sweep": [cell for _, cell in self.sweep]}
        return {
            "rows": [cell.row() | {"group": name} for name, cells in groups.items() for cell in cells],
            "decoded": [cell.decoded() for cells in groups.values() for cell in cells],
            "sweep_density": [density for density, _ in self.sweep],
            "sweep_pairs": list(self._pairs()),
            "other_texts": [
                {"text": name, "rows": [cell.row() for cell in cells]}
                for name, cells in zip(self.plan.other_texts, self.others, strict=True)
            ],
            "heads": self._heads(),
            "inefficiency": [
                {
                    "selector": self.adapters[index].name,
                    "bits": self.adapters[index].bits,
                    "context": context,
                    "median": float(torch.cat(found, -1).median()),
                    "mean": float(torch.cat(found, -1).mean()),
                }
                for (index, context), found in self.inefficiencies.items()
            ],
            "agreement": [c.next_tokens() for c in self.agreement],
            "layer_density": self._layer_density(),
            "left_out": selectors.missing(self.hash_weights),
            "plan": self.plan.__dict__
            | {
                "pieces": pieces,
                "calibration": [texts.CALIBRATION, texts.CALIBRATION_MORE],
                "calibration_tokens": self.calibration_tokens,
                "least_agreement": self._least_agreement(),
            },
            "seconds": round(seconds),
            "machine": machine(),
        }

    def _heads(self) -> list[dict[str, Any]]:
        """Heads judged one by one: all texts together, and those alone that nothing was chosen by."""
        found = []
        for bits in sorted({bits for _, bits in self.heads}):
            for is_fresh in (False, True):
                tallies = [
                    cell.tally
                    for (name, size), cells in self.heads.items()
                    if size == bits and not (is_fresh and name in texts.IN_SIGHT)
                    for cell in cells
                ]
                if tallies:
                    found.append({"bits": bits, "fresh": is_fresh, **each_head(tallies, self.plan.delta)})
        return found

    def _pairs(self) -> Iterator[dict[str, Any]]:
        """``proportional`` less another method by the same scores, position by position, where both have many."""
        found = {
            (at, c.adapter.name, c.adapter.bits, c.method.sampler): c for at, c in self.sweep if self._is_output(c)
        }
        for (density, name, bits, sampler), other in found.items():
            if density not in self.plan.compared_densities or sampler not in ("top_k", "uniform"):
                continue
            ours = found[density, name, bits, "proportional"]
            yield {
                "density": density,
                "selector": name,
                "bits": bits,
                "against": sampler,
                "mean_error": ours.tally.mean_error() - other.tally.mean_error(),
                **ours.kl_less(other),
            }

    @staticmethod
    def _is_output(cell: Cell) -> bool:
        return cell.method.target in COMPARED_TARGETS

    def _layer_density(self) -> list[float]:
        """Density of each layer at the product's default, longest context."""
        cell = next((c for c in self.cells if c.context == self.plan.longest and self._is_default(c)), None)
        if cell is None:
            return []
        per_layer = cell.tally.steps.sum(1).double()
        return [float(x) for x in cell.tally.layer_density / per_layer]


def spread(context: int, count: int) -> list[int]:
    """Positions of an even spread over the last eighth of a context; the last one sees all of it."""
    return [int(p) for p in torch.linspace(context - context // TAIL, context - 1, count)]


def every(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """An even choice of ``count`` of some positions, the last one among them; all of them if they are fewer."""
    if count >= chosen.numel():
        return chosen
    return chosen[torch.linspace(0, chosen.numel() - 1, count + 1).round().long()[1:]]


def small_settings(density: float, context: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Sink and window, and pilot, that leave room at low densities; the defaults where there is room.

    Parameters
    ----------
    density : float
        Share of the context to be read.
    context : int
        Tokens.
    """
    d, tokens = methods.DEFAULTS, density * context
    total = min(d.sink + d.window, int(tokens / 3))
    sink = min(d.sink, max(2, total // 5))
    pilot = {"pilot": min(d.pilot, density / 8), "pilot_min": min(d.pilot_min, max(4, int(tokens / 8)))}
    return {"sink": sink, "window": max(1, total - sink)}, pilot


def fixed_share(density: float, context: int, sink: int, window: int) -> float:
    """Share of the range between sink and window that leaves ``density`` of the context to be read.

    Parameters
    ----------
    density : float
        Share of the context to be read.
    context, sink, window : int
        Tokens.
    """
    return (density * context - sink - window) / (context - sink - window)


def check(path: Path, plan: Plan) -> None:
    """Refuse a plan that the model or the shipped texts cannot carry.

    Parameters
    ----------
    path : pathlib.Path
        Folder of the model.
    plan : Plan
        How much is to be measured.

    Raises
    ------
    ValueError
        If a text or the model's range of positions is too short.
    vattn_sgl.config.ConfigError
        If the weights cannot be read.
    """
    if plan.hash_weights is not None:
        hash_weights.load(plan.hash_weights)
    limit = model_folder.positions(path)
    if plan.longest > limit:
        raise ValueError(f"context {plan.longest} is longer than the model's {limit} positions")
    for names, needed in (
        ((texts.CALIBRATION, texts.CALIBRATION_MORE), plan.longest),
        ((plan.text,), plan.longest * plan.pieces),
        *(((name,), plan.longest) for name in plan.other_texts),
    ):
        found = len(capture.token_ids(path, *names))
        if found < needed:
            raise ValueError(f"{' + '.join(names)} has {found} tokens of this model, {needed} are needed")


def steps(plan: Plan) -> int:
    """How often `Fidelity.run` calls ``step``."""
    densities = len({*plan.densities, *plan.compared_densities})
    sweeps = min(plan.pieces, plan.sweep_pieces) * densities if plan.sweep_context in plan.contexts else 0
    return 4 + len(plan.other_texts) + plan.pieces * (3 + 3 * len(plan.contexts)) + sweeps


def machine() -> str:
    """Processor, cores and versions, in words."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return f"{name}, {torch.get_num_threads()} thread(s), Python {platform.python_version()}, torch {torch.__version__}"
