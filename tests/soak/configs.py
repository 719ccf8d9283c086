"""Random runs from the whole space of settings, as plain values that a report can show."""

import random
from typing import Any

Config = dict[str, Any]
# Ragged: the user's own loaders of sequences that are padded. Stream: rows tokenised while the model trains on them.
DATA = ("sudoku", "sudoku sequence", "lines", "packed", "ragged", "stream")
# Of these each run of a trial has another number of processes, see ``dealt.py``.
NUMBERED = ("numbered sampler", "numbered stream", "numbered stream without state")


def random_config(rng: random.Random, processes: int | None = None, data: str | None = None) -> Config:
    """Draw what is trained on what, and how; ``processes`` fixes their number, ``data`` the data."""
    drawn = rng.choice((*DATA, rng.choice(NUMBERED)))
    data = data or drawn
    numbered = data in NUMBERED
    length = {"sudoku sequence": 32}.get(data, 16)
    # A model from the left needs a given first position.
    kind = rng.choice(["masked", "masked", "block", *(["left to right"] if data == "sudoku sequence" else [])])
    accumulate = rng.choice([1, 1, 2, 3, {"1": 2}])
    steps = rng.randint(10, 24)
    config: Config = {
        "data": data,
        "kind": kind,
        "batch_size": rng.choice([2, 4, 5]) if data != "packed" else 2,  # rows are short, and few when packed
        "workers": rng.choice([0, 0, 0, 1, 2]),
        "num_train": rng.choice([47, 64, 90]),
        "process": _process(rng),
        "block_size": _block_size(rng, length) if kind == "block" else None,
        "shifted": kind == "masked" and data == "sudoku sequence" and rng.random() < 0.3,
        "dropout": rng.choice([0.0, 0.2]),
        "optimizer": rng.choice(["adamw", "fused adamw", "fused adamw", "sgd", "nesterov"]),
        "scheduler": rng.random() < 0.7,
        "ema": rng.random() < 0.4,
        "clip": rng.choice([None, 0.5]),
        "precision": rng.choice(["32-true", "32-true", "bf16-mixed", "64-true"]),
        "accumulate": accumulate,
        "save_every": rng.randint(1, 5),
        "save_best": rng.random() < 0.4,
        "save_on_exception": rng.random() < 0.3 and not numbered,
        "generate": rng.random() < 0.3,
        "val_check_interval": rng.choice([None, 0.5, 0.34]),
        "limit_train_batches": rng.choice([None, None, 0.5, 7]),
        "overfit_batches": rng.choice([0, 0, 0, 0, 3]) if not numbered else 0,
        "padding": rng.choice(["first_eos", "none"]),
        "end_at_eos": rng.random() < 0.3 and not data.startswith(("sudoku", "numbered")),
        "seed": rng.randrange(1000),
        "processes": processes or rng.choice([1, 1, 2]),
    }
    if numbered:  # few, so that there are several passes; three batches for three processes, so that a third is one
        config["num_train"] = 3 * 3 * config["batch_size"] + rng.randrange(3)
        config["limit_train_batches"] = None
        steps *= 3
    # Of the runs that are stopped and resumed some take so many steps at a time, the one left alone does not.
    several = rng.choice([1, 1, 2, 3])
    config["steps_per_execution"] = several
    # And some record their steps, where it can be done.
    config["captured"] = rng.choice([False, "auto"])
    config["save_every"] *= several
    steps = -(-steps // several) * several
    # Accumulation that changes does so at an epoch.
    in_epochs = isinstance(accumulate, dict) or rng.random() < 0.3
    config |= {"max_epochs": rng.randint(2, 3) * (1 + numbered), "max_steps": -1} if in_epochs else {"max_steps": steps}
    return config


def _process(rng: random.Random) -> dict[str, Any]:
    name = rng.choice(["puma", "puma", "puma", "random", "mixed", "self-aligned"])
    if name in ("random", "self-aligned"):
        return {"name": name}
    return {
        "name": name,
        "num_stages": rng.choice([1, 3, 8, [[0, 2], [4, 3], [9, 6]]]),
        "threshold": rng.choice([None, 0.2, 0.5]),
        "policy": rng.choice(["Confidence", "Margin", "Entropy", "RandomOrder", "LeftToRight"]),
    }


def _block_size(rng: random.Random, length: int) -> Any:
    return rng.choice([4, 8, length, [[0, 4], [5, 8], [11, length]]])
