"""How far quantized networks are from full precision, on one set of images."""

import pytest
import torch

from reverie.images import Images
from reverie.report import metrics


@pytest.fixture
def logits():
    random = torch.Generator().manual_seed(0)
    full = torch.randn(metrics.BATCH + 9, 5, generator=random)
    return {"full_precision": full, "quantized": full + torch.randn(full.shape, generator=random)}


def scored(logits, labels=None):
    """`score` of models whose answer to image i is row i of their logits."""
    images = Images(inputs=torch.arange(float(len(logits["full_precision"]))).view(-1, 1, 1, 1), labels=labels)
    models = {name: lambda part, rows=rows: rows[part.flatten().long()] for name, rows in logits.items()}
    steps = []
    return metrics.score(models, images, lambda: steps.append(1)), steps


def test_divergence_is_the_mean_kl_of_all_images_in_nats(logits):
    scores, steps = scored(logits)
    full, ours = (rows.double().softmax(dim=1) for rows in (logits["full_precision"], logits["quantized"]))
    by_hand = (full * (full / ours).log()).sum(dim=1).mean().item()
    assert scores["divergence"] == {"quantized": pytest.approx(by_hand, rel=1e-5)}
    assert len(steps) == 2


def test_a_network_is_no_way_from_itself(logits):
    scores, _ = scored({**logits, "quantized": logits["full_precision"]})
    assert scores["divergence"]["quantized"] == pytest.approx(0, abs=1e-6)
    assert scores["agreement"] == {"quantized": 1.0}
    assert "top1" not in scores


def test_agreement_and_accuracy_count_the_largest_logit(logits):
    labels = logits["quantized"].argmax(dim=1)
    scores, _ = scored(logits, labels)
    same = (logits["full_precision"].argmax(dim=1) == labels).float().mean().item()
    assert scores["agreement"]["quantized"] == pytest.approx(same)
    assert scores["top1"] == {"full_precision": pytest.approx(same), "quantized": 1.0}
    assert set(scores["difference"]) == {"quantized"}
