"""Autoregressive models: trained on answers up to their end, sampled token by token, and what diffusion starts from."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from puma_lightning import (
    AutoregressiveLM,
    LeftToRightSampler,
    MaskedDiffusion,
    RandomMasking,
    Sampler,
    TransformerBackbone,
)
from puma_lightning.output.losses import trained_positions

V, MASK, EOS, LENGTH = 12, 11, 0, 10
SMALL = dict(hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, max_length=32)
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=15, deadline=None)


def backbone(causal=True, seed=0, **changes):
    torch.manual_seed(seed)
    model = TransformerBackbone(V, causal=causal, **{**SMALL, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model


def rows(size=24, prompt=3, seed=0):
    """Sequences that count up from their first token, end in EOS and are padded with it."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(1, 4, (size, 1), generator=generator)
    x0 = first + torch.arange(LENGTH)
    x0 = torch.where(torch.arange(LENGTH) < LENGTH - 3, x0 % 10 + 1, EOS)
    given_mask = torch.arange(LENGTH) < prompt
    return [{"input_ids": row, "prompt_mask": given_mask} for row in x0]


def trainer(folder, **options):
    return pl.Trainer(
        accelerator="cpu", default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        logger=False, **{"max_steps": 3, "enable_checkpointing": False, **options},
    )  # fmt: skip


class TestTrainedPositions:
    @few
    @given(seeds)
    def test_they_are_the_answer_up_to_and_including_its_first_eos(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x0 = torch.randint(1, V - 1, (6, LENGTH), generator=generator)
        end = torch.randint(0, LENGTH + 1, (6, 1), generator=generator)
        prompt = torch.randint(0, LENGTH, (6, 1), generator=generator)
        place = torch.arange(LENGTH)
        x0 = torch.where(place >= end.maximum(prompt), EOS, x0)
        expected = (place >= prompt.clamp_min(1)) & (place <= end.maximum(prompt))
        # Where nothing is given, an EOS at position 0 is not predicted, nor is the padding after it.
        assert torch.equal(trained_positions(x0, place < prompt, EOS), expected)

    def test_packed_documents_all_count(self):
        x0 = torch.tensor([[EOS, 3, 4, EOS, 5, EOS, 6, 7]])
        given_mask = torch.arange(8)[None] < 1
        assert trained_positions(x0, given_mask, EOS).tolist() == [[False] + [True] * 7]

    def test_without_an_eos_everything_counts_but_the_prompt_and_the_first(self):
        x0 = torch.zeros(1, 5, dtype=torch.long)
        assert trained_positions(x0, torch.zeros(1, 5, dtype=torch.bool), None).tolist() == [[False] + [True] * 4]


class TestLoss:
    @few
    @given(seeds)
    def test_it_is_the_textbook_formula(self, seed):
        model = AutoregressiveLM(backbone(seed=seed % 5), MASK, EOS)
        batch = torch.utils.data.default_collate(rows(4, seed=seed))
        x0 = batch["input_ids"]
        logits = model.backbone(x0)[:, :-1].index_fill(-1, torch.tensor(MASK), float("-inf"))
        trained = slice(2, LENGTH - 3)  # predicts positions 3..7, the last of them the first EOS
        expected = F.cross_entropy(logits[:, trained].flatten(0, 1), x0[:, 3 : LENGTH - 2].flatten())
        torch.testing.assert_close(model._loss(batch)[0], expected)

    def test_what_follows_the_end_and_the_prompt_have_no_gradient(self):
        model = AutoregressiveLM(backbone(), MASK, EOS)
        batch = torch.utils.data.default_collate(rows(4))
        logits = model(batch["input_ids"]).detach().requires_grad_()
        model.forward = lambda _: logits
        model._loss(batch)[0].backward()
        moved = logits.grad.abs().nan_to_num().sum(-1) > 0
        assert torch.equal(moved, trained_positions(batch["input_ids"], batch["prompt_mask"], EOS))

    def test_validation_weighs_every_token_the_same(self, tmp_path):
        data = rows(7)
        long = {"input_ids": torch.arange(LENGTH) % 9 + 1, "prompt_mask": torch.arange(LENGTH) < 1}
        model = AutoregressiveLM(backbone(), MASK, EOS)
        losses = [
            trainer(tmp_path).validate(model, DataLoader([*data, long], batch_size=size), verbose=False)[0]["val/loss"]
            for size in (1, 3, 8)
        ]
        torch.testing.assert_close(losses, [losses[0]] * 3)

    def test_it_learns_and_reports_the_perplexity(self, tmp_path):
        model = AutoregressiveLM(backbone(), MASK, EOS, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3))
        loader = DataLoader(rows(64), batch_size=16, shuffle=True)
        run = trainer(tmp_path, max_steps=120, limit_val_batches=4)
        run.fit(model, loader, DataLoader(rows(8, seed=1), batch_size=8))
        metrics = run.callback_metrics
        assert metrics["val/loss"] < 0.1
        torch.testing.assert_close(metrics["val/perplexity"], metrics["val/loss"].exp())
        batch = torch.utils.data.default_collate(rows(8, seed=2))
        sample = model.sample(batch["input_ids"], batch["prompt_mask"])
        assert torch.equal(sample.tokens, batch["input_ids"])


