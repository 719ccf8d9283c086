"""Draw the picture of the README, docs/images/puma.png:  python docs/make_pictures.py."""

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.policies import Confidence
from puma_lightning.chain.reveal import reveal_at_random
from puma_lightning.chain.teacher import ProgressiveUnmasking
from puma_lightning.data.sudoku import geometry, solve

PUZZLE = "520000006000050100100000063200210640"
ORDER, MASK_ID, NUM_STAGES = 6, 7, 6
SEED = 36  # its stages are well apart
GIVEN, MASKED, RANDOM = to_rgb("#e3e3e3"), to_rgb("#3b4554"), to_rgb("#b9d3ea")
STAGES = [colormaps["YlGn"](0.08 + 0.58 * stage / (NUM_STAGES - 1)) for stage in range(NUM_STAGES)]


def candidates(xt: Tensor) -> Tensor:
    """A model made by hand: equal probability to all digits not yet in the cell's row, column or box."""
    placed = F.one_hot(xt, ORDER + 2)
    ruled_out = torch.zeros_like(placed, dtype=torch.bool)
    for cells in torch.from_numpy(geometry(ORDER).groups):
        ruled_out[:, cells] |= placed[:, cells].any(1, keepdim=True)
    logits = -6.0 * ruled_out.float()
    logits[..., [0, MASK_ID]] = float("-inf")
    return logits


def chain(x0: Tensor, prompt_mask: Tensor) -> list[Tensor]:
    """What the teacher's chain visits, one board a stage."""
    generator = torch.Generator().manual_seed(SEED)
    process = ProgressiveUnmasking(num_stages=NUM_STAGES, policy=Confidence())
    chains = process.start(Chains.fully_masked(x0, prompt_mask, MASK_ID, NUM_STAGES), generator)
    boards = []
    while not chains.done.all():
        boards.append(chains.xt)
        chains = process.advance(chains, candidates(chains.xt), step=0, generator=generator)
    return boards


def draw_board(axis: Axes, board: Tensor, prompt_mask: Tensor, colors: list[tuple[float, ...]]) -> None:
    """One board; ``colors`` are those of the revealed cells."""
    for cell in range(ORDER * ORDER):
        row, column = divmod(cell, ORDER)
        given, masked = bool(prompt_mask[0, cell]), int(board[0, cell]) == MASK_ID
        color = GIVEN if given else MASKED if masked else colors[cell]
        axis.add_patch(Rectangle((column, row), 1, 1, facecolor=color, edgecolor="0.7", linewidth=0.5))
        if not masked:
            axis.text(
                column + 0.5, row + 0.54, str(int(board[0, cell])), ha="center", va="center", fontsize=8,
                fontweight="bold" if given else "normal",
            )  # fmt: skip
    shape = geometry(ORDER)
    for line in range(0, ORDER + 1, shape.box_rows):
        axis.add_line(Line2D([0, ORDER], [line, line], color="black", linewidth=1.2))
    for line in range(0, ORDER + 1, shape.box_cols):
        axis.add_line(Line2D([line, line], [0, ORDER], color="black", linewidth=1.2))
    axis.set(xlim=(-0.08, ORDER + 0.08), ylim=(ORDER + 0.08, -0.08), aspect="equal")
    axis.axis("off")


def draw_picture() -> Figure:
    """Random masks above, the masks of the chain below, as many cells masked in the one as in the other."""
    puzzle = torch.tensor([[int(digit) for digit in PUZZLE]])
    x0, prompt_mask = torch.from_numpy(solve(puzzle.numpy())[0]).long(), puzzle > 0
    answer_length = int((~prompt_mask).sum())
    boards = chain(x0, prompt_mask)
    revealed = [answer_length - int((board == MASK_ID).sum()) for board in boards]

    generator = torch.Generator().manual_seed(SEED)
    counts = torch.tensor(revealed)[:, None]
    blank = x0.masked_fill(~prompt_mask, MASK_ID)
    random_boards = [reveal_at_random(blank, x0, count, MASK_ID, generator) for count in counts]
    first_seen = torch.stack([board[0] == MASK_ID for board in boards]).sum(0)
    stage_colors = [STAGES[stage] for stage in first_seen.clamp_max(NUM_STAGES - 1).tolist()]

    figure = Figure(figsize=(10, 4.95), dpi=160, facecolor="white")
    above, below, foot = figure.subfigures(3, 1, height_ratios=[1, 1, 0.13])
    ordinary = "what ordinary training shows the model: each board is a new draw"
    ours = "what inference will meet: the surest cells first, each board grown from the last"
    rows = ((above, "Random masks", ordinary, random_boards), (below, "PUMA's chain", ours, boards))
    for part, name, text, row in rows:
        part.text(0.009, 0.925, name, fontsize=13, fontweight="bold", va="center")
        part.text(0.178, 0.921, text, fontsize=12, color="0.3", va="center")
        axes = part.subplots(1, NUM_STAGES, gridspec_kw={
            "left": 0.01, "right": 0.99, "top": 0.77, "bottom": 0.02, "wspace": 0.06,
        })  # fmt: skip
        for stage, (axis, board) in enumerate(zip(axes, row, strict=True)):
            colors = [RANDOM] * len(stage_colors) if row is random_boards else stage_colors
            draw_board(axis, board, prompt_mask, colors)
            masked = f"{answer_length - revealed[stage]} masked"
            axis.set_title(masked if row is random_boards else f"stage {stage}: {masked}", fontsize=10.5, pad=3)
    handles = [
        Patch(facecolor=GIVEN, edgecolor="0.6", label="clue (prompt)"),
        Patch(facecolor=MASKED, edgecolor="0.6", label="masked"),
        Patch(facecolor=RANDOM, edgecolor="0.6", label="revealed at random"),
    ] + [
        Patch(facecolor=color, edgecolor="0.6", label=str(stage) if stage else "revealed at stage 0")
        for stage, color in enumerate(STAGES)
    ]
    foot.legend(handles=handles, loc="center", ncols=len(handles), fontsize=10.5, frameon=False,
                handlelength=1.1, handleheight=1.1, columnspacing=1.3, handletextpad=0.5)  # fmt: skip
    return figure


if __name__ == "__main__":
    path = Path(__file__).parent / "images" / "puma.png"
    path.parent.mkdir(exist_ok=True)
    # No software version in the file: the picture is the same on every run.
    draw_picture().savefig(path, metadata={"Software": None})
    print(path)
