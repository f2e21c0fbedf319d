"""Reading an ONNX file that may be anything: damaged, someone else's, made to read what it should not.

Nothing in a file is executed, and nothing outside of its folder is read. What comes back is ready to be converted: one
float32 image in, one tensor out, operators of the ONNX standard alone, functions inlined, external data inside, everything that
has a training mode in evaluation, and no softmax at the end: Reverie's networks answer logits.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import external_data_helper, inliner, version_converter

from reverie import received
from reverie.errors import ConfigError, ModelError
from reverie.models._onnx_limits import check_functions, check_stored
from reverie.models._onnx_operators import OPERATORS

OLDEST_OPSET = 11
_STANDARD = ("", "ai.onnx")
# What probabilities may pass through on their way out of a file.
_MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
# What a message of protocol buffers can hold, and so what ONNX Runtime can be handed in memory.
_MOST_BYTES = 2**31 - 1
_AGAIN = "export or fetch it again"
_FLOAT = onnx.TensorProto.FLOAT
_OTHER_FLOATS = frozenset(
    {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
    | {value for name, value in onnx.TensorProto.DataType.items() if name.startswith(("FLOAT8", "FLOAT4"))}
)


def read(path: Path) -> onnx.ModelProto:
    """The network in `path`, as the module's docstring says.

    Raises:
        ConfigError: No such file, damaged, or with external data that is missing or not beside it.
        ModelError: A whole file of something that Reverie does not convert; says what.
    """
    model = _parsed(path)
    check_stored(_tensors(model))
    check_functions(model)
    _load_external_data(model, path.parent)
    _check_whole(model)
    model = inliner.inline_local_functions(model)
    _check_operators(model.graph)
    _check_ends(model.graph)
    _free_sizes_(model.graph)
    _check_types(model.graph)
    _check_dense(model.graph)
    _evaluate_(model.graph)
    _leave_out_softmax_(model.graph)
    return _modern(model)


def _parsed(path: Path) -> onnx.ModelProto:
    if not path.exists() or path.is_dir():
        raise ConfigError(f"must be an ONNX file, got {'a folder' if path.is_dir() else 'nothing there'}; check the path")
    received.check_file(path)
    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"must be smaller than 2 GiB, got {path.stat().st_size} bytes; is it a classification network?")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ConfigError(f"must be a whole ONNX file, got one that cannot be parsed; {_AGAIN}") from error
    # Nothing reads it, so nothing need check it.
    del model.training_info[:]
    if not model.graph.node or not any(entry.domain in _STANDARD for entry in model.opset_import):
        raise ConfigError(f"must be a whole ONNX file, got one without nodes or without an opset; {_AGAIN}")
    return model


def _load_external_data(model: onnx.ModelProto, folder: Path) -> None:
    """Reads what the file keeps beside itself, once every place is known to be beside it, and whole."""
    outside = [tensor for tensor in _tensors(model) if external_data_helper.uses_external_data(tensor)]
    total = 0
    for tensor in outside:
        said = {entry.key: entry.value for entry in tensor.external_data}
        location = said.get("location", "")
        _check_beside(tensor.name, location, folder)
        size = (folder / location).stat().st_size
        try:
            offset, length = int(said.get("offset", 0)), int(said.get("length", size - int(said.get("offset", 0))))
        except ValueError as error:
            raise ConfigError(f"offset and length of {tensor.name!r} must be whole numbers, got {said}; {_AGAIN}") from error
        if not 0 <= offset <= offset + length <= size:
            raise ConfigError(
                f"external data {location!r} must hold bytes {offset} to {offset + length} for {tensor.name!r}, got {size} bytes; "
                "fetch it again, with the file that belongs to it"
            )
        total += length
    if total > _MOST_BYTES:
        raise ConfigError(f"must be smaller than 2 GiB, got {total} bytes of external data; is it a classification network?")
    for tensor in outside:
        external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")


def _check_beside(tensor: str, location: str, folder: Path) -> None:
    """Refuses a place that is not a file in `folder` or below, whichever system's paths and links lead away from it."""
    parts = (*PurePosixPath(location).parts, *PureWindowsPath(location).parts)
    absolute = PurePosixPath(location).is_absolute() or bool(PureWindowsPath(location).anchor)
    leaves = absolute or ".." in parts or not location or "\0" in location
    target = folder / location
    if leaves or not target.resolve().is_relative_to(folder.resolve()):
        got = f"{location!r}" if leaves else f"{location!r}, a link to {str(target.resolve())!r}"
        raise ConfigError(
            f"external data of {tensor!r} must lie in the file's own folder, got {got}; "
            "put it there and save the file again with onnx.save_model"
        )
    if not target.is_file():
        raise ConfigError(
            f"external data {location!r} of {tensor!r} must lie beside the file, got nothing there; fetch both files"
        )


def _check_whole(model: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"must be a valid ONNX file, got {reason!r}; {_AGAIN}") from error


