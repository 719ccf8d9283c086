"""What the output layer costs in a training step, from hidden states and in the textbook way. See benchmarks/README.md.

Both sides make the loss of the masked positions, the gradients of hidden states and weight, and the confidence of the
masked positions, which the policy reads. They take turns, in random order within every round, on the same numbers.
Memory is measured in a process of its own for each side.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import _published
import _report
import _turns
import torch
import torch.nn.functional as F
from torch import Tensor

from puma_lightning.output.head import linear_cross_entropy, rows_per_chunk

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """A batch of hidden states and a head."""

    batch_size: int
    length: int
    masked: float
    vocab_size: int
    hidden_size: int
    device: str = "cpu"
    precision: str = "32"

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(torch.device(self.device).type, dtype, enabled=dtype is not None)


@dataclass
class Inputs:
    hidden: Tensor  # (B, L, D)
    weight: Tensor  # (V, D)
    x0: Tensor  # (B, L)
    masked: Tensor  # (B, L)
    mask_id: int


def make(shape: Shape) -> Inputs:
    """Numbers of the size they have in a model: a norm before the head, and a head drawn with std 0.02."""
    torch.manual_seed(0)
    size = (shape.batch_size, shape.length)
    count = round(shape.masked * shape.length)
    hidden = torch.empty(*size, shape.hidden_size, device=shape.device).normal_()
    weight = torch.empty(shape.vocab_size, shape.hidden_size, device=shape.device).normal_(std=0.02)
    return Inputs(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        x0=torch.randint(shape.vocab_size - 1, size, device=shape.device),
        masked=torch.rand(size, device=shape.device).argsort(1) < count,
        mask_id=shape.vocab_size - 1,
    )


def ours(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Loss, with gradients, and the confidence of the masked positions."""
    masked = inputs.masked
    weights = (masked / masked.sum(1, keepdim=True) / len(masked))[masked]
    loss, prediction = linear_cross_entropy(
        inputs.hidden[masked],
        inputs.weight,
        inputs.x0[masked],
        weights,
        mask_id=inputs.mask_id,
        statistics=["log_prob"],
    )
    loss.backward()
    assert prediction.log_prob is not None
    return loss.detach(), prediction.log_prob.exp()


def textbook(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The same from the logits of all positions."""
    masked = inputs.masked
    logits = F.linear(inputs.hidden, inputs.weight)
    logits[..., inputs.mask_id] = float("-inf")
    nll = F.cross_entropy(logits.float().flatten(0, 1), inputs.x0.flatten(), reduction="none").view_as(inputs.x0)
    loss = ((nll * masked).sum(1) / masked.sum(1)).mean()
    loss.backward()
    confidence = logits.detach().float().softmax(-1).amax(-1)
    return loss.detach(), confidence[masked]


def published(progressive: ModuleType, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The same by the published loss, and the maximum that its chain goes by."""
    log_probs = F.linear(inputs.hidden, inputs.weight).log_softmax(-1)
    xt = inputs.x0.masked_fill(inputs.masked, inputs.mask_id)
    loss = progressive.mdm_loss_fn(
        log_probs, inputs.x0, xt, inputs.mask_id, prompt_mask=torch.zeros_like(inputs.masked)
    )
    loss.backward()
    return loss.detach(), log_probs.detach().max(2)[0].exp()[inputs.masked]


OURS, TEXTBOOK, PUBLISHED = "ours", "textbook", "published"
SIDES: dict[str, Callable[[Inputs], tuple[Tensor, Tensor]]] = {OURS: ours, TEXTBOOK: textbook}


def step(side: str, shape: Shape, inputs: Inputs) -> tuple[Tensor, ...]:
    """Loss, confidence, and the gradients of hidden states and weight."""
    inputs.hidden.grad = inputs.weight.grad = None
    with shape.autocast():
        loss, confidence = SIDES[side](inputs)
    assert inputs.hidden.grad is not None and inputs.weight.grad is not None
    return loss, confidence, inputs.hidden.grad, inputs.weight.grad


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Seconds of both sides, and how far apart what they computed is."""
    for side in SIDES:
        # Loads the libraries.
        small = replace(shape, batch_size=1, length=8, vocab_size=100)
        step(side, small, make(small))
    inputs = make(shape)
    results: dict[str, tuple[Tensor, ...]] = {}

    def run(side: str) -> None:
        results[side] = step(side, shape, inputs)

    # The first round is not counted on a GPU, whose libraries choose their kernels in it.
    warmup = int(shape.device != "cpu")
    sides = {side: partial(run, side) for side in SIDES}
    measured = _turns.in_turn(sides, rounds, "rounds", shape.device, warmup)
    names = ("loss", "confidence", "grad_hidden", "grad_weight")
    return {
        "shape": asdict(shape),
        "rounds": rounds,
        **measured,
        "relative_difference": {
            name: float((a - b).norm() / b.norm())
            for name, a, b in zip(names, results[OURS], results[TEXTBOOK], strict=True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=2, help="sequences, where both sides are timed")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--masked", type=float, default=0.5, help="share of positions masked")
    parser.add_argument("--vocab-size", type=int, default=151_645)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--full-batch-size", type=int, default=32, help="where ours alone is run once, 0 to leave out")
    parser.add_argument("--full-textbook", action="store_true", help="the textbook version at that size too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=PRECISIONS, default="32", help="of autocast; 32 is none")
    parser.add_argument("--threads", type=int, help="CPU threads; default what PyTorch chooses")
    parser.add_argument("--reference", type=Path, help="a checkout of JaeyeonKim01/PUMA, to compare with it too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/head.json"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = Shape(
        args.batch_size, args.length, args.masked, args.vocab_size, args.hidden_size, args.device, args.precision
    )
    if args.reference:
        SIDES[PUBLISHED] = partial(published, _published.load(args.reference, "progressive"))
    full = replace(shape, batch_size=args.full_batch_size)
    if args.memory_of:
        size, side = args.memory_of.split(",")
        shape = {"timed": shape, "full": full}[size]
        # Without what it is given, hidden states and weight; gradients are counted.
        print(json.dumps(_turns.peak_memory(partial(step, side, shape, make(shape)), args.device)))
        return
    # Before anything of this process lies in the device's memory.
    memory = {side: _turns.peak_memory_of(f"timed,{side}") for side in SIDES}
    sides = [side for side in SIDES if side == OURS or args.full_textbook] if args.full_batch_size else []
    at_full_size = {side: _turns.peak_memory_of(f"full,{side}") for side in sides}
    measured = measure(shape, args.rounds)
    positions = round(shape.masked * shape.length) * shape.batch_size
    report = {
        "command": _report.command_line(),
        "environment": {**_report.environment(args.device), "precision": args.precision},
        **measured,
        "rows_per_chunk": rows_per_chunk(positions, shape.vocab_size, torch.device(shape.device)),
        "peak_memory": memory,
        "full_size": {"batch_size": full.batch_size, **at_full_size},
        # The float32 logits alone; the textbook version makes several such tensors.
        "full_size_logits_gb": round(4e-9 * full.batch_size * full.length * full.vocab_size, 2),
    }
    _report.write(args.out, report)
    _turns.print_table(measured, memory)
    print("relative difference", measured["relative_difference"])


if __name__ == "__main__":
    main()
