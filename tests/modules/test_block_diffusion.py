"""Block diffusion: blocks see what they may, are the family's other models at both ends, and are cached exactly."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from puma_lightning import (
    AutoregressiveLM,
    BlockDiffusion,
    BlockSampler,
    CellAccuracy,
    Confidence,
    GenerationEvaluation,
    MaskedDiffusion,
    PredictionWriter,
    ProgressiveUnmasking,
    RandomMasking,
    Sampler,
    TransformerBackbone,
    UnmaskingTrajectory,
)
from puma_lightning.chain.blocks import cut_blocks
from puma_lightning.chain.chains import Chains
from puma_lightning.modules.block_diffusion import CachedBlocks
from puma_lightning.output.losses import masked_cross_entropy
from puma_lightning.output.prediction import exclude_token

V, MASK, EOS, LENGTH = 12, 11, 0, 12
SMALL = dict(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, max_length=32)
seeds = st.integers(0, 2**31 - 1)
NAMES = ("tokens", "reveal_step", "nfe")
few = settings(max_examples=12, deadline=None)
shifts = pytest.mark.parametrize("shifted", [False, True], ids=["aligned", "shifted"])


def backbone(seed=0, **changes):
    torch.manual_seed(seed)
    model = TransformerBackbone(V, **{**SMALL, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model


def block_model(block_size, net=None, **options):
    options = {"forward_process": RandomMasking(), **options}
    return BlockDiffusion(net or backbone(), MASK, block_size, **options)


def sequences(size=24, seed=0):
    return torch.randint(1, MASK, (size, LENGTH), generator=torch.Generator().manual_seed(seed))


def rows(size=24, given=2, seed=0):
    prompt = torch.arange(LENGTH) < given
    return [{"input_ids": row, "prompt_mask": prompt} for row in sequences(size, seed)]


def partly_masked(x0, seed=0):
    xt = x0.masked_fill(torch.rand(x0.shape, generator=torch.Generator().manual_seed(seed)) < 0.6, MASK)
    xt[:, 0] = x0[:, 0]
    return xt


def trainer(folder, **options):
    return pl.Trainer(
        accelerator="cpu", default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        **{"logger": False, "max_steps": 3, "enable_checkpointing": False, **options},
    )  # fmt: skip


class Losses(pl.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


# --- what a block sees ---


@shifts
@pytest.mark.parametrize("size", [1, 3, 4, 6])
def test_the_loss_of_a_block_has_no_gradient_from_what_it_must_not_see(shifted, size):
    """Exactly zero from later blocks, from x0 of the block itself, and from other blocks of xt; not so from before."""
    net = backbone()
    model = block_model(size, net, shifted=shifted)
    embedded = []

    def keep(module, args, out):
        out.retain_grad()
        embedded.append(out)

    net.embed_tokens.register_forward_hook(keep)
    x0 = sequences(2)
    xt = partly_masked(x0)
    for block in range(LENGTH // size):
        here = slice(block * size, (block + 1) * size)
        xt[:, here.stop - 1] = MASK
        embedded.clear()
        logits = model(xt, x0, size)
        masked = torch.zeros_like(xt, dtype=torch.bool)
        masked[:, here] = (xt == MASK)[:, here]
        masked_cross_entropy(logits, x0, masked).sum().backward()
        gradient = embedded[0].grad.abs().sum((0, 2))
        noisy, clean = gradient[:LENGTH], gradient[LENGTH:]
        assert not noisy[: here.start].any() and not noisy[here.stop :].any()
        assert not clean[here.start :].any()
        assert clean[: here.start].all()
        if size > 1 or not shifted or block == 0:  # a shifted block of one position is predicted from before it alone
            assert noisy[here].any()


@shifts
def test_every_block_is_a_masked_diffusion_model_given_the_blocks_before(shifted):
    """Two layers deep: what a block sees of the blocks before is what these see, and not a bidirectional prefix."""
    model = block_model(4, shifted=shifted)
    x0 = sequences(3)
    xt = partly_masked(x0)
    whole = model(xt, x0)
    for block in (0, 1, 2):
        here = slice(4 * block, 4 * block + 4)
        changed = xt.clone()
        changed[:, 4 * block + 4 :] = MASK
        clean = x0.clone()
        clean[:, here.start :] = 1
        torch.testing.assert_close(model(changed, clean)[:, here], whole[:, here])


# --- both ends of the family ---


@pytest.mark.parametrize("process", [RandomMasking(), ProgressiveUnmasking(3), ProgressiveUnmasking(3, threshold=0.3)])
def test_one_block_as_long_as_the_sequence_is_masked_diffusion(tmp_path, process):
    """The same logits, training losses, weights and NELBO."""
    results, xt = [], partly_masked(sequences(3))
    for kind in (MaskedDiffusion, partial(BlockDiffusion, block_size=LENGTH)):
        pl.seed_everything(0)
        model = kind(
            backbone(), MASK, forward_process=process, scheduler=None, optimizer=partial(torch.optim.SGD, lr=0.1)
        )
        losses = Losses()
        run = trainer(tmp_path, max_steps=8, callbacks=[losses], limit_val_batches=2)
        data = DataLoader(rows(), batch_size=4, shuffle=True)
        run.fit(model, data, DataLoader(rows(seed=1), batch_size=8))
        chains = replace(Chains.fully_masked(sequences(3), torch.zeros_like(xt).bool(), MASK), xt=xt)
        results.append((losses.values, run.callback_metrics["val/loss"].item(), model.denoise(chains)))
    (losses, nelbo, logits), (block_losses, block_nelbo, block_logits) = results
    assert block_losses == pytest.approx(losses, rel=1e-6)
    assert block_nelbo == pytest.approx(nelbo, rel=1e-6)
    torch.testing.assert_close(block_logits, logits)


def test_blocks_of_one_position_are_an_autoregressive_model(tmp_path):
    net = backbone()
    causal = backbone(causal=True)
    causal.load_state_dict(net.state_dict())
    model, ar = block_model(1, net, shifted=True), AutoregressiveLM(causal, MASK)
    x0 = sequences(4)
    masked = torch.full_like(x0, MASK)
    masked[:, 0] = x0[:, 0]
    torch.testing.assert_close(model(masked, x0)[:, 1:], ar(x0)[:, 1:], atol=1e-5, rtol=1e-5)
    data = DataLoader(rows(given=1), batch_size=8)
    (block_loss,), (loss,) = (trainer(tmp_path).validate(module, data, verbose=False) for module in (model, ar))
    assert block_loss["val/loss"] == pytest.approx(loss["val/loss"], rel=1e-5)


def test_the_nelbo_is_that_of_the_blocks_over_the_length_of_the_answer():
    """Enumerated: blocks of two positions, of which the prompt takes one of the first."""
    model = block_model(2)
    x0 = sequences(2)[:, :4]
    prompt = torch.tensor([[True, False, False, False]]).expand(2, 4)

    def nll(positions):
        xt = x0.clone()
        xt[:, positions] = MASK
        at = model(xt, x0).log_softmax(-1).gather(2, x0[..., None])[..., 0]
        return -at[:, positions]

    with torch.no_grad():
        first = nll([1])[:, 0]
        # n is 1 or 2 with probability 1/2; two positions times the mean of -log p over the masked ones.
        second = 2 * 0.5 * (0.5 * (nll([2])[:, 0] + nll([3])[:, 0]) + nll([2, 3]).mean(1))
        expected = ((first + second) / 3).mean()
        model.current_block_size = lambda: 2
        found = [
            model.evaluation_loss({"input_ids": x0, "prompt_mask": prompt}, torch.Generator().manual_seed(seed))[0]
            for seed in range(600)
        ]
    found = torch.stack(found)
    assert abs(found.mean() - expected) < 4 * found.std() / len(found) ** 0.5


# --- sampling ---


class Uncached:
    """Reads everything anew for each prediction, as training does."""

    def __init__(self, model: BlockDiffusion, total: int) -> None:
        self.model, self.total = model, total
        self.tokens: Tensor | None = None
        self.logits: list[Tensor] = []

    def read(self, tokens: Tensor, block_size: int) -> None:
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], 1)

    def __call__(self, xt: Tensor) -> Tensor:
        before = xt[:, :0] if self.tokens is None else self.tokens
        rest = xt.new_full((len(xt), self.total - before.shape[1] - xt.shape[1]), MASK)
        x0 = torch.cat([before, xt, rest], 1)
        out = self.model(x0, x0, xt.shape[1])[:, before.shape[1] :][:, : xt.shape[1]]
        self.logits.append(out)
        return out

    def select(self, rows: Tensor) -> "Uncached":
        chosen = copy.copy(self)
        chosen.tokens = None if self.tokens is None else self.tokens[rows]
        return chosen


class Recorded(CachedBlocks):
    def __init__(self, *args):
        super().__init__(*args)
        self.logits = []

    def __call__(self, xt):
        self.logits.append(exclude_token(super().__call__(xt), MASK))
        return self.logits[-1]


@shifts
@pytest.mark.parametrize("options", [{}, {"learned_positions": True}, {"num_kv_heads": 1, "qkv_bias": True}])
@few
@given(seed=seeds, size=st.sampled_from([1, 2, 3, 6, 12]), tokens=st.integers(1, 3), length=st.sampled_from([None, 24]))
def test_cached_sampling_is_uncached_sampling(shifted, options, seed, size, tokens, length):
    """The same logits and the same tokens, whatever is given, with rows that end early."""
    model = block_model(size, backbone(seed % 7, **options), shifted=shifted).eval().double()
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, MASK, (5, LENGTH), generator=generator)
    given_ = torch.randint(1, LENGTH + 1, (5, 1), generator=generator)
    xt = x0.masked_fill(torch.arange(LENGTH) >= given_, MASK)
    sampler = BlockSampler(Sampler(tokens_per_step=tokens, temperature=0.7), length)
    samples, logits = [], []
    for reader in (Recorded(model, 24), Uncached(model, length or LENGTH)):
        samples.append(sampler(reader, xt, MASK, size, EOS, torch.Generator().manual_seed(seed)))
        logits.append(reader.logits)
    for a, b in zip(*logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(getattr(samples[0], name), getattr(samples[1], name)) for name in NAMES)


@shifts
def test_the_sample_of_the_module_is_the_uncached_one(shifted):
    model = block_model(3, shifted=shifted, eos_id=EOS)
    x0 = sequences(4)
    prompt = torch.arange(LENGTH) < torch.tensor([[1], [4], [6], [11]])
    sample = model.sample(x0, prompt)
    expected = model.sampler(Uncached(model, LENGTH), x0.masked_fill(~prompt, MASK), MASK, 3, EOS)
    assert torch.equal(sample.tokens, expected.tokens)
    assert torch.equal(sample.tokens[prompt], x0[prompt])
    assert not (sample.tokens == MASK).any()


class Scripted:
    """Writes 5, and EOS at chosen positions; keeps what it was asked."""

    def __init__(self, rows: int, ends: dict[int, int]) -> None:
        self.position, self.rows, self.ends = 0, torch.arange(rows), ends
        self.predicted: list[tuple[int, list[int]]] = []
        self.read_to: list[tuple[int, list[int]]] = []

    def read(self, tokens: Tensor, block_size: int) -> None:
        self.position += tokens.shape[1]
        self.read_to.append((self.position, self.rows.tolist()))
        assert len(tokens) == len(self.rows)

    def __call__(self, xt: Tensor) -> Tensor:
        assert len(xt) == len(self.rows)
        self.predicted.append((self.position, self.rows.tolist()))
        logits = torch.zeros(*xt.shape, V)
        for i, row in enumerate(self.rows.tolist()):
            for place in range(xt.shape[1]):
                end = self.ends.get(row) == self.position + place
                logits[i, place, EOS if end else 5] = 9
        return logits

    def select(self, rows: Tensor) -> "Scripted":
        chosen = copy.copy(self)
        chosen.rows = self.rows[rows]
        return chosen


def test_a_row_that_wrote_eos_is_finished_and_costs_nothing_more():
    """Rows of 12 in blocks of 3; 0 ends in its first block, 1 in its third, 2 never, 3 has an EOS that was given."""
    x0 = torch.full((4, LENGTH), 7)
    x0[3, 1] = EOS
    given_ = torch.arange(LENGTH) < torch.tensor([[1], [4], [8], [2]])
    reader = Scripted(4, {0: 2, 1: 6, 3: 11})
    xt = x0.masked_fill(~given_, MASK)
    sample = BlockSampler(Sampler(tokens_per_step=1))(reader, xt, MASK, 3, EOS)
    expected = x0.masked_fill(~given_, 5)
    expected[0, 2:] = EOS
    expected[1, 6] = EOS
    expected[1, 9:] = EOS
    expected[3, 11] = EOS
    assert torch.equal(sample.tokens, expected)
    assert reader.predicted == [
        (0, [0, 3]), (0, [0]), (3, [1, 3]), (3, [1, 3]), (3, [3]),
        (6, [1, 2, 3]), (6, [1, 3]), (6, [1, 3]), (9, [2, 3]), (9, [2, 3]), (9, [2, 3]),
    ]  # fmt: skip
    assert reader.read_to == [(3, [1, 2, 3]), (6, [1, 2, 3]), (9, [2, 3])]
    # 2 + 0; prompt, 2, read, 3; prompt, 1, read, 3; 1, read, 3, read, 3, read, 3
    assert sample.nfe.tolist() == [2, 7, 6, 13]
    assert (sample.reveal_step[0, 3:] == 1).all() and (sample.reveal_step[1, 9:] == 6).all()
    assert torch.equal(sample.reveal_step == -1, given_)


def test_a_row_costs_what_it_costs_alone():
    model = block_model(2)
    x0 = sequences(6)
    prompt = torch.arange(LENGTH) < torch.tensor([[1], [2], [5], [10], [11], [12]])
    together = model.sample(x0, prompt)
    for row in range(6):
        alone = model.sample(x0[row : row + 1], prompt[row : row + 1])
        assert torch.equal(alone.nfe, together.nfe[row : row + 1])
        assert torch.equal(alone.tokens, together.tokens[row : row + 1])
        assert alone.reveal_step.max() < max(1, int(alone.nfe))


def test_a_threshold_and_a_number_of_steps_hold_within_a_block():
    reader = Scripted(1, {})
    xt = torch.full((1, LENGTH), MASK)
    sample = BlockSampler(Sampler(threshold=0.9))(reader, xt, MASK, 4)
    assert sample.nfe.tolist() == [3 + 2]  # it is sure of everything: a pass for each block, and two to read
    sample = BlockSampler(Sampler(num_steps=2))(Scripted(1, {}), xt, MASK, 4)
    assert sample.nfe.tolist() == [6 + 2]


def test_generation_may_go_on_past_the_training_length():
    model = block_model(4)
    x0 = sequences(2)
    prompt = (torch.arange(LENGTH) < 2).expand(2, LENGTH)
    short, long = (model.sample(x0, prompt, BlockSampler(length=n)) for n in (None, 32))
    assert long.tokens.shape == (2, 32)
    assert torch.equal(long.tokens[:, :LENGTH], short.tokens)
    assert not (long.tokens == MASK).any()


# --- marginals, on a toy ---


class Toy:
    """All sequences of 6 bits with arbitrary probabilities; predictions are the true conditionals of blocks of 3."""

    size, mask = 3, 2

    def __init__(self) -> None:
        self.x0 = torch.tensor(list(itertools.product([0, 1], repeat=6)))
        self.p = torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 3
        self.p /= self.p.sum()

    def logits(self, before: Tensor, xt: Tensor) -> Tensor:
        """Of a block given the clean ones before it: (B, m), (B, 3) -> (B, 3, 3)."""
        start = before.shape[1]
        block = self.x0[:, start : start + self.size]
        agree = (self.x0[None, :, :start] == before[:, None]).all(2)
        agree &= ((xt[:, None] == block[None]) | (xt[:, None] == self.mask)).all(2)
        weight = self.p * agree
        ones = (weight[:, :, None] * block).sum(1) / weight.sum(1, keepdim=True)
        return exclude_token(torch.stack([1 - ones, ones, ones], -1).log(), self.mask)


class ToyReader:
    def __init__(self, toy: Toy, batch: int) -> None:
        self.toy, self.before = toy, torch.empty(batch, 0, dtype=torch.long)
        self.seen: dict[tuple[int, int], list[tuple]] = {}

    def read(self, tokens: Tensor, block_size: int) -> None:
        self.before = torch.cat([self.before, tokens], 1)

    def __call__(self, xt: Tensor) -> Tensor:
        key = (self.before.shape[1] // 3, int((xt[0] != self.toy.mask).sum()))
        self.seen[key] = [tuple(row) for row in torch.cat([self.before, xt], 1).tolist()]
        return self.toy.logits(self.before, xt)

    def select(self, rows: Tensor) -> "ToyReader":
        chosen = copy.copy(self)
        chosen.before = self.before[rows]
        return chosen


def test_the_boards_of_the_teacher_are_those_of_the_student():
    """Per block, the distribution of (clean blocks before, xt) at every number revealed, for a perfect model."""
    from puma_lightning.chain.stages import StepSchedule
    from puma_lightning.training.sequences import CleanSequences
    from puma_lightning.training.stream import Stream

    toy = Toy()
    given_ = torch.zeros(6, dtype=torch.bool)
    loader = DataLoader([{"input_ids": row, "prompt_mask": given_} for row in toy.x0], batch_size=8)
    stages = 6  # twice the positions of a block: at most one is revealed in a step
    stream = Stream(
        CleanSequences(loader, toy.mask, 3), ProgressiveUnmasking(stages, Confidence()), toy.mask, 8, 10**6,
        block_size=StepSchedule("block_size", 3),
    )  # fmt: skip
    boards: dict[tuple[int, int], dict[tuple, tuple]] = {}
    batches = iter(stream)
    for step in range(stages * (64 // 8) + 2 * stages):
        batch = next(batches)
        x0, xt = batch["input_ids"], batch["xt"]
        if step > stages:  # the first chains start half way, at random
            for clean, board in zip(x0.tolist(), xt.tolist(), strict=True):
                for block in (0, 1):
                    part = board[3 * block : 3 * block + 3]
                    shown = (*clean[: 3 * block], *part)
                    known = boards.setdefault((block, 3 - part.count(toy.mask)), {})
                    assert known.setdefault(tuple(clean), shown) == shown
        logits = torch.cat([toy.logits(x0[:, : 3 * b], xt[:, 3 * b : 3 * b + 3]) for b in (0, 1)], 1)
        stream.advance(cut_blocks(logits, 3), step)

    number = 60_000
    reader = ToyReader(toy, number)
    BlockSampler(Sampler(temperature=1.0))(
        reader, torch.full((number, 6), toy.mask), toy.mask, 3, generator=torch.Generator().manual_seed(0)
    )
    for key in itertools.product((0, 1), (0, 1, 2)):
        assert len(boards[key]) == 64
        teacher: dict[tuple, float] = {}
        for clean, p in zip(toy.x0.tolist(), toy.p.tolist(), strict=True):
            shown = boards[key][tuple(clean)]
            teacher[shown] = teacher.get(shown, 0) + p
        student: dict[tuple, int] = {}
        for shown in reader.seen[key]:
            student[shown] = student.get(shown, 0) + 1
        assert set(student) <= set(teacher)
        for shown, p in teacher.items():
            assert abs(student.get(shown, 0) / number - p) < 5 * (p * (1 - p) / number) ** 0.5 + 1e-5


# --- training ---


def test_it_trains_with_a_curriculum_and_its_checkpoint_knows_how_far_it_came(tmp_path):
    curriculum = [[0, 2], [4, 3], [8, 12]]
    model = block_model(
        curriculum,
        forward_process=ProgressiveUnmasking([[0, 2], [4, 3]], threshold=0.9),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        scheduler=None,
    )
    sizes = []

    class Sizes(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            sizes.append(batch["chains"].x0.shape[1])
            assert (
                (batch["xt"] == MASK).view(4, -1, sizes[-1]).any(2) | batch["prompt_mask"].view(4, -1, sizes[-1]).all(2)
            ).any()

    data = DataLoader(rows(given=3), batch_size=4, shuffle=True)
    run = trainer(tmp_path, max_steps=6, callbacks=[Sizes()])
    run.fit(model, data)
    # A switch is made when the chains advance at its step, as that of K.
    assert sizes == [2, 2, 2, 2, 2, 3]
    assert model.current_block_size() == 3
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = block_model(curriculum, forward_process=ProgressiveUnmasking(2))
    assert other.current_block_size() == 2
    trainer(tmp_path).validate(other, data, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert other.current_block_size() == 3
    trainer(tmp_path, max_steps=1).fit(other, data)  # a new run, from the first block size on
    assert other.current_block_size() == 2
    resumed = block_model(curriculum, forward_process=ProgressiveUnmasking(2))
    sizes.clear()
    trainer(tmp_path, max_steps=8, callbacks=[Sizes()]).fit(resumed, data, ckpt_path=tmp_path / "a.ckpt")
    assert sizes == [3, 3]


def test_validation_is_in_the_blocks_trained_in_last(tmp_path):
    """At the step of a switch too, when no batch of the new size has been seen."""
    model = block_model([[0, 2], [2, 12]], scheduler=None)
    asked = []
    model.denoise = lambda chains: (
        asked.append((model.training, chains.x0.shape[1])) or type(model).denoise(model, chains)
    )
    data = DataLoader(rows(), batch_size=4)
    trainer(tmp_path, max_steps=6, val_check_interval=1, limit_val_batches=1, num_sanity_val_steps=0).fit(
        model, data, data
    )
    asked = asked[1:]  # without the first batch's check
    trained, validated = ([size for training, size in asked if training is kind] for kind in (True, False))
    assert trained == validated == [2, 2, 2, 12, 12, 12]


def test_checkpoints_of_block_models_and_others_are_not_taken_for_each_other(tmp_path):
    data = DataLoader(rows(), batch_size=4)
    models = {"blocks": block_model(4), "whole": MaskedDiffusion(backbone(), MASK, RandomMasking())}
    for name, model in models.items():
        run = trainer(tmp_path, max_steps=1)
        run.fit(model, data)
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
    with pytest.raises(ValueError, match="without blocks, which MaskedDiffusion is, got one of a block model"):
        trainer(tmp_path).fit(models["whole"], data, ckpt_path=tmp_path / "blocks.ckpt")
    with pytest.raises(ValueError, match="which BlockDiffusion is, got one of a model without blocks"):
        trainer(tmp_path).validate(models["blocks"], data, ckpt_path=tmp_path / "whole.ckpt")


@shifts
def test_it_starts_from_a_masked_diffusion_or_an_autoregressive_model(tmp_path, shifted):
    source = AutoregressiveLM(backbone(causal=True), MASK) if shifted else MaskedDiffusion(backbone(), MASK)
    run = trainer(tmp_path, max_steps=1)
    run.fit(source, DataLoader(rows(), batch_size=4))
    run.save_checkpoint(tmp_path / "start.ckpt")
    model = block_model(4, backbone(1), init_from=str(tmp_path / "start.ckpt"), shifted=shifted)
    model.load_weights(str(tmp_path / "start.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    wrong = block_model(4, backbone(1), shifted=not shifted)
    with pytest.raises(ValueError, match="shifted"):
        wrong.load_weights(str(tmp_path / "start.ckpt"))


def test_weights_of_a_curriculum_alone_are_not_judged(tmp_path):
    """They do not say which block size they were trained in last."""
    source = MaskedDiffusion(backbone(), MASK)
    run = trainer(tmp_path, max_steps=1)
    run.fit(source, DataLoader(rows(), batch_size=4))
    run.save_checkpoint(tmp_path / "start.ckpt")
    model = block_model([(0, 2), (5, 4)], init_from=str(tmp_path / "start.ckpt"))
    with pytest.raises(ValueError, match=r"block sizes \[2, 4\].*--ckpt_path"):
        trainer(tmp_path).validate(model, DataLoader(rows(), batch_size=4))
    trainer(tmp_path, max_steps=1).fit(model, DataLoader(rows(), batch_size=4))


@few
@given(given_=st.integers(1, LENGTH - 1), size=st.sampled_from([2, 3, 4, 6]))
def test_prompts_may_end_anywhere(given_, size):
    """Blocks that are all prompt have no loss, and a prompt is never masked."""
    model = block_model(size, forward_process=ProgressiveUnmasking(2), scheduler=None)
    losses = Losses()

    class Prompts(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert torch.equal(batch["xt"][batch["prompt_mask"]], batch["input_ids"][batch["prompt_mask"]])
            assert (batch["xt"] == MASK).any(1).all()

    run = trainer(None, max_steps=5, callbacks=[losses, Prompts()], enable_checkpointing=False)
    run.fit(model, DataLoader(rows(given=given_), batch_size=4))
    assert all(0 < loss < 50 for loss in losses.values)
    x0 = sequences(3)
    prompt = (torch.arange(LENGTH) < given_).expand(3, LENGTH)
    sample = model.sample(x0, prompt)
    assert torch.equal(sample.tokens[prompt], x0[prompt])
    assert torch.equal(sample.reveal_step == -1, prompt)


def test_evaluation_pictures_and_predictions_use_the_block_sampler(tmp_path):
    x0 = torch.tensor([[1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]])
    prompt = torch.arange(16) < 8
    data = DataLoader([{"input_ids": row, "prompt_mask": prompt} for row in x0.repeat(8, 1)], batch_size=4)
    evaluation = GenerationEvaluation({"cells": CellAccuracy()}, [BlockSampler()])
    picture = UnmaskingTrajectory()
    writer = PredictionWriter(str(tmp_path / "p.jsonl"))
    model = block_model(4, scheduler=None)
    run = trainer(tmp_path, max_steps=4, val_check_interval=2, callbacks=[evaluation, picture, writer])
    run.fit(model, data, data)
    assert run.callback_metrics["val/nfe/block_confidence_1"] == 8 + 2  # a pass to read the prompt, one between blocks
    assert len(picture.history) == 2
    run.predict(model, data)
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 8


# --- bad input ---


class OwnBackbone(nn.Module):
    vocab_size = V

    def forward(self, xt):
        return torch.zeros(*xt.shape, V)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(block_size=0), "at least 1"),
        (dict(block_size=[[0, 6], [10, 3]]), "that increase"),
        (dict(block_size=[[0, 3], [10, 4], [10, 6]]), "that increase"),
        (dict(block_size=[[5, 3]]), "first step"),
        (dict(block_size=4, sampler=Sampler()), "within"),
        (dict(block_size=4, eos_id=MASK), "eos_id"),
        (dict(block_size=4, backbone=OwnBackbone()), "hidden_states"),
        (dict(block_size=4, backbone=backbone(causal=True)), "causal to false"),
    ],
)
def test_impossible_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        BlockDiffusion(**{"backbone": backbone(), "mask_id": MASK, "forward_process": RandomMasking(), **change})


@pytest.mark.parametrize("size, padded", [(5, 15), (24, 24), ([(0, 3), (2, 5)], 15)])
def test_blocks_that_do_not_fill_the_sequence_are_padded_and_that_is_said(tmp_path, size, padded):
    """No position is trained on that is not there, also after the blocks have changed."""
    model, losses, seen = block_model(size), Losses(), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((batch["xt"] == MASK).any(0))
            assert batch["chains"].x0.shape[1] * batch["chains"].num_blocks == padded
            assert batch["attention_mask"][:, :LENGTH].all() and not batch["attention_mask"][:, LENGTH:].any()

    with pytest.warns(UserWarning, match=f"sequences of length 12, which are padded to {padded}"):
        trainer(tmp_path, max_steps=5, callbacks=[losses, Watch()]).fit(model, DataLoader(rows(), batch_size=4))
    assert len(losses.values) == 5 and torch.stack(seen).any(0)[2:LENGTH].all()
    assert not torch.stack(seen)[:, LENGTH:].any()


def test_the_sampler_of_the_whole_canvas_is_refused_by_name(tmp_path):
    model = block_model(4)
    with pytest.raises(ValueError, match="a BlockSampler for BlockDiffusion, got a Sampler"):
        model.sample(sequences(1), torch.ones(1, LENGTH, dtype=torch.bool), Sampler())
    with pytest.raises(ValueError, match="a Sampler for MaskedDiffusion, got a BlockSampler"):
        MaskedDiffusion(backbone(), MASK).sample(sequences(1), torch.ones(1, LENGTH).bool(), BlockSampler())
    losses = Losses()
    evaluation = GenerationEvaluation({"cells": CellAccuracy()}, [Sampler()])
    with pytest.raises(ValueError, match="BlockSampler"):
        trainer(tmp_path, callbacks=[evaluation, losses]).fit(model, DataLoader(rows(), batch_size=4))
    assert not losses.values


@pytest.mark.parametrize("length, words", [(30, "a divisor of"), (64, "max_length 32"), (0, "at least 1")])
def test_an_impossible_length_is_refused(length, words):
    with pytest.raises(ValueError, match=words):
        block_model(4).sample(sequences(1), (torch.arange(LENGTH) < 2)[None], BlockSampler(length=length))


def test_a_shifted_model_needs_its_first_position(tmp_path):
    with pytest.raises(ValueError, match="position 0 to be given"):
        trainer(tmp_path).fit(block_model(4, shifted=True), DataLoader(rows(given=0), batch_size=4))
