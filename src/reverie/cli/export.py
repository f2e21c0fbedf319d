"""`reverie export`: a finished run as a file for a runtime, once more."""

from pathlib import Path

from reverie.cli._options import NO_OPTIONS, NetworkOptions
from reverie.cli._output import say
from reverie.cli._runs import load_network, packed_file
from reverie.errors import ConfigError

# As many as a run compares; more would only repeat the same arithmetic.
_PARITY_IMAGES = 64


def export(
    run: Path,
    /,
    *,
    target: str = "onnx",
    output: Path | None = None,
    network: str | None = None,
    options: NetworkOptions = NO_OPTIONS,
) -> None:
    """Write the integer model of a run for a target, from its packed checkpoint.

    The file replaces an older one only once ONNX Runtime computes from it, in integers, what the checkpoint says for the
    run's own images.

    Example: reverie export runs/embedded-digits-w4a8 --target onnx --output digits.onnx

    Args:
        run: A run directory that `reverie quantize` completed.
        target: Which kind of file; `reverie methods` lists them.
        output: The file; default RUN/network.TARGET.
        network: The full-precision network; default: the one that the run names.
    """
    from reverie import export as targets
    from reverie import plugins, recipe, stages
    from reverie.export import _verify as verify
    from reverie.export._packed import restore, stored_bits
    from reverie.images.store import load_images
    from reverie.report.outcome import size_text
    from reverie.runs import atomic_write

    exporter = plugins.load(targets, target)()
    packed = packed_file(run)
    file = output or run / f"network.{target}"
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: must be in a folder that exists, got none; create it or choose another --output")
    resolved = recipe.read(str(run / "recipe.toml"))
    loaded = load_network(run, network, options)
    teacher = stages.as_teacher(loaded)
    _, student = stages.student_of(teacher.graph, resolved.quantization, stored_bits(packed))
    quantized = restore(student, packed)
    facts = {"reverie.network": loaded.name, "reverie.recipe": resolved.fingerprint}
    images = run / "images.safetensors"
    proof = f"not compared with the checkpoint: {images} is not there"

    def write_proven(aside: Path) -> None:
        nonlocal proof
        exporter(quantized, loaded.input.shape, aside, facts=facts)
        if images.is_file():
            parity = verify.measure_parity(
                quantized, aside, load_images(images).resized(*loaded.input.shape[1:]).inputs[:_PARITY_IMAGES]
            )
            verify.assert_parity(parity)
            proof = (
                f"same class as the checkpoint on {parity.images} of its own images, "
                f"codes at most {parity.max_code_difference} steps apart"
            )
        verify.assert_integer(aside, quantized)

    atomic_write(file, write_proven)
    say(f"wrote {file}, {size_text(file.stat().st_size)}")
    say(proof)
