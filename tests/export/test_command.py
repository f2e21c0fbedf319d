"""`reverie export` replaces a file only by one that is proven."""

import onnx
import pytest

from reverie.cli import main
from reverie.export import _verify as verify
from reverie.export.onnx import Onnx


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
    monkeypatch.setattr(verify, "float_layers", lambda model, layers: list(layers))


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
    assert file.read_bytes() == (run / "network.onnx").read_bytes()
    assert "same class as the checkpoint on 8 of its own images" in capsys.readouterr().out


def test_without_images_it_says_that_nothing_was_compared(run, tmp_path, capsys):
    images = run / "images.safetensors"
    images.rename(tmp_path / "aside")
    try:
        assert main(["export", str(run), "--output", str(tmp_path / "network.onnx")]) == 0
    finally:
        (tmp_path / "aside").rename(images)
    assert f"not compared with the checkpoint: {images} is not there" in capsys.readouterr().out


def test_the_packed_checkpoint_is_no_target(run, capsys):
    assert main(["export", str(run), "--target", "packed"]) != 0
    assert "unknown export method 'packed'; choose one of onnx" in capsys.readouterr().err
