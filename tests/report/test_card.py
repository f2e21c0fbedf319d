"""The model card: the Hub can read it, nobody's names become markup, and its lines of code run."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from reverie.export.onnx import Onnx
from reverie.recipe import Recipe
from reverie.report import card
from reverie.report.card import UNPACK, markdown, render

ROOT = Path(__file__).parents[2]
RECORD = {
    "identity": {"calibration": "none", "evaluation": "9c8ae8f3bf8c906f", "unlabelled": "none", "capsule": "none"},
    "versions": {"reverie": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.31.1"},
}
RECIPE = Recipe(export=Onnx())


def front_matter(text):
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def section(text, name):
    return text.partition(f"## {name}\n")[2].partition("\n## ")[0]


def blocks(text, language):
    return [block.partition("\n```")[0] for block in text.split(f"```{language}\n")[1:]]


def test_the_hub_reads_bits_accuracy_and_its_interval(tiny_cnn, labelled):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra 'models')")
    text = render(tiny_cnn(), labelled, RECIPE, RECORD)
    data = hub.ModelCard(text).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("reverie", "other", "image-classification")
    assert data.tags == ["quantized", "data-free-quantization", "w4a8", "onnx"]
    accuracy, difference = data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 93.5)
    assert difference.metric_value == -1.5
    assert difference.metric_name == "points of top-1 accuracy from full precision, 95 % interval -3.00 to +0.00"
    # What was measured stands in the text, too.
    assert "| exported \\(ONNX Runtime\\) | 93.50 % | \\-1.50 \\(\\-3.00 to \\+0.00\\) |" in text


def test_without_labels_no_accuracy_is_claimed(tiny_cnn, unlabelled):
    text = render(tiny_cnn(), unlabelled, RECIPE, RECORD)
    assert "model-index" not in front_matter(text)
    assert "accuracy was not measured, for want of labelled images" in text


def test_it_says_that_no_real_image_was_read(tiny_cnn, unlabelled):
    unlabelled["images"]["source"] = {"zeroq": 64}
    none = {**RECORD, "identity": dict.fromkeys(RECORD["identity"], "none")}
    assert section(render(tiny_cnn(), unlabelled, RECIPE, none), "Data").split("\n")[1:3] == [
        "- 64 images, made by zeroq out of the network itself",
        "- no real image had a part in making it",
    ]


def test_it_says_which_real_images_were_read_and_what_for(tiny_cnn, labelled):
    some = {**RECORD, "identity": RECORD["identity"] | {"calibration": "0123456789abcdef", "capsule": "fedc"}}
    told = section(render(tiny_cnn(), labelled, RECIPE, some), "Data")
    assert "- 2 real images \\(sha256 of their inputs 0123456789abcdef...\\): learned from" in told
    assert "- 200 real images \\(sha256 of their inputs 9c8ae8f3bf8c906f...\\): only looked at" in told
    assert "- a capsule \\(fedc\\): statistics of real images" in told
    assert "no real image" not in told


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "a`b``c```d",
        'quote " backslash \\ colon: # [link](http://x)',
        "two\nlines\n---\nlicense: mit",
        "\x00\x07\u2028\x85\udc80",
        "| a | b |",
        "{{ 7 * 7 }}{% raw %}",
        "😀 für",
    ],
)
def test_a_name_stays_text(name, tiny_cnn, labelled):
    labelled["network"]["name"] = name
    text = render(replace(tiny_cnn(), name=name), labelled, RECIPE, RECORD)
    text.encode()
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    front = front_matter(text)
    assert front["license"] == "other"
    assert front["model-index"][0]["name"] == f"{shown} at W4A8"
    title = next(line for line in text.splitlines() if line.startswith("# "))
    assert not set(re.sub(r"\\.", "", title)) & set("`*_[]<>|{}")
    # The headings are the card's own, so nothing has ended a line or opened a block.
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {heading}" for heading in ("How it was made", "Data", "Limits", "How to load it", "How to make it again")
    ]
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert len(fences) % 2 == 0


def test_folders_of_the_makers_machine_are_left_out(tiny_cnn, labelled):
    name = "/home/someone/secret/nets.py:resnet20"
    labelled["network"]["name"] = name
    options = {"weights": "/home/someone/secret/w.pth", "input_size": 32, "mean": (0.5, 0.25)}
    text = render(replace(tiny_cnn(), name=name, options=options), labelled, RECIPE, RECORD)
    assert "someone" not in text
    command = blocks(text, "sh")[-1]
    assert command.startswith(
        "reverie quantize nets.py:resnet20 --weights w.pth --input-size 32 --mean 0.5,0.25 --recipe recipe.toml"
    )
    assert command.endswith("--evaluate EVALUATION")


def test_timm_networks_name_their_base_on_the_hub(tiny_cnn, labelled):
    for name, base in (("timm:resnet18.a1_in1k", "timm/resnet18.a1_in1k"), ("timm:resnet18", None), ("embedded:digits", None)):
        labelled["network"]["name"] = name
        assert front_matter(render(replace(tiny_cnn(), name=name), labelled, RECIPE, RECORD)).get("base_model") == base


def test_markdown_is_escaped_letter_by_letter():
    assert markdown("a_b*c <d> & [e](f) `g` |h|") == r"a\_b\*c &lt;d\> &amp; \[e\]\(f\) \`g\` \|h\|"


def test_the_ten_lines_are_those_of_the_page_on_the_checkpoint():
    page = (ROOT / "docs/checkpoint.md").read_text()
    assert page.partition("<!-- ten lines -->\n```python\n")[2].partition("\n```")[0] == UNPACK


@pytest.mark.slow
def test_its_lines_of_code_load_the_files_of_a_real_run(tiny_cnn, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'onnx')")
    from reverie.pipeline import run
    from reverie.recipes import read

    network = tiny_cnn()
    quick = {"images": 8, "held_out": 0, "estimate_images": 0, "synthesis.steps": 2, "quantization.weight_bits": 4}
    done = run(read("zeroq", quick), network, output=tmp_path / "run", evaluation=network.held_out())
    text = (done.path / "README.md").read_text()
    assert text == card.render(network, done.metrics, read("zeroq", quick), json.loads((done.path / "run.json").read_text()))
    picture = network.input.denormalize(network.held_out().inputs[0]).clamp(0, 1).permute(1, 2, 0).numpy()
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(done.path / "image.png")
    used, unpacked = blocks(text, "python")
    classified = subprocess.run([sys.executable, "-W", "error", "-c", used], cwd=done.path, capture_output=True, text=True)
    assert classified.stdout.strip() == str(int(network.held_out().labels[0])), classified.stderr
    shapes = unpacked + "\nprint(sorted(tuple(weight.shape) for weight in weights.values()))"
    printed = subprocess.run([sys.executable, "-c", shapes], cwd=done.path, capture_output=True, text=True)
    assert printed.stdout.strip() == "[(3, 16), (8, 3, 3, 3), (16, 8, 3, 3), (16, 16, 3, 3)]", printed.stderr
