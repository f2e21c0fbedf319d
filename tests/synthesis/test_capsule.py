"""A capsule holds, class by class, what the network's own batch norms see; and it is refused wherever it does not belong."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import reverie
from reverie.errors import ConfigError, ModelError
from reverie.graph.capture import capture
from reverie.images import Images
from reverie.models import InputContract
from reverie.synthesis import Teacher, lacks_capsule
from reverie.synthesis._capsule import capsule_of, check_capsule, load_capsule, save_capsule

AGAIN = "make one with `reverie capsule`"


def teacher_of(network):
    graph = capture(network.module, network.input.shape)
    return Teacher(graph, network.input, network.classes, network.name, network.fingerprint)


@pytest.fixture(scope="module")
def teacher(tiny_cnn):
    return teacher_of(tiny_cnn())


@pytest.fixture(scope="module")
def patterns(tiny_cnn):
    return tiny_cnn().held_out()


@pytest.fixture(scope="module")
def made(teacher, patterns):
    return capsule_of(teacher, patterns)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "centres.safetensors"


def some(images, chosen, labels=None):
    labels = images.labels[chosen] if labels is None else torch.tensor(labels)
    return Images(inputs=images.inputs[chosen], labels=labels)


def first_of_each(images):
    return some(images, [int((images.labels == label).nonzero()[0]) for label in images.labels.unique()])


def seen_by_batch_norms(module, inputs):
    """The input of each `nn.BatchNorm2d`, with the channels last, read by hooks."""
    seen = []

    def keep(_, arguments):
        seen.append(arguments[0].double().permute(0, 2, 3, 1).numpy())

    hooks = [part.register_forward_pre_hook(keep) for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    with torch.no_grad():
        logits = module(inputs)
    for hook in hooks:
        hook.remove()
    return seen, logits


@pytest.mark.parametrize("pick", [first_of_each, lambda images: images], ids=["one image", "many images"])
def test_centres_are_mean_and_variance_of_all_positions_of_a_class(teacher, tiny_cnn, patterns, pick):
    images = pick(patterns)
    seen, _ = seen_by_batch_norms(tiny_cnn().module, images.inputs)
    got = capsule_of(teacher, images)
    assert len(got.mean) == len(got.variance) == len(seen) == 3
    for mean, variance, values in zip(got.mean, got.variance, seen, strict=True):
        for label in range(3):
            # All pixels of the class's images, as if they were one.
            pixels = values[images.labels.numpy() == label].reshape(-1, values.shape[-1])
            scale = pixels.std(axis=0).max()
            np.testing.assert_allclose(mean[label].numpy(), pixels.mean(axis=0), atol=1e-5 * scale)
            np.testing.assert_allclose(variance[label].numpy(), pixels.var(axis=0), rtol=1e-4, atol=1e-6 * scale**2)


def test_centres_are_those_of_the_networks_own_modules_in_their_order():
    network = reverie.load_network("embedded:digits")
    images = network.held_out()
    one_each = first_of_each(images)
    seen, _ = seen_by_batch_norms(network.module, one_each.inputs)
    got = capsule_of(teacher_of(network), one_each)
    assert [mean.shape[1] for mean in got.mean] == [values.shape[-1] for values in seen]
    for mean, variance, values in zip(got.mean, got.variance, seen, strict=True):
        np.testing.assert_allclose(mean.numpy(), values.mean(axis=(1, 2)), atol=1e-5 * values.std())
        np.testing.assert_allclose(variance.numpy(), values.var(axis=(1, 2)), rtol=1e-3, atol=1e-6 * values.var())


def test_images_that_differ_only_between_each_other_have_that_variance(teacher):
    # Flat images: a variance of zero in each, and all of the class's in the spread of the means.
    flat = torch.tensor([-1.0, 0.0, 2.0]).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    module = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()
    plain = Teacher(capture(module, (3, 16, 16)), teacher.input, 3, "flat")
    got = capsule_of(plain, Images(inputs=flat, labels=torch.tensor([1, 1, 1])))
    torch.testing.assert_close(got.mean[0][1], torch.full((3,), 1 / 3))
    torch.testing.assert_close(got.variance[0][1], torch.full((3,), 5 / 3 - 1 / 9))
    assert not got.mean[0][[0, 2]].any() and not got.variance[0][[0, 2]].any()


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_the_size_of_a_batch_changes_nothing(teacher, patterns, made, batch):
    got = capsule_of(teacher, patterns, batch)
    for ours, theirs in zip((*got.mean, *got.variance), (*made.mean, *made.variance), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_order_of_the_images_changes_nothing(teacher, patterns, made):
    got = capsule_of(teacher, some(patterns, torch.arange(len(patterns) - 1, -1, -1)))
    for ours, theirs in zip((*got.mean, *got.variance), (*made.mean, *made.variance), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_capsule_knows_what_it_is_of(teacher, patterns, made):
    assert made.classes == 3
    assert made.count.tolist() == patterns.labels.bincount().tolist()
    assert made.names == tuple(norm.name for norm in teacher.batch_norms)
    assert made.fingerprint == teacher.fingerprint
    assert made.missing == [] and made.wrong == []
    assert all(tensor.dtype == torch.float32 for tensor in (*made.mean, *made.variance))


def test_classes_without_images_are_missing_and_zero(teacher, patterns):
    got = capsule_of(teacher, some(patterns, patterns.labels == 1))
    assert got.missing == [0, 2] and got.wrong == []
    assert got.correct.tolist() == [False, True, False]
    for tensor in (*got.mean, *got.variance):
        assert not tensor[[0, 2]].any() and tensor[1].any()


@pytest.mark.parametrize(
    ("true", "labels", "wrong"),
    [
        ([0], [1], [1]),
        # Half is no majority; two of three are.
        ([0, 1], [1, 1], [1]),
        ([0, 1, 1], [1, 1, 1], []),
        ([0, 2, 1], [1, 1, 1], [1]),
    ],
)
def test_a_class_is_wrong_unless_most_of_its_images_are_recognized(teacher, patterns, true, labels, wrong):
    recognized = teacher.logits(patterns.inputs).argmax(1)
    chosen = [int((recognized == label).nonzero()[place]) for place, label in enumerate(true)]
    assert capsule_of(teacher, some(patterns, chosen, labels)).wrong == wrong


def test_the_teacher_is_left_as_it_was(teacher, patterns):
    before = {key: value.clone() for key, value in teacher.graph.state_dict().items()}
    capsule_of(teacher, patterns)
    assert all(torch.equal(value, before[key]) for key, value in teacher.graph.state_dict().items())
    assert not teacher.graph.training


def test_it_moves_between_devices(made):
    there = made.to("meta")
    tensors = (*there.mean, *there.variance, there.count, there.correct)
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (there.names, there.fingerprint) == (made.names, made.fingerprint)


def test_a_teacher_carries_it(teacher, made):
    assert teacher.capsule is None
    assert replace(teacher, capsule=made).capsule is made


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (
            Images(inputs=torch.zeros(2, 3, 16, 16)),
            "tiny: images must have labels 0 to 2, got none; give the true class of each",
        ),
        (
            Images(inputs=torch.zeros(0, 3, 16, 16), labels=torch.zeros(0, dtype=torch.long)),
            "tiny: must have labelled images of its 3 classes, got none; give at least one",
        ),
        (
            Images(inputs=torch.zeros(3, 3, 16, 16), labels=torch.tensor([2, 3, -1])),
            "tiny: labels must be 0 to 2, got 3 for image 1 and 1 more outside; check that these images belong to this network",
        ),
        (
            Images(inputs=torch.zeros(1, 1, 16, 16), labels=torch.tensor([0])),
            "tiny: images must have shape (3, 16, 16), got (1, 16, 16); make them anew",
        ),
        (
            Images(inputs=torch.tensor([0.0, torch.nan]).view(2, 1, 1, 1).expand(2, 3, 16, 16), labels=torch.tensor([0, 1])),
            "tiny: images must be finite, got NaN or infinite values in image 1; remove them",
        ),
    ],
)
def test_unusable_images_are_refused(teacher, images, expected):
    with pytest.raises(ConfigError) as caught:
        capsule_of(teacher, images)
    assert str(caught.value) == expected


def test_a_batch_of_nothing_is_refused(teacher, patterns):
    with pytest.raises(ConfigError) as caught:
        capsule_of(teacher, patterns, 0)
    assert str(caught.value) == "tiny: batch must be at least 1, got 0"


def test_a_network_without_batch_norm_is_refused():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    contract = InputContract(channels=3, height=16, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    plain = Teacher(capture(module, contract.shape), contract, 3, "plain")
    with pytest.raises(ModelError) as caught:
        capsule_of(plain, Images(inputs=torch.zeros(1, 3, 16, 16), labels=torch.tensor([0])))
    assert str(caught.value) == (
        "plain: a capsule needs a batch norm with running statistics, got none in the network; "
        "use the images themselves, with --calibration"
    )


def test_a_method_without_a_capsule_says_how_to_get_one():
    assert str(lacks_capsule("net", "fdda")) == (
        "net: fdda needs labelled real images, one for each class, got none; give --calibration with a folder of them "
        "(one sub-folder a class) or --capsule with a file that `reverie capsule` wrote"
    )


def test_it_is_stored_without_loss_and_the_same_bytes_again(teacher, made, path, tmp_path):
    save_capsule(made, path)
    save_capsule(made, tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    got = load_capsule(path, teacher)
    assert (got.names, got.fingerprint) == (made.names, made.fingerprint)
    stored, kept = (*got.mean, *got.variance, got.count, got.correct), (*made.mean, *made.variance, made.count, made.correct)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(stored, kept, strict=True))
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["again.safetensors", "centres.safetensors"]


def refused(path, teacher=None):
    with pytest.raises(ConfigError) as caught:
        load_capsule(path, teacher)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_no_such_file_is_refused(path):
    assert refused(path) == "must be a file that `reverie capsule` wrote, got no such file; check the path"


def about_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["reverie"])


def damage(path, kind):
    """Makes of the capsule at `path` something that is none."""
    tensors, about = load_file(path), about_of(path)
    first = about["names"][0]
    if kind == "text":
        path.write_text("precious")
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "weights":
        save_file(tensors, path)
    elif kind == "no JSON":
        save_file(tensors, path, {"reverie": "hello"})
    elif kind == "JSON of something else":
        save_file(tensors, path, {"reverie": json.dumps({"sources": []})})
    elif kind == "a JSON list":
        save_file(tensors, path, {"reverie": "[]"})
    else:
        if kind == "a tensor missing":
            del tensors[f"{first}.variance"]
        elif kind == "a tensor of another type":
            tensors["correct"] = tensors["correct"].long()
        elif kind == "classes that differ":
            tensors[f"{first}.mean"] = tensors[f"{first}.mean"][:2].clone()
        elif kind == "channels that differ":
            tensors[f"{first}.mean"] = tensors[f"{first}.mean"][:, :2].clone()
        save_file(tensors, path, {"reverie": json.dumps(about)})


@pytest.mark.parametrize(
    "kind",
    [
        "text", "cut short", "empty", "a folder", "weights", "no JSON", "JSON of something else", "a JSON list",
        "a tensor missing", "a tensor of another type", "classes that differ", "channels that differ",
    ],
)  # fmt: skip
def test_a_file_that_is_no_whole_capsule_is_refused(made, path, kind):
    save_capsule(made, path)
    damage(path, kind)
    assert refused(path) == f"must be a file that `reverie capsule` wrote, got another or a damaged one; {AGAIN}"


def test_a_capsule_of_another_format_is_refused(made, path):
    save_capsule(made, path)
    about = about_of(path) | {"format": "reverie capsule 2"}
    save_file(load_file(path), path, {"reverie": json.dumps(about)})
    assert refused(path) == f"must have the format 'reverie capsule 1', got 'reverie capsule 2'; {AGAIN}"


def test_a_capsule_of_other_weights_is_refused(teacher, made, path):
    save_capsule(replace(made, fingerprint="0" * 16), path)
    assert refused(path, teacher) == (
        f"must be of tiny with these very weights ({teacher.fingerprint}), got a capsule of others (0000000000000000); {AGAIN}"
    )
    assert load_capsule(path).fingerprint == "0" * 16


def test_a_capsule_with_another_number_of_classes_is_refused(teacher, made, path):
    save_capsule(made, path)
    assert refused(path, replace(teacher, classes=4)) == f"must have a centre for each of the 4 classes, got 3; {AGAIN}"


def test_a_capsule_of_other_batch_norms_is_refused(teacher, made, path):
    names = made.names
    save_capsule(replace(made, mean=made.mean[:2], variance=made.variance[:2], names=names[:2]), path)
    assert refused(path, teacher) == (
        f"must have 3 batch norms with 40 channels from {names[0]!r} to {names[2]!r} of tiny, "
        f"got 2 batch norms with 24 channels from {names[0]!r} to {names[1]!r}; {AGAIN}"
    )


@pytest.mark.parametrize("change", ["order", "channels", "none"])
def test_batch_norms_are_compared_by_name_channels_and_order(teacher, made, change):
    if change == "order":
        other = replace(made, mean=made.mean[::-1], variance=made.variance[::-1], names=made.names[::-1])
    elif change == "channels":
        other = replace(made, mean=tuple(mean[:, :1] for mean in made.mean))
    else:
        other = replace(made, mean=(), variance=(), names=())
    with pytest.raises(
        ConfigError, match=r"^must have 3 batch norms with 40 channels from .*; make one with `reverie capsule`$"
    ):
        check_capsule(other, teacher)


def test_a_place_that_cannot_be_written_is_refused(made, tmp_path):
    with pytest.raises(ConfigError) as caught:
        save_capsule(made, tmp_path / "nowhere" / "centres.safetensors")
    assert str(caught.value) == (
        f"{tmp_path}/nowhere/centres.safetensors: must be writable, got 'No such file or directory'; choose another place"
    )


def test_its_names_are_public():
    assert reverie.capsule_of is capsule_of and reverie.save_capsule is save_capsule and reverie.load_capsule is load_capsule
    assert reverie.Capsule.__name__ == "Capsule"
