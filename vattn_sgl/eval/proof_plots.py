"""Plots of the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from PIL import Image

from vattn_kernels import ops
from vattn_sgl.eval import proof
from vattn_sgl.eval.proof import Cell, Result

COLORS = {"clt": "tab:red", "student": "tab:orange", "f8": "tab:purple", "bernstein": "tab:green"}
LINES: dict[str, Any] = {"output": "-", "denominator": "--", "numerator": "-.", "sdpa": ":"}
DPI = 70
COLORS_OF_A_FILE = 48


def draw(results: dict[Cell, Result], folder: Path) -> None:
    """Write ``violations.png``, ``density.png`` and ``tail.png``.

    Parameters
    ----------
    results : dict of Cell to Result
        Violations.
    folder : pathlib.Path
        Made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _by_population(results, "rate", "share of trials above ε", folder / "violations.png")
    _by_population(results, "density", "density", folder / "density.png")
    _tail(results, folder / "tail.png")


def _by_population(results: dict[Cell, Result], value: str, label: str, file: Path) -> None:
    figure, axes = pyplot.subplots(2, len(proof.POPULATIONS), figsize=(15, 6), sharex=True, sharey="row")
    for row, sampler in zip(axes, ops.SAMPLERS, strict=True):
        for axis, name in zip(row, proof.POPULATIONS, strict=True):
            _lines(axis, results, name, sampler, value)
            axis.set_title(f"{name}, {sampler}", fontsize=9)
            axis.set_xscale("log")
            axis.set_xticks(proof.EPSILONS, [str(e) for e in proof.EPSILONS])
            axis.minorticks_off()
            if value == "rate":
                axis.axhline(proof.DELTA, color="black", linewidth=0.8)
                axis.set_yscale("symlog", linthresh=0.01)
        row[0].set_ylabel(label)
    for axis in axes[1]:
        axis.set_xlabel("ε")
    entries = [pyplot.Line2D([], [], color=c, label=b) for b, c in COLORS.items()]
    entries += [pyplot.Line2D([], [], color="gray", linestyle=s, label=t) for t, s in LINES.items()]
    figure.legend(handles=entries, loc="lower center", ncols=len(entries), fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    _save(figure, file)


def _lines(axis: Any, results: dict[Cell, Result], name: str, sampler: str, value: str) -> None:
    for target, style in LINES.items():
        for bound, color in COLORS.items():
            found = [results.get(Cell(name, "sketch", sampler, target, bound, e)) for e in proof.EPSILONS]
            points = [(r.cell.epsilon, getattr(r, value)) for r in found if r is not None]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1)


def _tail(results: dict[Cell, Result], file: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(7, 4))
    for bound, color in COLORS.items():
        found = [r for r in results.values() if r.cell.bound == bound]
        axis.scatter([max(r.pilot_spread, 0.05) for r in found], [r.rate for r in found], s=8, color=color, label=bound)
    axis.axvline(proof.WIDEST_SPREAD, color="black", linestyle="--", linewidth=0.8)
    axis.axhline(proof.DELTA, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylim(-0.002, 1.1)
    axis.set_xlabel("spread of the pilot's variance estimate over that of normal summands")
    axis.set_ylabel("share of trials above ε")
    axis.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=DPI)
    pyplot.close(figure)
    with Image.open(file) as image:
        few = image.convert("RGB").quantize(COLORS_OF_A_FILE)
    few.save(file, optimize=True)
