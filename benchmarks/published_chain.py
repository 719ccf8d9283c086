"""Does our chain train on the same states as the published one?

Drives ``ProgressiveUnmasking`` through its ``Stream`` and the published ``PhasedMasking`` with the same scripted
predictions and compares the states trained on and the lengths of the chains, as distributions; and, from
identical states with identical random numbers, single steps position by position. See benchmarks/README.md.
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import _published
import _report
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.policies import Confidence
from puma_lightning.chain.stages import stage_of, target_count
from puma_lightning.chain.teacher import ProgressiveUnmasking
from puma_lightning.training.sequences import CleanSequences
from puma_lightning.training.stream import Stream

V = 11
MASK = 10
ID_DIGITS = 7
PLACES = 10 ** torch.arange(ID_DIGITS - 1, -1, -1)
CPU = torch.device("cpu")
SIGNIFICANCE = 0.01  # of all tests that should agree, together (Bonferroni)


@dataclass(frozen=True)
class Setting:
    name: str
    length: int
    prompt_lengths: tuple[int, ...]
    num_stages: int
    batch_size: int = 240
    thresholds: tuple[float | None, ...] = (None, 0.9, 0.6)


SETTINGS = (
    Setting("K divides A", 24, (0,), 6, thresholds=(None, 1.0, 0.9, 0.6)),  # 1.0 is never exceeded
    Setting("K does not divide A", 24, (0,), 7),
    Setting("prompts of varying length", 36, (5, 12, 19), 8),
    Setting("varying prompts, K near A", 20, (0, 5, 8), 11, thresholds=(None, 1.0, 0.9, 0.6)),
    Setting("K equals A", 20, (8,), 12, thresholds=(None,)),  # with a threshold: check_last_position
    Setting("two stages, B odd", 12, (1, 3), 2, 241),
    Setting("Sudoku of the paper", 162, (81,), 8, 96),
)


# The script: sequences and predictions that depend on nothing but the sequence's number, the position and
# how much is revealed, so that both codes are given the same whatever else they do.


def scramble(*keys: NDArray[np.uint64] | int) -> NDArray[np.uint64]:
    """A 64-bit hash of integers (the finaliser of splitmix64, chained), broadcasting."""
    state: NDArray[np.uint64] = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state ^ np.asarray(key, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(*keys: NDArray[np.uint64] | int) -> NDArray[np.float64]:
    return (scramble(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sequences(ids: NDArray[np.uint64], setting: Setting) -> tuple[Tensor, Tensor]:
    """x0 (B, L), whose first tokens spell the id, and prompt masks (B, L) at scattered positions."""
    positions = np.arange(setting.length, dtype=np.uint64)
    x0 = torch.from_numpy((scramble(ids[:, None], positions, 1) % np.uint64(MASK)).astype(np.int64))
    x0[:, :ID_DIGITS] = torch.from_numpy(ids.astype(np.int64))[:, None] // PLACES % 10
    which = scramble(ids, 2) % np.uint64(len(setting.prompt_lengths))
    given = np.array(setting.prompt_lengths)[which.astype(np.int64)]
    rank = uniform(ids[:, None], positions, 3).argsort(1).argsort(1)
    return x0, torch.from_numpy(rank < given[:, None])


def scripted_log_probs(x0: Tensor, revealed: Tensor) -> Tensor:
    """Log-probabilities (B, L, V): flat, middling or peaked by sequence, new at every number revealed."""
    ids = (x0[:, :ID_DIGITS] @ PLACES).numpy().astype(np.uint64)[:, None]
    positions = np.arange(x0.shape[1], dtype=np.uint64)
    draw = uniform(ids, positions, revealed.numpy().astype(np.uint64)[:, None], 4)
    flatness = np.array([4.0, 1.0, 0.25])[(scramble(ids, 5) % np.uint64(3)).astype(np.int64)]
    top = 1 / MASK + (1 - 1 / MASK) * draw**flatness
    favourite = (scramble(ids, positions, 6) % np.uint64(MASK)).astype(np.int64)
    log_probs = np.repeat(np.log((1 - top) / (MASK - 1))[..., None], V, axis=-1)
    np.put_along_axis(log_probs, favourite[..., None], np.log(top)[..., None], axis=-1)
    log_probs[..., MASK] = -np.inf
    return torch.from_numpy(log_probs).float()


class Rows(Dataset[Any]):
    """The scripted sequences for our loader, fetched a batch at a time."""

    def __init__(self, size: int, setting: Setting) -> None:
        self.size = size
        self.setting = setting

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        x0, prompt_mask = sequences(np.array(indices, np.uint64), self.setting)
        return {"input_ids": x0, "prompt_mask": prompt_mask}


class PublishedLoader:
    """The scripted sequences in the published batch format; counts what is fetched.

    They are other sequences than ours, so that the two samples are independent.
    """

    first = 5_000_000

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.fetched = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            ids = np.arange(self.setting.batch_size, dtype=np.uint64) + np.uint64(self.first + self.fetched)
            self.fetched += len(ids)
            x0, prompt_mask = sequences(ids, self.setting)
            yield {"labels": x0, "prompt_mask": prompt_mask}


# The two runs.


@dataclass
class Trace:
    """What was trained on: one entry for each row of each step."""

    ids: NDArray[np.int64]
    step: NDArray[np.int64]
    stage: NDArray[np.int64]
    revealed: NDArray[np.int64]
    answer: NDArray[np.int64]
    fetched: int

    @property
    def idle(self) -> NDArray[np.bool_]:
        """Rows with nothing masked: they take a place in the batch and have no loss."""
        return np.equal(self.revealed, self.answer)

    def where(self, keep: NDArray[np.bool_]) -> "Trace":
        columns = (self.ids, self.step, self.stage, self.revealed, self.answer)
        ids, step, stage, revealed, answer = (column[keep] for column in columns)
        return Trace(ids, step, stage, revealed, answer, self.fetched)


class Recorder:
    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def add(self, step: int, x0: Tensor, prompt_mask: Tensor, xt: Tensor, stage: Tensor) -> Tensor:
        """Record a batch; returns how many answer positions are revealed."""
        answer = (~prompt_mask).sum(1)
        revealed = answer - (xt == MASK).sum(1)
        ids = x0[:, :ID_DIGITS] @ PLACES
        self.rows.append(torch.stack([ids, torch.full_like(ids, step), stage, revealed, answer]))
        return revealed

    def trace(self, fetched: int) -> Trace:
        ids, step, stage, revealed, answer = torch.cat(self.rows, dim=1).numpy()
        return Trace(ids, step, stage, revealed, answer, fetched)


def our_stream(setting: Setting, threshold: float | None, steps: int, seed: int) -> Stream:
    process = ProgressiveUnmasking(setting.num_stages, Confidence(), threshold)
    rows = Rows(setting.batch_size * (steps + 1), setting)
    loader = DataLoader(rows, batch_size=setting.batch_size, collate_fn=lambda batch: batch)
    clean = CleanSequences(loader, MASK, V, seed=seed)
    return Stream(clean, process, MASK, setting.batch_size, steps, seed=seed, device=CPU)


def run_ours(setting: Setting, threshold: float | None, steps: int, seed: int, lockstep: "Lockstep") -> Trace:
    stream = our_stream(setting, threshold, steps, seed)
    recorder = Recorder()
    for step, batch in enumerate(stream):
        revealed = recorder.add(step, batch["input_ids"], batch["prompt_mask"], batch["xt"], batch["chains"].stage)
        log_probs = scripted_log_probs(batch["input_ids"], revealed)
        if step % 4 == 0:
            lockstep.compare(batch["chains"], log_probs, seed + step)
        stream.advance(log_probs, step)
    return recorder.trace(stream.sequences.position)


def published_pool(module: ModuleType, setting: Setting, threshold: float | None) -> Any:
    return module.PhasedMasking(
        PublishedLoader(setting), setting.batch_size, MASK, setting.num_stages, CPU, setting.length,
        mode="standard" if threshold is None else "confidence_collapse", confidence_threshold=threshold,
    )  # fmt: skip


def run_published(module: ModuleType, setting: Setting, threshold: float | None, steps: int, seed: int) -> Trace:
    torch.manual_seed(seed)
    pool = published_pool(module, setting, threshold)
    recorder = Recorder()
    for step in range(steps):
        revealed = recorder.add(step, pool.x0, pool.state["prompt_mask"], pool.current_batch(), pool.state["phase"])
        pool.update_with_logits(scripted_log_probs(pool.x0, revealed))
    return recorder.trace(pool.train_loader.fetched)


# One step of both from the same state, with the same random numbers.


class Lockstep:
    """Both codes draw their target ratios first, so seeding them alike gives them the same ratios."""

    def __init__(self, module: ModuleType, setting: Setting, threshold: float | None) -> None:
        self.process = ProgressiveUnmasking(setting.num_stages, Confidence(), threshold)
        self.threshold = threshold
        self.pool = published_pool(module, setting, threshold)
        self.counts = Counter[str]()

    def compare(self, chains: Chains, log_probs: Tensor, seed: int) -> None:
        pool, counts = self.pool, self.counts
        pool.x0, pool.xt = chains.x0.clone(), chains.xt.clone()
        answer = chains.answer_length
        pool.state.update(phase=chains.stage.clone(), prompt_mask=chains.prompt_mask.clone(), L_eff=answer.clone())
        refilled = chains.stage + 1 == pool.K

        torch.manual_seed(seed)
        pool.update_with_logits(log_probs)
        ours = self.process.advance(chains, log_probs, 0, torch.Generator().manual_seed(seed))

        counts["rows"] += len(answer)
        counts["rows refilled by the published code"] += int(refilled.sum())
        counts["of these not done in ours"] += int((refilled & ~ours.done).sum())
        kept = ~refilled
        published_masked, our_masked = pool.xt == MASK, ours.xt == MASK
        full = kept & ~published_masked.any(1)
        counts["rows compared"] += int(kept.sum())
        counts["fully revealed: ours done, published one more step"] += int((full & ours.done).sum())
        counts["done in ours only"] += int((kept & ~full & ours.done).sum())
        counts["fully revealed, not done in ours"] += int((full & ~ours.done).sum())
        other_count = kept & (published_masked.sum(1) != our_masked.sum(1))
        other_set = kept & ~other_count & (published_masked != our_masked).any(1)
        tied = other_set & self._tied(chains.xt, log_probs, published_masked != our_masked)
        counts["another number revealed"] += int(other_count.sum())
        counts["another set of positions, scores tied"] += int(tied.sum())
        counts["another set of positions"] += int((other_set & ~tied).sum())
        counts["other stage"] += int((kept & ~other_count & (pool.state["phase"] != ours.stage)).sum())
        untouched = torch.where(our_masked, MASK, chains.x0).equal(ours.xt)
        counts["revealed tokens that are not those of x0"] += 0 if untouched else 1

    @staticmethod
    def _tied(xt: Tensor, log_probs: Tensor, differ: Tensor) -> Tensor:
        """Rows in which all positions that differ have one score in single precision."""
        scores = Confidence()(log_probs, xt)
        low = scores.masked_fill(~differ, math.inf).amin(1)
        high = scores.masked_fill(~differ, -math.inf).amax(1)
        return low == high


# Two-sample tests. The unit is the chain, because the steps of a chain are not independent.


@dataclass
class Started:
    """Chains that started within the window: occupancy[i, c] is how often chain i was in cell c."""

    cells: NDArray[np.int64]  # one row for each state: (chain, A, stage, revealed)
    lengths: NDArray[np.int64]


def chains_started(trace: Trace, first: int, last: int, final_step: int) -> Started:
    """All chains that started in steps first..last-1, followed to their ends: no chain is cut or favoured."""
    ids, index, lengths = np.unique(trace.ids, return_inverse=True, return_counts=True)
    start = np.full(len(ids), np.iinfo(np.int64).max)
    end = np.full(len(ids), -1)
    np.minimum.at(start, index, trace.step)
    np.maximum.at(end, index, trace.step)
    chosen = (start >= first) & (start < last)
    if (end[chosen] >= final_step).any():
        raise RuntimeError("a chain outlasted the run: use more steps")
    number = np.cumsum(chosen) - 1
    keep = chosen[index]
    columns = (number[index], trace.answer, trace.stage, trace.revealed)
    return Started(np.stack([column[keep] for column in columns], axis=1), lengths[chosen])


def occupancy(one: Started, other: Started) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Chain by cell (A, stage, revealed); rare cells are pooled."""
    states = np.concatenate([one.cells[:, 1:], other.cells[:, 1:]])
    _, cell, total = np.unique(states, axis=0, return_inverse=True, return_counts=True)
    return _pooled(cell.ravel(), total, one.cells[:, 0], other.cells[:, 0], len(one.lengths), len(other.lengths))


