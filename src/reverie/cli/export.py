"""`reverie export`: a finished run as a file for a runtime, once more."""

from pathlib import Path

from reverie.cli._options import NO_OPTIONS, NetworkOptions, Settings, as_overrides
from reverie.cli._output import say
from reverie.cli._runs import load_network, packed_file, restored
from reverie.errors import ConfigError, ReverieError

# As many as a run compares; more would only repeat the same arithmetic.
_PARITY_IMAGES = 64


def export(
    run: Path,
    /,
    *,
    target: str = "onnx",
    output: Path | None = None,
    settings: Settings = None,
    network: str | None = None,
    options: NetworkOptions = NO_OPTIONS,
) -> None:
    """Write the integer model of a run for a target, from its packed checkpoint.

    The file replaces an older one only once the target's runtime computes from it what the checkpoint says for the run's own
    images, in integers where it is made for this machine. Every installed runtime that reads it is asked; what they answer is its
    certificate, which stands in the file (`reverie verify` repeats it).

    Example: reverie export runs/embedded-digits-w4a8 --target onnx --output digits.onnx

    Args:
        run: A run directory that `reverie quantize` completed.
        target: Which kind of file; `reverie methods` lists them.
        output: The file; default: in the run directory, under the target's own name.
        settings: Of the target, as KEY=VALUE, such as packing=int2; repeatable.
        network: The full-precision network; default: the one that the run names.
    """
    from reverie import recipes, runtimes
    from reverie.export import _verify as verify
    from reverie.export._certificate import certify
    from reverie.files import atomic_write
    from reverie.images.store import load_images
    from reverie.report.measure import sizes
    from reverie.report.outcome import size_text
    from reverie.runs import check_hash, seal

    exporter = recipes.exporter(target, as_overrides(settings))
    own = runtimes.load(exporter.runtime)
    packed = packed_file(run)
    file = output or run / exporter.filename
    suffix = Path(exporter.filename).suffix
    if file.suffix != suffix:
        raise ConfigError(f"{file}: must end in {suffix}, got {file.suffix!r}; rename the --output of target {target!r}")
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: must be in a folder that exists, got none; create it or choose another --output")
    loaded = load_network(run, network, options)
    quantized = restored(run, loaded)
    facts = {"reverie.network": loaded.name, "reverie.recipe": recipes.fingerprint(recipes.read(str(run / "recipe.toml")))}
    stored = run / "images.safetensors"
    proof = f"not compared with the checkpoint: {stored} is not there"

    def write_proven(aside: Path) -> None:
        nonlocal proof
        exporter(quantized, loaded.input.shape, aside, facts=facts)
        if stored.is_file():
            images = load_images(stored).resized(*loaded.input.shape[1:]).inputs[:_PARITY_IMAGES]
            parity, _ = certify(quantized, aside, images, exporter.runtime, checkpoint=packed)
            proof = (
                f"same class as the checkpoint on {parity.images} of its own images, "
                f"codes at most {parity.max_code_difference} steps apart"
            )
        if exporter.device is None:
            verify.assert_integer(aside, quantized, runtime=own)

    def write_named(aside: Path) -> None:
        try:
            write_proven(aside)
        except ReverieError as error:
            # Nobody asked for the file aside, and it is gone.
            error.args = (str(error).replace(str(aside), str(file)),)
            raise

    if stored.is_file():
        check_hash(run, stored)
    atomic_write(file, write_named, beside=[part.suffix for part in runtimes.parts(file)[1:]])
    if file.absolute().parent == run.absolute():
        seal(run, *runtimes.parts(run / file.name))
    say(f"wrote {', '.join(map(str, runtimes.parts(file)))}, {size_text(sizes({'file': file})['file'])}")
    say(proof)
    if exporter.device is not None:
        say(f"made for {exporter.device}, and not run there")
