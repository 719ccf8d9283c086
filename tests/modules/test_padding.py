"""Padding is not there: a padded batch is, to every model, its sequences alone."""

from dataclasses import replace
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from puma_lightning import (
    AutoregressiveLM,
    BlockDiffusion,
    BlockSampler,
    ChainDiagnostics,
    Confidence,
    GenerationEvaluation,
    MaskedDiffusion,
    PredictionWriter,
    ProgressiveUnmasking,
    RandomMasking,
    Sampler,
    TransformerBackbone,
    pad_collate,
)
from puma_lightning.chain.chains import Chains
from puma_lightning.data.batch import padded_to_multiple, padding_last
from puma_lightning.data.text.token_cache import collate
from puma_lightning.data.word_problems import WordProblemsDataModule

V, MASK, EOS = 12, 11, 0
few = settings(max_examples=10, deadline=None)
lengths = st.lists(st.integers(3, 13), min_size=2, max_size=4)
sides = st.sampled_from(["right", "left", "between"])


def backbone(**changes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, max_length=32, learned_positions=True)
    net = TransformerBackbone(V, **{**sizes, **changes})
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return net


MODELS = {
    "any order": lambda **o: MaskedDiffusion(backbone(), MASK, RandomMasking(), **o),
    "any order, shifted": lambda **o: MaskedDiffusion(backbone(), MASK, RandomMasking(), shifted=True, **o),
    "blocks": lambda **o: BlockDiffusion(backbone(), MASK, 4, EOS, RandomMasking(), **o),
    "blocks, shifted": lambda **o: BlockDiffusion(backbone(), MASK, 4, EOS, RandomMasking(), shifted=True, **o),
    "one block": lambda **o: BlockDiffusion(backbone(), MASK, 16, None, RandomMasking(), **o),
    "from the left": lambda **o: AutoregressiveLM(backbone(causal=True), MASK, EOS, **o),
}
models = pytest.mark.parametrize("name", MODELS)
heads = pytest.mark.parametrize("large", [False, True], ids=["logits", "head"])


def model_of(name, large=False):
    model = MODELS[name]().eval()
    model.large_vocabulary = 1 if large else None
    return model


def sequences(lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(1, MASK, (length,), generator=generator) for length in lengths]


def examples(lengths):
    return [{"input_ids": ids, "prompt_mask": torch.arange(len(ids)) < 1 + len(ids) // 4} for ids in sequences(lengths)]


def padded(rows, side="right", token=7):
    """A batch with the padding at one side, or between, holding some token."""
    batch = pad_collate([*rows, {"input_ids": torch.ones(15).long(), "prompt_mask": torch.arange(15) < 2}])
    batch = {name: column[:-1] for name, column in batch.items()}
    size = batch["input_ids"].shape[1]
    real = batch["attention_mask"]
    order = {
        "right": torch.arange(size).expand(real.shape),
        "left": real.long().argsort(dim=1, stable=True),
        "between": torch.cat([torch.arange(2), torch.arange(14, 1, -1)]).expand(real.shape),
    }[side]
    if side == "between":
        # Two positions, the padding, and the others in their order.
        order = torch.stack(
            [torch.cat([torch.arange(2), torch.arange(n, size), torch.arange(2, n)]) for n in real.sum(1).tolist()]
        )
    batch = {name: column.gather(1, order) for name, column in batch.items()}
    return {**batch, "input_ids": batch["input_ids"].masked_fill(~batch["attention_mask"], token)}  # fmt: skip


def alone(row):
    return {name: column[None] for name, column in row.items()}


def chains_of(model, batch):
    """Every third position masked, in the blocks of the model."""
    batch = padding_last(batch)
    size = model.block_size.at(0) if model.block_size else None
    batch = padded_to_multiple(batch, size or 1, MASK)
    chains = Chains.fully_masked(
        batch["input_ids"], batch["prompt_mask"], MASK, block_size=size, attention_mask=batch.get("attention_mask")
    )
    column = torch.arange(chains.x0.shape[1])
    return replace(chains, xt=torch.where(column % 3 == 1, chains.xt, chains.x0))


@heads
@models
@few
@given(lengths, sides)
def test_the_loss_of_a_padded_batch_is_that_of_its_sequences(name, large, lengths, side):
    model, rows = model_of(name, large), examples(lengths)
    batch = model.checked(padded(rows, side))
    if name == "from the left":
        loss, weight = model.evaluation_loss(batch, None)
        each = [model.evaluation_loss(model.checked(alone(row)), None) for row in rows]
        assert weight == sum(count for _, count in each)
        assert loss.item() == pytest.approx(sum(float(nll) * count for nll, count in each) / weight, rel=1e-4)
        return
    chains = chains_of(model, batch)
    for i, row in enumerate(rows):
        here = chains_of(model, model.checked(alone(row)))
        weights = torch.zeros(len(chains.x0)).view(len(rows), -1)
        weights[i] = 1
        loss = model.loss(chains, weights.flatten())[0]
        assert loss.item() == pytest.approx(model.loss(here, torch.ones(len(here.x0)))[0].item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "from the left"])
@few
@given(lengths)
def test_the_scores_in_a_padded_batch_are_those_of_its_sequences(name, lengths):
    model, rows = model_of(name), examples(lengths)
    chains = chains_of(model, model.checked(padded(rows)))
    scores = Confidence()(model.denoise(chains), chains.xt).masked_fill(~chains.masked, 0).view(len(rows), -1)
    for row, found in zip(rows, scores, strict=True):
        here = chains_of(model, model.checked(alone(row)))
        expected = Confidence()(model.denoise(here), here.xt).masked_fill(~here.masked, 0).flatten()
        torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-5)


