import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from PIL import Image

from reverie.recipes import read, to_toml
from reverie.report.render import render
from reverie.report.sections import commands

RECORD = {
    "versions": {"python": "3.11.7", "onnxruntime": "1.31.1", "threads": 2},
    "facts": {"network": "tiny", "options": {"weights": "<w>.pt"}, "seed": 0, "device": "cpu"},
}
VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """Notes what a browser would fetch, the text and the headings, and that every element is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.fetched, self.open, self.text, self.headings, self.ids = [], [], "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data


SECTIONS = [
    "verdict",
    "images",
    "spread",
    "learning",
    "tensors",
    "classes",
    "ranges",
    "bits",
    "speed",
    "proof",
    "limits",
    "made",
]


def page(metrics, path, recipe=None):
    html = render(metrics, recipe or read("adaround"), RECORD, path)
    parsed = Page(html)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.headings[0] == 1 and all(after <= before + 1 for before, after in pairwise(parsed.headings))
    assert [place for place in parsed.fetched if place.startswith("#")] == [
        f"#{place}" for place in ["verdict", *(place for place in SECTIONS if place in parsed.ids)]
    ]
    return html, parsed


def test_the_page_needs_nothing_but_itself(labelled, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "contact_sheet.png")
    html, parsed = page(labelled, tmp_path)
    sheet = base64.b64encode((tmp_path / "images" / "contact_sheet.png").read_bytes()).decode()
    assert [place for place in parsed.fetched if not place.startswith("#")] == [f"data:image/png;base64,{sheet}"]
    assert not re.search(r"@import|<link|url\((?!\"data:image/)", html)


def test_the_policy_allows_our_script_by_its_hash_and_no_request(labelled, tmp_path):
    html, _ = page(labelled, tmp_path)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in policy.replace("&#39;", "'").split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert (rules["img-src"], rules["script-src"]) == ("data:", f"'sha256-{allowed}'")
    assert set(rules) == {"default-src", "img-src", "style-src", "script-src", "base-uri", "form-action"}


ALL = set(SECTIONS)
QUANTIZED = {"verdict", "images", "learning", "speed", "proof", "limits", "made"}


def sections(parsed):
    return ALL & set(parsed.ids)


def test_a_run_with_everything_has_every_section(labelled, detailed):
    assert sections(page(labelled, detailed)[1]) == ALL


@pytest.mark.parametrize(
    ("case", "expected"),
    [("labelled", QUANTIZED), ("unlabelled", QUANTIZED), ("simulated", QUANTIZED - {"speed", "proof"})],
)
def test_a_run_of_an_older_version_has_the_sections_that_it_has_numbers_for(request, tmp_path, case, expected):
    assert sections(page(request.getfixturevalue(case), tmp_path)[1]) == expected


def test_without_labels_or_an_exported_file_their_sections_are_left_out(labelled, detailed, request):
    del labelled["by_class"]
    simulated = request.getfixturevalue("simulated")
    simulated["quantization"]["placement"] = "literature"
    assert sections(page(simulated, detailed)[1]) == ALL - {"classes", "speed", "proof"}


def test_a_run_that_made_images_only_tells_of_them_and_of_nothing_else(labelled, detailed):
    made = {key: labelled[key] for key in ("network", "images", "seconds", "peak_memory_bytes")}
    details = json.loads((detailed / "details.json").read_text())
    (detailed / "details.json").write_text(json.dumps({key: details[key] for key in ("thumbnails", "plane", "deviations")}))
    html, parsed = page(made, detailed)
    assert sections(parsed) == {"verdict", "images", "spread", "limits", "made"}
    assert "66 images were made out of the network alone by zeroq and real; it takes them for 3 of its 3 classes" in parsed.text
    assert "bits" not in html[: html.index("<style>")]


def test_of_a_thousand_classes_images_stand_without_rows_and_classes_without_a_table(labelled, detailed):
    labelled["network"]["classes"] = 1000
    labelled["images"]["diversity"]["class_histogram"] = [1, 0] * 500
    del labelled["by_class"]["change"]
    details = json.loads((detailed / "details.json").read_text())
    details["thumbnails"]["by_class"] = False
    (detailed / "details.json").write_text(json.dumps(details))
    html, parsed = page(labelled, detailed)
    assert sections(parsed) == ALL
    assert html.count('class="thumb') == 4
    assert 'class="row' not in html and 'class="change"' not in html and 'data-k="0">class 0' not in html


def test_every_string_stays_text(labelled, detailed):
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    labelled["network"]["name"] = bad
    labelled["rounding_errors"] = {bad: {"before": 1.0, "after": 0.5}}
    labelled["parity"]["per_tensor"] = {bad: {"max_code_difference": 1, "differing_share": 0.1}}
    labelled["images"]["source"] = {bad: 66}
    labelled["choice"] = [bad]
    details = json.loads((detailed / "details.json").read_text())
    details["thumbnails"]["items"][0]["set"] = bad
    details["tensors"][0]["name"] = bad
    details["plane"]["sets"][bad] = details["plane"]["sets"]["zeroq"]
    details["deviations"]["layers"][0] = bad
    details["deviations"]["histograms"][0]["layer"] = bad
    (detailed / "details.json").write_text(json.dumps(details))
    html, parsed = page(labelled, detailed)
    assert parsed.text.count(bad) >= 6
    assert html.count("<script") == html.count("</script>") == 2
    assert "<img src=x" not in html
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert json.loads(data)[0] == [bad, 0, [[0, 0.9], [1, 0.1]]]


def test_a_picture_of_the_nearest_real_images_is_shown_where_there_is_one(labelled, detailed):
    assert "nearest to it" not in page(labelled, detailed)[0]
    Image.new("RGB", (4, 4)).save(detailed / "plots" / "nearest.png")
    picture = base64.b64encode((detailed / "plots" / "nearest.png").read_bytes()).decode()
    html, _ = page(labelled, detailed)
    assert f'<img src="data:image/png;base64,{picture}" alt="Synthetic images beside the real images nearest to them">' in html


def test_real_images_in_the_file_are_announced(labelled, detailed):
    assert "This file contains real images" in page(labelled, detailed)[1].text
    details = json.loads((detailed / "details.json").read_text())
    details["thumbnails"]["items"] = details["thumbnails"]["items"][:2]
    (detailed / "details.json").write_text(json.dumps(details))
    assert "This file contains real images" not in page(labelled, detailed)[1].text


@pytest.mark.parametrize(
    ("facts", "identity", "line"),
    [
        ({}, {}, "reverie quantize tiny --recipe RUN/recipe.toml --weights '<w>.pt' --output again"),
        (
            {"network": "a b.py:net", "device": "cuda", "options": {"mean": [0.5, 0.25]}},
            {"calibration": "none", "evaluation": "0f"},
            "reverie quantize 'a b.py:net' --recipe RUN/recipe.toml --mean 0.5,0.25 --device cuda --evaluate FOLDER --output again",
        ),
        ({"request": {"line": "reverie quantize 'x; y'"}}, {}, "reverie quantize 'x; y'"),
        ({"request": None, "options": {}}, {}, "reverie quantize tiny --recipe RUN/recipe.toml --output again"),
        ({}, {"only": "images"}, "reverie synthesize tiny --recipe RUN/recipe.toml --weights '<w>.pt' --output again"),
    ],
)
def test_the_command_line_can_be_pasted_into_a_shell(facts, identity, line):
    record = RECORD | {"facts": RECORD["facts"] | facts, "identity": identity}
    assert commands(record)[0][1] == line


def test_the_page_says_which_real_images_were_read(labelled, tmp_path):
    read_for_accuracy = {"count": 5, "from": "<photos>", "hashes": "files"}
    page = render(labelled | {"real_images": {"evaluation": read_for_accuracy}}, read("adaround"), RECORD, tmp_path)
    assert "evaluation: 5 images from &lt;photos&gt;; their hashes are in real_images.json." in page
    page = render(labelled | {"real_images": {}}, read("adaround"), RECORD, tmp_path)
    assert "No real image was read." in page


def test_the_page_says_what_was_measured(labelled, tmp_path):
    _, parsed = page(labelled, tmp_path)
    for words in ("93.50", "-1.50 (-3.00 to +0.00)", "6.0 x", "0.1", "25 %", "0.6 GiB", "1.31.1", "<w>.pt"):
        assert words in parsed.text
    assert to_toml(read("adaround")).strip() in parsed.text


def test_only_tensors_that_differ_are_listed_most_first(labelled, tmp_path):
    _, parsed = page(labelled, tmp_path)
    assert "quiet" not in parsed.text
    assert parsed.text.index("often") < parsed.text.index("rare")


def test_the_certificate_stands_in_the_page_whole(certified, tmp_path):
    text, _ = page(certified, tmp_path)
    for digest in certified["certificate"]["sha256"].values():
        assert f"<dd>{digest}</dd>" in text
    assert "Integers alone, without a runtime and without a float, and ONNX Runtime: codes at most 1 step apart" in text
    assert '<tr><th scope="row">often</th><td>1, 2.00 %</td><td>1, 50.00 %</td></tr>' in text
    assert "The same file in PyTorch 2.13 no float8 here." in text


def test_the_histogram_has_a_bar_for_each_class_in_proportion(labelled, tmp_path):
    html, _ = page(labelled, tmp_path)
    counts = html[html.index('class="counts"') :]
    assert re.findall(r'<rect [^>]*height="([^"]*)"', counts[: counts.index("</svg>")]) == ["1.0000", "0.6667", "0.3333"]


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
    assert re.findall(r'<td class="shaded chosen" style="--share: (\d+)%">([^<]*)', html) == [
        ("30", "5.0e-03"),  # 50 * (1 - 2/5): a hundredth of the largest
        ("40", "5.0e-02"),
        ("13", "1.0e-04"),
    ]
    assert all(f'<th scope="row">{tensor["name"]}</th><td>{tensor["elements"]:,}</td>' in html for tensor in MIXED["tensors"])
    assert 'style="--share: 50%">5.0e-01' in html and 'style="--share: 0%">0.0e+00' in html
    assert "mixed W3.5A8" in parsed.text


def test_without_mixed_precision_nothing_is_said_of_it(labelled, tmp_path):
    assert "need their bits" not in page(labelled, tmp_path)[1].text
