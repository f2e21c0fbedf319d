"""A name is text wherever the page shows it: in elements, in attributes, in scripts and in their data."""

import copy
import json
from html.parser import HTMLParser
from itertools import count

import pytest

from reverie.recipes import from_tables
from reverie.report.render import render

HOSTILE = """"><script>alert(1)</script>' onmouseover='alert(2)' x="</style><!-- ]]> </script><img src=x onerror=alert(3)> {{ 7*7 }} \u2028 \\u003c"""
# Values that the page knows, and so no names.
WORDS = {"integer", "literature", "weight", "activation", "onnxruntime", "openvino", "torch"}
# What is keyed by names: of tensors and units, of methods and sets of images.
NAMED = {"per_tensor", "rounding_errors", "source", "separation", "certificate"}
SEPARATION = {
    "inter_class_separation": 1.0,
    "intra_class_spread": 0.5,
    "separation_ratio": 2.0,
    "centre_distance_to_real": 0.1,
    "coverage": 0.5,
}
TENSORS = [
    {"name": "conv1", "kind": "weight", "elements": 432, "bits": 4, "divergence": {"2": 0.5, "4": 0.005}},
    {"name": "relu", "kind": "activation", "elements": 16384, "bits": 8, "divergence": {"2": 0.1, "8": 1e-4}},
]


class Page(HTMLParser):
    """The elements of a page with the names of their attributes, the places that it leads to, its text and its scripts."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.places, self.text, self.scripts = [], [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, [name for name, _ in attributes]))
        self.places += [value for name, value in attributes if name in ("href", "src", "action", "xlink:href")]
        if tag == "script":
            self.scripts.append([dict(attributes).get("type"), ""])

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1][1] += data
        self.text += data

    def handle_comment(self, data):
        self.elements.append(("comment", []))


def named(value, name, key=""):
    """`value` with what `name` gives in place of everything that a user could have called something."""
    if isinstance(value, dict):
        names = [name() if key in NAMED else inner for inner in value]
        return {new: named(value[old], name, old) for new, old in zip(names, value, strict=True)}
    if isinstance(value, list):
        return [named(inner, name, key) for inner in value]
    return name() if isinstance(value, str) and value not in WORDS else value


def page(metrics, name, path):
    metrics = named(copy.deepcopy(metrics), name)
    record = {
        "versions": {"python": name(), "onnxruntime": name(), "threads": 2},
        "facts": {"network": metrics["network"]["name"], "options": {"weights": name()}, "seed": 0, "device": name()},
    }
    recipe = from_tables({"bits": {"weights": {name(): 8}, "activations": {name(): 4}}})
    return Page(render(metrics, recipe, record, path))


@pytest.mark.parametrize("case", ["labelled", "unlabelled", "simulated"])
def test_no_name_becomes_an_element_or_an_attribute(request, tmp_path, case):
    metrics = request.getfixturevalue(case)
    metrics["mixed_precision"] = {
        "effective_bits": 3.5,
        "effective_activation_bits": 8.0,
        "bit_operations": 2.5,
        "tensors": TENSORS,
    }
    metrics["images"]["separation"] = {"zeroq": dict(SEPARATION), "real": dict(SEPARATION)}
    plain, hostile = count(), count()
    expected = page(metrics, lambda: f"name {next(plain)}", tmp_path)
    found = page(metrics, lambda: f"{HOSTILE} {next(hostile)}", tmp_path)
    assert found.elements == expected.elements
    assert HOSTILE in found.text
    assert all(place.startswith(("data:", "#")) for place in found.places)
    assert "name 0" in expected.text
    for kind, text in found.scripts:
        if kind == "application/json":
            json.loads(text)


def test_the_test_sees_markup():
    plain, hostile = Page("<p title='a'>a</p>"), Page(f"<p title='{HOSTILE}'>{HOSTILE}</p>")
    assert hostile.elements != plain.elements