def _check_operators(graph: onnx.GraphProto) -> None:
    custom = Counter(f"{node.domain}.{node.op_type}" for node in _nodes(graph) if node.domain not in _STANDARD)
    if custom:
        raise ModelError(f"operators must be of the ONNX standard, got {_counted(custom)}; export the network without them")
    flow = Counter(node.op_type for node in graph.node if node.op_type in _CONTROL_FLOW)
    if flow:
        raise ModelError(
            f"the network must have no control flow, got {_counted(flow)}; export it with fixed shapes and in evaluation mode"
        )
    unknown = Counter(node.op_type for node in graph.node if node.op_type not in OPERATORS)
    if unknown:
        raise ModelError(
            f"operators must be among those that Reverie converts, got {_counted(unknown)}; "
            "use the network's own code, path/to/file.py:FACTORY"
        )


def _check_ends(graph: onnx.GraphProto) -> None:
    stored = {tensor.name for tensor in graph.initializer}
    # Until IR version 3, weights were listed among the inputs.
    inputs = [value for value in graph.input if value.name not in stored]
    for kind, values in (("input", inputs), ("output", graph.output)):
        if len(values) != 1:
            names = ", ".join(repr(value.name) for value in values) or "none"
            raise ModelError(
                f"the network must have one {kind}, got {len(values)} ({names}); export it with one image in, logits out"
            )
    if len(inputs[0].type.tensor_type.shape.dim) != 4:
        rank = len(inputs[0].type.tensor_type.shape.dim)
        raise ModelError(f"the input must have 4 axes (batch, channels, height, width), got {rank}; export it for images")
    del graph.input[:]
    graph.input.extend(inputs)


def _free_sizes_(graph: onnx.GraphProto) -> None:
    """Leaves open, in place, the sizes of the input and output for which exporters write 0 or -1."""
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value <= 0:
                dim.Clear()


def _check_types(graph: onnx.GraphProto) -> None:
    kind = graph.input[0].type.tensor_type.elem_type
    if kind != _FLOAT:
        raise ModelError(f"the input must be float32, got {_type_name(kind)}; export the network in float32")
    other = [tensor for tensor in _tensors(graph) if tensor.data_type in _OTHER_FLOATS and len(tensor.dims) > 1]
    if other:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise ModelError(
            f"weights must be float32, got {_type_name(other[0].data_type)} in {other[0].name!r}{more}; "
            "export the network in float32"
        )


def _check_dense(graph: onnx.GraphProto) -> None:
    sparse = [tensor.values.name for tensor in graph.sparse_initializer]
    sparse += [
        node.name or node.output[0] for node in _nodes(graph) for entry in node.attribute if entry.name == "sparse_value"
    ]
    if sparse:
        raise ModelError(f"tensors must be stored whole, got sparse ones in {', '.join(map(repr, sparse))}; export it without")


def _evaluate_(graph: onnx.GraphProto) -> None:
    """Batch norms and dropouts of a file that was exported for training do what they do when it is used, in place."""
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            for attribute in [attribute for attribute in node.attribute if attribute.name == "training_mode"]:
                node.attribute.remove(attribute)
        if node.op_type == "Dropout":
            del node.input[1:]
        if node.op_type in ("BatchNormalization", "Dropout"):
            del node.output[1:]


def _leave_out_softmax_(graph: onnx.GraphProto) -> None:
    """Makes logits the output of a network that ends in the probabilities of its classes, in place.

    Raises:
        ModelError: Probabilities are moved before they are given out, so that what leads to logits is not the network's end.
    """
    makers = {name: node for node in graph.node for name in node.output}
    while (last := makers.get(graph.output[0].name)) is not None and last.op_type in ("Identity", "Dropout"):
        _leave_out_(graph, last)
    if last is None:
        return
    if last.op_type == "Softmax":
        _leave_out_(graph, last)
        return
    moved: onnx.NodeProto | None = last
    while moved is not None and moved.op_type in _MOVES:
        moved = makers.get(moved.input[0])
    if moved is not None and moved.op_type == "Softmax":
        raise ModelError(
            f"the network must give logits, got probabilities behind a {last.op_type}; export it without its Softmax"
        )


def _leave_out_(graph: onnx.GraphProto, last: onnx.NodeProto) -> None:
    """Makes what the node `last` reads the output; others may read what it gives."""
    made = last.output[0]
    graph.output[0].name = last.input[0]
    if not any(made in node.input for node in graph.node):
        graph.node.remove(last)


def _modern(model: onnx.ModelProto) -> onnx.ModelProto:
    opset = next(entry.version for entry in model.opset_import if entry.domain in _STANDARD)
    if opset >= OLDEST_OPSET:
        return model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return version_converter.convert_version(model, OLDEST_OPSET)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"opset {opset} must convert to {OLDEST_OPSET}, got {reason!r}; export it with a newer opset"
        ) from error


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _tensors(model: onnx.ModelProto | onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All stored tensors: initializers and attributes, of functions and subgraphs too."""
    graph = model.graph if isinstance(model, onnx.ModelProto) else model
    bodies: list[Iterable[onnx.NodeProto]] = [graph.node]
    if isinstance(model, onnx.ModelProto):
        bodies += [function.node for function in model.functions]
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for body in bodies:
        for node in body:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                for inner in (attribute.g, *attribute.graphs):
                    yield from _tensors(inner)


def _counted(kinds: Counter[str]) -> str:
    """Such as `If (2), Loop (1)`."""
    return ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))


def _type_name(kind: int) -> str:
    name: str = onnx.TensorProto.DataType.Name(kind).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)
