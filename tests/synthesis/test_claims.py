"""What the methods with a generator claim over GDFQ, on `embedded:digits`, with the same steps, batch and width for both.

Of the generators' own images: refinement brings those of all methods nearer to the real ones.
"""

from dataclasses import replace

import pytest

from reverie import models
from reverie.checkpoints import Forgetful
from reverie.graph.capture import capture
from reverie.images import Images
from reverie.models.embedded import digits_images
from reverie.progress import Silent
from reverie.randomness import Seed
from reverie.report.separation import describe
from reverie.synthesis import Teacher
from reverie.synthesis._capsule import capsule_of
from reverie.synthesis.clusterq import Clusterq
from reverie.synthesis.fdda import Fdda
from reverie.synthesis.gdfq import Gdfq

pytestmark = pytest.mark.slow

# A third is in docs/log.md.
SEEDS = (0, 1)
PUBLISHED = {"refine_steps": 0, "relative": False, "statistics_weight": 1.0}


@pytest.fixture(scope="module")
def teacher():
    """With a capsule of one real training image of each class."""
    network = models.load("embedded:digits")
    alone = Teacher(capture(network.module, network.input.shape), network.input, network.classes, network.name)
    real = digits_images("train")
    first = [int((real.labels == label).nonzero()[0]) for label in range(network.classes)]
    return replace(alone, capsule=capsule_of(alone, Images(inputs=real.inputs[first], labels=real.labels[first])))


@pytest.fixture(scope="module")
def measured(teacher):
    """The measures of `report.separation` of 200 images by a method, beside the held-out digits; each made once."""
    held_out, known = digits_images("held out"), {}

    def measure(method, seed):
        if (method, seed) not in known:
            images = method(teacher, 200, seed=Seed(seed), checkpoints=Forgetful(), progress=Silent())
            known[method, seed] = describe(teacher, {"real": held_out, "made": images})["made"]
        return known[method, seed]

    return measure


def test_fddas_images_are_nearer_to_the_real_classes_than_gdfqs(measured):
    # At lower rates the generators have hardly begun to tell classes apart after so few steps.
    same = PUBLISHED | {"steps": 200, "batch": 16, "width": 16, "learning_rate": 5e-3}
    ours = [measured(Fdda(**same, class_batch=16), seed)["centre_distance_to_real"] for seed in SEEDS]
    theirs = [measured(Gdfq(**same), seed)["centre_distance_to_real"] for seed in SEEDS]
    # The farthest of FDDA's against the nearest of GDFQ's: 0.129 against 0.155.
    assert max(ours) < 0.9 * min(theirs)


def test_clusterqs_classes_are_tighter_than_gdfqs_and_so_further_apart_for_their_spread(measured):
    # Not at the defaults: weight 0.3 (and 0.9) does less than the seeds here, and while a generator still learns its classes, centroids
    # hold them back as much as they tighten them. So: one that has learned them, a strong weight, and fresh centroids.
    same = PUBLISHED | {"steps": 400, "batch": 16, "width": 16, "learning_rate": 2e-2, "conditioning": "norms"}
    strong = {"cluster_weight": 10.0, "augmented": 0.0, "refresh": 5, "centroid_images": 4}
    ours = [measured(Clusterq(**same, **strong), seed) for seed in SEEDS]
    theirs = [measured(Gdfq(**same), seed) for seed in SEEDS]
    spreads, rival_spreads = ([found["intra_class_spread"] for found in part] for part in (ours, theirs))
    ratios, rival_ratios = ([found["separation_ratio"] for found in part] for part in (ours, theirs))
    # 0.032 to 0.035 against 0.059 to 0.060, and 12.5 to 15.6 against 9.9 to 11.3: means of 14.1 and 10.8.
    assert max(spreads) < 0.8 * min(rival_spreads)
    assert min(ratios) > max(rival_ratios)
    assert sum(ratios) > 1.15 * sum(rival_ratios)
