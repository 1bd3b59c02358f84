"""Votes by hand, in memory and in files."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from segkit.inference.voting import HardVote, SoftVote, Vote

IN_MEMORY, IN_FILES = 2**30, 0
SHAPES = [(2, 3), (1, 1), (5, 4)]


def _certain(choice: int) -> Tensor:
    """The probabilities of one pixel that is of a class for certain."""
    return torch.eye(4)[choice].view(4, 1, 1)


def _hard(votes: list[int], **options: object) -> int:
    """The winner of one pixel's votes, in order of rank."""
    vote = HardVote([(1, 1)], 4, **options)  # type: ignore[arg-type]
    for voter, choice in enumerate(votes):
        vote.add(0, _certain(choice), voter=voter)
    return int(vote.result(0))


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ([2], 2),
        ([0, 1, 1], 1),  # the majority, against the best
        ([3, 1], 3),  # a tie: the best voter's, and not the lowest index
        ([1, 3], 1),
        ([2, 0, 0, 3, 3], 0),  # the best voter's class is not tied; the next one's is
        ([2, 3, 0, 3, 0], 3),
        ([0, 1, 2, 3], 0),
        ([3, 2, 1, 0], 3),
        ([3, 3, 1, 1, 2, 2, 0], 3),
    ],
)
def test_hard_votes_by_hand(votes: list[int], winner: int) -> None:
    assert _hard(votes) == winner
    assert _hard(votes, max_bytes=IN_FILES) == winner


def test_ranks_hold_in_any_order_of_voters() -> None:
    choices = [3, 1, 1, 3, 0]
    for order in itertools.permutations(range(5)):
        vote = HardVote([(1, 1)], 4)
        for voter in order:
            vote.add(0, _certain(choices[voter]), voter=voter)
        assert int(vote.result(0)) == 3


