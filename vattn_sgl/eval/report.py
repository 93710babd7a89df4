"""The report of ``vattn eval fidelity``: JSON, Markdown and plots from one result."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

from vattn_sgl import texts
from vattn_sgl.eval.metrics import FAMILY_ALPHA, detectable_rate

ROW_KEYS = (
    "sampler", "selector", "target", "bound", "epsilon", "delta", "context", "head_steps", "bits", "density",
    "violation_rate", "binding_violation_rate", "heads_over_delta", "mean_error", "p95_error", "kl", "agreement",
    "group",
)  # fmt: skip
# vAttention (arXiv 2510.05688), Llama-3.1-8B, oracle top-k, RULER qa_1 at 32K, delta .05: epsilon -> density, error.
PUBLISHED = {0.05: (0.104, 0.054), 0.1: (0.061, 0.095), 0.2: (0.038, 0.189)}
DPI = 90
DOTS: dict[str, Any] = {"marker": "o", "markersize": 3}
Row = dict[str, Any]


def write(result: dict[str, Any], folder: Path, name: str = "fidelity") -> list[Path]:
    """Write ``<name>.md`` and its plots.

    Parameters
    ----------
    result : dict
        From `vattn_sgl.eval.fidelity.Fidelity.run`, with ``command``, ``date`` and perhaps ``server`` added.
    folder : pathlib.Path
        Made if need be.
    name : str
        Stem of the files.

    Returns
    -------
    list of pathlib.Path
        What was written, the Markdown first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = [_plot_violations(result, folder / f"{name}-violations.png")]
    if groups(result)["sweep"]:
        plots.append(_plot_sweep(result, folder / f"{name}-density.png"))
    page = folder / f"{name}.md"
    page.write_text(markdown(result, name), encoding="utf-8")
    return [page, *plots]