def length_cells(one: Started, other: Started) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    _, cell, total = np.unique(np.concatenate([one.lengths, other.lengths]), return_inverse=True, return_counts=True)
    return _pooled(
        cell, total, np.arange(len(one.lengths)), np.arange(len(other.lengths)), len(one.lengths), len(other.lengths)
    )


def _pooled(
    cell: NDArray[np.int64],
    total: NDArray[np.int64],
    chain_one: NDArray[np.int64],
    chain_other: NDArray[np.int64],
    size_one: int,
    size_other: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    common = total >= 40
    column = np.where(common, np.cumsum(common) - 1, common.sum())[cell]
    width = int(column.max()) + 1
    tables = []
    for columns, chain, size in (
        (column[: len(chain_one)], chain_one, size_one),
        (column[len(chain_one) :], chain_other, size_other),
    ):
        table = np.zeros((size, width), np.float32)
        np.add.at(table, (chain, columns), 1)
        tables.append(table)
    return tables[0], tables[1]


def compare(
    tables: tuple[NDArray[np.float32], NDArray[np.float32]], rng: np.random.Generator, permutations: int = 400
) -> dict[str, Any]:
    """Chi-square distance of two shares over cells, and its p-value under exchange of whole chains.

    The tail of the permutation distribution is that of a gamma distribution of the same mean and variance, so
    that p-values below 1 / permutations can be told apart.
    """
    one, other = (torch.from_numpy(table) for table in tables)
    both = torch.cat([one, other])
    total = both.double().sum(0)
    cells = both.shape[1]

    def distance(sums: Tensor) -> Tensor:
        rest = total - sums
        share, share_rest = sums / sums.sum(-1, keepdim=True), rest / rest.sum(-1, keepdim=True)
        return ((share - share_rest) ** 2 / (share + share_rest)).sum(-1)

    observed = float(distance(one.double().sum(0)))
    share_one, share_other = one.double().mean(0), other.double().mean(0)
    variation = float((share_one / share_one.sum() - share_other / share_other.sum()).abs().sum() / 2)
    result = {
        "chains": [len(one), len(other)],
        "states": [int(one.sum()), int(other.sum())],
        "cells": cells,
        "total_variation": round(variation, 5),
    }
    if cells == 1:
        return {**result, "p": 1.0}
    member = torch.zeros(len(both))
    member[: len(one)] = 1
    null = []
    for _ in range(0, permutations, 25):
        orders = torch.stack([torch.from_numpy(rng.permutation(len(both))) for _ in range(25)])
        # Sums of single-precision integers this small are exact.
        null.append(distance((member[orders] @ both).double()))
    variance, mean = torch.var_mean(torch.cat(null))
    p = float(torch.special.gammaincc(mean**2 / variance, observed * mean / variance))
    return {**result, "statistic_over_null_mean": round(observed / float(mean), 3), "p": float(f"{p:.3g}")}


def planted(chains: Started, share: float, rng: np.random.Generator) -> Started:
    """The same chains, in a share of which one position more is revealed throughout: the test's power."""
    shift = rng.random(len(chains.lengths)) < share
    cells = chains.cells.copy()
    cells[:, 3] += shift[cells[:, 0]]
    return replace(chains, cells=cells)


# Formulas on all their arguments.


def check_stages(module: ModuleType, max_answer: int, max_stages: int) -> dict[str, int]:
    """The published ``calculate_phase`` against ``stage_of`` for every count, A and K."""
    result = Counter[str]()
    answers = (*range(1, max_answer + 1), 256, 512, 1000)
    pool = published_pool(module, Setting("", 8, (0,), 1, 1), None)
    for answer in tqdm(answers, desc="stages", leave=False, mininterval=1):
        revealed = torch.arange(answer + 1)
        xt = torch.where(torch.arange(answer) < revealed[:, None], 0, MASK)
        size = torch.full_like(revealed, answer)
        pool.state.update(prompt_mask=torch.zeros_like(xt, dtype=torch.bool), L_eff=size)
        for num_stages in range(1, max_stages + 1):
            pool.update_k(num_stages)
            differ = pool.calculate_phase(xt) != stage_of(revealed, num_stages, size)
            boundary = (revealed * num_stages) % answer == 0
            result["compared"] += len(revealed)
            result["exactly on a boundary"] += int(boundary.sum())
            result["different"] += int(differ.sum())
            result["different on a boundary"] += int((differ & boundary).sum())
    return dict(result)


def check_targets(module: ModuleType, max_answer: int, max_stages: int, draws: int = 64) -> dict[str, int]:
    """The published number of positions to uncover against ``target_count``, from the same random numbers."""
    result = Counter[str]()
    pool = published_pool(module, Setting("", 8, (0,), 1, 1), None)
    for num_stages in tqdm(range(1, max_stages + 1), desc="targets", leave=False, mininterval=1):
        pool.update_k(num_stages)
        answer = torch.arange(1, max_answer + 1).repeat_interleave(num_stages * draws)
        stage = torch.arange(num_stages).repeat_interleave(draws).repeat(max_answer)
        torch.manual_seed(num_stages)
        theirs = pool._sample_target_unmasked(pool._sample_ratio(stage), answer)
        ours = target_count(stage, num_stages, answer, torch.Generator().manual_seed(num_stages))
        differ = theirs != ours
        result["compared"] += len(ours)
        result["different"] += int(differ.sum())
        result["different, A = 1 (published reveals everything)"] += int((differ & (answer == 1)).sum())
        result["different by more than one"] += int(((theirs - ours).abs() > 1).sum())
    return dict(result)


def check_ties(module: ModuleType, rows: int = 600) -> dict[str, Any]:
    """Which position is revealed first when all scores are equal."""
    setting = Setting("", 12, (0,), 12, rows)
    pool = published_pool(module, setting, None)
    x0, prompt_mask = sequences(np.arange(rows, dtype=np.uint64), setting)
    xt = torch.full_like(x0, MASK)
    scores = torch.zeros(rows, 12)
    theirs = module.unmask_from_scores(scores, torch.ones(rows, dtype=torch.long), x0, xt)
    chains = replace(Chains.fully_masked(x0, prompt_mask, MASK, 12), xt=xt)
    log_probs = torch.full((rows, 12, V), -math.log(MASK))
    ours = ProgressiveUnmasking(12).advance(chains, log_probs, 0, torch.Generator().manual_seed(0)).xt
    del pool

    def distinct(new: Tensor) -> int:
        return int(((new != MASK).any(0)).sum())

    return {"rows": rows, "positions": 12, "positions_chosen": {"published": distinct(theirs), "ours": distinct(ours)}}


def check_last_position(module: ModuleType, steps: int = 240) -> dict[str, dict[str, Any]]:
    """With a threshold, chains of A <= K can stay at A - 1 revealed: that is the bucket below the last.

    The scripted predictions never change, so a position that is not confident stays so.
    """
    result = {}
    for name, setting in (
        ("A = K", Setting("", 20, (8,), 12)),
        ("A = K + 1", Setting("", 20, (7,), 12)),
    ):
        row: dict[str, Any] = {}
        for who in ("published", "ours"):
            try:
                trace = (
                    run_published(module, setting, 0.9, steps, 0)
                    if who == "published"
                    else run_ours(setting, 0.9, steps, 0, Lockstep(module, setting, 0.9))
                )
            except ValueError as error:
                row[who] = f"refused: {error}"
                continue
            ids, counts = np.unique(trace.ids, return_counts=True)
            now = np.isin(ids, trace.ids[trace.step == steps - 1])
            row[who] = {
                "chains": setting.batch_size,
                "slots_held_for_5K_steps": int((now & (counts > 5 * setting.num_stages)).sum()),
                "longest_chain": int(counts.max()),
            }
        result[name] = row
    return result


def compare_runs(
    module: ModuleType, setting: Setting, threshold: float | None, steps: int, seed: int
) -> dict[str, Any]:
    """Both codes on one setting."""
    rng = np.random.default_rng(seed)
    lockstep = Lockstep(module, setting, threshold)
    ours = run_ours(setting, threshold, steps, seed, lockstep)
    published = run_published(module, setting, threshold, steps, seed + 1)
    # Long enough for the staggered first chains to be over, and for the last ones to end.
    first, last = 4 * setting.num_stages, steps - 6 * setting.num_stages

    def chains(trace: Trace) -> Started:
        return chains_started(trace, first, last, steps - 1)

    our_chains, trained = chains(ours), chains(published.where(~published.idle))
    tests = {
        "states": compare(occupancy(our_chains, trained), rng),
        "lengths": compare(length_cells(our_chains, trained), rng),
    }
    controls = {
        "states, one more revealed in 3 % of our chains": compare(
            occupancy(planted(our_chains, 0.03, rng), trained), rng
        )
    }
    if threshold is not None:
        with_idle = chains(published)
        controls["states, published with idle steps"] = compare(occupancy(our_chains, with_idle), rng)
        controls["lengths, published with idle steps"] = compare(length_cells(our_chains, with_idle), rng)

    steady = published.step >= first
    started = [len(np.unique(trace.ids)) for trace in (published, ours)]
    return {
        "setting": setting.name,
        "length": setting.length,
        "answer_lengths": sorted(setting.length - n for n in setting.prompt_lengths),
        "num_stages": setting.num_stages,
        "batch_size": setting.batch_size,
        "threshold": threshold,
        "steps": steps,
        "tests": tests,
        "controls": controls,
        "mean_length": {
            "published": round(float(chains(published).lengths.mean()), 4),
            "published_without_idle": round(float(trained.lengths.mean()), 4),
            "ours": round(float(our_chains.lengths.mean()), 4),
        },
        "idle_rows": {
            "published": int(published.idle.sum()),
            "published_share": round(float(published.idle[steady].mean()), 5),
            "ours": int(ours.idle.sum()),
        },
        "sequences_fetched": {"published": published.fetched, "ours": ours.fetched},
        "sequences_dropped": {"published": published.fetched - started[0], "ours": ours.fetched - started[1]},
        "lockstep": dict(lockstep.counts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of JaeyeonKim01/PUMA")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/published_chain.json"))
    parser.add_argument("--steps", type=int, default=1000, help="steps of each run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps < 200:
        parser.error("--steps must be at least 200, for the warm-up and for the last chains to end")

    module = _published.load(args.reference, "progressive")
    runs = []
    progress = tqdm([(setting, threshold) for setting in SETTINGS for threshold in setting.thresholds], unit="run")
    for number, (setting, threshold) in enumerate(progress):
        progress.set_description(f"{setting.name}, threshold {threshold}")
        runs.append(compare_runs(module, setting, threshold, args.steps, args.seed + 1000 * number))
    stages, targets, ties = check_stages(module, 128, 64), check_targets(module, 512, 64), check_ties(module)
    last_position = check_last_position(module)

    p_values = [test["p"] for run in runs for test in run["tests"].values() if test["cells"] > 1]
    level = SIGNIFICANCE / len(p_values)
    faults = (
        "of these not done in ours", "done in ours only", "fully revealed, not done in ours",
        "another set of positions", "other stage", "revealed tokens that are not those of x0",
    )  # fmt: skip
    lockstep = sum((Counter(run["lockstep"]) for run in runs), Counter[str]())
    verdict = {
        "tests": len(p_values),
        "smallest_p": min(p_values),
        "median_p": sorted(p_values)[len(p_values) // 2],
        "level_after_bonferroni": level,
        "tests_below_0.05": sum(p < 0.05 for p in p_values),
        "distributions_agree": min(p_values) >= level,
        "lockstep_agrees": not any(lockstep[fault] for fault in faults),
        # Where the published code idles in less than 1 % of its rows, no test of this size could tell.
        "largest_control_p": {
            kind: max(
                run["controls"][kind]["p"]
                for run in runs
                if kind in run["controls"] and ("idle" not in kind or run["idle_rows"]["published_share"] > 0.01)
            )
            for kind in runs[-1]["controls"]
        },
    }
    report = {
        "command": _report.command_line(),
        "environment": _report.environment(),
        "published_progressive_py_sha256": _published.digest(args.reference, "progressive"),
        "verdict": verdict,
        "lockstep_total": {name: lockstep[name] for name in runs[0]["lockstep"]},
        "stage_formula": stages,
        "target_formula": targets,
        "ties": ties,
        "last_position": last_position,
        "runs": runs,
    }
    _report.write(args.out, report)
    print_report(report)


def print_report(report: dict[str, Any]) -> None:
    columns = ("tau", "p states", "p lengths", "TV", "idle", "dropped", "length: published", "less idle", "ours")
    print(f"{'setting':28}", *(f"{name:>9}" for name in columns))
    for run in report["runs"]:
        tests, length = run["tests"], run["mean_length"]
        values = (
            run["threshold"] or "-",
            f"{tests['states']['p']:.3g}",
            f"{tests['lengths']['p']:.3g}",
            f"{tests['states']['total_variation']:.4f}",
            f"{run['idle_rows']['published_share']:.2%}",
            f"{run['sequences_dropped']['published'] / run['sequences_fetched']['published']:.1%}",
            f"{length['published']:.3f}",
            f"{length['published_without_idle']:.3f}",
            f"{length['ours']:.3f}",
        )
        print(f"{run['setting']:28}", *(f"{v:>{max(9, len(c))}}" for v, c in zip(values, columns, strict=True)))
    for name in ("lockstep_total", "stage_formula", "target_formula", "ties", "last_position", "verdict"):
        print(f"{name}: {report[name]}")


if __name__ == "__main__":
    main()
