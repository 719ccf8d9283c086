"""Block diffusion: one pass for all blocks, and the cache of finished ones. See benchmarks/README.md."""

import argparse
import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import _report
import _turns
import torch
from torch import Tensor

from puma_lightning.chain.blocks import join_blocks
from puma_lightning.chain.chains import Chains
from puma_lightning.chain.student import BlockSampler, Sample, Sampler
from puma_lightning.chain.teacher.random_masking import stratified_masking
from puma_lightning.models import TransformerBackbone
from puma_lightning.modules import BlockDiffusion
from puma_lightning.modules.block_diffusion import CachedBlocks
from puma_lightning.output.losses import masked_cross_entropy
from puma_lightning.output.prediction import exclude_token

ONE_PASS, LOOP = "one pass", "pass per block"
CACHED, UNCACHED = "cached", "read again"
TARGET = 2.0  # times as fast as the loop, from 8 blocks on


class Training:
    """One optimizer step on the same batch, in both ways."""

    def __init__(self, args: argparse.Namespace, num_blocks: int) -> None:
        self.module = build(args, args.length // num_blocks)
        self.size = args.length // num_blocks
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.0)
        generator = torch.Generator().manual_seed(1)
        self.x0 = torch.randint(args.vocab_size - 1, (args.batch_size, args.length), generator=generator)
        given = torch.zeros_like(self.x0, dtype=torch.bool)
        chains = Chains.fully_masked(self.x0, given, self.module.mask_id, block_size=self.size)
        self.chains = stratified_masking(chains, generator)
        self.xt = join_blocks(self.chains.xt, num_blocks)
        # Every block has something masked, so the loss is the mean over all of them.
        self.count = len(chains.x0)

    def one_pass(self) -> Tensor:
        """As ``MaskedDiffusion.training_step`` does it; the loss of each block of each row."""
        losses = masked_cross_entropy(self.module.denoise(self.chains), self.chains.x0, self.chains.masked)
        (losses.sum() / self.count).backward()
        return losses.detach().view(len(self.x0), -1)

    def pass_per_block(self) -> Tensor:
        """As in the published code: a bidirectional pass, and its backward pass, for each block and those before it."""
        found = []
        for start in range(0, self.xt.shape[1], self.size):
            end = start + self.size
            read = torch.cat([self.x0[:, :start], self.xt[:, start:end]], dim=1)
            hidden = self.module.backbone.hidden_states(read)  # type: ignore[operator]
            logits = exclude_token(self.module.backbone.lm_head(hidden[:, start:]), self.module.mask_id)  # type: ignore[operator]
            losses = masked_cross_entropy(logits, self.x0[:, start:end], read[:, start:] == self.module.mask_id)
            (losses.sum() / self.count).backward()
            found.append(losses.detach())
        return torch.stack(found, dim=1)

    def step(self, side: str) -> Tensor:
        self.optimizer.zero_grad()
        losses = self.one_pass() if side == ONE_PASS else self.pass_per_block()
        self.optimizer.step()
        return losses

    def check(self) -> None:
        """Both have a loss at every block of every row, and it is the same where they see the same: in the first."""
        ours, theirs = self.step(ONE_PASS), self.step(LOOP)
        assert ours.shape == theirs.shape and (ours > 0).all() and (theirs > 0).all()
        torch.testing.assert_close(ours[:, 0], theirs[:, 0], atol=1e-4, rtol=1e-4)


class ReadAgain:
    """A reader without a cache: every step reads all finished blocks and the current one."""

    def __init__(self, module: BlockDiffusion) -> None:
        self.module = module
        self.finished: Tensor | None = None
        self.size = 0

    def read(self, tokens: Tensor, block_size: int) -> None:
        self.finished = tokens if self.finished is None else torch.cat([self.finished, tokens], dim=1)
        self.size = block_size

    def __call__(self, xt: Tensor) -> Tensor:
        rows = xt if self.finished is None else torch.cat([self.finished, xt], dim=1)
        hidden = self.module.backbone.hidden_states(rows, block_size=xt.shape[1])  # type: ignore[operator]
        logits: Tensor = self.module.backbone.lm_head(hidden[:, -xt.shape[1] :])  # type: ignore[operator]
        return logits

    def select(self, rows: Tensor) -> Any:
        chosen = copy.copy(self)
        chosen.finished = None if self.finished is None else self.finished[rows]
        return chosen


