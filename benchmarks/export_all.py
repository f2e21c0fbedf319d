"""Every network of the capture test, with random weights, as a file that ONNX Runtime loads and that answers like the student.

    python benchmarks/export_all.py                                  all networks, W8A8 and W4A4, target onnx
    python benchmarks/export_all.py --networks resnet18 --bits 8     one
    python benchmarks/export_all.py --target tensorrt --symmetric    another kind of file

The list is that of `tests/graph/test_networks.py`. Each network has a process of its own; what is finished stays in
`build/export_all` and is not done again (`--again` does). Prints the table.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "export_all"
CALIBRATION, COMPARED = 8, 16


def networks() -> ModuleType:
    """The module of the capture test."""
    file = ROOT / "tests" / "graph" / "test_networks.py"
    spec = importlib.util.spec_from_file_location("capture_test", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measure(name: str, bits: int, target: str, symmetric: bool, file: Path) -> dict[str, Any]:
    """Exports one network, has the file checked, and compares what ONNX Runtime computes with what the student does."""
    import onnx
    import torch

    from reverie import export, plugins, runtimes
    from reverie.errors import ExportError
    from reverie.export import _verify as verify
    from reverie.graph.placement import place
    from reverie.graph.quantized import finish
    from reverie.graph.sums import separate_sums
    from reverie.graph.taps import tap
    from reverie.observers import tensor_qparams, weight_qparams
    from reverie.observers.minmax import MinMax

    torch.set_num_threads(1)
    tests = networks()
    (architecture,) = [each for each in tests.ARCHITECTURES if each.name == name]
    began = time.perf_counter()
    case = tests.Case(architecture)
    images = torch.randn(COMPARED, *case.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        graph = separate_sums(case.folded) if bits < 8 else case.folded
        student = place(graph, "integer", weight_bits=bits, activation_bits=bits, end_bits=8, sum_bits=8, symmetric=symmetric)
        for tensor, values in tap(graph, student.activations)(images[:CALIBRATION]).items():
            watch = MinMax().watch()
            watch.update(values.reshape(1, -1))
            student.activations[tensor].set_qparams(*tensor_qparams(watch, student.activations[tensor].grid))
        for layer, quantizer in student.weights.items():
            weight = student.graph.get_buffer(student.layers[layer].weight)
            quantizer.set_qparams(*weight_qparams(weight, MinMax(), quantizer.grid, symmetric=True))
        quantized = finish(student)
    plugins.load(export, target)()(quantized, case.shape, file)
    onnx.checker.check_model(file, full_check=True)
    onnx.shape_inference.infer_shapes_path(file, os.devnull, strict_mode=True)
    parity = verify.measure_parity(quantized, file, images, batch=4)
    try:
        verify.assert_parity(parity)
        verdict = ""
    except ExportError as error:
        verdict = str(error)
    return {
        "layers": len(quantized.layers),
        "tensors": len(quantized.activations),
        "integer": len(quantized.layers) - len(runtimes.load("onnxruntime").float_layers(file, quantized.layers)),
        "codes": parity.max_code_difference,
        "share": parity.differing_share,
        "logits": parity.logit_error,
        "top1": parity.top1_agreement,
        "untied": parity.untied_disagreements,
        "verdict": verdict,
        "bytes": file.stat().st_size,
        "seconds": time.perf_counter() - began,
    }


COLUMNS = (
    "network",
    "bits",
    "layers",
    "as integers",
    "tensors",
    "largest code difference",
    "values that differ, ties left out",
    "logits",
    "same class",
    "of another, ties left out",
    "holds",
    "MB",
    "s",
)
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def line(name: str, bits: int, found: dict[str, Any]) -> str:
    """The Markdown row of one network."""
    if "error" in found:
        return f"| {name} | W{bits}A{bits} | | | | | | | | | {found['error']} | | |"
    return (
        f"| {name} | W{bits}A{bits} | {found['layers']} | {found['integer']} | {found['tensors']} | {found['codes']} | "
        f"{found['share']:.1e} | {found['logits']:.1e} | {found['top1']:.0%} | {found['untied']} | {found['verdict'] or 'yes'} | "
        f"{found['bytes'] / 1e6:.2f} | {found['seconds']:.0f} |"
    )


def main() -> None:
    """Runs what is asked for and not there yet, then prints the table."""
    names = [architecture.name for architecture in networks().ARCHITECTURES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4], help="of weights and activations alike")
    parser.add_argument("--target", default="onnx")
    parser.add_argument("--symmetric", action="store_true", help="activations on symmetric grids")
    parser.add_argument("--again", action="store_true", help="measure even what is there already")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if given.worker:
        (name,), (bits,) = given.networks, given.bits
        file = BUILD / f"{name}-{bits}-{given.target}.onnx"
        try:
            print(json.dumps(measure(name, bits, given.target, given.symmetric, file)))
        finally:
            file.unlink(missing_ok=True)
        return
    rows = []
    for name in given.networks:
        for bits in given.bits:
            record = BUILD / f"{name}-{bits}-{given.target}{'-symmetric' * given.symmetric}.json"
            if given.again or not record.is_file():
                asked = ["--networks", name, "--bits", str(bits), "--target", given.target, *["--symmetric"] * given.symmetric]
                done = subprocess.run([sys.executable, __file__, "--worker", *asked], capture_output=True, text=True)
                said = (done.stdout if done.returncode == 0 else done.stderr).strip()
                last = said.splitlines()[-1] if said else f"exit status {done.returncode}"
                record.write_text(last if done.returncode == 0 else json.dumps({"error": last}))
                print(line(name, bits, json.loads(record.read_text())), file=sys.stderr, flush=True)
            rows.append(line(name, bits, json.loads(record.read_text())))
    print(HEADER, *rows, sep="\n")


if __name__ == "__main__":
    main()
