"""``make prove``: the whole study, and ``docs/proof.md`` with its tables and plots from the run."""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vattn_kernels import ops
from vattn_sgl.arguments import positive
from vattn_sgl.eval import proof, proof_plots
from vattn_sgl.eval.proof import DELTA, LEVEL, POWER, Bias, Cell, Result

CALLS, BIAS_CALLS = 20, 60
BOUND_COLUMNS = ("clt", "student", "f8", "bernstein")
NOTES = """What to know about these rows:

- *needle*, `sketch`: selector and pilot both miss the token, and a sample's variance knows nothing of what was not
  read. `bernstein` need not see it, because the norm byte says how heavy a token may be; it then reads nearly all.
- *heavy-tailed*, `uniform`: the same on a smaller scale. `proportional` reads such tokens for certain.
- *equal*, `uniform`, `denominator`: the sample is drawn from the range without the top-k, whose weights are all equal,
  so a pilot of any size is exact.
- `f8` with sampler `uniform`: its quantile was measured for `proportional`, whose weights keep the residuals even.
- `sdpa` asks `2 (eps1 + eps2) <= eps` of two sums that each get half of delta: it reads most and is violated least.
- `bernstein` trusts the codes. A code that is older than its key voids it (`tests/kernels/test_violations.py`); the
  valid bit is there for that."""


