"""`reverie inspect`: what a network consists of, and what Reverie can and cannot do with it."""

from reverie.cli._options import NO_OPTIONS, Json, NetworkOptions
from reverie.cli._output import say, say_json, say_table


def inspect(network: str, /, *, json: Json = False, options: NetworkOptions = NO_OPTIONS) -> None:
    """Show the layers, batch norms, units and operators of a network, and what can be done with it.

    Example: reverie inspect timm:resnet18

    Args:
        network: Such as embedded:digits, timm:resnet18, torchvision:resnet50, package:mobilenet_v2,
            path/to/file.py:factory or path/to/network.onnx.
        json: Print it as one JSON document.
    """
    from reverie.graph.capture import capture
    from reverie.graph.summary import summarize

    loaded = options.load(network)
    summary = summarize(capture(loaded.module, loaded.input.shape, name=loaded.name), loaded.input.shape)
    if json:
        say_json({"network": loaded.name, "fingerprint": loaded.fingerprint, **summary.as_dict()})
        return
    contract = loaded.input
    say(f"{loaded.name}, weights {loaded.fingerprint}")
    say(
        f"input {_shape(contract.shape)}, mean {_numbers(contract.mean)}, std {_numbers(contract.std)}, {contract.interpolation}"
    )
    say(
        f"{summary.parameters:,} parameters, {summary.multiply_accumulates:,} multiply-accumulates an image, "
        f"output {_shape(summary.output_shape)}"
    )
    say()
    say_table(
        ("layer", "kind", "weight", "output", "parameters", "multiply-accumulates"),
        [
            (
                layer.name,
                layer.kind,
                _shape(layer.weight_shape),
                _shape(layer.output_shape),
                f"{layer.parameters:,}",
                f"{layer.multiply_accumulates:,}",
            )
            for layer in summary.layers
        ],
        numbers=(4, 5),
    )
    if summary.batch_norms:
        say()
        say_table(
            ("batch norm", "channels", "folds"),
            [(norm.name, str(norm.channels), "yes" if norm.folds else f"no: {norm.reason}") for norm in summary.batch_norms],
            numbers=(1,),
        )
    say()
    say_table(("block", "layers"), [(block.name, ", ".join(block.layers) or "none") for block in summary.blocks])
    say()
    say_table(("operator", "times"), [(name, str(count)) for name, count in summary.operators.items()], numbers=(1,))
    say()
    say_table(
        ("can Reverie do", "answer", "because"),
        [(verdict.capability, "yes" if verdict.possible else "no", verdict.reason) for verdict in summary.verdicts],
    )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
