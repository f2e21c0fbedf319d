"""Plots are whole, readable files that depend on the images alone."""

import base64
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from reverie.errors import ModelError
from reverie.images import Images
from reverie.models import InputContract, Network
from reverie.recipes import read
from reverie.report import features, plots
from reverie.report.render import render
from reverie.stages import as_teacher

RECORD = {"versions": {"threads": 2, "onnxruntime": "1"}, "facts": {"options": {}, "device": "cpu"}}


def draw_plane(path, teacher, sets):
    plots.feature_plane(path, features.plane(teacher, sets), teacher.classes)


def draw_deviations(path, teacher, sets):
    plots.deviation_histograms(path, features.deviations(teacher, sets))


PLOTS = [draw_plane, draw_deviations]


@pytest.fixture(scope="module")
def teacher(tiny_cnn):
    return as_teacher(tiny_cnn())


@pytest.fixture(scope="module")
def sets(tiny_cnn):
    real = tiny_cnn().held_out()
    noise = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"real": real, "noise": Images(inputs=noise, sources=("noise",) * 20)}


@pytest.mark.parametrize("plot", PLOTS)
def test_a_plot_is_a_whole_png_and_the_same_twice(plot, tmp_path, teacher, sets):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    torch.manual_seed(0)
    plot(first, teacher, sets)
    torch.manual_seed(1)
    plot(second, teacher, sets)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(tmp_path.iterdir()) == [first, second]
    with Image.open(first) as picture:
        pixels = np.asarray(picture.convert("RGB"))
        assert "Software" not in picture.info
    assert (pixels != 255).any(2).mean() > 0.01


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, (6.3, 6.9)), (2, (6.3, 3.9)), (3, (9.3, 3.9)), (4, (12.3, 3.9)), (5, (9.3, 6.9))],
)
def test_the_planes_are_side_by_side_at_most_four_in_a_row(tmp_path, teacher, sets, count, size):
    draw_plane(tmp_path / "x.png", teacher, {str(number): sets["noise"] for number in range(count)})
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == pytest.approx([150 * inches for inches in size], abs=1)


def test_the_histograms_have_a_panel_for_each_of_three_batch_norms(tmp_path, teacher, sets):
    draw_deviations(tmp_path / "x.png", teacher, sets)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == pytest.approx([150 * (3 * 2.4 + 0.3), 150 * (1.8 + 0.9)], abs=1)


def test_the_plane_is_that_of_numpy_with_each_set_weighing_the_same():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(50, 5, generator=generator) * torch.tensor([5.0, 1, 1, 3, 1]), torch.randn(9, 5, generator=generator)
    a, b = one.double().numpy(), two.double().numpy()
    origin = (a.mean(0) + b.mean(0)) / 2
    covariance = sum((rows - origin).T @ (rows - origin) / len(rows) for rows in (a, b)) / 2
    values, vectors = np.linalg.eigh(covariance)
    plane = vectors[:, ::-1][:, :2]
    plane = plane * np.sign(plane[np.abs(plane).argmax(0), [0, 1]])
    (first, second), shares = features.principal_plane([one, two])
    np.testing.assert_allclose(first.numpy(), (a - origin) @ plane, atol=1e-4)
    np.testing.assert_allclose(second.numpy(), (b - origin) @ plane, atol=1e-4)
    assert shares == pytest.approx(tuple(values[::-1][:2] / values.sum()), rel=1e-4)


def test_the_plane_does_not_turn_with_the_order_or_number_of_images():
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 2, 1, 1, 1, 1])
    (straight,), _ = features.principal_plane([rows])
    (turned,), _ = features.principal_plane([rows.flip(0)])
    (twice,), _ = features.principal_plane([rows.repeat(2, 1)])
    assert torch.allclose(straight, turned.flip(0), atol=1e-4)
    assert torch.allclose(straight, twice[:30], atol=1e-4)