class TestSampling:
    def batch(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x0 = torch.randint(0, V - 1, (5, LENGTH), generator=generator)
        return x0, torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (5, 1), generator=generator)

    @few
    @given(seeds, st.sampled_from([0.0, 0.7]))
    def test_with_and_without_a_cache_the_same(self, seed, temperature):
        class Uncached(nn.Module):
            vocab_size = V

            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, input_ids):
                return self.inner(input_ids)

        inner = backbone(seed=seed % 7, num_kv_heads=1)
        x0, prompt = self.batch(seed)
        sampler = LeftToRightSampler(temperature)
        samples = [
            AutoregressiveLM(model, MASK, EOS).sample(x0, prompt, sampler, torch.Generator().manual_seed(seed))
            for model in (inner, Uncached(inner))
        ]
        assert torch.equal(samples[0].tokens, samples[1].tokens)
        assert torch.equal(samples[0].reveal_step, samples[1].reveal_step)

    @few
    @given(seeds)
    def test_greedy_tokens_are_the_most_likely_given_all_before_them(self, seed):
        model = AutoregressiveLM(backbone(seed=seed % 7), MASK, EOS)
        x0, prompt = self.batch(seed)
        sample = model.sample(x0, prompt)
        best = model(sample.tokens).argmax(-1)
        written = trained_positions(sample.tokens, prompt, EOS)
        assert torch.equal(sample.tokens[written], best[written])

    @few
    @given(seeds, st.sampled_from([0.0, 1.0]))
    def test_prompts_stay_rows_end_at_eos_and_no_mask_is_left(self, seed, temperature):
        model = AutoregressiveLM(backbone(seed=seed % 7), MASK, EOS)
        x0, prompt = self.batch(seed)
        sample = model.sample(x0, prompt, LeftToRightSampler(temperature), torch.Generator().manual_seed(seed))
        assert torch.equal(sample.tokens[prompt], x0[prompt])
        assert not (sample.tokens == MASK).any()
        ended = ((sample.tokens == EOS) & ~prompt).cumsum(1) > 0
        assert (sample.tokens[ended & ~prompt] == EOS).all()
        assert torch.equal(sample.reveal_step == -1, prompt)
        assert torch.equal(sample.nfe, trained_positions(sample.tokens, prompt, EOS).sum(1))

    def test_a_row_alone_is_completed_as_in_a_batch(self):
        model = AutoregressiveLM(backbone(), MASK, EOS)
        x0, prompt = self.batch(3)
        together = model.sample(x0, prompt).tokens
        alone = torch.cat([model.sample(x0[i : i + 1], prompt[i : i + 1]).tokens for i in range(len(x0))])
        assert torch.equal(together, alone)

    def test_finished_rows_are_read_no_more(self):
        model = AutoregressiveLM(backbone(), MASK, EOS)
        sizes = []
        forward = model.backbone.forward
        model.backbone.forward = lambda input_ids, cache=None: (
            sizes.append(len(input_ids)),
            forward(input_ids, cache),
        )[1]
        x0 = torch.ones(3, LENGTH, dtype=torch.long)
        prompt = torch.arange(LENGTH) < torch.tensor([[2], [LENGTH - 1], [LENGTH]])
        sample = model.sample(x0, prompt)
        assert sizes[0] == 3 and sizes[1] <= 2
        assert sample.nfe[2] == 0

    def test_position_0_must_be_given(self):
        model = AutoregressiveLM(backbone(), MASK, EOS)
        with pytest.raises(ValueError, match="position 0 to be given"):
            model.sample(torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool))

    @pytest.mark.parametrize(("option", "value"), [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5)])
    def test_impossible_settings(self, option, value):
        with pytest.raises(ValueError, match=option):
            LeftToRightSampler(**{option: value})

    def test_names(self):
        assert LeftToRightSampler().name == "left_to_right"
        assert LeftToRightSampler(0.8, 0.95).name == "left_to_right_T0.8_p0.95"

    def test_each_model_asks_for_its_own_sampler(self):
        x0, prompt = self.batch(0)
        with pytest.raises(ValueError, match="a LeftToRightSampler for AutoregressiveLM, got a Sampler"):
            AutoregressiveLM(backbone(), MASK, EOS).sample(x0, prompt, Sampler())
        with pytest.raises(ValueError, match="a Sampler for MaskedDiffusion, got a LeftToRightSampler"):
            MaskedDiffusion(backbone(causal=False), MASK).sample(x0, prompt, LeftToRightSampler())


