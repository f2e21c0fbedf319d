"""A set that stands for a larger one: first and last in it, evenly spaced."""

import torch

from reverie.images import Images, evenly


def test_twelve_of_fifty_two_are_evenly_spaced_from_first_to_last():
    assert evenly(52, 12).tolist() == [0, 5, 9, 14, 19, 23, 28, 32, 37, 42, 46, 51]


def test_few_are_all_taken():
    assert evenly(7, 12).tolist() == list(range(7))
    assert evenly(0, 12).tolist() == []


def test_a_set_sorted_by_class_is_there_whole_in_small():
    many = Images(
        inputs=torch.arange(3000.0).view(3000, 1, 1, 1),
        labels=torch.arange(3000) // 300,
        logits=torch.arange(3000.0).view(3000, 1),
        sources=tuple(str(number) for number in range(3000)),
    )
    few = many.evenly(1000)
    chosen = few.inputs.flatten().long()
    assert len(few) == 1000 and chosen[0] == 0 and chosen[-1] == 2999
    assert set(chosen.diff().tolist()) <= {2, 3, 4}
    assert few.labels.bincount().tolist() == [100] * 10
    assert torch.equal(few.logits.flatten().long(), chosen)
    assert few.sources == tuple(str(number) for number in chosen.tolist())