def write_json(result: dict[str, Any], file: Path) -> None:
    """Write the whole result; ``rows`` holds the figures, in the order of `ROW_KEYS`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def groups(result: dict[str, Any]) -> dict[str, list[tuple[Row, Row]]]:
    """Rows, each with what the whole model added, by group."""
    found: dict[str, list[tuple[Row, Row]]] = {"main": [], "published": [], "sweep": []}
    for row, decoded in zip(result["rows"], result["decoded"], strict=True):
        found[row["group"]].append((row, decoded))
    return found


def label(row: Row) -> str:
    """Selector with its code size."""
    return f"{row['selector']} {row['bits']}" if row["bits"] else str(row["selector"] or "-")


def markdown(result: dict[str, Any], name: str) -> str:
    """The page."""
    plan, parts = result["plan"], groups(result)
    steps = plan["pieces"] * plan["positions"]
    heads = result["rows"][0]["head_steps"] // steps
    few = plan["pieces"] * min(plan["positions"], plan["other_positions"])
    detected = detectable_rate(steps, heads, plan["delta"])
    lines = [
        "# Fidelity on real attention",
        "",
        f"Written by `{result['command']}` on {result['date']}; seed {plan['seed']}; {result['machine']}; "
        f"{result['seconds']} s.",
        "",
        f"Model: {result['model']}, float32, {heads} (layer, query head) pairs. Codes are calibrated on "
        f"{plan['calibration_tokens']:,} tokens of {' and '.join(plan['calibration'])}; measured on "
        f"{plan['pieces']} disjoint piece(s) of `{plan['text']}`, "
        f"{plan['positions']} positions each from the last eighth of every context ({plan['other_positions']} with "
        "selectors other than `oracle` and `sketch`). Every figure is the real op against float64 dense attention over "
        "the same cache; contexts below `dense_below` are sampled here too.",
        "",
        _head_steps(parts["main"]),
        "",
        "- *density*: distinct tokens read / tokens of the context.",
        "- *violations*: head-steps whose relative output error exceeds epsilon. "
        "*Binding*: the same among the heads whose final half-width is the largest of their KV group or within 10 % of "
        "epsilon, for which the sample grew; groups that read everything have none.",
        f"- *heads over*: heads whose violations exceed delta by a one-sided binomial test at {FAMILY_ALPHA:g} over "
        f"all heads together (Bonferroni). {steps} steps a head: a true rate of {detected:.3f} is found with power .9 "
        f"({few} and {detectable_rate(few, heads, plan['delta']):.3f} with the other selectors).",
        "- *KL*, *agreement*, *perplexity*: every layer attends by the method, one token at each position, forced on "
        "the text before it, whose K and V are dense; KL(dense, method) in nats over the whole vocabulary.",
    ]
    if plan["hash_steps"] and plan["hash_weights"] is None:
        lines += ["", f"Nets of `hash` were trained here, {plan['hash_steps']} steps on the calibration text."]
    if result["left_out"]:
        lines += ["", f"Not measured: {', '.join(result['left_out'])}."]
    lines += ["", f"## The bound on {plan['text']}", "", _sight(plan["text"]), ""]
    lines += [f"![violations]({name}-violations.png)", ""]
    lines += _main_table(parts["main"])
    for other in result["other_texts"]:
        lines += ["", f"## The bound on {other['text']}", "", *_other_table(other["text"], other["rows"], plan)]
    lines += ["", "## Heads one by one", "", *_heads_table(result["heads"], plan)]
    lines += ["", "## Scores", "", *_inefficiency_table(result["inefficiency"], plan)]
    if parts["sweep"]:
        lines += ["", f"## Error at equal density, {plan['sweep_context']} tokens", ""]
        lines += [f"![error against density]({name}-density.png)", "", *_pairs_table(result["sweep_pairs"]), ""]
        lines += _sweep_table(parts["sweep"], result)
    lines += ["", "## The published table", "", *_published_table(parts["published"])]
    if result["agreement"]:
        lines += ["", "## Next tokens", "", *_agreement_table(result)]
    if result["layer_density"]:
        shares = ", ".join(f"{x:.3f}" for x in result["layer_density"])
        lines += ["", "## Density by layer", "", f"At the default, {plan['contexts'][-1]} tokens: {shares}."]
    if result.get("server"):
        lines += ["", "## Through the server", "", *_server_table(result["server"])]
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _main_table(pairs: list[tuple[Row, Row]]) -> list[str]:
    head = ["context", "selector", "sampler", "target", "bound", "epsilon", "head-steps", "density", "violations",
            "binding", "heads over", "mean error", "p95", "KL", "agreement", "positions",
            "perplexity / dense"]  # fmt: skip
    return _table(
        head,
        [
            [
                str(r["context"]), label(r), r["sampler"], r["target"], r["bound"], f"{r['epsilon']:g}",
                f"{r['head_steps']:,}", f"{r['density']:.3f}", f"{r['violation_rate']:.2%}",
                f"{r['binding_violation_rate']:.2%}", str(r["heads_over_delta"]), f"{r['mean_error']:.4f}",
                f"{r['p95_error']:.4f}", f"{r['kl']:.5f}", f"{r['agreement']:.2%}", str(d["positions"]),
                f"{d['perplexity']:.3f} / {d['dense_perplexity']:.3f}",
            ]
            for r, d in pairs
        ],
    )  # fmt: skip


def _sight(name: str) -> str:
    if name in texts.IN_SIGHT:
        return f"In sight: {texts.IN_SIGHT[name]}."
    return f"Nothing was chosen by it{', but ' * (name in texts.SEEN)}{texts.SEEN.get(name, '')}."


def _other_table(name: str, found: list[Row], plan: Row) -> list[str]:
    heads = found[0]["head_steps"] // plan["positions"]
    text = (
        f"{_sight(name)} One piece, {plan['positions']} positions a context; sampler `proportional`, target `output` "
        "and its default bound. A true rate of "
        f"{detectable_rate(plan['positions'], heads, plan['delta']):.3f} of a head is found with power .9."
    )
    head = ["context", "selector", "epsilon", "head-steps", "density", "violations", "binding", "heads over",
            "mean error", "p95"]  # fmt: skip
    rows = [
        [str(r["context"]), label(r), f"{r['epsilon']:g}", f"{r['head_steps']:,}", f"{r['density']:.3f}",
         f"{r['violation_rate']:.2%}", f"{r['binding_violation_rate']:.2%}", str(r["heads_over_delta"]),
         f"{r['mean_error']:.4f}", f"{r['p95_error']:.4f}"]
        for r in found
    ]  # fmt: skip
    return [text, "", *_table(head, rows)]


def _heads_table(found: list[Row], plan: Row) -> list[str]:
    text = (
        f"The default of selector `sketch` at {plan['sweep_context']:,} tokens, {plan['head_samples']} further samples "
        "of each position of every text above, counted head by head; the test is that of *heads over*, with so many "
        "steps a head. It is about a head's rate at these very positions: samples of one query err alike, and for "
        "others are worth fewer steps. *Found*: the least such rate that it finds with power .9. *Worst*: the heads "
        "that violate most, (layer, head), from 0. *Fresh*: texts that nothing was chosen by."
    )
    head = ["bits", "texts", "steps a head", "density", "violations", "heads over", "found", "worst"]
    rows = [
        [str(h["bits"]), "fresh" if h["fresh"] else "all", f"{h['steps']:,}", f"{h['density']:.3f}",
         f"{h['violation_rate']:.2%}", str(h["heads_over_delta"]), f"{h['detectable_rate']:.3f}",
         ", ".join(f"({w['layer']}, {w['head']}) {w['rate']:.1%}" for w in h["worst"])]
        for h in found
    ]  # fmt: skip
    return [text, "", *_table(head, rows)]


def _head_steps(pairs: list[tuple[Row, Row]]) -> str:
    """How many head-steps the product's rows have, all together and for each selector and epsilon."""
    counts: dict[tuple[str, float], int] = {}
    for r, _ in pairs:
        if (r["sampler"], r["target"]) == ("proportional", "output") and r["selector"] in ("oracle", "sketch"):
            counts[label(r), r["epsilon"]] = counts.get((label(r), r["epsilon"]), 0) + r["head_steps"]
    return (
        f"Head-steps of `proportional` with target `output` and its default bound: {sum(counts.values()):,} with "
        f"selectors `oracle` and `sketch`, {min(counts.values()):,} for each selector and epsilon over the contexts."
    )


