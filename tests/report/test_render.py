import base64
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from reverie.recipe import read, to_toml
from reverie.report.render import render

RECORD = {
    "versions": {"python": "3.11.7", "onnxruntime": "1.31.1", "threads": 2},
    "facts": {"network": "tiny", "options": {"weights": "<w>.pt"}, "seed": 0, "device": "cpu"},
}
VOID = {"meta", "img", "link", "br", "rect"}


class Page(HTMLParser):
    """Notes what a browser would fetch, and that every element is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.fetched, self.open, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID or tag == "rect":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page(metrics, path, recipe=None):
    html = render(metrics, recipe or read("adaround"), RECORD, path)
    parsed = Page(html)
    assert parsed.open == []
    return html, parsed


def test_the_page_needs_nothing_but_itself(labelled, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "contact_sheet.png")
    html, parsed = page(labelled, tmp_path)
    sheet = base64.b64encode((tmp_path / "images" / "contact_sheet.png").read_bytes()).decode()
    assert parsed.fetched == [f"data:image/png;base64,{sheet}"]
    assert not re.search(r"url\(|@import|<script|<link", html)


def test_the_page_says_what_was_measured(labelled, tmp_path):
    _, parsed = page(labelled, tmp_path)
    for words in ("93.50", "-1.50 (-3.00 to +0.00)", "6.0 x smaller", "0.4 to 0.1, 25 % left", "650.0 MB", "1.31.1", "<w>.pt"):
        assert words in parsed.text
    assert to_toml(read("adaround")).strip() in parsed.text


def test_only_tensors_that_differ_are_listed_most_first(labelled, tmp_path):
    _, parsed = page(labelled, tmp_path)
    assert "quiet" not in parsed.text
    assert parsed.text.index("often") < parsed.text.index("rare")


def test_the_histogram_has_a_bar_for_each_class_in_proportion(labelled, tmp_path):
    html, _ = page(labelled, tmp_path)
    assert re.findall(r'<rect [^>]*height="([^"]*)"', html) == ["1.0000", "0.6667", "0.3333"]


@pytest.mark.parametrize(
    ("case", "caveat"),
    [
        ("labelled", "Accuracy and its interval are about images like the labelled ones given"),
        ("unlabelled", "No labelled images were given, so accuracy is unknown."),
        ("simulated", "Nothing was run in a real runtime"),
    ],
)
def test_the_page_says_what_it_does_not_tell(request, tmp_path, case, caveat):
    _, parsed = page(request.getfixturevalue(case), tmp_path)
    assert caveat in parsed.text


def test_a_file_that_was_timed_but_not_compared_did_run_in_a_real_runtime(labelled, tmp_path):
    _, parsed = page(labelled | {"parity": None, "agreement": {}}, tmp_path)
    assert "Nothing was run in a real runtime" not in parsed.text
    assert "Parity was checked" not in parsed.text


def test_agreement_on_the_calibration_images_is_called_that(unlabelled, tmp_path):
    _, parsed = page(unlabelled | {"agreement": {"calibration": unlabelled["agreement"]["synthetic"]}}, tmp_path)
    assert "on 96.88\u00a0% of 32 calibration images" in parsed.text
    assert "Agreement was measured on the calibration images themselves" in parsed.text


def test_similar_images_are_explained(labelled, tmp_path):
    _, parsed = page(labelled, tmp_path)
    assert "0.415" in parsed.text
    assert "0 to 1 behind a ReLU; 1 is one image many times" in parsed.text


def test_noise_among_the_images_is_called_a_baseline(labelled, tmp_path):
    labelled["images"]["source"] = {"noise": 66}
    _, parsed = page(labelled, tmp_path)
    assert "Gaussian noise, which knows nothing of the network" in parsed.text


def test_measures_that_a_network_cannot_have_are_left_out(labelled, tmp_path):
    labelled["images"]["diversity"] |= {"batch_norm_distance": None, "feature_similarity": None}
    _, parsed = page(labelled, tmp_path)
    assert "batch norm distance" not in parsed.text


def test_equal_runs_give_equal_pages(labelled, tmp_path):
    assert page(labelled, tmp_path)[0] == page(labelled, tmp_path)[0]


MIXED = {
    "effective_bits": 3.5,
    "effective_activation_bits": 8.0,
    "bit_operations": 27.94,
    "tensors": [
        {"name": "conv1", "kind": "weight", "elements": 432, "bits": 4, "divergence": {"2": 0.5, "4": 0.005, "8": 0.0}},
        {"name": "fc", "kind": "weight", "elements": 1440, "bits": 2, "divergence": {"2": 0.05, "4": 0.001, "8": 1e-9}},
        {"name": "relu", "kind": "activation", "elements": 16384, "bits": 8, "divergence": {"2": 0.1, "4": 0.01, "8": 1e-4}},
    ],
}


def test_every_tensors_sensitivity_is_shown_and_what_it_got_is_framed(labelled, tmp_path):
    html, parsed = page(labelled | {"mixed_precision": MIXED}, tmp_path)
    assert "1 weight with 2, 1 with 4 (mean 3.5); 1 activation with 8 (mean 8); 27.9 bit operations" in parsed.text
    assert re.findall(r'<td class=chosen style="--share: (\d+)%">([^<]*)', html) == [
        ("36", "5.0e-03"),  # 60 * (1 - 2/5): a hundredth of the largest
        ("48", "5.0e-02"),
        ("16", "1.0e-04"),
    ]
    assert all(f"<td>{tensor['name']}</td><td>{tensor['elements']:,}</td>" in html for tensor in MIXED["tensors"])
    assert 'style="--share: 60%">5.0e-01' in html and 'style="--share: 0%">0.0e+00' in html
    assert "mixed W3.5A8" in parsed.text


def test_without_mixed_precision_nothing_is_said_of_it(labelled, tmp_path):
    assert "need their bits" not in page(labelled, tmp_path)[1].text
