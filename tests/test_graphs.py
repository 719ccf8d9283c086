"""Work that is recorded once and replayed."""

from contextlib import contextmanager

import pytest
import torch
from recorder import use_recorder
from torch import nn

from puma_lightning import graphs
from puma_lightning.graphs import CannotRecord, Graph, Look, NoLooks

CPU = torch.device("cpu")


def trained(steps: int, draws: torch.Generator, seeds: bool = True):
    """A small model, its optimizer, and a step of it as a function of memory that stays."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.GELU(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    x, losses, count = torch.zeros(6, 4), torch.zeros(steps), torch.zeros(1, dtype=torch.long)

    def step():
        optimizer.zero_grad(set_to_none=True)
        noise = torch.rand(6, generator=draws)
        loss = (model(x).squeeze(1) - noise).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.index_copy_(0, count, loss.detach()[None])
        count.add_(1)
        return loss.detach()

    return model, x, losses, step


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_a_replayed_step_is_the_step_to_the_last_bit(monkeypatch, warmup):
    """Losses, weights, random numbers, and what is returned; with seeds that are set between the steps."""
    use_recorder(monkeypatch)
    found = []
    for recorded in (False, True):
        draws = torch.Generator()
        model, x, losses, step = trained(8, draws)
        if recorded:
            for _ in range(0 if warmup else 1):
                x.normal_(generator=draws.manual_seed(99))
                step()  # an optimizer makes its moments in the first
            step = Graph(step, CPU, [draws], warmup=warmup)
        elif not warmup:
            x.normal_(generator=draws.manual_seed(99))
            step()
        returned = []
        for i in range(7):
            x.normal_(generator=draws.manual_seed(100 + i))
            draws.manual_seed(i)
            torch.manual_seed(i)
            returned.append(step().clone())
        if recorded:
            assert step.recorded
        found.append((losses, torch.stack(returned), *model.state_dict().values()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert len(set(found[0][1].tolist())) == 7


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x + 1),
        lambda x: torch.arange(2).repeat_interleave(torch.tensor([1, 2])),
    ],
)
def test_a_look_at_a_value_is_an_error_while_recording_and_where_looks_are_refused(monkeypatch, look):
    use_recorder(monkeypatch)
    x = torch.ones(3)
    with pytest.raises(CannotRecord, match="Look"):
        Graph(lambda: look(x.add_(1)), CPU, warmup=0)()
    assert x.tolist() == [1, 1, 1]  # nothing is done by recording
    with pytest.raises(Look), NoLooks():
        look(x)


def test_what_is_no_look_is_none():
    x = torch.arange(6.0).view(2, 3)
    with NoLooks():
        y = x[torch.tensor([1, 0])] + torch.where(x > 1, x, -x)[:, 1:].sum()
        assert torch.rand(3, generator=torch.Generator()).argsort().shape == (3,)
        x[:, 0] = 7.0
    assert y.shape == (2, 3)


def test_a_generator_cannot_be_seeded_while_recording(monkeypatch):
    use_recorder(monkeypatch)
    generator = torch.Generator()
    with pytest.raises(CannotRecord, match="seed"):
        Graph(lambda: torch.rand(2, generator=generator.manual_seed(3)), CPU, [generator], warmup=0)()


def test_on_cuda_it_is_recorded_on_a_stream_of_its_own_with_all_generators(monkeypatch):
    """In the order that PyTorch asks for: generators are known before the recording begins, and work is replayed."""
    said = []

    class CUDAGraph:
        def register_generator_state(self, generator):
            said.append(("generator", generator))

        def replay(self):
            said.append("replay")

    class Stream:
        def __init__(self, device=None):
            self.device = device

        def wait_stream(self, other):
            said.append("wait")

    @contextmanager
    def recording(graph, pool, stream, capture_error_mode):
        said.append(("begin", pool, type(stream)))
        yield
        said.append("end")

    @contextmanager
    def nothing(*_):
        yield

    for name, stand_in in {
        "CUDAGraph": CUDAGraph,
        "graph": recording,
        "Stream": Stream,
        "stream": nothing,
        "device": nothing,
        "current_stream": Stream,
        "set_stream": lambda stream: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs, "_streams", {})
    generator = torch.Generator()
    work = Graph(lambda: said.append("work"), torch.device("cuda", 0), [generator], warmup=1, pool=(0, 1))
    work()
    assert said == ["wait", "work", "wait"] and not work.recorded
    said.clear()
    work()
    assert said == [("generator", generator), ("begin", (0, 1), Stream), "work", "end", "replay"]
    said.clear()
    work()
    assert said == ["replay"] and work.recorded
    assert graphs.can_record(torch.device("cuda")) and not graphs.can_record(CPU)
