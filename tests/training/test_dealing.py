"""Sequences dealt to another number of ranks: of every pass each is taken once, whatever the numbers were before."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puma_lightning.training.dealing import Passes, left_in_queue

few = settings(max_examples=60, deadline=None)
eras = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), max_size=3)


@few
@given(size=st.integers(4, 15), eras=eras, ranks=st.integers(1, 4))
def test_every_sequence_of_every_pass_is_taken_once(size, eras, ranks):
    """By one of the ranks of one of the eras; each takes its share in the order of the passes."""
    orders = [torch.randperm(size, generator=torch.Generator().manual_seed(i)) for i in range(200)]
    passes = 14  # more than 40 sequences of each of four ranks
    taken: Counter[tuple[int, int]] = Counter()
    for number, era in enumerate(eras):
        left = Passes(size, eras[:number])
        for rank, more in enumerate(era):
            for i, order in enumerate(orders):
                mine = left.rest(i, order)[rank :: len(era)][:more].tolist()
                more -= len(mine)
                taken.update((i, each) for each in mine)
            assert more == 0
    left = Passes(size, eras)
    passes = max([i for i, _ in taken], default=0) + 1
    for rank in range(ranks):
        for i in range(passes):
            taken.update((i, each) for each in left.rest(i, orders[i])[rank::ranks].tolist())
    assert taken == Counter((i, each) for i in range(passes) for each in range(size))


@few
@given(size=st.integers(4, 15), eras=eras, ranks=st.integers(1, 4), position=st.integers(0, 60))
def test_a_position_is_found(size, eras, ranks, position):
    """As if all before had been taken one by one."""
    passes = Passes(size, eras)
    for rank in range(ranks):
        number, skip = passes.find(position, rank, ranks)
        shares = [len(range(rank, passes.left(i), ranks)) for i in range(number + 1)]
        assert sum(shares[:-1]) + skip == position and 0 <= skip < shares[-1]


@few
@given(eras=eras, start=st.integers(0, 50))
def test_what_is_left_of_a_queue_can_be_told_from_anywhere(eras, start):
    """The same for a part of the places as for all of them; and what is left is numbered without gaps."""
    whole = torch.arange(400)
    places, kept = whole, whole
    for era in eras:
        left, numbers = left_in_queue(places, era)
        ranks = len(era)
        expected = [place // ranks >= era[place % ranks] for place in places.tolist()]
        assert left.tolist() == expected
        places, kept = numbers[left], kept[left]
        assert places.tolist() == list(range(len(places)))
    part, mine = whole[start:], whole[start:]
    for era in eras:
        left, numbers = left_in_queue(part, era)
        part, mine = numbers[left], mine[left]
    assert (
        dict(zip(mine.tolist(), part.tolist(), strict=True)).items()
        <= dict(zip(kept.tolist(), places.tolist(), strict=True)).items()
    )
    assert mine.tolist() == [each for each in kept.tolist() if each >= start]
