"""Measures of separation and coverage agree with what numpy makes of the definitions, pair by pair."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from reverie.images import Images
from reverie.models import InputContract, Network
from reverie.recipes import read
from reverie.report import separation
from reverie.report.render import render
from reverie.stages import as_teacher
from reverie.synthesis._losses import deep_layers

RECORD = {"versions": {"threads": 2, "onnxruntime": "1"}, "facts": {"options": {}, "device": "cpu"}}


@pytest.fixture(scope="module")
def teacher(tiny_cnn):
    return as_teacher(tiny_cnn())


@pytest.fixture(scope="module")
def real(tiny_cnn):
    return tiny_cnn().held_out()


@pytest.fixture(scope="module")
def described(teacher, real):
    return separation.describe(teacher, {"noise": noise(100), "real": real, "part": images(real, slice(0, 60))})


def noise(count, seed=0):
    inputs = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return Images(inputs=inputs, sources=("noise",) * count)


def images(of, chosen, *, labelled=True):
    inputs = of.inputs[chosen]
    return Images(inputs=inputs, labels=of.labels[chosen] if labelled else None, sources=("x",) * len(inputs))


def clusters(*, classes=4, each=(5, 9, 2, 7), width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(torch.tensor(each)) * 3
    noise = torch.randn(len(labels), width, generator=generator)
    return 4 * torch.randn(classes * 3, width, generator=generator)[labels] + noise, labels


def known(measures):
    return {measure: value for measure, value in measures.items() if value is not None}


def squared(a, b):
    return ((a - b) ** 2).sum()


def test_two_classes_at_a_known_distance_with_a_known_spread():
    """Centres (0, 0) and (3, 4); images 1 from the first centre and 2 from the second, two each."""
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [3.0, 6.0], [3.0, 2.0]])
    labels = torch.tensor([7, 7, 2, 2])
    assert separation.inter_class_separation(features, labels) == 25.0
    assert separation.intra_class_spread(features, labels) == (1 + 1 + 4 + 4) / (1 + 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_separation_and_spread_are_means_over_pairs_and_images(seed):
    features, labels = clusters(seed=seed)
    x, y = features.double().numpy(), labels.numpy()
    centres = [x[y == label].mean(0) for label in np.unique(y)]
    pairs = [squared(a, b) for index, a in enumerate(centres) for b in centres[:index]]
    spread = sum(((y == label).sum() - 1) * x[y == label].var(0, ddof=1).sum() for label in np.unique(y)) / (len(y) - 4)
    assert separation.inter_class_separation(features, labels) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert separation.intra_class_spread(features, labels) == pytest.approx(spread, rel=1e-5)


def test_the_spread_of_few_images_is_not_smaller_than_that_of_many():
    """Unit variance in 8 dimensions has a spread of 8, three images a class or three hundred."""
    generator = torch.Generator().manual_seed(0)
    for each, classes in ((3, 2000), (300, 20)):
        labels = torch.arange(classes).repeat_interleave(each)
        spread = separation.intra_class_spread(torch.randn(each * classes, 8, generator=generator), labels)
        assert spread == pytest.approx(8, rel=0.05)


def test_a_class_with_one_image_adds_nothing_to_the_spread():
    features, labels = torch.tensor([[1.0], [3.0], [100.0]]), torch.tensor([0, 0, 1])
    assert separation.intra_class_spread(features, labels) == 2.0


def test_what_is_not_defined_is_none():
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    one, many = torch.zeros(5, dtype=torch.long), torch.arange(5)
    assert separation.inter_class_separation(features, one) is None
    assert separation.intra_class_spread(features, many) is None
    assert separation.centre_distance(features, one, features, one + 1) is None
    assert separation.coverage(features[:1], features) is None


def test_the_distance_to_real_centres_is_over_classes_that_both_have():
    """Class 4 is off by (3, 4), class 6 by (0, 1); 5 and 9 are in one set alone."""
    real = torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0], [9.0, 9.0]])
    synthetic = torch.tensor([[5.0, 6.0], [4.0, 4.0], [-50.0, 0.0]])
    found = separation.centre_distance(synthetic, torch.tensor([6, 4, 5]), real, torch.tensor([4, 4, 6, 9]))
    assert found == (25 + 1) / 2


def test_coverage_is_what_its_definition_says(monkeypatch):
    monkeypatch.setattr(separation, "_PAIRS", 64)
    generator = torch.Generator().manual_seed(0)
    real, synthetic = torch.randn(40, 4, generator=generator), torch.randn(15, 4, generator=generator) + 0.5
    a, b = real.double().numpy(), synthetic.double().numpy()
    radius = np.sort(np.linalg.norm(a[:, None] - a[None], axis=2), axis=1)[:, 3]
    expected = (np.linalg.norm(a[:, None] - b[None], axis=2).min(1) <= radius).mean()
    assert 0 < expected < 1
    assert separation.coverage(real, synthetic, neighbours=3) == expected


@pytest.mark.parametrize("count", [2, 4, 200])
def test_coverage_is_whole_for_the_same_images_and_none_for_far_ones(count):
    real = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    assert separation.coverage(real, real.flip(0)) == 1.0
    assert separation.coverage(real, real + 100) == 0.0


def test_the_order_of_images_does_not_matter(teacher, real):
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    one, other = noise(40), images(noise(40), torch.arange(40).flip(0), labelled=False)
    first = separation.describe(teacher, {"real": real, "noise": one})
    second = separation.describe(teacher, {"real": images(real, order), "noise": other})
    for name in first:
        assert known(second[name]) == pytest.approx(known(first[name]), rel=1e-4)


@pytest.mark.parametrize(("norms", "first"), [(1, 0), (3, 0), (4, 0), (7, 2), (19, 8), (20, 8), (27, 12), (52, 24), (53, 25)])
def test_the_deep_batch_norms_are_those_of_fdda(norms, first):
    assert deep_layers(norms).start == first


def test_the_statistics_are_those_of_each_image_alone(teacher, real, tiny_cnn):
    """The second convolution's output, by hand, in units of the batch norm behind it; three batch norms, 8, 16 and 16 channels."""
    module, inputs = tiny_cnn().module, real.inputs[:70]
    with torch.no_grad():
        values = module[:4](inputs).flatten(2).double().numpy()
    norm = module[4]
    mu, sigma = norm.running_mean.double().numpy(), np.sqrt(norm.running_var.double().numpy())
    features, labels = separation.deep_statistics(teacher, images(real, slice(0, 70)))
    assert features.shape == (70, 2 * (8 + 16 + 16))
    assert torch.equal(labels, real.labels[:70])
    scale = np.sqrt(3 * 16)
    np.testing.assert_allclose(features[:, 16:32].numpy() * scale, (values.mean(2) - mu) / sigma, atol=1e-4)
    np.testing.assert_allclose(features[:, 32:48].numpy() * scale, values.std(2) / sigma - 1, atol=1e-4)