def build(args: argparse.Namespace, block_size: int) -> BlockDiffusion:
    torch.manual_seed(0)
    backbone = TransformerBackbone(
        args.vocab_size, args.hidden_size, 3 * args.hidden_size, args.num_layers, args.num_heads, max_length=args.length
    )
    return BlockDiffusion(backbone, args.vocab_size - 1, block_size)


def sample(module: BlockDiffusion, args: argparse.Namespace, block_size: int, side: str) -> Sample:
    xt = torch.full((args.sample_batch_size, args.length), module.mask_id)
    # A prompt that differs between the rows.
    xt[:, :8] = torch.randint(args.vocab_size - 1, (len(xt), 8), generator=torch.Generator().manual_seed(2))
    reader = CachedBlocks(module, args.length) if side == CACHED else ReadAgain(module)
    return BlockSampler(Sampler(tokens_per_step=args.tokens_per_step))(reader, xt, module.mask_id, block_size)


def train(args: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for num_blocks in args.num_blocks:
        training = Training(args, num_blocks)
        training.check()
        sides = {side: partial(training.step, side) for side in (ONE_PASS, LOOP)}
        measured = _turns.in_turn(sides, args.rounds, f"{num_blocks} blocks")
        if args.memory:
            measured["peak_memory"] = {side: _turns.peak_memory_of(f"{num_blocks},{side}") for side in sides}
        found[str(num_blocks)] = measured
    return found


def generate(args: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for block_size in args.block_sizes:
        module = build(args, block_size).eval()
        for weight in module.parameters():
            if weight.ndim == 2:
                # Untrained, all positions look alike, and rounding would decide which is revealed first.
                weight.data *= 5
        samples: dict[str, Sample] = {}

        def run(
            side: str, module: BlockDiffusion = module, size: int = block_size, into: dict[str, Sample] = samples
        ) -> None:
            into[side] = sample(module, args, size, side)

        sides = {side: partial(run, side) for side in (CACHED, UNCACHED)}
        measured = _turns.in_turn(sides, args.sample_rounds, str(block_size))
        one, other = samples[CACHED], samples[UNCACHED]
        assert one.tokens.equal(other.tokens) and one.reveal_step.equal(other.reveal_step), "the samples differ"
        found[str(block_size)] = {**measured, "forward_passes": int(one.nfe.max()), "same_tokens": True}
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4, help="of training")
    parser.add_argument("--num-blocks", type=int, nargs="*", default=[2, 8, 16], help="of training")
    parser.add_argument("--rounds", type=int, default=5, help="of training")
    parser.add_argument("--memory", action="store_true", help="also how much memory a step takes at its peak")
    parser.add_argument("--block-sizes", type=int, nargs="*", default=[32, 128], help="of sampling")
    parser.add_argument("--sample-batch-size", type=int, default=8)
    parser.add_argument("--tokens-per-step", type=int, default=2)
    parser.add_argument("--sample-rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/block.json"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.memory_of:
        num_blocks, side = args.memory_of.split(",")
        print(json.dumps(_turns.peak_memory(partial(Training(args, int(num_blocks)).step, side))))
        return
    shape = {name: value for name, value in vars(args).items() if name not in ("out", "memory_of", "memory")}
    report: dict[str, Any] = {"command": _report.command_line(), "environment": _report.environment(), "shape": shape}
    report["parameters"] = sum(p.numel() for p in build(args, args.length).parameters())
    report["training"] = train(args)
    report["sampling"] = generate(args)
    fast = [m["times_as_fast"][LOOP]["cpu"]["of_medians"] for n, m in report["training"].items() if int(n) >= 8]
    report["training_target"] = {"times_as_fast_from_8_blocks": TARGET, "met": min(fast, default=0) >= TARGET}
    _report.write(args.out, report)
    for part, unit in (("training", "blocks"), ("sampling", "positions a block")):
        for number, measured in report[part].items():
            print(f"\n{part}, {number} {unit}")
            _turns.print_table(measured, measured.get("peak_memory"))
    print(report["training_target"])


if __name__ == "__main__":
    main()