@heads
@models
@few
@given(lengths, sides)
def test_what_is_generated_in_a_padded_batch_is_what_is_for_each_sequence(name, large, lengths, side):
    model, rows = model_of(name, large), examples(lengths)
    batch = padded(rows, side)
    found = model.predict_step(batch, 0)
    for i, row in enumerate(rows):
        expected, real = model.predict_step(alone(row), 0), batch["attention_mask"][i]
        assert torch.equal(found["tokens"][i, real], expected["tokens"][0])
        assert torch.equal(found["reveal_step"][i, real], expected["reveal_step"][0])
        assert found["nfe"][i] == expected["nfe"][0]
    assert torch.equal(found["attention_mask"], batch["attention_mask"])


@pytest.mark.parametrize("name", ["blocks", "blocks, shifted"])
def test_a_padded_batch_may_have_rows_with_nothing_to_generate(name):
    """Blocks are then completed for the others alone."""
    model = model_of(name)
    x0 = torch.randint(1, MASK, (4, 8), generator=torch.Generator().manual_seed(0))
    real = torch.arange(8) < torch.tensor([[8], [6], [7], [5]])
    given_ = torch.arange(8) < torch.tensor([[8], [3], [7], [1]])
    sample = model.sample(x0, given_, attention_mask=real)
    alone = model.sample(x0[[1, 3]], given_[[1, 3]], attention_mask=real[[1, 3]])
    assert torch.equal(sample.tokens[[1, 3]], alone.tokens) and torch.equal(sample.nfe[[1, 3]], alone.nfe)
    assert torch.equal(sample.tokens[[0, 2]][real[[0, 2]]], x0[[0, 2]][real[[0, 2]]]) and not sample.nfe[[0, 2]].any()


@few
@given(lengths)
def test_generating_further_goes_as_far_for_every_row(lengths):
    model, rows, sampler = model_of("blocks"), examples(lengths), BlockSampler(length=20)
    batch = padded(rows)
    found = model.sample(batch["input_ids"], batch["prompt_mask"], sampler, None, batch["attention_mask"])
    for i, row in enumerate(rows):
        expected = model.sample(row["input_ids"][None], row["prompt_mask"][None], sampler)
        assert torch.equal(found.tokens[i], expected.tokens[0]) and found.nfe[i] == expected.nfe[0]
    assert found.attention_mask is None


