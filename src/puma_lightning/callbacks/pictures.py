"""The pictures of the callbacks: sequences on their way from masked to clean, and what chains did over training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from puma_lightning.data.base import Picture

Panel = tuple[Tensor, Tensor, Tensor]
COLORMAP = colormaps["viridis_r"]


def save_picture(trainer: pl.Trainer, name: str, draw: Callable[[], Figure] | None) -> Path | None:
    """Draw a picture in the log directory, over an earlier one, and in TensorBoard. Call it on all ranks; rank 0 draws.

    Args:
        trainer: The Trainer that has the log directory.
        name: Name of the file, without its ending.
        draw: Returns the picture; None if there is nothing to draw.

    Returns:
        The file; None where nothing was drawn, as in a trial run.
    """
    folder = trainer.log_dir  # asks all ranks, so it must not be left to rank 0
    if draw is None or folder is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    figure = draw()
    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, trainer.global_step)
    return path


def draw_reveal_order(
    panels: Sequence[Sequence[Panel]], titles: Sequence[str], picture: Picture | None = None
) -> Figure:
    """Draw when each position of some sequences was revealed: a row for each sequence, a column for each title.

    Given positions are grey, the others coloured from early (light) to late (dark); tokens that differ from the target
    are crossed out in red.

    Args:
        panels: For each row and column (tokens, reveal_step, target), each (L,); reveal_step is -1 where given.
        titles: One for each column.
        picture: How to draw a sequence as a grid, as a DataModule may offer it; None for a strip.

    Returns:
        The figure.
    """
    length = len(panels[0][0][0])
    picture = picture or Picture(torch.arange(length)[None])
    rows, columns = picture.positions.shape
    size = (2.4, 2.4) if rows > 1 else (max(3.0, 0.22 * columns), 0.8)
    figure = Figure(figsize=(size[0] * len(titles) + 1.0, size[1] * len(panels) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), len(titles), squeeze=False)
    last = max(1, *(int(reveal_step.max()) for row in panels for _, reveal_step, _ in row))
    scale = Normalize(0, last)
    for line, row in zip(axes, panels, strict=True):
        for axis, panel in zip(line, row, strict=True):
            _draw_panel(axis, panel, scale, picture)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    bar = figure.colorbar(ScalarMappable(scale, COLORMAP), ax=list(axes.flat), shrink=0.8, pad=0.02)
    bar.set_label("revealed by forward pass", fontsize=8)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar.ax.tick_params(labelsize=7)
    return figure


def draw_chains(history: Sequence[Mapping[str, float]]) -> Figure:
    """Draw what chains did over training: their mismatch with sampling, loss, reveals and length.

    Args:
        history: What ``ChainDiagnostics`` logged at each validation, with ``step``, the optimizer step.

    Returns:
        The figure.
    """
    found = {name for entry in history for name in entry if name.startswith("loss_")}
    parts = sorted(found, key=lambda name: int(name.removeprefix("loss_")))
    panels: dict[str, dict[str, str]] = {
        "mismatch with the sampler's masks": {"mismatch": ""},
        "loss (nats per token), little to most revealed": {name: name.removeprefix("loss_") for name in parts},
        "positions revealed in a step": {"by_count": "by count", "by_threshold": "above the threshold"},
        "steps of a chain": {"length": ""},
    }
    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for place, (name, label) in enumerate(lines.items()):
            seen = [entry for entry in history if name in entry]
            color = COLORMAP(0.15 + 0.85 * place / max(1, len(lines) - 1)) if len(lines) > 1 else COLORMAP(0.6)
            steps, values = [entry["step"] for entry in seen], [entry[name] for entry in seen]
            axis.plot(steps, values, marker="o", markersize=3, color=color, label=label or None)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=7)
    return figure


def _draw_panel(axis: Axes, panel: Panel, scale: Normalize, picture: Picture) -> None:
    rows, columns = picture.positions.shape
    drawn = (tensor[picture.positions].flatten().tolist() for tensor in panel)
    for cell, (token, step, right) in enumerate(zip(*drawn, strict=True)):
        row, column = divmod(cell, columns)
        color = COLORMAP(scale(step)) if step >= 0 else (0.92, 0.92, 0.92, 1.0)
        axis.add_patch(Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=0.6))
        dark = 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2] < 0.5
        text_color = "white" if dark else "black"
        axis.text(
            column + 0.5, row + 0.5, str(token), ha="center", va="center", fontsize=7, color=text_color,
            fontweight="bold" if step < 0 else "normal",
        )  # fmt: skip
        if step >= 0 and token != right:
            axis.plot([column + 0.15, column + 0.85], [row + 0.85, row + 0.15], color="red", linewidth=1.6)
    if picture.box is not None:
        box_rows, box_columns = picture.box
        for line in range(0, rows + 1, box_rows):
            axis.axhline(line, color="black", linewidth=1.2)
        for line in range(0, columns + 1, box_columns):
            axis.axvline(line, color="black", linewidth=1.2)
    axis.set(xlim=(-0.03, columns + 0.03), ylim=(rows + 0.03, -0.03), aspect="equal")
    axis.axis("off")