class TestShift:
    def test_aligned_logits_are_those_of_the_position_before(self):
        model = MaskedDiffusion(backbone(causal=False), MASK, shifted=True)
        xt = torch.randint(0, V, (2, LENGTH))
        aligned, raw = model(xt), model.backbone(xt)
        assert torch.equal(aligned[:, 1:, :MASK], raw[:, :-1, :MASK])
        assert (aligned[..., MASK] == float("-inf")).all()

    def test_loss_scores_and_samples_all_see_aligned_logits(self):
        """A model that says at each position what the next holds: right if and only if all are shifted."""

        class Next(nn.Module):
            vocab_size = V

            def forward(self, xt):
                answer = (torch.arange(xt.shape[1]) + 1) % 10 + 1  # of the next position
                confidence = 5.0 + torch.arange(xt.shape[1])  # later positions are surer
                return F.one_hot(answer, V).float()[None] * confidence[:, None] * torch.ones(len(xt), 1, 1)

        x0 = (torch.arange(LENGTH) % 10 + 1).expand(3, -1)
        prompt = (torch.arange(LENGTH) < 2).expand(3, -1)
        model = MaskedDiffusion(Next(), MASK, RandomMasking(), shifted=True)
        loss, _ = model.evaluation_loss({"input_ids": x0, "prompt_mask": prompt}, torch.Generator().manual_seed(0))
        assert loss < 0.1
        sample = model.sample(x0, prompt)
        assert torch.equal(sample.tokens, x0)
        # Position i's score is the confidence at i - 1, so the last position comes first.
        assert sample.reveal_step[0, 2:].tolist() == list(range(LENGTH - 3, -1, -1))
        loss, _ = MaskedDiffusion(Next(), MASK, RandomMasking()).evaluation_loss(
            {"input_ids": x0, "prompt_mask": prompt}, torch.Generator().manual_seed(0)
        )
        assert loss > 3

    def test_position_0_must_be_given_in_evaluation_and_sampling(self, tmp_path):
        model = MaskedDiffusion(backbone(causal=False), MASK, RandomMasking(), shifted=True)
        with pytest.raises(ValueError, match="position 0 to be given"):
            trainer(tmp_path).validate(model, DataLoader(rows(prompt=0), batch_size=8), verbose=False)
        with pytest.raises(ValueError, match="position 0 to be given"):
            model.sample(torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool))

    @pytest.mark.parametrize("module", ["autoregressive", "shifted"])
    def test_position_0_must_be_given_in_training(self, tmp_path, module):
        model = (
            AutoregressiveLM(backbone(), MASK, EOS)
            if module == "autoregressive"
            else MaskedDiffusion(backbone(causal=False), MASK, RandomMasking(), shifted=True)
        )
        with pytest.raises(ValueError, match="expected position 0 to be given"):
            trainer(tmp_path).fit(model, DataLoader(rows(prompt=0), batch_size=8))


