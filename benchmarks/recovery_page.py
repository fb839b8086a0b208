"""The section of docs/results.md on longer learning and on recovery, and its picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import table

RATIOS = (20, 30, 40, 50)
WHOLE, FIRST = "wiki.test", "wiki.test, 16 of 1024"
PEERS: tuple[tuple[str, tuple[float | None, float | None, float | None]], ...] = (
    ("DISP-LLM, 307 k tokens", (24.5, 30.8, 51.5)),
    ("MLP channels by activation-weighted magnitude", (None, 61.3, None)),
    ("FLAP", (39.5, 82.1, 555.9)),
    ("LLM-Pruner (first order, no recovery)", (None, 101.7, None)),
    ("SliceGPT (its Q matrices counted)", (80.1, 115.8, 284.1)),
)
"""At 20, 30 and 50 %. Measured outside of this repository, one seed each."""
STEPS = (
    ("masks from more text", "pruned"),
    ("recovered, adapters of rank 8", "lora"),
    ("recovered, all weights", "full"),
)
DISTANCES = (
    ("pruned", "full", "begin"),
    ("recovered, adapters of rank 8", "lora", "best"),
    ("recovered, all weights", "full", "best"),
)
"""Title, which recovery, and when in it the divergence was measured."""
PICTURE = "learning-curve.png"


def recovery_sections(report: Mapping[str, Any], short: Mapping[int, float], folder: Path) -> list[str]:
    """The blocks of the page, whose picture is drawn too.

    `short` has the whole-split perplexities of the masks from 307,200 tokens, by ratio.
    """
    draw(report, folder / PICTURE)
    columns = ("", *(f"{ratio} %" for ratio in RATIOS))
    rows = [
        ("masks from 307 k tokens", *(f"{short[ratio]:.2f}" for ratio in RATIOS)),
        *((what, *(f"{report[f'{kind} {ratio}'][WHOLE]:.2f}" for ratio in RATIOS)) for what, kind in STEPS),
    ]
    answers = [(what, *(f"{report[f'{kind} {ratio}']['answers']:.2f}" for ratio in RATIOS)) for what, kind in STEPS]
    found = report["recoveries"]
    distances = [
        (what, *(f"{found[f'{kind} {ratio}'][when]['distil']:.2f}" for ratio in RATIOS))
        for what, kind, when in DISTANCES
    ]
    tokens = [report[f"curve {ratio}"][-1]["tokens"] for ratio in RATIOS]
    trained = [record["tokens"] for record in found.values()]
    ours = (f"{report[f'pruned {ratio}'][FIRST]:.1f}" for ratio in (20, 30, 50))
    peers = [
        (f"DISP-LLM, {min(tokens) / 1e6:.1f} M tokens", *ours),
        *((name, *(f"{one:.1f}" if one else "" for one in values)) for name, values in PEERS),
    ]
    return [
        "## Masks from more text, and recovery",
        f"On one {report['device'].split(',')[0]}, everything at once, {report['seconds'] / 60:.1f} minutes in all: "
        f"masks from {min(tokens) / 1e6:.1f} to {max(tokens) / 1e6:.1f} million tokens (steps of 8 sequences of 512), "
        f"then `dispc recover` on {min(trained) // 1000} to {max(trained) // 1000} thousand. The text is WikiText-2's "
        "without sentences that have `<unk>`, and 352 answers that the dense model gave (`benchmarks/texts`); "
        "the held-out answers are 48 others. In float32 (TF32 products), by `benchmarks/learn_and_recover.py`.",
        f"Perplexity on wiki.test.raw, all 148 windows of 2,048 tokens; dense {report['dense'][WHOLE]:.2f}:",
        table(columns, rows),
        f"Perplexity on held-out answers of the dense model; dense {report['dense']['answers']:.2f}:",
        table(columns, answers),
        "Divergence from the dense model, KL(dense || model), nats a token, on 16 windows at the end of the text:",
        table(columns, distances),
        "Adapters of rank 8 have 2.4 million weights, and give half and more of what all 106 million give. The masks, "
        "and one of the adapters, ship with dispc. A perplexity below the dense model's means that WikiText was "
        "trained on too: the divergence tells how far the model is from it.",
        f"![perplexity against tokens]({PICTURE})",
        "The points are the sets that a run would have ended in, before its rate had fallen: a run planned for as many "
        "tokens ends lower.",
        "## Peers at equal parameters",
        "Perplexity on the first 16 windows of 1,024 tokens, the same share of the block parameters, one seed, no "
        "recovery. Measured outside of this repository: SliceGPT by its authors' code at 6b12cde, FLAP's statistics at "
        "3bb57db, LLM-Pruner's criterion at 128a07d; the peers' statistics are from 4 k to 33 k tokens. They see less "
        "text because they learn nothing from more: DISP-LLM's answer to the same budget is learned, and takes "
        "minutes.",
        table(("", "20 %", "30 %", "50 %"), peers),
    ]


def draw(report: Mapping[str, Any], file: Path) -> None:
    """Perplexity against tokens, a line per ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for ratio in RATIOS:
        points = report[f"curve {ratio}"]
        axis.plot([p["tokens"] / 1e6 for p in points], [p[FIRST] for p in points], marker="o", label=f"{ratio} %")
    axis.axhline(report["dense"][FIRST], color="gray", linewidth=0.8, label="dense")
    axis.set(xlabel="million tokens", ylabel="perplexity, first 16 windows of 1,024", yscale="log")
    axis.set_yticks([20, 30, 40, 60, 100], ["20", "30", "40", "60", "100"])
    axis.legend()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