@pytest.mark.parametrize("max_bytes", [IN_MEMORY, IN_FILES])
def test_hard_vote_equals_counting(max_bytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = [
        [torch.rand(4, *shape, generator=generator) for shape in SHAPES] for _ in range(5)
    ]
    vote = HardVote(SHAPES, 4, max_bytes=max_bytes)
    for voter, images in enumerate(predictions):
        for index, probabilities in enumerate(images):
            vote.add(index, probabilities, voter=voter)
    for index, shape in enumerate(SHAPES):
        masks = torch.stack([images[index].argmax(0) for images in predictions])
        winner = vote.result(index)
        assert winner.dtype == torch.uint8
        for row, column in itertools.product(*map(range, shape)):
            assert winner[row, column] == _by_hand(masks[:, row, column])


def _by_hand(votes: Tensor) -> int:
    counts = [int((votes == value).sum()) for value in range(4)]
    return next(int(vote) for vote in votes if counts[vote] == max(counts))


@pytest.mark.parametrize("max_bytes", [IN_MEMORY, IN_FILES])
def test_soft_vote_is_the_mean(max_bytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vote = SoftVote(SHAPES, 4, max_bytes=max_bytes)
    sums = [torch.zeros(4, *shape) for shape in SHAPES]
    for voter in range(6):
        for index, shape in enumerate(SHAPES):
            probabilities = torch.randn(4, *shape, generator=generator).softmax(0)
            vote.add(index, probabilities, voter=voter)
            sums[index] += probabilities
    for index, total in enumerate(sums):
        torch.testing.assert_close(vote.probabilities(index), total / 6, atol=1e-6, rtol=0)
        assert torch.equal(vote.result(index).long(), vote.probabilities(index).argmax(0))


def test_soft_votes_by_hand() -> None:
    sure, unsure = torch.tensor([0.0, 0.9, 0.1]), torch.tensor([0.0, 0.4, 0.6])
    vote = SoftVote([(1, 1)], 3)
    for voter, scored in enumerate([unsure, unsure, sure]):
        vote.add(0, scored.view(3, 1, 1), voter=voter)
    assert int(vote.result(0)) == 1  # 1.7 against 1.3, though two of three say 2
    weighted = SoftVote([(1, 1)], 3, coefficients=torch.tensor([[1.0, 0.1, 1.0], [1.0, 0.1, 1.0]]))
    weighted.add(0, sure.view(3, 1, 1), voter=1)
    assert int(weighted.result(0)) == 2  # .09 against .1
    torch.testing.assert_close(
        weighted.probabilities(0).view(3), torch.tensor([0.0, 0.09 / 0.19, 0.1 / 0.19])
    )


@pytest.mark.parametrize("kind", [HardVote, SoftVote])
def test_wrong_votes(kind: type) -> None:
    vote = kind(SHAPES, 3)
    with pytest.raises(ValueError, match="no voter has voted on image 1"):
        vote.result(1)
    vote.add(1, torch.full((3, 1, 1), 1 / 3), voter=0)
    with pytest.raises(ValueError, match="image 1, voter 0: expected rows from 1, got top=0"):
        vote.add(1, torch.full((3, 1, 1), 1 / 3), voter=0)
    with pytest.raises(ValueError, match="image 0: expected shape"):
        vote.add(0, torch.rand(3, 3, 2), voter=0)
    with pytest.raises(ValueError, match="no voter has voted on image 0"):
        vote.result(0)


@pytest.mark.parametrize("kind", [HardVote, SoftVote])
@pytest.mark.parametrize("max_bytes", [IN_MEMORY, IN_FILES])
def test_votes_in_bands_of_rows_are_those_of_the_whole(kind: type, max_bytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    whole, banded = kind([(9, 5)], 3), kind([(9, 5)], 3, max_bytes=max_bytes)
    for voter in range(3):
        probabilities = torch.rand(3, 9, 5, generator=generator)
        whole.add(0, probabilities, voter=voter)
        for top, stop in ((0, 4), (4, 8), (8, 9)):
            banded.add(0, probabilities[:, top:stop], voter=voter, top=top)
    assert torch.equal(whole.result(0), banded.result(0))
    with pytest.raises(ValueError, match="image 0, voter 1: expected rows from 9, got top=4"):
        banded.add(0, probabilities[:, 4:], voter=1, top=4)
    with pytest.raises(ValueError, match="image 0, voter 3: expected rows from 0, got top=4"):
        banded.add(0, probabilities[:, 4:], voter=3, top=4)
    with pytest.raises(ValueError, match=r"image 0: expected shape \((3, )?5, 5\)"):
        banded.add(0, probabilities, voter=3, top=4)


def test_large_images_are_counted_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, generator = (37, 5), torch.Generator().manual_seed(0)
    hard, soft = HardVote([shape], 4), SoftVote([shape], 4)
    for voter in range(3):
        probabilities = torch.rand(4, *shape, generator=generator)
        hard.add(0, probabilities, voter=voter)
        soft.add(0, probabilities, voter=voter)
    whole = hard.result(0), soft.result(0)
    bands = [slice(0, 16), slice(16, 32), slice(32, 48)]
    monkeypatch.setattr(Vote, "_bands", lambda *_: bands)
    assert torch.equal(hard.result(0), whole[0])
    assert torch.equal(soft.result(0), whole[1])


_MEMORY = """
import resource, torch
from segkit.inference.voting import SoftVote

def peak(images):
    vote = SoftVote([(256, 256)] * images, 8, max_bytes=0)
    for index in range(images):
        for voter in (0, 1):
            vote.add(index, torch.full((8, 256, 256), 0.125), voter=voter)
    assert int(vote.result(images - 1)[0, 0]) == 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(-peak(4) + peak(100))
"""


def test_memory_does_not_grow_with_the_images() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True
    )
    # 2 MiB an image: 96 more would be 192 MiB, in memory or mapped.
    assert int(done.stdout) < 16 * 1024
