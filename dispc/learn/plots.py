"""Pictures of a run and of masks."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from dispc.learn.folder import LEARNING, METRICS, RECOVERY, WIDTHS, read_metrics
from dispc.masks import SETS, Masks, set_width
from dispc.support.errors import DispcError
from dispc.support.extras import need
from dispc.support.files import whole

FORMATS = (".png", ".svg", ".pdf")
LABELS = dict(
    zip(SETS, ("S1 attention read", "S2 attention write", "S3 MLP read", "S4 MLP mid", "S5 MLP write"), strict=True)
)


def plot_run(folder: Path, masks: Masks) -> None:
    """Write both pictures, `learning.png` and `widths.png`, into the run's folder."""
    plot_learning(folder / METRICS, folder / LEARNING)
    plot_widths(masks, folder / WIDTHS)


def plot_learning(metrics: Path, file: Path) -> None:
    """Loss, its running mean, and the regulariser over the steps of a `metrics.jsonl`."""
    records = [record for record in read_metrics(metrics) if {"loss", "regulariser", "pruned"} <= record.keys()]
    if not records:  # those of a finished run were removed
        return
    figure, axes = _figure(2, 1, (8, 6))
    steps = np.array([record["step"] for record in records])
    loss = np.array([record["loss"] for record in records])
    share = max(1, len(loss) // 50)
    axes[0].plot(steps, loss, linewidth=0.5, color="tab:blue", alpha=0.4, label="each step")
    smooth = np.convolve(loss, np.ones(share) / share, mode="valid")
    axes[0].plot(steps[share - 1 :], smooth, color="tab:blue", label=f"mean of {share} steps")
    axes[0].set(ylabel="language-model loss (nats)")
    axes[0].legend()
    axes[1].plot(steps, [record["regulariser"] for record in records], color="tab:red", label="log(max / min)")
    axes[1].set(xlabel="step", ylabel="regulariser")
    axes[1].legend(loc="upper left")
    pruned = axes[1].twinx()
    pruned.plot(steps, [100 * record["pruned"] for record in records], color="tab:green", linewidth=0.8)
    pruned.set_ylabel("block parameters pruned (%)", color="tab:green")
    _save(figure, file)


def plot_recovery(folder: Path) -> None:
    """Write `recovery.png` into the run's folder: both losses of each step, and of the held-out text."""
    records = read_metrics(folder / METRICS)
    figure, axes = _figure(2, 1, (8, 6))
    for axis, name, label in (
        (axes[0], "distil", "divergence from the dense model (nats)"),
        (axes[1], "text", "loss of the text (nats)"),
    ):
        steps = [record for record in records if record.get(name)]
        judged = [record for record in records if f"held_out_{name}" in record]
        axis.plot([r["step"] for r in steps], [r[name] for r in steps], linewidth=0.5, alpha=0.5, label="each step")
        axis.plot([r["step"] for r in judged], [r[f"held_out_{name}"] for r in judged], marker="o", label="held out")
        axis.set(ylabel=label)
        axis.legend()
    axes[1].set(xlabel="step")
    _save(figure, folder / RECOVERY)


def plot_widths(masks: Masks, file: Path) -> None:
    """The share that each set keeps, block by block (the paper's Fig. 6), as png, svg or pdf by the file's name.

    Raises:
        DispcError: when the name asks for another format, or matplotlib is missing.
    """
    if file.suffix not in FORMATS:
        raise DispcError(f"{file}: pictures are drawn as {', '.join(FORMATS)}; give a name that ends so")
    figure, (axis,) = _figure(1, 1, (9, 4))
    for name in SETS:
        full = set_width(name, masks.hidden_size, masks.intermediate_size)
        shares = [len(block.sets()[name]) / full for block in masks.blocks]
        axis.plot(range(len(shares)), shares, marker="o", markersize=3, label=LABELS[name])
    facts = [masks.metadata[key] for key in ("method", "pruning_ratio") if key in masks.metadata]
    axis.set(xlabel="block", ylabel="share kept", ylim=(-0.02, 1.02), title=", ".join(facts))
    axis.legend(fontsize="small", ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    _save(figure, file)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    need("matplotlib", "learn")
    import matplotlib

    matplotlib.rcParams["text.parse_math"] = False  # a name with a dollar sign is no formula
    matplotlib.use("Agg")  # files only: no window, whatever the desktop
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, axes.flatten()


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    try:
        with whole(file) as partial, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure.savefig(partial, dpi=150, format=file.suffix.removeprefix("."))
    finally:
        pyplot.close(figure)
