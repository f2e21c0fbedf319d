"""Numbers of runs, as `metrics.json` holds them: with labels, without, and without an exported file."""

import copy

import pytest

LABELLED = {
    "network": {"name": "tiny", "fingerprint": "0123", "classes": 3},
    "quantization": {"weight_bits": 4, "activation_bits": 8, "sum_bits": 8, "placement": "integer"},
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