def test_images_without_labels_have_the_class_that_the_teacher_takes_them_for(teacher, real):
    _, labels = separation.deep_statistics(teacher, images(real, slice(0, 70), labelled=False))
    assert torch.equal(labels, teacher.logits(real.inputs[:70]).argmax(1))


def test_the_batch_does_not_matter(teacher, real):
    whole, parts = (separation.describe(teacher, {"real": real}, batch=batch)["real"] for batch in (300, 7))
    assert known(parts) == pytest.approx(known(whole), rel=1e-4)


def test_real_images_keep_their_classes_apart_and_noise_does_not(described):
    assert described["real"]["inter_class_separation"] > 3 * described["noise"]["inter_class_separation"]
    assert described["real"]["separation_ratio"] > 3 * described["noise"]["separation_ratio"]


def test_real_images_cover_others_and_noise_does_not(described):
    assert described["part"]["coverage"] > 0.5 and described["noise"]["coverage"] == 0.0
    assert described["part"]["centre_distance_to_real"] < 0.1 * described["noise"]["centre_distance_to_real"]
    assert described["real"]["coverage"] is None and described["real"]["centre_distance_to_real"] is None


def test_the_measures_are_in_the_order_of_the_sets_and_json_can_hold_them(described):
    assert list(described) == ["noise", "real", "part"]
    assert {tuple(measures) for measures in described.values()} == {separation.MEASURES}
    assert json.loads(json.dumps(described, allow_nan=False)) == described


def test_without_real_images_nothing_is_compared_with_them(teacher):
    alone = separation.describe(teacher, {"noise": noise(20)})["noise"]
    assert alone["coverage"] is None and alone["centre_distance_to_real"] is None
    assert alone["intra_class_spread"] > 0


def test_real_images_without_labels_have_no_centres_to_be_near(teacher, real):
    blind = images(real, slice(0, 60), labelled=False)
    measures = separation.describe(teacher, {"real": blind, "noise": noise(20)})["noise"]
    assert measures["centre_distance_to_real"] is None and measures["coverage"] == 0.0


def test_one_image_has_no_measures(teacher):
    assert separation.describe(teacher, {"noise": noise(1)}) == {"noise": dict.fromkeys(separation.MEASURES)}


def test_a_network_without_batch_norms_has_no_measures():
    module = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).eval()
    contract = InputContract(channels=3, height=1, width=1, mean=(0.5,) * 3, std=(0.25,) * 3)
    bare = as_teacher(Network(name="bare", module=module, input=contract, classes=2))
    some = Images(inputs=torch.rand(4, 3, 1, 1), sources=("x",) * 4)
    assert separation.describe(bare, {"some": some}) == {"some": dict.fromkeys(separation.MEASURES)}


def test_the_page_has_a_column_for_each_set_and_a_row_for_each_measure_that_is_known(labelled, tmp_path):
    labelled["images"]["separation"] = {
        "real": dict.fromkeys(separation.MEASURES) | {"inter_class_separation": 0.1125},
        "zeroq": dict.fromkeys(separation.MEASURES) | {"inter_class_separation": 0.043, "intra_class_spread": 0.07},
    }
    html = render(labelled, read("adaround"), RECORD, tmp_path)
    assert '<tr><td></td><th scope="col">real</th><th scope="col">zeroq</th></tr>' in html
    assert "mean squared distance of their centres</span></th><td>0.113</td><td>0.043</td></tr>" in html
    assert "mean squared distance to its centre</span></th><td>-</td><td>0.07</td></tr>" in html
    assert ">coverage<br>" not in html
    assert "the yardstick for the others" in html


def test_every_measure_is_explained_on_the_page(labelled, tmp_path, described):
    labelled["images"]["separation"] = described
    html = render(labelled, read("adaround"), RECORD, tmp_path)
    for measure in (
        "inter-class separation", "intra-class spread", "separation ratio", "centre distance to real", "coverage",
    ):  # fmt: skip
        assert f'<th scope="row">{measure}<br><span' in html


def test_a_run_from_before_these_measures_has_a_page_without_them(labelled, tmp_path):
    assert "spread as real ones do" not in render(labelled, read("adaround"), RECORD, tmp_path)
