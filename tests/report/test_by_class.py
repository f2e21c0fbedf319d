"""Which classes lost, and which pairs are confused more often."""

import pytest
import torch

from reverie.report import by_class


def found(labels, full, ours, classes):
    return by_class.describe(*(torch.tensor(part) for part in (labels, full, ours)), classes)


def test_few_classes_are_all_listed_with_what_changed():
    told = found([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0], [0, 2, 2, 1, 1, 2], 4)
    assert told["classes"] == [
        {"class": 0, "images": 3, "full_precision": 2 / 3, "quantized": 1 / 3},
        {"class": 1, "images": 2, "full_precision": 1.0, "quantized": 1.0},
        {"class": 2, "images": 1, "full_precision": 0.0, "quantized": 1.0},
    ]
    assert told["pairs"] == [{"label": 0, "answer": 2, "full_precision": 0, "quantized": 2}]
    assert told["change"] == [[-1, -1, 2, 0], [0, 0, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]]
    assert (told["lost"], told["gained"]) == (1, 1)


def test_of_many_classes_those_that_lost_most_are_listed_and_no_table_is_made():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1000).repeat(4)
    full = labels.clone()
    ours = labels.where(torch.rand(4000, generator=generator) > 0.3, (labels + 1) % 1000)
    told = by_class.describe(labels, full, ours, 1000)
    lost = [one["full_precision"] - one["quantized"] for one in told["classes"]]
    right = torch.stack([(ours == labels)[labels == number].float().mean() for number in range(1000)])
    assert lost == sorted(lost, reverse=True)
    assert len(lost) == by_class.MOST_LISTED
    assert lost == pytest.approx((1 - right).sort(descending=True).values[: by_class.MOST_LISTED].tolist())
    assert told["lost"] == int((right < 1).sum())
    assert "change" not in told
    assert len(told["pairs"]) == 12
    assert all(pair["answer"] == (pair["label"] + 1) % 1000 and pair["full_precision"] == 0 for pair in told["pairs"])


def test_the_same_answers_have_no_pairs():
    told = found([0, 1], [1, 1], [1, 1], 30)
    assert told == {"classes": [], "pairs": [], "lost": 0, "gained": 0}
