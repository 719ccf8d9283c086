"""What a training step moves and computes, counted from its operators; nothing is run, and no GPU is needed.

python benchmarks/bytes.py

The step is taken on tensors without values, in bfloat16 autocast, with the passes over logits that a GPU takes. Every
operator is taken to read its tensors once and to write its results once, as without compilation; views move nothing.
``gigabytes_at_least`` is what a part must move however it is done: what it is given, and what it hands on.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _report import command_line, environment, write
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from puma_lightning import MaskedDiffusion, ProgressiveUnmasking, TransformerBackbone
from puma_lightning.chain.chains import Chains
from puma_lightning.output import head
from puma_lightning.output.losses import masked_cross_entropy
from puma_lightning.training.stream import begin

# The paper's models. Of TinyGSM half of the positions are an answer, and half of these are masked on average.
SHAPES: dict[str, dict[str, Any]] = {
    "sudoku": {
        "backbone": {
            "vocab_size": 11, "hidden_size": 256, "intermediate_size": 768, "num_layers": 8, "num_heads": 8,
            "max_length": 162, "qkv_bias": True, "learned_positions": True,
        },
        "batch": 32, "length": 162, "prompt": 81, "masked": 1296, "stages": 8, "threshold": None, "ema": False,
    },
    "tinygsm": {
        "backbone": {
            "vocab_size": 151_645, "hidden_size": 512, "intermediate_size": 1536, "num_layers": 14, "num_heads": 8,
            "max_length": 512, "qkv_bias": True, "tie_embeddings": True,
        },
        "batch": 32, "length": 512, "prompt": 256, "masked": 4096, "stages": 12, "threshold": 0.9, "ema": True,
    },
}  # fmt: skip


NOTHING = ("detach", "lift_fresh", "_unsafe_view", "empty", "new_empty", "empty_like", "device")  # move no bytes
CHOOSING = ("gather", "index", "embedding")  # read no more of their first tensor than they return
PLACING = ("scatter_", "scatter", "index_put_")  # write no more than what they place
OVERWRITING = ("copy_", "fill_", "zero_")  # do not read what they write over


def _attention(products: int) -> Callable[..., int]:
    """Return what counts so many products of all positions with all positions."""

    def count(*args: Any, out_val: Any = None, **_: Any) -> int:
        batch, heads, length, width = args[0].shape
        return products * 2 * batch * heads * length * length * width

    return count


# What PyTorch has no formula for: two products, and five for the gradients.
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention(2),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention(5),
}


class Counts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up, for the part that is named at the time, operators, bytes and floating-point operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = ""
        self.found: dict[str, Counter[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in NOTHING:
            return out
        arguments = list(_arguments(func, args, kwargs))
        read = [tensor for tensor, argument in arguments if not argument.is_out]
        changed = [tensor for tensor, argument in arguments if _is_written(argument)]
        known = {_place(tensor) for tensor, _ in arguments}
        written = [*changed, *(tensor for tensor in _tensors(out) if _place(tensor) not in known)]
        if name in CHOOSING:
            read = [*written, *read[1:]]
        elif name in PLACING:
            read, written = read[1:], read[-1:]
        elif name in OVERWRITING:
            read = read[1:]
        counts = self.found.setdefault(self.part, Counter())
        flops = flop_registry.get(func.overloadpacket) or ATTENTION.get(name)
        counts.update(operators=1, read=sum(map(_bytes, read)), written=sum(map(_bytes, written)))
        if flops is not None:
            counts["flops"] += flops(*args, **kwargs, out_val=out)
        return out


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, Any]]:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        yield from ((tensor, argument) for tensor in _tensors(value))
    for argument in func._schema.arguments:
        if argument.name in kwargs:
            yield from ((tensor, argument) for tensor in _tensors(kwargs[argument.name]))


def _is_written(argument: Any) -> bool:
    # The gradients that a fused optimizer is said to write too are written only where they are scaled.
    return argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"


def _tensors(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Return what of its memory a tensor shows: a dimension that is expanded is read once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Take the passes over logits, and the chunks, that a GPU takes."""
    before = head.softmax_overwrites, head.CHUNK_BYTES["cpu"]
    head.softmax_overwrites, head.CHUNK_BYTES["cpu"] = (lambda device: False), head.CHUNK_BYTES["cuda"]  # type: ignore[assignment]
    try:
        yield
    finally:
        head.softmax_overwrites, head.CHUNK_BYTES["cpu"] = before