def test_one_image_and_one_feature_have_a_plane_too():
    (point,), shares = features.principal_plane([torch.tensor([[3.0, 4.0, 5.0]])])
    assert point.tolist() == [[0.0, 0.0]] and shares == (0.0, 0.0)
    (points,), shares = features.principal_plane([torch.tensor([[1.0], [3.0]])])
    assert points.tolist() == [[-1.0, 0.0], [1.0, 0.0]] and shares == (1.0, 0.0)


def test_the_deviations_are_those_of_each_image_alone(teacher, sets, tiny_cnn):
    module, inputs = tiny_cnn().module, sets["real"].inputs
    norm, observed = module[4], teacher.batch_norms[1]
    with torch.no_grad():
        means = module[:4](inputs).mean((2, 3))
    found = features.deviations(teacher, {"real": sets["real"]})["real"][observed.name]
    assert torch.allclose(found, (means - norm.running_mean) / norm.running_var.sqrt(), atol=1e-4)


def test_noise_is_off_and_images_that_are_one_image_do_not_spread():
    many = torch.tensor([[1.0, -2.0], [3.0, -2.0]])
    assert plots._told([many]) == "off by 2.00, spread 0.50"
    assert plots._told([many[:1].expand(4, -1)]) == "off by 1.50, spread 0.00"


def test_images_that_do_not_deviate_can_be_drawn(tmp_path, teacher):
    same = {norm.name: torch.zeros(4, len(norm.mean)) for norm in teacher.batch_norms}
    plots.deviation_histograms(tmp_path / "x.png", {"same": same})
    assert (tmp_path / "x.png").is_file()


def test_a_network_of_many_classes_without_batch_norms_has_a_plane_and_no_histograms(tmp_path):
    contract = InputContract(channels=3, height=2, width=2, mean=(0.5,) * 3, std=(0.25,) * 3)
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 40)).eval()
    bare = as_teacher(Network(name="bare", module=module, input=contract, classes=40))
    some = {"some": Images(inputs=torch.rand(8, 3, 2, 2), sources=("x",) * 8)}
    draw_deviations(tmp_path / "deviations.png", bare, some)
    draw_plane(tmp_path / "features.png", bare, some)
    assert [path.name for path in tmp_path.iterdir()] == ["features.png"]


def test_a_long_name_keeps_its_end():
    assert plots._short("features_18_conv_1_batch_norm") == "features_18_conv_1"
    assert plots._short("_0_1_batch_norm") == "0_1"
    assert plots._short("stage_" * 6 + "end") == "...stage_stage_stage_stage_end"


@pytest.mark.parametrize("plot", PLOTS)
def test_a_plot_leaves_no_trace_in_matplotlib(plot, tmp_path, teacher, sets):
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 7.0, "savefig.facecolor": "red"}):
        plot(tmp_path / "red.png", teacher, sets)
        assert matplotlib.rcParams["lines.linewidth"] == 7.0
    plot(tmp_path / "white.png", teacher, sets)
    assert (tmp_path / "red.png").read_bytes() == (tmp_path / "white.png").read_bytes()
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("plot", PLOTS)
def test_without_matplotlib_the_message_names_the_extra(plot, tmp_path, teacher, sets, monkeypatch):
    assert plots.available()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModelError) as caught:
        plot(tmp_path / "x.png", teacher, sets)
    assert str(caught.value) == (
        "matplotlib must be installed, got no module 'matplotlib'; "
        "install Reverie with its extra 'report': pip install -e '.[report]' in its folder"
    )
    assert not plots.available()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "words"), [("features", "the same axes in every panel"), ("deviations", "a peak at 0")])
def test_the_page_embeds_a_plot_that_is_there_with_what_to_look_for(labelled, tmp_path, name, words):
    html = render(labelled, read("adaround"), RECORD, tmp_path)
    assert words not in html
    (tmp_path / "plots").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "plots" / f"{name}.png")
    content = base64.b64encode((tmp_path / "plots" / f"{name}.png").read_bytes()).decode()
    html = render(labelled, read("adaround"), RECORD, tmp_path)
    assert f'<img src="data:image/png;base64,{content}"' in html
    assert words in " ".join(html.split())
