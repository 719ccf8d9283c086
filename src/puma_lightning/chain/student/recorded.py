"""Passes of a sampler that are recorded for the shape of a batch, and replayed by later passes and later batches."""

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from puma_lightning.chain.student.sample import Sample
from puma_lightning.graphs import Graph, NoLooks, default_generator, memory_pool, recover


@runtime_checkable
class Recordable(Protocol):
    """A model whose passes may be recorded: what it predicts depends on its weights and on its inputs.

    Its Python is run once, when a pass is recorded. A public attribute of it that is another number or tensor later has
    passes recorded anew; other things that it reads do not.

    Attributes:
        model: Has the weights.
        passes: Where recorded passes are kept; None if this model's cannot be recorded.
        per_position: Whether ``predict_masked`` takes a bound on the number of masked positions, ``number``.

    Example:
        >>> isinstance(torch.nn.Linear(2, 2), Recordable)
        False
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def passes(self) -> "Passes | None": ...

    @property
    def per_position(self) -> bool: ...

    def inputs(self) -> dict[str, Tensor]:
        """Return what it knows of the rows of a batch besides xt, (B, ...) each."""

    def with_inputs(self, inputs: dict[str, Tensor]) -> Any:
        """Return the same model for rows of which it knows this."""


# Takes a pass in place, given a model, the sample so far, the number of the pass (a tensor, () int64, which it raises),
# a generator, and a bound on the number of masked positions, or None.
TakePass = Callable[[Any, Sample, Tensor, torch.Generator | None, int | None], None]


class RecordedPasses:
    """The passes over batches of one shape, on tensors that stay where they are.

    A pass of a model or policy that looks at a value cannot be recorded. It is taken as it is, with a warning.

    Args:
        take: Takes a pass in place; it must depend on nothing that changes but the tensors that it is given.
        model: The model, for a batch of the shape.
        sample: A sample of the shape.
        generator: A generator where there is one: None draws from the device's own.
        pool: Memory that is shared with other recorded passes.
        name: What the passes are called in a warning.

    Attributes:
        sample: The sample so far, whose tensors are changed in place.
        refused: Whether the passes cannot be recorded.

    Example:
        Where nothing can be recorded a pass is taken as it is:

        >>> class Canvas:
        ...     def inputs(self):
        ...         return {}
        ...     def with_inputs(self, inputs):
        ...         return self
        >>> def take(model, sample, step, generator, number):
        ...     sample.tokens.fill_(7)
        >>> xt = torch.tensor([[5, 9]])
        >>> passes = RecordedPasses(take, Canvas(), Sample.of_masked(xt, 9), None)
        >>> passes.begin(Canvas(), Sample.of_masked(xt, 9), None)
        >>> passes()
        >>> passes.end(None).tokens
        tensor([[7, 7]])
    """

    def __init__(
        self,
        take: TakePass,
        model: Any,
        sample: Sample,
        generator: torch.Generator | None,
        pool: Any = None,
        name: str = "Sampler",
    ) -> None:
        self._take = take
        self._device = sample.tokens.device
        self._pool, self._name = pool, name
        self._graphs: dict[int | None, Graph[None]] = {}
        self._generator = None if generator is None else torch.Generator(self._device)
        # Made in evaluation, they are used outside of it as well, where inference tensors cannot be changed.
        with torch.inference_mode(False):
            self._inputs = {name: torch.empty_like(value) for name, value in model.inputs().items()}
            self._step = torch.zeros((), dtype=torch.long, device=self._device)
            self.sample = Sample(*(torch.empty_like(x) for x in (sample.tokens, sample.reveal_step, sample.nfe)))
        self._model = model.with_inputs(self._inputs)
        self.refused = False

    def begin(self, model: Any, sample: Sample, generator: torch.Generator | None) -> None:
        """Begin a batch of the same shape, from a sample of which nothing is revealed."""
        for name, value in model.inputs().items():
            self._inputs[name].copy_(value)
        self.sample.tokens.copy_(sample.tokens)
        self.sample.reveal_step.copy_(sample.reveal_step)
        self.sample.nfe.copy_(sample.nfe)
        self._step.zero_()
        if self._generator is not None and generator is not None:
            # A graph draws from the generator that it was recorded with.
            self._generator.set_state(generator.get_state())

    def end(self, generator: torch.Generator | None) -> Sample:
        """Return the completed batch; the generator is moved on to where its draws have come."""
        if self._generator is not None and generator is not None:
            generator.set_state(self._generator.get_state())
        return Sample(self.sample.tokens.clone(), self.sample.reveal_step.clone(), self.sample.nfe.clone())

    def __call__(self, number: int | None = None) -> None:
        """Take a pass, given a bound on the number of masked positions if ``take`` wants one."""
        graph = self._graphs.get(number)
        if graph is not None and graph.recorded:
            graph()
            return
        with _as_recorded(self._device):
            if self.refused:
                self._pass(number)
                return
            generators = [default_generator(self._device), *([] if self._generator is None else [self._generator])]
            before = [generator.get_state() for generator in generators]
            try:
                self._record(number)
            except RuntimeError as error:
                # Nothing is done yet: a pass changes its tensors at its end, and recording does not run it.
                self.refused = True
                self.drop()
                recover(self._device, generators)
                for generator, state in zip(generators, before, strict=True):
                    generator.set_state(state)
                self._pass(number)  # which raises the error again, if it was none of recording
                warnings.warn(
                    f"{self._name}: expected a model and a policy that look at no value of a tensor, so that a pass "
                    f"can be recorded and replayed, got {type(error).__name__}: {error}; samples are the same without, "
                    "but take longer: leave out .item(), branches on values and shapes that depend on them",
                    stacklevel=2,
                )

    def drop(self) -> None:
        """Forget what was recorded, whose memory is free then."""
        self._graphs.clear()

    def _record(self, number: int | None) -> None:
        """Take a pass that leads to its being recorded."""
        if not self._graphs:
            self._graphs[number] = self._graph(number, warmup=2)
            # A recording that fails is not undone on CUDA without a trace, so looks are looked for first. Compiled code
            # would never be compiled if it were met here first.
            with torch.compiler.set_stance("force_eager"), NoLooks():  # type: ignore[no-untyped-call]
                self._pass(number)
            return
        if number not in self._graphs:
            self._graphs[number] = self._graph(number, warmup=1)
        self._graphs[number]()

    def _graph(self, number: int | None, warmup: int) -> Graph[None]:
        generators = [] if self._generator is None else [self._generator]
        return Graph(partial(self._pass, number), self._device, generators, warmup, self._pool)

    def _pass(self, number: int | None) -> None:
        self._take(self._model, self.sample, self._step, self._generator, number)


class Passes:
    """The recorded passes of a model, by what they were recorded for.

    A model holds its own, so that they end with it; they hold the model in turn. A copy of a model, or what is
    unpickled, begins without any. All are dropped when a weight lies elsewhere in memory, as a graph reads the memory
    that it was recorded with, or when a plain attribute of a part of the model, such as its mode, is another. Weights
    that are changed in place are seen by what is replayed.

    Attributes:
        MOST: How many batch shapes and samplers passes are kept for; beyond it all are dropped.

    Example:
        >>> import copy
        >>> passes = Passes()
        >>> made = passes.of(torch.nn.Linear(2, 2), "a shape", lambda pool: "recorded passes")
        >>> len(passes), len(copy.deepcopy(passes))
        (1, 0)
    """

    MOST = 64

    def __init__(self) -> None:
        self._kept: dict[Hashable, RecordedPasses] = {}
        self._memory: list[Any] = []
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[Any, ...]:
        return Passes, ()

    def of(self, model: nn.Module, key: Hashable, make: Callable[[Any], RecordedPasses]) -> RecordedPasses:
        """Return the passes for a key, made if there are none.

        Args:
            model: The model whose passes these are.
            key: All that a pass depends on but the values of tensors.
            make: Makes them, given a memory pool.
        """
        memory = _memory_of(model)
        new = key not in self._kept and len(self._kept) >= self.MOST
        if new or not _same(memory, self._memory):
            for passes in self._kept.values():
                passes.drop()
            self._kept, self._memory, self._pool = {}, memory, None
        if key not in self._kept:
            if self._pool is None:
                self._pool = memory_pool(next((p.device for p in model.parameters()), torch.device("cpu")))
            self._kept[key] = make(self._pool)
        return self._kept[key]


def state_of(thing: Any) -> list[Any]:
    """Return what is plain among the public attributes of an object, and where its tensors lie, as (owner, value).

    Example:
        >>> module = torch.nn.Dropout(0.5)
        >>> [value for owner, value in state_of(module)]
        [('training', True), ('p', 0.5), ('inplace', False)]
    """
    found: list[Any] = []
    for name, value in getattr(thing, "__dict__", {}).items():
        if isinstance(value, Tensor):
            found.append((value, value.data_ptr()))
        elif name[0] != "_" and isinstance(value, (bool, int, float, str, type(None))):
            found.append((thing, (name, value)))
    return found


def _memory_of(model: nn.Module) -> list[Any]:
    """Return all that passes were recorded with but the values of tensors, as (owner, value)."""
    tensors = [(tensor, tensor.data_ptr()) for tensor in (*model.parameters(), *model.buffers())]
    return [*tensors, *(entry for part in model.modules() for entry in state_of(part))]


def _same(one: list[Any], other: list[Any]) -> bool:
    """Tell whether all is as it was. What is compared is also kept, so that nothing else can come to lie there."""
    return len(one) == len(other) and all(a is b and x == y for (a, x), (b, y) in zip(one, other, strict=True))


@contextmanager
def _as_recorded(device: torch.device) -> Iterator[None]:
    """Run a pass in the modes in which it is recorded, whatever those around it are."""
    kind = device.type
    autocast: dict[str, Any] = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
    # Autocast keeps copies of weights: a graph that read one would not see that the weight has changed, or is gone.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, **autocast, cache_enabled=False):
        yield