def count(shape: dict[str, Any], process: Any) -> dict[str, Counter[str]]:
    """Count a step, part by part."""
    counts = Counts()
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_a_gpu(), counts:
        counts.part = "set-up"
        backbone = TransformerBackbone(**shape["backbone"])
        mask_id = shape["backbone"]["vocab_size"] - 1
        module = MaskedDiffusion(backbone, mask_id, process)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
        for parameter in module.parameters():  # as after a first step
            optimizer.state[parameter].update(
                step=torch.ones(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter)
            )
        average = [torch.zeros_like(parameter) for parameter in module.parameters()]
        x0 = torch.zeros(shape["batch"], shape["length"], dtype=torch.long)
        given = (torch.arange(shape["length"]) < shape["prompt"]).expand(x0.shape).contiguous()
        clean = {"input_ids": x0, "prompt_mask": given}
        chains = begin(process, clean, mask_id, process.num_stages_at(0), torch.zeros(shape["batch"], dtype=torch.long))
        weights = torch.full((shape["batch"],), 1 / shape["batch"])

        def part(name: str, work: Callable[[], Any]) -> Any:
            counts.part = name
            return work()

        def enter() -> None:
            fresh = begin(process, clean, mask_id, chains.num_stages, chains.stage)
            for name, rows in chains.tensors().items():
                over = chains.done.view(-1, *[1] * (rows.dim() - 1))
                rows.copy_(torch.where(over, fresh.tensors()[name], rows))

        part("chain: sequences enter", enter)
        with torch.autocast("cpu", torch.bfloat16):
            layer = module.head()
            if layer is None:
                logits = part("backbone, forward", lambda: module.denoise(chains))
                loss, predictions = part("head and loss", lambda: _plain_loss(module, chains, weights, logits))
            else:
                states = part("backbone, forward", lambda: module.aligned_states(chains))
                loss, predictions = part(
                    "head and loss",
                    lambda: module._loss_of_masked(
                        states, layer, chains, weights, process.reads() or (), shape["masked"]
                    ),
                )
        part("backward", lambda: loss.backward())
        part("clipping", lambda: nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True))
        part("optimizer", optimizer.step)
        if shape["ema"]:
            part("average", lambda: _average(average, list(module.parameters())))
        part("chain: moves on", lambda: process.advance(chains, predictions, 0))
    del counts.found["set-up"]
    return counts.found


def _plain_loss(module: MaskedDiffusion, chains: Chains, weights: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return (masked_cross_entropy(logits, chains.x0, chains.masked) * weights).sum(), logits.detach()


def _average(average: list[Tensor], weights: list[Any]) -> None:
    torch._foreach_mul_(average, 0.9999)
    torch._foreach_add_(average, torch._foreach_mul([weight.detach() for weight in weights], 1e-4))


def least(shape: dict[str, Any], parameters: int) -> dict[str, int]:
    """Return the bytes that parts must move, however they are done."""
    size = 4 * parameters
    found = {
        "clipping": size,  # the gradients are read for their norm; the factor can join the optimizer's step
        "optimizer": 7 * size,  # weight, gradient and two moments are read; all but the gradient written
    }
    if shape["ema"]:
        found["average"] = 3 * size
    if shape["backbone"].get("tie_embeddings"):
        # Logits stay on the chip: hidden states and the weight are read, and their gradients written.
        width, vocab = shape["backbone"]["hidden_size"], shape["backbone"]["vocab_size"]
        found["head and loss"] = 2 * 4 * width * (shape["masked"] + vocab)
    return found


def table(counted: dict[str, Counter[str]], shape: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the counts of each part and of all, with the times that a GPU takes for bytes and operations at best."""
    backbone = TransformerBackbone(**shape["backbone"])
    fewest = least(shape, sum(parameter.numel() for parameter in backbone.parameters()))
    rows: dict[str, Any] = {}
    for name, counts in [*counted.items(), ("all", sum(counted.values(), Counter()))]:
        moved = counts["read"] + counts["written"]
        rows[name] = {
            "operators": counts["operators"],
            "gigabytes": round(moved / 1e9, 3),
            "teraflop": round(counts["flops"] / 1e12, 4),
            "ms_for_bytes": round(moved / options.tbytes / 1e9, 3),
            "ms_for_flop": round(counts["flops"] / options.tflops / 1e9, 3),
        }
        if name in fewest:
            rows[name]["gigabytes_at_least"] = round(fewest[name] / 1e9, 3)
    return rows


def show(name: str, rows: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    columns = ["operators", "gigabytes", "gigabytes_at_least", "teraflop", "ms_for_bytes", "ms_for_flop"]
    print(f"{name:24}" + "".join(f"{column:>20}" for column in columns))
    for part, row in rows.items():
        print(f"{part:24}" + "".join(f"{row.get(column, ''):>20}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tflops", type=float, default=790.0, help="of a GPU: products in bfloat16, 1e12 a second")
    parser.add_argument("--tbytes", type=float, default=4.0, help="of a GPU: bandwidth, 1e12 bytes a second")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bytes.json"))
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": command_line(), **environment(), "assumed": {"tflops": options.tflops, "tbytes": options.tbytes},
        "shapes": {},
    }  # fmt: skip
    for name in options.shapes:
        shape = SHAPES[name]
        process = ProgressiveUnmasking(shape["stages"], threshold=shape["threshold"])
        rows = table(count(shape, process), shape, options)
        logits = shape["masked"] * shape["backbone"]["vocab_size"]
        report["shapes"][name] = {"shape": shape, "parts": rows}
        if "head and loss" in rows and shape["backbone"]["vocab_size"] >= 4096:
            report["shapes"][name]["bytes_a_logit"] = round(rows["head and loss"]["gigabytes"] * 1e9 / logits, 1)
        show(name, rows)
    write(options.out, report)


if __name__ == "__main__":
    main()
