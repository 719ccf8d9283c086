"""Weights: reading checkpoints and pretrained models, checking that they fit, and starting from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn

from puma_lightning.data.base import offer_of
from puma_lightning.models.qwen2 import read_qwen2
from puma_lightning.training.checkpoints import CHECKPOINT_KEY, is_sharded, load_checkpoint
from puma_lightning.training.finite import first_non_finite_in
from puma_lightning.training.lightning_internals import loads_weights_in_place, trainer_of

if TYPE_CHECKING:
    from puma_lightning.modules.base import StreamedModule

# A model's vocabulary is often padded to a round number; more than this is another tokenizer's.
MAX_PADDING = 1024


class StartingWeights:
    """The weights of ``init_from``, which a module starts from unless it has others already.

    Args:
        init_from: A checkpoint, a folder with a Qwen2 model, or its name on the hub; None for random weights.
    """

    def __init__(self, init_from: str | None) -> None:
        self.init_from = init_from
        self.loaded = False  # these or others, from a checkpoint or from training

    def load_once(self, module: "StreamedModule") -> None:
        """Load the weights, unless others have been loaded.

        Raises:
            ValueError: If they are not there, or are of another model or tokenizer.
        """
        if self.init_from is not None and not self.loaded:
            module.load_weights(self.init_from)
        self.loaded = True


def load_weights(module: "StreamedModule", path: str) -> None:
    """Give a module the weights of a checkpoint or of a Qwen2 model, and nothing else of it.

    Raises:
        ValueError: If they are not there, or are of another model or tokenizer; or if they are to be judged and do not
            tell in which of several block sizes they were trained last.
    """
    trainer, sizes = trainer_of(module), [] if module.block_size is None else module.block_size.values
    if trainer is not None and trainer.state.fn != "fit" and len(sizes) > 1:
        raise ValueError(
            f"init_from: expected a checkpoint of one block size to judge, got a model with the block sizes {sizes}, "
            "and weights alone do not tell in which they were trained last; judge the checkpoint with --ckpt_path "
            "(ckpt_path=...) instead"
        )
    weights = read_weights(path)
    check_facts(facts_of(module), weights.facts, path)
    per_token = [f"backbone.{name}" for name in getattr(module.backbone, "weights_per_token", [])]
    tensors = fit_vocabulary(weights, per_token, module.vocab_size)
    check_weights(module, tensors, path)
    check_numbers(module, {"state_dict": tensors}, path)
    module.load_state_dict(tensors)
    rank_zero_info(f"Starting from the weights of {path}")


def facts_of(module: "StreamedModule") -> dict[str, Any]:
    """Return what the names and shapes of a module's weights do not show, and a checkpoint of them should say."""
    return {
        "tokenizer": offer_of(trainer_of(module)).tokenizer_fingerprint,
        "shifted": module.shifted,
        **getattr(module.backbone, "settings", {}),
    }


