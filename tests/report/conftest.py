"""Numbers of runs, as `metrics.json` holds them: with labels, without, and without an exported file."""

import copy
import json

import pytest
from PIL import Image

LABELLED = {
    "network": {"name": "tiny", "fingerprint": "0123", "classes": 3},
    "quantization": {"weight_bits": 4, "activation_bits": 8, "stem_bits": 8, "sum_bits": 8, "placement": "integer"},
    "full_precision": {"top1": 0.95, "images": 200},
    "quantized": {"top1": 0.94, "images": 200},
    "exported": {"top1": 0.935, "images": 200},
    "difference": {
        "quantized": {"difference": -0.01, "low": -0.025, "high": 0.005},
        "exported": {"difference": -0.015, "low": -0.03, "high": 0.0},
    },
    "estimate": None,
    "agreement": {
        "synthetic": {"images": 32, "quantized": 1.0, "exported": 0.96875},
        "evaluation": {"images": 200, "quantized": 0.98, "exported": 0.975},
    },
    "parity": {
        "max_code_difference": 1,
        "differing_share": 0.00001,
        "top1_agreement": 0.99,
        "images": 64,
        "per_tensor": {
            "quiet": {"max_code_difference": 0, "differing_share": 0.0},
            "rare": {"max_code_difference": 1, "differing_share": 0.00001},
            "often": {"max_code_difference": 1, "differing_share": 0.02},
        },
    },
    "bytes": {"network": 900, "fp32": 6_000_000, "packed": 1_000_000},
    "latency_ms": {"fp32": 3.0, "quantized": 1.5, "ratio": 2.0, "quartiles": {"fp32": [2.9, 3.1], "quantized": [1.4, 1.6]}},
    "images": {
        "count": 66,
        "source": {"zeroq": 64, "real": 2},
        "diversity": {
            "batch_norm_distance": 0.02,
            "class_histogram": [33, 22, 11],
            "class_coverage": 0.9,
            "confidence": 0.99,
            "entropy": 0.01,
            "feature_similarity": 0.415,
        },
    },
    "rounding_errors": {"layer1": {"before": 0.4, "after": 0.1}},
    "seconds": {"capture": 1.0, "synthesize": 9.0},
    "peak_memory_bytes": 650_000_000,
}


@pytest.fixture
def labelled():
    return copy.deepcopy(LABELLED)


@pytest.fixture
def certified(labelled):
    """The certificate of a file that two runtimes and the reference were asked about, the second of which hides a tensor."""
    proof = {"failure": None, "layers": 3, "float_layers": [], "images": 64, "max_code_difference": 1, "top1_agreement": 1.0}
    labelled["certificate"] = {
        "runtime": "onnxruntime",
        "runtimes": {
            "onnxruntime": proof | {"version": "1.2", "codes": {"quiet": [0, 0.0], "often": [1, 0.02]}},
            "openvino": proof | {"version": "3.4", "float_layers": ["fc"], "codes": {"often": [1, 0.5]}},
            "torch": {"version": "2.13", "failure": "no float8 here", "layers": 3, "float_layers": []},
        },
        "reference": {key: proof[key] for key in ("layers", "float_layers", "max_code_difference", "top1_agreement")}
        | {"runtime": "onnxruntime", "images": 5, "differing_share": 0.25},
        "sha256": {"checkpoint": "c0" * 32, "content": "c1" * 32, "images": "c2" * 32},
    }
    return labelled


@pytest.fixture
def unlabelled(labelled):
    for name in ("full_precision", "quantized", "exported"):
        labelled[name] = {"top1": None}
    del labelled["agreement"]["evaluation"]
    return labelled | {"difference": {}}


@pytest.fixture
def simulated(labelled):
    """Nothing was exported."""
    for answers in labelled["agreement"].values():
        del answers["exported"]
    del labelled["difference"]["exported"]
    return labelled | {"exported": {"top1": None}, "latency_ms": None, "parity": None, "bytes": {"network": 900}}


SHEET = {
    "file": "thumbnails.png",
    "size": [16, 16],
    "columns": 4,
    "rows": 1,
    "by_class": True,
    "items": [
        {"set": "zeroq", "class": 0, "top": [[0, 0.9], [1, 0.1]]},
        {"set": "zeroq", "class": 1, "top": [[2, 0.6], [1, 0.4]]},
        {"set": "real", "class": 0, "top": [[0, 1.0], [1, 0.0]]},
        {"set": "real", "class": 2, "top": [[2, 0.7], [1, 0.3]]},
    ],
}
DETAILS = {
    "thumbnails": SHEET,
    "plane": {
        "shares": [0.5, 0.25],
        "sets": {
            "zeroq": {"points": [[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], "classes": [0, 1, 2]},
            "real": {"points": [[0.25, 1.0], [1.0, 0.25]], "classes": [0, 1]},
        },
    },
    "deviations": {
        "layers": ["conv1_batch_norm", "conv2_batch_norm"],
        "sets": {"zeroq": {"off": [0.1, 0.2], "spread": [0.2, 0.3]}, "real": {"off": [0.0, 0.1], "spread": [0.3, 0.4]}},
        "histograms": [
            {"layer": "conv1_batch_norm", "reach": 1.5, "sets": {"zeroq": [0.25, 0.5, 0.25], "real": [0.5, 0.25, 0.25]}}
        ],
    },
    "losses": {
        "synthesize": {"steps": [0, 1, 2], "losses": [4.0, 2.0, 1.0]},
        "distil": {"steps": [0, 9], "losses": [0.5, 0.25]},
    },
    "looked_at": "evaluation",
    "tensors": [
        {
            "name": name,
            "kind": kind,
            "bits": bits,
            "sqnr": sqnr,
            "student_sqnr": sqnr - 1,
            "max_error": 0.5,
            "clipped": clipped,
            "scale": [0.01, 0.02],
            "unit": "step" if kind == "weight" else "value",
            "low": -8.0,
            "high": 7.0,
            "step": 1.0,
            "from": -9.0,
            "to": 9.0,
            "counts": [1, 5, 25, 5, 1, 0],
        }
        for name, kind, bits, sqnr, clipped in (
            ("layer2", "weight", 4, 21.5, 0.01),
            ("layer10", "weight", 4, 9.5, 0.02),
            ("layer1", "weight", 8, 45.0, 0.0),
            ("relu", "activation", 8, 40.0, 0.0),
        )
    ],
}


@pytest.fixture
def detailed(labelled, tmp_path):
    """A run directory with everything that the report draws; `labelled` has what changed by class."""
    labelled["by_class"] = {
        "classes": [
            {"class": 0, "images": 100, "full_precision": 0.9, "quantized": 0.88},
            {"class": 1, "images": 60, "full_precision": 0.9, "quantized": 0.95},
            {"class": 2, "images": 40, "full_precision": 1.0, "quantized": 1.0},
        ],
        "pairs": [{"label": 0, "answer": 2, "full_precision": 3, "quantized": 5}],
        "lost": 1,
        "gained": 1,
        "change": [[-2, 0, 2], [-3, 3, 0], [0, 0, 0]],
    }
    (tmp_path / "plots").mkdir()
    Image.new("RGB", (64, 16), "teal").save(tmp_path / "plots" / "thumbnails.png")
    (tmp_path / "details.json").write_text(json.dumps(DETAILS))
    return tmp_path