def main(arguments: list[str] | None = None) -> int:
    """Run the study, write the report, and return 1 if a violation is unexplained or a sum is biased."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=positive, default=CALLS, help=f"calls a cell, {proof.HEADS} trials each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of proof.md and proof/*.png")
    options = parser.parse_args(arguments)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write to {options.output} ({error.strerror}): give a folder that may be made")
    command = f"python -m vattn_sgl.eval.prove --calls {options.calls} --seed {options.seed}"
    start = time.monotonic()
    results, biases = study(options.calls, options.seed)
    minutes = (time.monotonic() - start) / 60
    proof_plots.draw(results, options.output / "proof")
    text = report(results, biases, command, minutes)
    (options.output / "proof.md").write_text(text, encoding="utf-8")
    bad = unexplained(results)
    biased = [b for b in biases if b.biased]
    console = Console()
    above = sum(r.exceeds for r in results.values())
    console.print(_summary(results))
    console.print(
        f"{len(results)} cells, {above} above delta, {len(bad)} unexplained; "
        f"{len(biases)} sums, {len(biased)} biased; {minutes:.1f} min; {options.output / 'proof.md'}"
    )
    for result in bad:
        console.print(f"unexplained: {result}", style="red")
    for bias in biased:
        console.print(f"biased: {bias}", style="red")
    return 1 if bad or biased else 0


def _summary(results: dict[Cell, Result]) -> Table:
    """Cells above delta by sampler and bound, and why."""
    table = Table("sampler", "bound", "cells", "above delta", "why", "unexplained", "worst rate without a needle")
    for sampler in ops.SAMPLERS:
        for bound in BOUND_COLUMNS:
            found = [r for r in results.values() if (r.cell.sampler, r.cell.bound) == (sampler, bound)]
            above = [r for r in found if r.exceeds]
            why = Counter(proof.explain(r, results) for r in above)
            bad = why.pop(None, 0)
            rest = [r.rate for r in found if r.cell.population != "needle"]
            reasons = ", ".join(f"{reason} {count}" for reason, count in why.most_common())
            table.add_row(
                sampler, bound, str(len(found)), str(len(above)), reasons, str(bad), _share(max(rest, default=0))
            )
    return table


def study(calls: int, seed: int) -> tuple[dict[Cell, Result], list[Bias]]:
    """All cells and all sums, with a progress bar.

    Parameters
    ----------
    calls : int
        Calls of the op a cell.
    seed : int
        Of the data and of the samples.
    """
    todo = list(proof.cells())
    sums = [(p, sel, sam) for p in proof.POPULATIONS for sel in proof.SELECTORS for sam in ops.SAMPLERS]
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: dict[Cell, Result] = {}
    biases: list[Bias] = []
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(todo) + len(sums))
        for name in sums:
            progress.update(task, description=f"sums, {name[0]}")
            biases += proof.unbiasedness(*name, BIAS_CALLS, seed)
            progress.advance(task)
        for cell in todo:
            progress.update(task, description=f"violations, {cell.population}")
            results[cell] = proof.measure(cell, calls, seed)
            progress.advance(task)
    return results, biases


def unexplained(results: dict[Cell, Result]) -> list[Result]:
    """Cells above delta that `vattn_sgl.eval.proof.explain` does not explain."""
    return [r for r in results.values() if r.exceeds and proof.explain(r, results) is None]


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(header)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _share(x: float) -> str:
    return f"{100 * x:.1f} %" if x else "0"


def _name(cell: Cell) -> list[str]:
    values = "" if cell.value_dims == proof.VALUE_DIMS else f" (values of {cell.value_dims} dimension)"
    return [cell.population + values, cell.selector, cell.sampler, cell.target]


def report(results: dict[Cell, Result], biases: list[Bias], command: str, minutes: float) -> str:
    """The text of ``docs/proof.md``.

    Parameters
    ----------
    results : dict of Cell to Result
        Violations.
    biases : list of Bias
        Sums.
    command : str
        What made them.
    minutes : float
        How long it took.
    """
    trials = next(iter(results.values())).trials
    above = [r for r in results.values() if r.exceeds]
    bad = unexplained(results)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    most, least = proof.most_violations(trials), proof.detectable_rate(trials)
    counts = {b: sum(r.cell.bound == b for r in results.values()) for b in BOUND_COLUMNS}
    failed = {b: sum(r.cell.bound == b for r in above) for b in BOUND_COLUMNS}
    parts = [
        "# Proof by statistics",
        f"Written by `make prove` (`{command}`), {date}, {minutes:.1f} minutes on {torch.get_num_threads()} threads "
        f"({platform.machine()}), torch {torch.__version__}. Do not edit.",
        "## What is tested",
        f"A trial is one head and one step. It violates when its error exceeds ε in the target's own norm, against "
        f"float64, whether or not it was reported as certified. δ = {DELTA}. A cell has {trials:,} independent trials "
        f"({proof.HEADS} heads with data of their own, {trials // proof.HEADS} seeds; {proof.CONTEXT:,} tokens, head "
        f"dimension {proof.HEAD_DIM}, values that vary in 8 dimensions around a mean; CPU op).",
        f"*Exceeds δ*: more than {most} violations, the binomial quantile at {LEVEL:g} under a rate of δ. Power: a "
        f"true rate of {_share(least)} is found with probability {POWER} or more in each cell; with {len(results):,} "
        f"cells and every rate exactly δ, {len(results) * LEVEL:.1f} would exceed by chance.",
        "Populations: logits Gaussian, uniform on [-3, 3], equal, heavy-tailed (Pareto weights of index 1.25), and a "
        "*needle*: a token with about a quarter of the mass that sits entirely in what the codes leave out, so that "
        "selector `sketch` ranks it among the many; its norm byte is honest. `oracle` sees it. Selectors `quest`, "
        "`sign` and `hash` are not part of the study: in these isotropic keys they see little, and what that costs is "
        "tested in `tests/kernels/test_violations.py`.",
        "## Result",
        f"**{len(above)} of {len(results):,} cells exceed δ; {len(bad)} are unexplained.** By bound: "
        + ", ".join(f"`{b}` {failed[b]} of {counts[b]}" for b in BOUND_COLUMNS)
        + f". {sum(r.cell.population == 'needle' for r in above)} of them are needles; of the other "
        f"{sum(r.cell.population != 'needle' for r in above)}, "
        f"{sum(r.cell.sampler == 'proportional' for r in above if r.cell.population != 'needle')} are `proportional`. "
        f"In {sum(r.silent > most for r in above)} cells the violations that were reported as certified exceed δ "
        f"alone; in {sum(2 * r.silent < r.violations for r in above)} the op says of more than half of the violations "
        "that the bound does not hold (`uncertified`).",
        "The rule of explanation (`vattn_sgl.eval.proof.explain`):",
        _rule(),
        "![violations](proof/violations.png)",
        "The plots show selector `sketch`; lines of one color are the targets.",
        "## Where `clt` fails, and how far the others mend it",
        _mending(results),
        NOTES,
        "## What a bound costs",
        "Density by target, selector `sketch`:",
        "![density](proof/density.png)",
        _worst(results),
        "## Every cell that exceeds δ",
        _violations(above, results),
        "## The tail and the violations",
        "The pilot's variance estimate against that of normal summands (1 is normal) and the rate of violations; the "
        f"dashed line is the rule's limit of {proof.WIDEST_SPREAD:g}.",
        "![tail](proof/tail.png)",
        "## Unbiasedness",
        f"Mean relative deviation of D and of Nv (the coordinate that deviates most) at a fixed sample of a twentieth "
        f"of the range. Biased: more than {proof.MOST_ERRORS} standard errors; a bias of "
        f"{proof.MOST_ERRORS + 1.64:.1f} standard errors is found with power .95. "
        f"**{sum(b.biased for b in biases)} of {len(biases)} are biased.**",
        _biases(biases),
        "## All cells",
        "Share of trials above ε, and density in brackets.",
        *(_all(results, name) for name in proof.POPULATIONS),
    ]
    return "\n\n".join(parts) + "\n"


def _biases(biases: list[Bias]) -> str:
    header = ["population", "selector", "sampler", "sum", "trials", "mean deviation", "standard error", "ratio"]
    rows = []
    for b in biases:
        ratio = f"{b.mean / b.error:+.1f}" if b.error > proof.ROUNDING else "exact"
        rows.append([b.population, b.selector, b.sampler, b.total, f"{b.trials:,}", f"{b.mean:+.5f}"])
        rows[-1] += [f"{b.error:.5f}", ratio]
    return _table(header, rows)


def _rule() -> str:
    text = (proof.explain.__doc__ or "").split("Parameters")[0].split("\n\n", 1)[1]
    return "\n".join(line.removeprefix("    ") for line in text.rstrip().splitlines()).replace("``", "`")


def _violations(above: list[Result], results: dict[Cell, Result]) -> str:
    header = ["population", "selector", "sampler", "target", "bound", "ε", "above ε", "and certified"]
    rows = (
        [*_name(r.cell), r.cell.bound, r.cell.epsilon, _share(r.rate), _share(r.certified_rate),
         f"{r.density:.2f}", f"{r.pilot_spread:.1f}", proof.explain(r, results) or "**unexplained**"]
        for r in sorted(above, key=lambda r: (proof.POPULATIONS.index(r.cell.population), -r.rate))
    )  # fmt: skip
    return _table([*header, "density", "tail", "explanation"], rows)


def _mending(results: dict[Cell, Result]) -> str:
    rows = []
    for cell, result in results.items():
        if cell.bound != "clt" or not result.exceeds:
            continue
        row = [*_name(cell), str(cell.epsilon)]
        for bound in BOUND_COLUMNS:
            other = results.get(Cell(*_key(cell), bound, cell.epsilon, cell.value_dims))
            mark = "**" if other is not None and other.exceeds else ""
            row.append("" if other is None else f"{mark}{_share(other.rate)}{mark} ({other.density:.2f})")
        rows.append(row)
    note = "Share of trials above ε (bold: exceeds δ) and density, in every cell where `clt` exceeds δ."
    return f"{note}\n\n" + _table(["population", "selector", "sampler", "target", "ε", *BOUND_COLUMNS], rows)


def _key(cell: Cell) -> tuple[str, str, str, str]:
    return cell.population, cell.selector, cell.sampler, cell.target


def _worst(results: dict[Cell, Result]) -> str:
    def entry(test: Callable[[Cell], bool]) -> str:
        found = [r for c, r in results.items() if c.value_dims == proof.VALUE_DIMS and test(c)]
        worst = max(found, key=lambda r: r.rate)
        low, high = min(r.density for r in found), max(r.density for r in found)
        return f"{_share(worst.rate)} ({low:.2f}-{high:.2f})"

    rows = []
    for population in proof.POPULATIONS:
        for selector in proof.SELECTORS:
            for sampler in ops.SAMPLERS:
                key = (population, selector, sampler)
                columns = [entry(lambda c, k=key, b=b: _key(c)[:3] == k and c.bound == b) for b in BOUND_COLUMNS]  # type: ignore[misc]
                rows.append([*key, *columns])
    note = "Worst rate over the targets and ε, and the range of densities (`f8`: target `output` only)."
    return f"{note}\n\n" + _table(["population", "selector", "sampler", *BOUND_COLUMNS], rows)


def _all(results: dict[Cell, Result], population: str) -> str:
    rows: dict[tuple[str, ...], list[str]] = {}
    for cell, r in results.items():
        if cell.population == population:
            mark = "**" if r.exceeds else ""
            key = (*_name(cell), cell.bound)
            rows.setdefault(key, []).append(f"{mark}{_share(r.rate)}{mark} ({r.density:.2f})")
    header = ["population", "selector", "sampler", "target", "bound", *(f"ε = {e}" for e in proof.EPSILONS)]
    return f"### {population}\n\n" + _table(header[1:], ([*key[1:], *row] for key, row in rows.items()))


if __name__ == "__main__":
    sys.exit(main())
