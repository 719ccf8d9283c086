"""The check of a whole training set-up on its first batch, before any step is taken."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import rank_zero_warn

from puma_lightning.chain.chains import Chains
from puma_lightning.chain.student import AnySampler
from puma_lightning.data.base import offer_of
from puma_lightning.data.batch import Batch
from puma_lightning.graphs import Look, NoLooks
from puma_lightning.models.calling import check_takes_padding
from puma_lightning.modules.eval_mode import eval_mode

if TYPE_CHECKING:
    from puma_lightning.modules.generative import GenerativeModule


def preflight(module: "GenerativeModule") -> None:
    """Check what the DataModule offers, the samplers, the shape of the logits, and the scores of all policies.

    Raises:
        ValueError: If the DataModule offers something of a wrong type, a sampler is not one for this model, the logits
            have another shape than (B, L, V), or a policy returns scores of another shape or NaN.
    """
    offer, trainer = offer_of(module.trainer), module.trainer
    # Looking is checking. The tokenizer's fingerprint was looked at for the weights, texts and pictures are made by
    # callbacks that generate.
    _ = offer.eos_id
    if any(hasattr(callback, "samplers") or hasattr(callback, "sampler") for callback in trainer.callbacks):  # type: ignore[attr-defined]
        _ = offer.decode, offer.picture
    if len(trainer.num_val_batches) > 1:
        offer.set_names("val", len(trainer.num_val_batches))
    samplers = samplers_of(module)
    for sampler in samplers:
        module.check_sampler(sampler)
    batch = module.stream.peek()
    _warn_of_answers_without_end(module, batch)
    chains = batch["chains"]
    if chains.attention_mask is not None and not getattr(module.backbone, "causal", False):
        states: Any = module.backbone.forward if module.block_size is None else module.backbone.hidden_states
        check_takes_padding(states)
    if module.head() is not None:
        # The vocabulary is large: logits of one sequence alone can be kept.
        chains = chains.map(lambda tensor: tensor[: chains.num_blocks])
    # The shape of a trial is not that of training, so nothing is compiled for it; but attention in blocks must be.
    stance = torch.compiler.set_stance("force_eager" if module.block_size is None else "default")
    with torch.no_grad(), eval_mode(module), stance, trainer.precision_plugin.forward_context():
        logits = module.denoise(chains)
        expected = (*chains.xt.shape, module.vocab_size)
        if logits.shape != expected:
            raise ValueError(
                f"backbone: expected logits (B, L, V) = {expected}, got {tuple(logits.shape)}; return logits of every "
                "position"
            )
        parts: list[object] = [module.forward_process, *(getattr(sampler, "within", sampler) for sampler in samplers)]
        for unmasking in filter(None, (getattr(part, "unmasking", None) for part in parts)):
            policy, xt = unmasking.policy, chains.xt
            scores = policy(logits, xt)
            if scores.shape != xt.shape:
                raise ValueError(
                    f"policy: expected scores (B, L) = {tuple(xt.shape)}, got {tuple(scores.shape)} from {policy!r}; "
                    "return one score for each position"
                )
            if (scores.isnan() & chains.masked).any() and not logits.isnan().any():
                raise ValueError(
                    f"policy: expected numbers as scores, got NaN from {policy!r} where the logits have none (the mask "
                    "token's is -inf); return numbers"
                )


def what_looks_at_values(module: "GenerativeModule") -> str | None:
    """Say which of backbone, policy and forward process looks at values of tensors; None if none of them does."""
    batch = module.stream.peek()
    chains: Chains = batch["chains"]
    if module.head() is not None:
        chains = chains.map(lambda tensor: tensor[: chains.num_blocks])  # see above
    process, unmasking = module.forward_process, module.forward_process.unmasking
    generator = torch.Generator(module.device).manual_seed(0)
    begun = Chains.fully_masked(chains.x0, chains.prompt_mask, module.mask_id, chains.num_stages)
    stance = torch.compiler.set_stance("force_eager" if module.block_size is None else "default")
    with torch.no_grad(), eval_mode(module), stance, module.trainer.precision_plugin.forward_context():
        logits = module.denoise(chains)
        parts: dict[str, Callable[[], Any]] = {
            f"start of {type(process).__name__}": lambda: process.start(begun, generator),
            f"advance of {type(process).__name__}": lambda: process.advance(chains, logits, 0, generator),
        }
        if unmasking is not None:
            parts = {f"the policy {unmasking.policy!r}": lambda: unmasking.policy(logits, chains.xt), **parts}
        if module.block_size is None:  # attention in blocks is compiled, and known
            parts[f"the backbone {type(module.backbone).__name__}"] = lambda: module.denoise(chains)
        for name, call in parts.items():
            try:
                with NoLooks():  # type: ignore[no-untyped-call]
                    call()
            except Look as look:
                return f"{name}, which looks at a value ({look})"
    return None


def _warn_of_answers_without_end(module: "GenerativeModule", batch: Batch) -> None:
    """Say if training shows the model where answers end, and so does not teach it to end them."""
    eos_id: int | None = getattr(module, "eos_id", None)
    tokens, given = batch["input_ids"], batch["prompt_mask"]
    if eos_id is None:
        return
    after = (~given).flip(1).cumsum(1).flip(1) == 0  # the last position that is predicted
    end = tokens == eos_id
    if "attention_mask" in batch:
        end = end | ~batch["attention_mask"]
    shown = (after & end).any(1) & (~after | end).all(1)
    in_any_order = module.block_size is None and not getattr(module.backbone, "causal", False)
    if shown.any() and (in_any_order or not ((tokens == eos_id) & ~given).any()):
        rank_zero_warn(
            "padding: what follows the answers is given, or padding, so this model does not learn where one ends, and "
            "fills all the room there is when it generates; have EOS predicted there (padding: eos of the text "
            "DataModules), or give no eos_id where the lengths of answers are known"
        )


def samplers_of(module: "GenerativeModule") -> list[AnySampler]:
    """Return the module's own sampler and those of the callbacks, each once."""
    samplers = [module.sampler]
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        samplers += getattr(callback, "samplers", [getattr(callback, "sampler", None) or module.sampler])
    return list({id(sampler): sampler for sampler in samplers}.values())
