"""The training step as work on tensors that stay where they are, recorded once as a CUDA graph and then replayed.

A step queues more than a thousand kernels, one by one, and small models are done with each before the host has queued
the next. Recorded, a step is two launches: fresh sequences enter the batch, and all the rest, from the forward pass to
the chains moving on. What of it is the host's (seeds, learning rates, counters, logs) is done between the launches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn

from puma_lightning import graphs
from puma_lightning.chain.chains import Chains
from puma_lightning.output.prediction import Prediction
from puma_lightning.training.averaging import AverageInStep, averages_in_step
from puma_lightning.training.lightning_internals import (
    OwnStep,
    within_training_step,
)
from puma_lightning.training.obstacles import LENGTHS, what_stands_in_the_way
from puma_lightning.training.sequences import derived_seed, seed_device
from puma_lightning.training.stream import begin
from puma_lightning.training.supply import DeviceSupply, OtherLength

if TYPE_CHECKING:
    from puma_lightning.modules.base import StreamedModule

VARYING = ("params", "lr", "initial_lr", "capturable")  # of an optimizer, and read from tensors
UNUSUAL = 16  # steps in a row that are not recorded, after which it is said
BUCKET = 512  # masked positions by which two recordings for a large vocabulary differ


class CapturedStep:
    """Has a run take recorded steps, where that is possible.

    A step computes what it does otherwise: the same sequences in the same order, the same loss, gradients, clipping and
    optimizer. The masks with which sequences enter are drawn on the device and not on the CPU, so on a GPU their random
    numbers are others. In the first steps of a kind nothing is recorded yet.

    Args:
        captured: Whether to record steps; ``auto`` for where nothing stands in the way, which is looked for when
            training starts.

    Raises:
        ValueError: If it is none of true, false and ``auto``.
    """

    def __init__(self, captured: bool | Literal["auto"] = False) -> None:
        if captured != "auto" and type(captured) is not bool:
            raise ValueError(f"captured: expected true, false or auto, got {captured!r}; auto records where it can")
        self.captured = captured
        self._rows: RowsOnDevice | None = None
        self._instead: OwnStep | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return CapturedStep, (self.captured,)  # a run is not part of copies of a module

    def begin(self, module: "StreamedModule") -> None:
        """Take recorded steps from now on.

        Raises:
            ValueError: If steps are to be recorded and cannot be; says what stands in the way.
        """
        self.end()
        if not self.captured:
            return
        obstacle = what_stands_in_the_way(module)
        if obstacle is None:
            self._rows = module.stream.on_device = RowsOnDevice(module, self.captured is True, self._give_up)
            self._instead = OwnStep(module.trainer, partial(self._step, module))
        elif self.captured is True:
            raise _refusal(obstacle)
        elif graphs.can_record(module.device):
            rank_zero_warn(f"captured: steps are not recorded, and a GPU may wait for the host: {obstacle}")

    def _give_up(self, obstacle: str) -> None:
        """Take no recorded steps from here on."""
        if self.captured is True:
            raise _refusal(obstacle)
        rank_zero_warn(f"captured: steps are not recorded from here on: {obstacle}")
        self.end()

    def end(self) -> None:
        """Leave Trainer and stream as they were."""
        if self._instead is not None:
            self._instead.remove()
        if self._rows is not None:
            self._rows.close()
        self._rows = self._instead = None

    @property
    def is_active(self) -> bool:
        """Whether the steps of the run are recorded."""
        return self._rows is not None

    @property
    def is_being_taken(self) -> bool:
        """Whether the caller is part of a step that is, or will be, recorded."""
        return self._rows is not None and self._rows.step is not None

    def advance(self, predictions: Tensor | Prediction) -> None:
        """Move the chains in place, as part of a step."""
        assert self._rows is not None
        self._rows.advance(predictions)

    def _step(self, module: "StreamedModule", batch: Any, first: bool, last: bool) -> Tensor:
        """Take a step, and do the host's part of it; the loss, (), is the caller's to keep."""
        assert self._rows is not None
        module.resume.note_backward(module.stream)
        if last:
            module.resume.note_optimizer_step(module.stream)
        loss = self._rows.train(first, last)
        module.finite.observe(loss, module.trainer)
        with within_training_step(module):
            module.log_step(loss, batch)
        return loss


class RowsOnDevice:
    """The rows of a stream's batches, changed in place, and the recorded work that changes them.

    Args:
        module: A module whose training begins.
        must: Whether a step that cannot be recorded is an error.
        give_up: Called with what the rows cannot hold, to have the stream take care of them again.

    Attributes:
        step: The optimizer step that is being taken; None between steps.
        num_masked: In a step, a number that is at least that of the positions that are predicted; None if it is not
            needed.
    """

    def __init__(self, module: "StreamedModule", must: bool, give_up: Callable[[str], None]) -> None:
        self.module, self.stream, self.device = module, module.stream, module.stream.device
        self.step: int | None = None
        self.num_masked: int | None = None
        self.generators = {name: torch.Generator(self.device) for name in ("start", "advance")}
        self.supply: DeviceSupply | None = None
        self._must, self._give_up = must, give_up
        self._failed: str | None = None  # what was said when a step could not be recorded
        self._memory: dict[tuple[Any, ...], Any] = {}
        self._groups: dict[int, _Group] = {}
        self._after: Chains | None = None  # of a step that is being taken
        self._optimizer = module.trainer.optimizers[0]
        # Where the gradients of several batches are added up, once a whole step has been taken.
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._unusual = 0  # steps in a row that were taken unrecorded, although they could have been
        self._take_settings()
        self._averages = averages_in_step(module.trainer, module)
        self._recorded = False  # whether a step has been recorded
        for state in self._optimizer.state.values():
            state.update({n: s.to(self.device) for n, s in state.items() if isinstance(s, Tensor) and not s.dim()})

    def refilled(self, index: int) -> Chains:
        """Return the rows of an accumulation group, with fresh sequences in place of those whose chains are over.

        What a step changes is a copy, so that hooks see what has been trained on; the sequences stay until the next.
        """
        stream, group = self.stream, self._groups.get(index)
        if self._failed is not None:
            self._give_up(self._failed)
            return stream.refilled_by_host(index)
        if stream.pool_name is not None:
            return self._drawn_from_pool(index)
        if group is None:
            chains = stream.refilled_by_host(index)
            length = chains.num_blocks * chains.x0.shape[1]
            if self.supply is None:
                self.supply = DeviceSupply(stream.sequences, stream.batch_size, length, self.device)
            if chains.attention_mask is not None or length != self.supply.length:
                self._give_up(LENGTHS)
                return chains
            return self._take_over(index, chains).as_they_are()
        if group.chains is not stream.groups[index]:
            # The step before cut blocks of another size, or counted in other stages.
            moved = stream.groups[index]
            assert moved is not None
            group = self._take_over(index, moved)
        assert self.supply is not None
        try:
            self.supply.make_ready()
        except OtherLength:
            self._give_up(LENGTHS)
            return stream.refilled_by_host(index)
        self._seed("start", stream.step)
        try:
            group.refill()
        except graphs.CannotRecord as error:  # of which nothing has been done
            self._give_up(f"a forward process that cannot: {error}")
            return stream.refilled_by_host(index)
        return group.as_they_are()

    def _drawn_from_pool(self, index: int) -> Chains:
        """Return the rows of an accumulation group, which the host makes anew for every step, at their place."""
        group, chains = self._groups.get(index), self.stream.refilled_by_host(index)
        if chains.attention_mask is not None:
            self._give_up(LENGTHS)
            return chains
        if group is None or _kind(group.chains) != _kind(chains):
            group = self._take_over(index, chains)
        else:
            group.write(chains)
            group.predicted.copy_(group.count_predicted())
            self.stream.groups[index] = group.chains
        return group.as_they_are()

    def _take_over(self, index: int, chains: Chains) -> "_Group":
        if index in self._groups:
            self._groups[index].forget()
        kind = _kind(chains)
        if kind not in self._memory:
            # Groups of one kind share memory. That of another kind is free when all have left it.
            self._memory[kind] = graphs.memory_pool(self.device)
        group = self._groups[index] = _Group(self, index, chains.map(torch.clone), self._memory[kind])
        self.stream.groups[index] = group.chains
        return group

    def train(self, first: bool, last: bool) -> Tensor:
        """Train on the batch yielded last, and move its chains.

        Args:
            first: Whether it is the first batch of an optimizer step.
            last: Whether it is the last one of it.

        Returns:
            The loss, ().
        """
        module: Any = self.module
        stream = self.stream
        group = self._groups[(stream.step - 1) % len(stream.groups)]
        self._seed("advance", stream.step - 1)
        if changed := self._optimizer_settings() != self._settings:
            self._take_settings()
        for rate, settings in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(settings["lr"])
        self.step = module.global_step
        self._keep_gradients()
        if module.head() is not None:
            most = group.chains.xt.numel()
            self.num_masked = min(most, -(-int(group.predicted) // BUCKET) * BUCKET)
        parts = module.trainer.accumulate_grad_batches
        due = [average for average in self._averages if last and average.is_due(module.trainer)]
        work = partial(self._train, group, parts, first, last, due)
        kind = (parts, first, last, first and bool(self._gradients), *(self._averages.index(a) for a in due))
        usual = not changed and self._is_usual(group) and not any(average.is_first for average in due)
        self._unusual = 0 if usual else self._unusual + 1
        if self._unusual == UNUSUAL:
            rank_zero_warn(
                f"captured: {UNUSUAL} steps in a row were not recorded, as before each of them something has changed "
                "that a recording holds: settings of the optimizer other than its rate, or which weights are trained"
            )
        try:
            if not usual:
                with graphs.aside(self.device):
                    loss = work()
            else:
                loss = self._graph(group, kind, work)()
        except graphs.CannotRecord as error:
            loss = self._unrecorded(error, work)
        finally:
            self.step = self.num_masked = None
        for average in due:
            average.note(module.trainer)
        if last and len(stream.groups) > 1 and not self._gradients:
            self._gradients = [(p, p.grad) for p in module.parameters() if p.grad is not None]
        if self.supply is not None:
            self.supply.note()
        if stream.pool_name is not None:
            moved = stream.groups[group.index]
            assert moved is not None
            stream.note(group.index, moved)
        return loss.clone()

    def _keep_gradients(self) -> None:
        """Have gradients be where recordings know them; a validation takes them away."""
        for parameter, kept in self._gradients:
            if parameter.grad is None:
                kept.zero_()
            elif parameter.grad is not kept:
                kept.copy_(parameter.grad)
            parameter.grad = kept

    def _graph(self, group: "_Group", kind: tuple[Any, ...], work: Callable[[], Tensor]) -> graphs.Graph[Tensor]:
        key = (*kind, self.num_masked)
        if key not in group.work:
            # What differs in its number of masked positions alone has nothing more to set up.
            alike = any(other[:-1] == kind and graph.recorded for other, graph in group.work.items())
            warmup = 0 if alike else 1 if self._recorded else 3
            generators = [self.generators["advance"]]
            group.work[key] = graphs.Graph(work, self.device, generators, warmup, group.pool)
        self._recorded |= group.work[key].recorded
        return group.work[key]

    def _is_usual(self, group: "_Group") -> bool:
        """Tell whether the step changes nothing that recordings were made with."""
        assert self.step is not None
        process, size = self.stream.process, self.stream.block_size
        return process.num_stages_at(self.step) == group.chains.num_stages and (
            size is None or size.at(self.step) == group.chains.x0.shape[1]
        )

    def _train(self, group: "_Group", parts: int, first: bool, last: bool, due: list[AverageInStep]) -> Tensor:
        """Take a step as Lightning does: this is what is recorded."""
        module: Any = self.module
        trainer, optimizer = module.trainer, self._optimizer
        if first:
            # The gradients of several batches are added up where they are.
            optimizer.zero_grad(set_to_none=not self._gradients)
        with trainer.precision_plugin.train_step_context():
            loss: Any = module.training_step(self.stream.batch_of(group.chains), 0)
        (loss / parts).backward()
        if last:
            clip: Any = (trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
            module.configure_gradient_clipping(optimizer, *clip)
            with self._rates_on_device():
                optimizer.step()
        for average in due:
            average.update()
        # Only now: the backward pass reads the tokens.
        self._write(group)
        return cast(Tensor, loss.detach())

    def advance(self, predictions: Tensor | Prediction) -> None:
        """Find where the chains of the batch yielded last move to."""
        assert self.step is not None
        index = (self.stream.step - 1) % len(self.stream.groups)
        self._after = self.stream.moved(index, predictions, self.step, self.generators["advance"])

    def _write(self, group: "_Group") -> None:
        """Move them there: in place, if they can be."""
        after, self._after = self._after, None
        assert after is not None
        if _kind(after) == _kind(group.chains):
            group.write(after)
        else:
            self.stream.groups[group.index] = after

    def settle(self) -> None:
        """Count all sequences as taken that are in the rows, or were; the host waits for the device."""
        if self.supply is not None:
            self.supply.settle()

    def close(self) -> None:
        """Have the stream go on by itself."""
        self.settle()
        self.stream.sequences.give_back()
        self.stream.by_host_again()

    def _seed(self, name: Literal["start", "advance"], step: int) -> None:
        self.generators[name].manual_seed(self.stream.seed_of(step, name))

    def _take_settings(self) -> None:
        """Record steps with the settings that the optimizer has now."""
        self._settings = self._optimizer_settings()
        for group in self._groups.values():
            group.work.clear()
        self._gradients = []
        # On a CPU float64, as Python's numbers are.
        exact = torch.float32 if self.device.type == "cuda" else torch.float64
        self._rates = [torch.zeros((), dtype=exact, device=self.device) for _ in self._optimizer.param_groups]

    def _optimizer_settings(self) -> list[dict[str, Any]]:
        """Return what a recording holds as numbers: settings of the optimizer, and which weights are trained."""
        found: list[dict[str, Any]] = []
        for group in self._optimizer.param_groups:
            found.append({name: value for name, value in group.items() if name not in VARYING})
            found[-1]["trained"] = [parameter.requires_grad for parameter in group["params"]]
        return found

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Have the optimizer read its learning rates from the device; schedulers and checkpoints know numbers."""
        groups = self._optimizer.param_groups
        before = [(group["lr"], group["capturable"]) for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group.update(lr=rate, capturable=rate.is_cuda)  # a word that optimizers refuse on a CPU
        try:
            yield
        finally:
            for group, (rate, capturable) in zip(groups, before, strict=True):
                group.update(lr=rate, capturable=capturable)

    def _unrecorded(self, error: graphs.CannotRecord, work: Callable[[], Tensor]) -> Tensor:
        """Take a step that could not be recorded, of which nothing has been done."""
        if self._must:
            raise _refusal(f"a step that cannot: {error}") from error
        # Nothing is recorded any more: CUDA may not be as it was.
        self._failed = f"a step that cannot: {error}"
        graphs.recover(self.device, [graphs.default_generator(self.device), self.generators["advance"]])
        if len(self.stream.groups) == 1:
            self._optimizer.zero_grad(set_to_none=True)
        seed = derived_seed(self.stream.seed, self.module.global_rank, self.stream.step)
        seed_device(seed, self.device)
        self._seed("advance", self.stream.step - 1)
        with graphs.aside(self.device):
            return work()


class _Group:
    """The rows of one accumulation group, and the work on them."""

    def __init__(self, rows: RowsOnDevice, index: int, chains: Chains, pool: Any) -> None:
        self.rows, self.index, self.chains, self.pool = rows, index, chains, pool
        self.predicted = self.count_predicted()
        self.work: dict[tuple[Any, ...], graphs.Graph[Tensor]] = {}
        self.refill = graphs.Graph(self._refill, rows.device, [rows.generators["start"]], pool=pool)

    def forget(self) -> None:
        """Let go of what was recorded, whose work holds this in turn."""
        self.work.clear()
        del self.refill

    def as_they_are(self) -> Chains:
        """Return the chains as a step would not change them."""
        now = self.chains
        return replace(now, xt=now.xt.clone(), stage=now.stage.clone(), done=now.done.clone())

    def write(self, chains: Chains) -> None:
        """Change the rows in place."""
        now = chains.tensors()
        for name, tensor in self.chains.tensors().items():
            if now[name] is not tensor:
                tensor.copy_(now[name])

    def _refill(self) -> None:
        """Put the upcoming sequences into the rows whose chains are all over: the first into the first, and so on."""
        stream, supply, chains = self.rows.stream, self.rows.supply, self.chains
        assert supply is not None
        over = chains.done.view(stream.batch_size, -1).all(1)
        size = None if stream.block_size is None else chains.x0.shape[1]
        stage = torch.zeros_like(over, dtype=torch.long)
        fresh = begin(
            stream.process,
            supply.upcoming(),
            stream.mask_id,
            chains.num_stages,
            stage,
            size,
            self.rows.generators["start"],
        )
        supply.take(over.sum())
        place = (over.cumsum(0) - 1).clamp_min(0)
        source = (place[:, None] * chains.num_blocks + torch.arange(chains.num_blocks, device=over.device)).flatten()
        entering = over.repeat_interleave(chains.num_blocks)
        for name, rows in chains.tensors().items():
            new = fresh.tensors()[name][source]
            rows.copy_(torch.where(entering.view(-1, *[1] * (rows.dim() - 1)), new, rows))
        self.predicted.copy_(self.count_predicted())

    def count_predicted(self) -> Tensor:
        """Count the positions that are predicted."""
        return self.rows.module.predicted_positions(self.rows.stream.batch_of(self.chains)).sum()


def _kind(chains: Chains) -> tuple[Any, ...]:
    """Tell what must be the same of chains for one to be written in the place of another."""
    return chains.num_stages, chains.xt.shape


def _refusal(obstacle: str) -> ValueError:
    return ValueError(
        f"captured: expected a training step that can be recorded, got {obstacle}; change that, or set captured to "
        "false"
    )