def check_checkpoint(module: "StreamedModule", checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint is of such a module.

    Raises:
        ValueError: If its weights do not fit, mean something else, or are not finite.
    """
    if ("block_size" in checkpoint) != (module.block_size is not None):
        kinds = ["a model without blocks", "a block model"]
        expected, got = kinds if module.block_size is None else reversed(kinds)
        raise ValueError(
            f"ckpt_path: expected a checkpoint of {expected}, which {type(module).__name__} is, got one of {got}; use "
            "the class that the checkpoint was saved from, or start from its weights with init_from"
        )
    trainer = trainer_of(module)
    if module.strict_loading:
        if trainer is None or not loads_weights_in_place(trainer):
            check_weights(module, checkpoint.get("state_dict", {}), "the checkpoint")
        check_facts(facts_of(module), checkpoint.get(CHECKPOINT_KEY, {}).get("facts", {}), "the checkpoint")
    check_numbers(module, checkpoint, "the checkpoint")


def check_numbers(module: "StreamedModule", checkpoint: dict[str, Any], origin: str) -> None:
    """Check that weights, their averages and the moments of their gradients are numbers.

    Raises:
        ValueError: If not: nothing can be learned, or said, from there.
    """
    if name := first_non_finite_in(checkpoint, module):
        raise ValueError(
            f"{origin}: expected numbers, got NaN or infinity in {name}; take an earlier checkpoint, and a lower "
            "learning rate or gradient clipping"
        )


@dataclass(frozen=True)
class Weights:
    """Weights to start a training run from.

    Attributes:
        tensors: By the names they have in our modules.
        facts: What names and shapes do not show, see ``facts_of``.
        origin: Where they are from.
        padded: Whether the vocabulary may hold more tokens than the tokenizer has.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    origin: str
    padded: bool = False


def read_weights(path: str) -> Weights:
    """Read the weights of a Lightning checkpoint (a file), or of a Qwen2 model (a folder or a name on the hub).

    Raises:
        ValueError: If there is nothing there, or it cannot be read.
    """
    if is_sharded(path):
        raise ValueError(
            f"init_from: expected a checkpoint in one file, got shards of one in {path}; put them together with "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    if Path(path).is_file() or path.endswith(".ckpt"):
        checkpoint = load_checkpoint(path)
        facts = checkpoint.get(CHECKPOINT_KEY, {}).get("facts", {})
        return Weights(checkpoint["state_dict"], facts, path)
    tensors, settings = read_qwen2(path)
    tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    return Weights(tensors, {**settings, "shifted": True}, path, padded=True)


def fit_vocabulary(weights: Weights, names: list[str], vocab_size: int) -> dict[str, Tensor]:
    """Bring the weights with a row for every token to a vocabulary size, and say so.

    Args:
        weights: The weights.
        names: Which of them have a row for every token.
        vocab_size: V. New rows are the mean of the old ones; padding beyond the tokenizer's tokens is cut off.

    Returns:
        All tensors.

    Raises:
        ValueError: If more than padding would be cut off.
    """
    tensors = dict(weights.tensors)
    for name in names:
        if name not in tensors:
            continue
        old = tensors[name]
        surplus = len(old) - vocab_size
        if surplus > (MAX_PADDING if weights.padded else 0):
            raise ValueError(
                f"init_from: expected rows for the {vocab_size:,} tokens of this model's vocabulary, got {len(old):,} "
                f"in {name} of {weights.origin}; use the tokenizer that these weights were trained with"
            )
        if surplus > 0:
            tensors[name] = old[:vocab_size]
            rank_zero_info(f"{name}: left out {surplus:,} rows that no token of the tokenizer uses")
        elif -surplus > MAX_PADDING:
            raise ValueError(
                f"init_from: expected rows for the {vocab_size:,} tokens of this model's vocabulary, or a mask token "
                f"fewer, got {len(old):,} in {name} of {weights.origin}; use the tokenizer that these weights were "
                "trained with"
            )
        elif surplus < 0:
            mean = old.float().mean(0, keepdim=True).to(old.dtype)
            tensors[name] = torch.cat([old, mean.expand(-surplus, -1)])
            rank_zero_info(f"{name}: the vocabulary grew from {len(old):,} to {vocab_size:,} (mask token included)")
    return tensors


def check_facts(own: dict[str, Any], saved: dict[str, Any], origin: str) -> None:
    """Check that weights mean in this model what they meant in the one they are from.

    Raises:
        ValueError: If not; says which setting differs.
    """
    advice = {
        "tokenizer": "use the tokenizer it was trained with: the same ids are other words here",
        "shifted": "set `model.init_args.shifted` to {saved}: "
        "an autoregressive model predicts position i+1 at position i, and what is initialised from one goes on so",
    }
    for name, value in saved.items():
        here = own.get(name)
        if value is None or here is None or value == here:
            continue
        if name == "shifted" and not value:
            raise ValueError(
                f"shifted: expected false, as {origin} is no autoregressive model and predicts every position at that "
                f"position, got {here}; start from it in MaskedDiffusion or BlockDiffusion with shifted false"
            )
        wanted = advice.get(name, "set the backbone's {name} to {saved}").format(name=name, saved=str(value).lower())
        raise ValueError(f"{name}: expected {value}, as {origin} has, got {here} in this model; {wanted}")


def check_weights(module: nn.Module, weights: dict[str, Tensor], origin: str) -> None:
    """Check that weights fit a module.

    Raises:
        ValueError: If names or shapes differ; says which.
    """
    own = module.state_dict(keep_vars=True)
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{origin}: expected weights of this model, got others: {', '.join(problems[:3])}{more}; use the settings "
            "that they were trained with"
        )
    first: dict[int, str] = {}
    for name, parameter in own.items():
        twin = first.setdefault(id(parameter), name)
        if twin != name and not torch.equal(weights[twin], weights[name]):
            raise ValueError(
                f"{origin}: expected weights of this model, got others: {twin} and {name} are one weight here and two "
                "different ones there; use the settings that they were trained with (tie_embeddings)"
            )