def _inefficiency_table(entries: list[Row], plan: Row) -> list[str]:
    text = (
        "Inefficiency: variance of `proportional` over that with exact scores, at equal expected sample; "
        f"{plan['pieces'] * plan['inefficiency_positions']} positions a context, every layer and head."
    )
    rows = [
        [label(e), str(e["context"]), f"{e['median']:.2f}", f"{e['mean']:.1f}"]
        for e in sorted(entries, key=lambda e: (e["bits"], e["context"]))
    ]
    return [text, "", *_table(["selector", "context", "median", "mean"], rows)]


def _sweep_table(pairs: list[tuple[Row, Row]], result: dict[str, Any]) -> list[str]:
    text = (
        "Every KV group reads the same share of every request, as top-k does: a cap, with an epsilon out of reach; "
        "`uniform` spends half of it on its top-k. Targets differ in their scores only (`denominator` leaves the "
        "values' norms out), and in that `output` shrinks the estimate of a coarse selector; `sdpa` draws as "
        "`numerator` does, and `uniform` alike for all. Other targets than `output` have fewer positions. `quest` and "
        "`hash` give two thirds of the cap to their best scores. KL, agreement and perplexity over *positions*."
    )
    head = ["asked", "sampler", "selector", "target", "head-steps", "density", "mean error", "p95", "KL", "agreement",
            "positions", "perplexity"]  # fmt: skip
    return [text, "", *_table(
        head,
        [
            [
                f"{asked:.0%}", r["sampler"], label(r), r["target"] or "-",
                f"{r['head_steps']:,}", f"{r['density']:.4f}", f"{r['mean_error']:.4f}", f"{r['p95_error']:.4f}",
                f"{r['kl']:.5f}", f"{r['agreement']:.2%}", str(d["positions"]), f"{d['perplexity']:.3f}",
            ]
            for asked, (r, d) in zip(result["sweep_density"], pairs, strict=True)
        ],
    )]  # fmt: skip


def _pairs_table(pairs: list[Row]) -> list[str]:
    text = (
        "`proportional` with target `output` less the other method by the same scores: below 0 it is the better. KL "
        "position by position, with its standard error."
    )
    rows = [
        [f"{p['density']:.0%}", label(p), p["against"], f"{p['mean_error']:+.4f}",
         f"{p['kl']:+.5f} ± {p['kl_standard_error']:.5f}"]
        for p in pairs
    ]  # fmt: skip
    return [text, "", *_table(["asked", "selector", "less", "mean error", "KL"], rows)]


def _published_table(pairs: list[tuple[Row, Row]]) -> list[str]:
    text = (
        "Sampler `uniform`, oracle top-k, target `denominator`, bound `clt`, delta .05, sink and window 128, "
        f"top-k 2.5 %; {pairs[0][0]['head_steps']:,} head-steps a row at {pairs[0][0]['context']:,} tokens. Published: "
        "Llama-3.1-8B on RULER qa_1 at 32K. Another model and a shorter context, so only the shape compares; ours "
        "counts what the KV group reads, the pilot included."
    )
    rows = []
    for r, _ in pairs:
        density, error = PUBLISHED[r["epsilon"]]
        cells = [f"{r['epsilon']:g}", f"{r['density']:.3f}", f"{r['mean_error']:.3f}", f"{r['violation_rate']:.1%}"]
        rows.append([*cells, f"{density:.3f}", f"{error:.3f}"])
    head = ["epsilon", "density", "mean output error", "output error > epsilon", "published density", "published error"]
    return [text, "", *_table(head, rows)]