@heads
@models
def test_what_padding_holds_changes_nothing(name, large):
    """Not a bit, in losses, gradients and samples."""
    rows, results = examples([5, 9, 12]), []
    for token in (7, -100, MASK):
        model = model_of(name, large)
        batch = padded(rows, token=token)
        torch.manual_seed(0)
        loss = model.training_step(batch, 0)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([loss.detach(), *gradients, model.predict_step(batch, 0)["nfe"]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Rows(torch.utils.data.Dataset):
    def __init__(self, lengths):
        self.rows = examples(lengths)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def trainer(folder, **options):
    return pl.Trainer(
        accelerator="cpu", default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        **{"logger": False, "max_steps": 12, "enable_checkpointing": False, **options},
    )  # fmt: skip


LENGTHS = [5, 9, 12, 3, 3, 7, 12, 6, 4, 13, 8, 3]


@models
def test_ragged_data_trains_validates_and_predicts(tmp_path, name):
    model = MODELS[name]()
    model.forward_process = model.forward_process if name == "from the left" else ProgressiveUnmasking(3, threshold=0.5)
    loader = DataLoader(Rows(LENGTHS), batch_size=4, collate_fn=pad_collate)
    callbacks = [] if name == "from the left" else [ChainDiagnostics()]
    run = trainer(tmp_path, max_epochs=4, max_steps=-1, callbacks=callbacks)
    run.fit(model, loader, loader)
    assert run.global_step == 12 and run.callback_metrics["val/loss"].isfinite()
    writer = PredictionWriter(str(tmp_path / "out.jsonl"))
    trainer(tmp_path, callbacks=[writer]).predict(model, loader)
    import json

    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(len(row["tokens"]) for row in written) == sorted(LENGTHS)


class Texts(pl.LightningDataModule):
    def decode(self, tokens, prompt_mask):
        return {"completion": " ".join(map(str, tokens.tolist()))}

    def val_dataloader(self):
        return DataLoader(Rows([5, 9]), batch_size=2, collate_fn=pad_collate)


def test_metrics_read_texts_without_padding(tmp_path):
    from torchmetrics import Metric

    seen = []

    class Lengths(Metric):
        def update(self, completions, attention_mask):
            seen.append(([len(text.split()) for text in completions], attention_mask.sum(1).tolist()))

        def compute(self):
            return torch.tensor(0.0)

    evaluation = GenerationEvaluation({"lengths": Lengths()}, [Sampler()])
    trainer(tmp_path, callbacks=[evaluation]).validate(MODELS["any order"](), Texts(), verbose=False)
    assert seen == [([5, 9], [5, 9])]


# --- the padding of the text DataModules ---


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Word problems whose padding is hidden."""
    data = WordProblemsDataModule(
        num_train=40, num_val=6, num_test=6, vocab_size=600, sequence_length=144, padding="none", batch_size=4,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    return data


def with_padding(problems, token):
    """Batches whose padding holds some token."""

    def changed(items):
        batch = collate(items)
        return {**batch, "input_ids": batch["input_ids"].masked_fill(~batch["attention_mask"], token)}

    return changed


TEXT_MODELS = {
    "any order": lambda net, eos: MaskedDiffusion(net(), 1, ProgressiveUnmasking(3, threshold=0.02)),
    "any order, shifted": lambda net, eos: MaskedDiffusion(net(), 1, RandomMasking(), shifted=True),
    "blocks": lambda net, eos: BlockDiffusion(net(), 1, 16, eos, ProgressiveUnmasking(3, threshold=0.02)),
    "from the left": lambda net, eos: AutoregressiveLM(net(causal=True), 1, eos),
}


def text_model(name, problems):
    def net(causal=False):
        torch.manual_seed(0)
        return TransformerBackbone(problems.vocab_size, 16, 24, 1, 2, max_length=144, causal=causal)

    return TEXT_MODELS[name](net, problems.eos_id)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_what_hidden_padding_holds_changes_no_run(tmp_path, problems, name):
    """Losses, chains, weights and samples are the same to the last bit; there is one EOS less to see."""
    found = []
    for token in (problems.eos_id, 7, problems.mask_id):
        model = text_model(name, problems)
        loader = DataLoader(problems._sets["train"], batch_size=4, collate_fn=with_padding(problems, token))
        run = trainer(tmp_path, max_steps=6, val_check_interval=6, limit_val_batches=1)
        torch.manual_seed(0)
        run.fit(model, loader, loader)
        batch = with_padding(problems, token)(problems._sets["val"].__getitems__(range(6)))
        sample = model.predict_step(batch, 0)
        real = batch["attention_mask"]
        found.append(
            [run.callback_metrics["train/loss"], run.callback_metrics["val/loss"], *model.state_dict().values(),
             sample["tokens"][real], sample["reveal_step"][real], sample["nfe"]]
        )  # fmt: skip
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@few
@given(st.integers(2, 599), st.integers(0, 2**31))
def test_what_hidden_padding_holds_changes_no_score(problems, token, seed):
    model = text_model("any order", problems)
    clean = problems._sets["train"].__getitems__(range(8))
    changed = {**clean, "input_ids": clean["input_ids"].masked_fill(~clean["attention_mask"], token)}
    results = []
    for batch in (clean, changed):
        generator = torch.Generator().manual_seed(seed)
        chains = model.chains(batch, generator)
        with torch.no_grad():
            logits = model.denoise(chains)
        moved = model.forward_process.advance(chains, logits, 0, generator)
        results.append([chains.xt, logits, Confidence()(logits, chains.xt), moved.xt, moved.stage, moved.done])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_the_room_of_an_unknown_answer_is_generated(problems, name):
    batch = next(iter(problems.predict_dataloader()))
    sample = text_model(name, problems).predict_step(batch, 0)
    assert "attention_mask" not in sample and not (sample["tokens"] == problems.mask_id).any()
    assert torch.equal(sample["reveal_step"] >= 0, ~batch["prompt_mask"])


@pytest.mark.parametrize("name", ["any order", "blocks"])
def test_a_run_whose_padding_was_given_goes_on_with_it_hidden(tmp_path, problems, name):
    """As that of version 0.2.0: sequences in its slots stay as they were, and those that follow have theirs hidden."""

    def shown(items):
        return {n: column for n, column in collate(items).items() if n != "attention_mask"}

    widths = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            widths.append(real.sum(1).tolist())

    saved = str(tmp_path / "saved.ckpt")
    for collate_fn, steps, start in ((shown, 2, None), (collate, 12, saved)):
        model = text_model(name, problems)
        model.forward_process = ProgressiveUnmasking(3)
        run = trainer(tmp_path, max_steps=steps, callbacks=[Watch()])
        run.fit(model, DataLoader(problems._sets["train"], batch_size=4, collate_fn=collate_fn), ckpt_path=start)
        run.save_checkpoint(saved)
    assert widths[0] == widths[1] == [problems.sequence_length] * 4 and problems.sequence_length in widths[2]
    assert max(widths[-1]) < problems.sequence_length and run.global_step == 12


# --- backbones of one's own ---


class Own(nn.Module):
    """Means over the positions that are there, in Hugging Face's convention; answers as ``how`` says."""

    vocab_size = V

    def __init__(self, how=lambda logits: logits):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.embed, self.out = how, nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        assert real.dtype == torch.int64
        mean = (h * real[..., None]).sum(1, keepdim=True) / real.sum(1)[:, None, None]
        return self.how(self.out(h + mean))


class Deaf(Own):
    def forward(self, input_ids):
        return super().forward(input_ids)


def test_a_backbone_that_cannot_leave_padding_out_is_refused(tmp_path):
    loader = DataLoader(Rows(LENGTHS), batch_size=4, collate_fn=pad_collate)
    with pytest.raises(ValueError, match=r"takes an attention_mask, as sequences are padded, got .*Deaf.forward"):
        trainer(tmp_path).fit(MaskedDiffusion(Deaf(), MASK), loader)
    late = DataLoader(Rows([5] * 6 + [4] * 10), batch_size=4, collate_fn=pad_collate)
    with pytest.raises(ValueError, match="takes an attention_mask"):
        trainer(tmp_path).fit(MaskedDiffusion(Deaf(), MASK, RandomMasking()), late)
    trainer(tmp_path, max_steps=2).fit(MaskedDiffusion(Own(), MASK), loader)
    trainer(tmp_path, max_steps=2).fit(MaskedDiffusion(Deaf(), MASK), DataLoader(Rows([5] * 8), batch_size=4))


ANSWERS = {
    "output object": lambda logits: SimpleNamespace(logits=logits, hidden_states=None),
    "dictionary": lambda logits: {"loss": None, "logits": logits},
    "tuple": lambda logits: (torch.tensor(0.0), logits, (logits,)),
}


@pytest.mark.parametrize("how", ANSWERS.values(), ids=ANSWERS)
def test_the_logits_of_an_output_are_understood(how):
    batch = padded(examples([5, 9]))
    plain, wrapped = (MaskedDiffusion(Own(each), MASK, RandomMasking()) for each in (lambda logits: logits, how))
    for model in (plain, wrapped):
        torch.manual_seed(1)
        model.found = model.training_step(batch, 0), model.predict_step(batch, 0)["tokens"]
    assert torch.equal(plain.found[0], wrapped.found[0]) and torch.equal(plain.found[1], wrapped.found[1])


def test_an_answer_without_logits_is_refused():
    model = MaskedDiffusion(Own(lambda logits: "nothing"), MASK)
    with pytest.raises(ValueError, match=r"backbone: expected logits .* got str from Own"):
        model(torch.ones(1, 4).long())


# --- in a notebook ---


@models
def test_a_step_without_a_trainer(name):
    """A clean batch as it comes from a loader: a loss with gradients, and chains to look at."""
    model = MODELS[name]()
    loader = DataLoader(Rows(LENGTHS), batch_size=4, collate_fn=pad_collate)
    loss = model.training_step(next(iter(loader)), 0)
    loss.backward()
    assert loss.isfinite() and any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_look_at_chains_without_a_trainer():
    model = MaskedDiffusion(backbone(), MASK, ProgressiveUnmasking(4))
    batch = padded(examples([9, 12, 13, 12]))
    chains = model.chains(batch)
    assert chains.stage.tolist() == [0, 1, 2, 3] and chains.masked.any(1).all()
    moved = model.forward_process.advance(chains, model.denoise(chains), step=0)
    assert (moved.stage[:3] == chains.stage[:3] + 1).all() and moved.done.tolist() == [False] * 3 + [True]
    with pytest.raises(ValueError, match="input_ids"):
        model.chains({"tokens": batch["input_ids"]})
