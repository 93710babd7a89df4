"""Tell what ``results.json`` holds: RESULTS.md's table of decode attention, and ``roofline.png``.

The plot shows the time of a decode step against density, and what bounds it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from decode_gpu import KV_BYTES, SIDE_BYTES, copy_us

from vattn_sgl.arguments import writable

HERE = Path(__file__).parent
SHAPES = ((1, 131072), (16, 8192), (16, 32768), (16, 131072))


def table(rows: list[dict[str, Any]]) -> None:
    """A Markdown row for each shape and order of slots.

    Times in microseconds, speed-ups over the best dense kernel, the density that was read, how many times as long as
    copying the K and V of that density, and the mean error.
    """
    wanted = ("cap 0.5", "cap 0.2", "cap 0.1", "cap 0.05", "cap 0.025", "epsilon 0.05")
    names = " | ".join(name.replace("0.", ".") for name in wanted)
    print(f"| requests x context | best dense | {names} | reading all, ours |")
    print("|---" * (len(wanted) + 3) + "|")
    for key in sorted({(r["context"], r["batch"], r["order"]) for r in rows}):
        own = [r for r in rows if (r["context"], r["batch"], r["order"]) == key]
        totals = {r["wanted"]: r for r in own if r["stage"] == "total"}
        context, batch, order = key

        def cell(name: str, totals: dict[str, dict[str, Any]] = totals) -> str:
            found = totals.get(name)
            if found is None:
                return ""
            figures = f"{found['us']:.1f}, {found['ratio']:.2f}x at {found['density']:.3f}"
            return f"{figures}, {found['gather_ratio']:.1f}, {found['error']:.2%}"

        everything = next(r["ratio"] for r in own if r["stage"] == "dense:ours")
        cells = " | ".join(map(cell, wanted))
        print(f"| {batch} x {context:,}, {order} | {own[0]['dense_us']:,.0f} | {cells} | {everything:.2f}x |")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the shapes of `SHAPES`, ordered slots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    copy = rows[0]["copy_tb_s"]
    figure, axes = plt.subplots(1, len(SHAPES), figsize=(4 * len(SHAPES), 3.6), layout="constrained")
    for axis, (batch, context) in zip(axes, SHAPES, strict=True):
        own = [r for r in rows if (r["batch"], r["context"], r["order"]) == (batch, context, "in order")]
        totals = sorted((r["density"], r["us"]) for r in own if r["stage"] == "total" and r["wanted"].startswith("cap"))
        at = [density for density, _ in totals]
        bound = [copy_us(batch, context, KV_BYTES * d + SIDE_BYTES, copy) for d in at]
        axis.loglog(at, [us for _, us in totals], "o-", label="whole step")
        axis.loglog(at, bound, "k--", label=f"bytes at {copy} TB/s")
        axis.axhline(own[0]["dense_us"], color="tab:red", label="best dense")
        axis.set(title=f"{batch} x {context}", xlabel="density", ylabel="us a layer" if axis is axes[0] else "")
        axis.set_xticks([0.025, 0.05, 0.1, 0.2, 0.5], labels=[".025", ".05", ".1", ".2", ".5"])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=HERE / "results.json", help="what decode_gpu.py wrote")
    parser.add_argument("--png", type=writable, default=HERE / "roofline.png")
    options = parser.parse_args()
    if options.png.suffix != ".png":
        parser.error(f"--png {options.png}, expected a file whose name ends in .png")
    try:
        rows = json.loads(options.json.read_text())
        missing = set(SHAPES) - {(r["batch"], r["context"]) for r in rows if r["stage"] == "dense:ours"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{options.json}: {error!r}; expected what decode_gpu.py wrote", file=sys.stderr)
        return 2
    if missing:
        print(f"{options.json} has no rows of {sorted(missing)}: run decode_gpu.py with them", file=sys.stderr)
        return 2
    table(rows)
    try:
        plot(rows, options.png)
    except ImportError as error:
        print(f"no plot: {error}; expected matplotlib: pip install '.[eval]'", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