def _agreement_table(result: dict[str, Any]) -> list[str]:
    plan = result["plan"]
    text = (
        "The product's default, offline as above, at positions all over the text from "
        f"{plan['least_agreement']:,} tokens on"
    )
    forced = [("the text", e) for e in result["agreement"]]
    if result.get("continued"):
        forced.append(("dense's tokens", result["continued"]))
        text += (
            f", and along dense's greedy continuations of {plan['prompts']} prompts of {plan['prompt_tokens']} tokens"
        )
    head = ["forced on", "selector", "epsilon", "positions", "density", "agreement", "KL", "perplexity / dense"]
    rows = [
        [what, label(e), f"{e['epsilon']:g}", str(e["positions"]), f"{e['decoded_density']:.3f}",
         f"{e['agreement']:.2%}", f"{e['kl']:.5f}", f"{e['perplexity']:.3f} / {e['dense_perplexity']:.3f}"]
        for what, e in forced
    ]  # fmt: skip
    return [text + ".", "", *_table(head, rows)]


def _server_table(server: list[Row]) -> list[str]:
    text = (
        "A real SGLang server; each position is a request whose cache holds the prompt and dense's tokens so far, and "
        "whose second token comes from a decode step. KL over dense's most likely tokens, the rest as one outcome."
    )
    rows = [
        [f"{s['epsilon']:g}", str(s["positions"]), f"{s['density']:.3f}", f"{s['agreement']:.2%}", f"{s['kl']:.5f}",
         f"{s['perplexity']:.3f} / {s['dense_perplexity']:.3f}"]
        for s in server
    ]  # fmt: skip
    return [text, "", *_table(["epsilon", "positions", "density", "agreement", "KL", "perplexity / dense"], rows)]


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _colors(names: list[str]) -> dict[str, str]:
    """One color a name, in the order of their first mention."""
    return {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(names))}


def _plot_violations(result: dict[str, Any], file: Path) -> Path:
    figure, (left, right) = _figure(2)
    delta = result["plan"]["delta"]
    chosen = [r for r, _ in groups(result)["main"] if (r["sampler"], r["target"]) == ("proportional", "output")]
    colors = _colors([label(r) for r in chosen])
    lines = dict(zip(sorted({r["context"] for r in chosen}), cycle((":", "--", "-")), strict=False))
    for key in dict.fromkeys((label(r), r["context"]) for r in chosen):
        rows = [r for r in chosen if (label(r), r["context"]) == key]
        style = {"color": colors[key[0]], "linestyle": lines[key[1]], "label": f"{key[0]}, {key[1]}"} | DOTS
        left.plot([r["epsilon"] for r in rows], [r["density"] for r in rows], **style)
        right.plot([r["epsilon"] for r in rows], [r["binding_violation_rate"] for r in rows], **style)
    right.axhline(delta, color="black", linestyle="--", linewidth=1, label="delta")
    for axes, what in ((left, "density"), (right, "violations among binding heads")):
        axes.set(xlabel="epsilon", ylabel=what, xscale="log", ylim=(0, None))
        axes.set_xticks(result["plan"]["epsilons"], [f"{e:g}" for e in result["plan"]["epsilons"]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), fontsize=6, loc="outside right center")
    figure.savefig(file, dpi=DPI)
    return file


def _plot_sweep(result: dict[str, Any], file: Path) -> Path:
    figure, (left, right) = _figure(2)
    pairs = groups(result)["sweep"]
    lines = {"window": ":", "random": ":", "top_k": "--", "uniform": "-.", "proportional": "-"}
    chosen = [r for r, _ in pairs if r["target"] in (None, "output")]
    # The baselines without a selector differ in their color alone.
    colors = _colors([label(r) if label(r) != "-" else r["sampler"] for r in chosen])
    for key in dict.fromkeys((r["sampler"], label(r)) for r in chosen):
        rows = [r for r in chosen if (r["sampler"], label(r)) == key]
        color = colors[key[1] if key[1] != "-" else key[0]]
        style = {"color": color, "linestyle": lines[key[0]], "label": " ".join(key)} | DOTS
        left.plot([r["density"] for r in rows], [r["mean_error"] for r in rows], **style)
        right.plot([r["density"] for r in rows], [r["kl"] for r in rows], **style)
    for axes, what in ((left, "mean relative output error"), (right, "KL to dense, nats")):
        axes.set(xlabel="density", ylabel=what, yscale="log", xlim=(0, None))
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), fontsize=6, loc="outside right center")
    figure.savefig(file, dpi=DPI)
    return file
