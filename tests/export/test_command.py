"""`reverie export` replaces a file only by one that is proven."""

import onnx
import pytest

from reverie.cli import main
from reverie.export._metadata import content_hash
from reverie.export.onnx import Onnx
from reverie.runtimes.onnxruntime import OnnxRuntime


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`embedded:digits` at W8A8 from a few images of noise."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    command = ["quantize", "embedded:digits", "--recipe", "noise", "--images", "8", "--set", "held_out=4"]
    assert main([*command, "--output", str(path)]) == 0
    return path


def damage(monkeypatch):
    """Makes the exporter write the weights of the last layer with the wrong sign."""
    write = Onnx.__call__

    def write_damaged(self, quantized, shape, path, *, facts=None):
        write(self, quantized, shape, path, facts=facts)
        model = onnx.load(path)
        name = f"{list(quantized.layers.values())[-1].weight}_scale"
        (scale,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        scale.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(scale), name))
        onnx.save(model, path)

    monkeypatch.setattr(Onnx, "__call__", write_damaged)


def leave_in_float(monkeypatch):
    """Makes every layer look as if ONNX Runtime computed it in float."""
    monkeypatch.setattr(OnnxRuntime, "float_layers", lambda self, path, layers: list(layers))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "expected"), [(damage, "logits: onnxruntime must compute them"), (leave_in_float, "layers must run as integers")]
)
@pytest.mark.parametrize("before", [b"an older file", None])
def test_a_failed_proof_leaves_the_target_as_it_was(spoil, expected, before, run, tmp_path, monkeypatch, capsys):
    file = tmp_path / "network.onnx"
    if before is not None:
        file.write_bytes(before)
    spoil(monkeypatch)
    assert main(["export", str(run), "--output", str(file)]) != 0
    assert expected in capsys.readouterr().err
    assert (file.read_bytes() if file.exists() else None) == before
    assert list(tmp_path.iterdir()) == [file] * (before is not None)


def test_an_older_file_is_replaced_by_a_proven_one(run, tmp_path, capsys):
    file = tmp_path / "again.onnx"
    file.write_bytes(b"an older file")
    assert main(["export", str(run), "--output", str(file)]) == 0
    assert content_hash(file) == content_hash(run / "network.onnx")
    assert "same class as the checkpoint on 8 of its own images" in capsys.readouterr().out


def test_without_images_it_says_that_nothing_was_compared(run, tmp_path, capsys):
    images = run / "images.safetensors"
    images.rename(tmp_path / "aside")
    try:
        assert main(["export", str(run), "--output", str(tmp_path / "network.onnx")]) == 0
    finally:
        (tmp_path / "aside").rename(images)
    assert f"not compared with the checkpoint: {images} is not there" in capsys.readouterr().out


def test_settings_of_a_target_are_those_of_a_recipe(run, tmp_path, capsys):
    file = tmp_path / "network.onnx"
    assert main(["export", str(run), "--output", str(file), "--set", "packing=int2", "--set", "dynamic_size=false"]) == 0
    assert main(["export", str(run), "--output", str(file), "--set", "packing=int3"]) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("target onnx: packing must be 'int4' or 'int2', got 'int3'; did you mean 'int4'?")
    )
    assert main(["export", str(run), "--output", str(file), "--set", "packs=int2"]) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("target onnx: unknown key 'packs'; choose one of dynamic_size, packing, or did you mean 'packing'?")
    )


@pytest.mark.parametrize("target", ["portable", "qnn"])
def test_a_file_for_another_device_is_compared_here_and_says_so(target, run, capsys):
    assert main(["export", str(run), "--target", target]) == 0
    said = capsys.readouterr().out
    assert f"wrote {run / f'network.{target}.onnx'}" in said
    assert "same class as the checkpoint on 8 of its own images" in said
    assert "made for " in said and "and not run there" in said


def test_a_target_that_cannot_express_the_run_says_what_it_can(run, capsys):
    assert main(["export", str(run), "--target", "tensorrt"]) == 1
    said = capsys.readouterr().err.strip()
    assert "tensorrt: input_1: codes must be within -128 to 127 where there are no zero points, got " in said
    assert said.endswith(
        "; quantize with --set quantization.symmetric=true, or with activations of at most 7 bits (end_bits, stem_bits and sum_bits too)"
    )
    assert not (run / "network.tensorrt.onnx").exists()


def test_a_target_that_is_not_executed_here_is_no_target_of_a_recipe(tmp_path, capsys):
    command = [
        "quantize",
        "embedded:digits",
        "--recipe",
        "noise",
        "--set",
        "export.method=qnn",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(command) == 1
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(
            "export.method must be a target that is executed here, got 'qnn', made for QNN; leave it out, and then use "
            "`reverie export RUN --target qnn`"
        )
    )


@pytest.mark.slow
def test_a_run_on_symmetric_grids_is_a_file_without_zero_points(tmp_path, capsys):
    run = tmp_path / "digits"
    command = ["quantize", "embedded:digits", "--recipe", "noise", "--images", "8", "--set", "held_out=4"]
    assert main([*command, "--set", "quantization.symmetric=true", "--output", str(run)]) == 0
    assert main(["export", str(run), "--target", "tensorrt"]) == 0
    assert "made for TensorRT, and not run there" in capsys.readouterr().out


def test_the_packed_checkpoint_is_no_target(run, capsys):
    assert main(["export", str(run), "--target", "packed"]) != 0
    assert "unknown target 'packed'; choose one of onnx, " in capsys.readouterr().err
