"""The picture of a run: loss and metric over the optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def plot_run(
    path: Path,
    title: str,
    metric: str,
    train: Sequence[Sequence[float]],
    evaluated: Sequence[Sequence[float]],
) -> None:
    """Writes a PNG of two panels.

    Args:
        path: the file to write.
        title: of the whole picture.
        metric: name of the metric.
        train: loss and metric at each optimizer step.
        evaluated: the steps after which the model was evaluated, and loss and metric there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    steps, *eval_curves = evaluated
    for axes, name, values, eval_values in zip(
        figure.subplots(1, 2), ("loss", metric), train, eval_curves, strict=True
    ):
        axes.plot(range(1, len(values) + 1), values, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(range(1, len(values) + 1), smooth(values), color="tab:blue", label="training (running mean)")
        axes.plot(steps, eval_values, color="tab:orange", marker="o", label="evaluation")
        axes.set(xlabel="optimizer step", ylabel=name)
        if name == "perplexity":
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def smooth(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential running mean; weights of the first values sum to one too (Kingma, Ba, arXiv 1412.6980, section 3)."""
    mean, smoothed = 0.0, []
    for step, value in enumerate(values, 1):
        mean = decay * mean + (1 - decay) * value
        smoothed.append(mean / (1 - decay**step))
    return smoothed