class TestInitialisation:
    def checkpoint(self, folder, **changes):
        model = AutoregressiveLM(backbone(**changes), MASK, EOS)
        run = trainer(folder, max_steps=2)
        run.fit(model, DataLoader(rows(), batch_size=8))
        path = str(folder / "ar.ckpt")
        run.save_checkpoint(path)
        return model, path

    def test_a_diffusion_model_starts_from_an_autoregressive_one(self, tmp_path):
        lm, path = self.checkpoint(tmp_path)
        model = MaskedDiffusion(backbone(causal=False, seed=1), MASK, RandomMasking(), init_from=path, shifted=True)
        seen = {}
        model.on_train_start = lambda: seen.update({k: v.clone() for k, v in model.state_dict().items()})
        trainer(tmp_path).fit(model, DataLoader(rows(), batch_size=8))
        assert seen and all(torch.equal(value, lm.state_dict()[name]) for name, value in seen.items())

    def test_the_shift_must_be_kept(self, tmp_path):
        _, path = self.checkpoint(tmp_path)
        with pytest.raises(
            ValueError,
            match=r"shifted: expected True, .* got False in this model; set `model.init_args.shifted`",
        ):
            MaskedDiffusion(backbone(causal=False), MASK, init_from=path).load_weights(path)

    def test_it_is_kept_by_checkpoints_of_the_diffusion_model_too(self, tmp_path):
        model = MaskedDiffusion(backbone(causal=False), MASK, RandomMasking(), shifted=True)
        run = trainer(tmp_path, max_steps=1)
        run.fit(model, DataLoader(rows(), batch_size=8))
        run.save_checkpoint(tmp_path / "mdm.ckpt")
        plain = MaskedDiffusion(backbone(causal=False), MASK, RandomMasking())
        with pytest.raises(ValueError, match="shifted"):
            plain.load_weights(str(tmp_path / "mdm.ckpt"))
        with pytest.raises(ValueError, match="shifted"):
            trainer(tmp_path, max_steps=2).fit(
                plain, DataLoader(rows(), batch_size=8), ckpt_path=str(tmp_path / "mdm.ckpt")
            )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(hidden_size=24), r"embed_tokens.weight is \(12, 16\) instead of \(12, 24\)"),
            (dict(num_heads=1), "num_heads: expected 2, .* got 1"),
            (dict(rope_theta=500.0), "rope_theta"),
        ],
    )
    def test_another_shape_names_the_first_mismatch(self, tmp_path, changes, message):
        _, path = self.checkpoint(tmp_path)
        model = MaskedDiffusion(backbone(causal=False, **changes), MASK, shifted=True)
        with pytest.raises(ValueError, match=message):
            model.load_weights(path)

    def test_another_tokenizer_is_refused(self, tmp_path):
        class Data(pl.LightningDataModule):
            def __init__(self, fingerprint):
                super().__init__()
                self.tokenizer_fingerprint = fingerprint

            def train_dataloader(self):
                return DataLoader(rows(), batch_size=8)

        model = AutoregressiveLM(backbone(), MASK, EOS)
        run = trainer(tmp_path, max_steps=2)
        run.fit(model, datamodule=Data("a"))
        path = str(tmp_path / "ar.ckpt")
        run.save_checkpoint(path)
        for options in ({"init_from": path}, {}):
            other = MaskedDiffusion(backbone(causal=False), MASK, RandomMasking(), shifted=True, **options)
            with pytest.raises(ValueError, match=r"tokenizer: expected a, .* got b in this model; use the tokenizer"):
                trainer(tmp_path).fit(other, datamodule=Data("b"), **({} if options else {"ckpt_path": path}))
            trainer(tmp_path).fit(other, datamodule=Data("a"), **({} if options else {"ckpt_path": path}))

    def test_a_resumed_run_is_identical(self, tmp_path):
        def fit(steps, **options):
            model = AutoregressiveLM(backbone(dropout=0.1), MASK, EOS, scheduler=None)
            pl.seed_everything(0)
            run = trainer(tmp_path, max_steps=steps, max_epochs=-1)
            run.fit(model, DataLoader(rows(20), batch_size=8, shuffle=True), **options)
            return run, model.state_dict()

        whole = fit(7)[1]
        run, _ = fit(4)
        run.save_checkpoint(tmp_path / "half.ckpt")
        resumed = fit(7, ckpt_path=str(tmp_path / "half.ckpt"))[1]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(eos_id=MASK), "eos_id: expected"),
        (dict(eos_id=V), "eos_id: expected"),
        (dict(mask_id=V), "mask_id: expected"),
    ],
)
def test_impossible_ids(options, message):
    with pytest.raises(ValueError, match=message):
        AutoregressiveLM(backbone(), **{"mask_id": MASK, "eos_id": EOS, **options})


def test_a_bidirectional_backbone_is_refused():
    with pytest.raises(ValueError, match="set causal to true"):
        AutoregressiveLM(backbone(causal=False), MASK)
