"""The verdict is one sentence that follows from the numbers."""

import pytest

from reverie.report import verdict


def test_with_labels_the_sentence_says_what_was_gained_and_lost(labelled):
    assert verdict.sentence(labelled) == (
        "The W4A8 network takes 6.0 times less space, runs 2.00 times as fast, and reads 93.50 % of 200 labelled images right: "
        "1.50 points fewer than the original's 95.00 %, no more than chance explains."
    )


def test_a_loss_whose_interval_leaves_out_zero_is_more_than_chance(labelled):
    labelled["difference"]["exported"] = {"difference": -0.04, "low": -0.06, "high": -0.02}
    assert "4.00 points fewer than the original's 95.00 %, more than chance explains." in verdict.sentence(labelled)


def test_a_difference_of_nothing_is_called_that_and_a_slower_file_slower(labelled):
    labelled["difference"]["exported"] = {"difference": 0.0, "low": -0.01, "high": 0.01}
    labelled["latency_ms"]["ratio"] = 0.8
    told = verdict.sentence(labelled)
    assert "runs slower, at 0.80 of the speed, and reads" in told
    assert told.endswith("of 200 labelled images right: as many as the original.")


def test_without_labels_the_loss_is_an_estimate_or_unknown(unlabelled):
    assert verdict.sentence(unlabelled) == (
        "The W4A8 network takes 6.0 times less space, runs 2.00 times as fast, and gives the original's answer on 96.88 % of 32 "
        "held-out synthetic images; how accurate it is nobody knows without labelled ones."
    )
    assert verdict.mark(unlabelled) == ("unknown", "accuracy not measured")
    unlabelled["estimate"] = {"drop": 0.018, "low": 0.006, "high": 0.041, "distance": 0.1, "images": 32}
    assert verdict.sentence(unlabelled).endswith(
        "without labelled images the loss of accuracy is an estimate, 1.8 points (90 % interval 0.6 to 4.1)."
    )
    assert verdict.mark(unlabelled) == ("fair", "estimated to lose 1.8 points")


def test_what_was_not_exported_was_only_simulated(simulated):
    assert verdict.sentence(simulated) == (
        "The W4A8 network was only simulated, and it reads 94.00 % of 200 labelled images right: 1.00 points fewer than the "
        "original's 95.00 %, no more than chance explains."
    )
    assert [card.what for card in verdict.cards(simulated)] == ["accuracy", "change, points", "same answer"]


@pytest.mark.parametrize(
    ("top1", "tone", "words"),
    [
        (0.96, "good", "loses no accuracy"),
        (0.9405, "good", "keeps 99.0 % of the accuracy"),
        (0.94, "fair", "keeps 98.9 % of the accuracy"),
        (0.9, "poor", "keeps 94.7 % of the accuracy"),
    ],
)
def test_the_mark_is_the_share_of_accuracy_that_is_kept(labelled, top1, tone, words):
    labelled["exported"]["top1"] = top1
    assert verdict.mark(labelled) == (tone, words)
    assert {card.tone for card in verdict.cards(labelled)[:2]} == {tone}


def test_the_cards_say_how_much_beside_what(labelled):
    told = {card.what: (card.value, card.beside) for card in verdict.cards(labelled)}
    assert told == {
        "accuracy": ("93.50 %", "was 95.00 %"),
        "change, points": ("-1.50", "95 % sure: -3.00 to +0.00"),
        "same answer": ("97.50 %", "on 200 evaluation images"),
        "smaller": ("6.0 x", "6.0 MB to 1.0 MB"),
        "faster": ("2.00 x", "3 ms to 1.5 ms"),
    }
