"""What sampling a batch costs, versus the textbook way and the published code. See benchmarks/README.md.

All sides complete the same batch with the same weights, by top-1 confidence and at temperature 0, a fixed number of
positions in a pass. The lengths of the prompts differ, as those of questions do, so that rows are finished one by one.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _published
import _report
import _turns
import torch
from torch import Tensor

from puma_lightning.chain.student import Sampler
from puma_lightning.models import TransformerBackbone
from puma_lightning.modules import MaskedDiffusion

OURS, TEXTBOOK, PUBLISHED = "ours", "textbook", "published"
PRECISIONS = {"32": None, "bf16": torch.bfloat16}


class Case:
    """A model, a batch to complete, and every way to do so."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        torch.manual_seed(0)
        backbone = TransformerBackbone(
            args.vocab_size, args.hidden_size, 3 * args.hidden_size, args.num_layers, args.num_heads,
            max_length=args.length, tie_embeddings=True,
        )  # fmt: skip
        with torch.no_grad():
            for name, weight in backbone.named_parameters():
                if weight.ndim == 2 and "embed" not in name:
                    # Untrained, all positions look alike, and rounding would decide which is revealed first.
                    weight *= 5
        self.mask_id = args.vocab_size - 1
        self.module = MaskedDiffusion(backbone, self.mask_id).to(args.device).eval()
        x0 = torch.randint(self.mask_id, (args.batch_size, args.length), device=args.device)
        low, high = (round(share * args.length) for share in args.prompt)
        given = torch.linspace(low, high, args.batch_size, device=args.device).long()
        self.prompt_mask = torch.arange(args.length, device=args.device) < given[:, None]
        self.xt = x0.masked_fill(~self.prompt_mask, self.mask_id)
        self.samples: dict[str, Tensor] = {}
        self.sides: dict[str, Callable[[], Tensor]] = {OURS: self.ours, TEXTBOOK: self.textbook}
        if args.reference is not None:
            sampling = _published.load(args.reference, "sampling")
            theirs = _published.backbone(args.reference, backbone).eval()
            settings = SimpleNamespace(temperature=0.0, confidence="top_k", unmasking_num=args.tokens_per_step)
            self.sides[PUBLISHED] = lambda: sampling.mdm_sampling(theirs, self.xt, self.mask_id, settings)

    def run(self, side: str) -> None:
        dtype = PRECISIONS[self.args.precision]
        with torch.autocast(torch.device(self.args.device).type, dtype, enabled=dtype is not None):
            self.samples[side] = self.sides[side]()

    def ours(self) -> Tensor:
        sampler = Sampler(tokens_per_step=self.args.tokens_per_step)
        return self.module.sample(self.xt, self.prompt_mask, sampler).tokens

    @torch.no_grad()
    def textbook(self) -> Tensor:
        """Logits and probabilities of all positions of all rows in every pass; no Python for each row."""
        xt = self.xt.clone()
        while (masked := xt == self.mask_id).any():
            logits = self.module.backbone(xt)
            logits[..., self.mask_id] = float("-inf")
            confidence, tokens = logits.float().softmax(-1).max(-1)
            confidence = confidence.masked_fill(~masked, -1.0)
            best = confidence.topk(self.args.tokens_per_step, dim=1).indices
            chosen = torch.zeros_like(masked).scatter(1, best, True) & masked
            xt = torch.where(chosen, tokens, xt)
        return xt


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--prompt", type=float, nargs=2, default=(0.1, 0.4), help="shortest and longest, of the length")
    parser.add_argument("--tokens-per-step", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=50_258)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=PRECISIONS, default="32", help="of autocast; 32 is none")
    parser.add_argument("--threads", type=int, help="CPU threads; default what PyTorch chooses")
    parser.add_argument("--reference", type=Path, help="a checkout of JaeyeonKim01/PUMA, to compare with it too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sampling.json"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        case = Case(args)
        print(json.dumps(_turns.peak_memory(lambda: case.run(args.memory_of), args.device)))
        return
    sides = [OURS, TEXTBOOK, *([PUBLISHED] if args.reference else [])]
    # Before anything of this process lies in the device's memory.
    memory = {side: _turns.peak_memory_of(side) for side in sides}
    case = Case(args)
    measured = _turns.in_turn(
        {side: lambda side=side: case.run(side) for side in sides},  # type: ignore[misc]
        args.rounds, "rounds", args.device, warmup=int(args.device != "cpu"),
    )  # fmt: skip
    hidden = ("out", "reference", "memory_of")
    report: dict[str, Any] = {
        "command": _report.command_line(),
        "environment": {**_report.environment(args.device), "precision": args.precision},
        "shape": {name: value for name, value in vars(args).items() if name not in hidden},
        "parameters": sum(p.numel() for p in case.module.parameters()),
        **measured,
        "peak_memory": memory,
        # The published model has another rotary embedding, so that its samples are others.
        "share_of_tokens_as_in_textbook": float((case.samples[OURS] == case.samples[TEXTBOOK]).float().mean()),
    }
    _report.write(args.out, report)
    _turns.print_table(measured, memory)
    print("tokens as in the textbook's sample:", report["share_of_tokens_as_in_textbook"])


if __name__ == "__main__":
    main()
