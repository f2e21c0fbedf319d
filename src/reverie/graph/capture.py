"""One captured graph: the network as a flat sequence of functional ATen operators.

`torch.export` (non-strict, dynamic batch) is followed by functionalization, and the graph is brought to one normal form:
a batch norm is one `aten.batch_norm` node with its running statistics as arguments; reshapes do not demand a memory
layout; guards, dropped dropouts and unused nodes are gone. Names of nodes are names of tensors, everywhere in Reverie.

Not here: training-mode graphs. Whatever mode the module is in, what is captured is its evaluation.
"""

import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen

from reverie.errors import ModelError
from reverie.graph.operators import BATCH_NORM, LAYERS, arguments, aten, attribute, constant, set_attribute

# What torch.export raises for a forward it cannot follow, as seen on data-dependent branches, foreign types and more.
_EXPORT_FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, AttributeError)


def capture(module: nn.Module, shape: tuple[int, ...], *, name: str = "network") -> fx.GraphModule:
    """The evaluation of `module` as a graph with one input `(batch, *shape)` and one output, batch size free.

    Weights are copied, frozen and detached; `module` is left as it was, its modes included.

    Raises:
        ModelError: `torch.export` cannot capture the module, or it does not map one tensor to one tensor.
    """
    device = next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))
    example = torch.zeros(2, *shape, device=device)
    with _evaluating(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
            graph = exported.run_decompositions({}).module()
        except _EXPORT_FAILURES as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                f"{name}: torch.export must be able to capture the network at input {tuple(example.shape)}, got {reason!r}; "
                "check the input size, and that forward has no branch that depends on values"
            ) from error
    assert isinstance(graph, fx.GraphModule)
    _normalize(graph)
    outputs = graph.graph.output_node().all_input_nodes
    if len(outputs) != 1:
        raise ModelError(
            f"{name}: the network must return one tensor of logits, got {len(outputs) or 'no'} outputs; "
            "wrap it in a module that returns the logits"
        )
    graph.graph.output_node().args = (outputs[0],)
    _name_after_modules(graph)
    graph.graph.set_codegen(CodeGen())
    # A plain GraphModule: export's own subclass checks guards and shapes on every call.
    plain = fx.GraphModule(_copied_state(graph), graph.graph, class_name="Captured")
    plain.graph.eliminate_dead_code()
    plain.delete_all_unused_submodules()
    plain.recompile()
    return plain.eval()


def _copied_state(graph: fx.GraphModule) -> nn.Module:
    """A tree of empty modules that holds a copy of every tensor the graph reads, as a buffer under its own name."""
    root = nn.Module()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            tensor = attribute(graph, node)
            assert tensor is not None
            set_attribute(root, node.target, tensor.detach().clone())
    return root


def _name_after_modules(graph: fx.GraphModule) -> None:
    """Names every computed tensor after the module that computes it: `layer1_0_conv1`, `layer1_0_add`."""
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            node._rename(_free(node.name))
        if node.op != "call_function":
            continue
        operation = "batch_norm" if node.target is BATCH_NORM else node.target.__name__.split(".")[0]
        if node.target in LAYERS and constant(arguments(node)["weight"]):
            path = arguments(node)["weight"].target.rpartition(".")[0]
            operation = "" if path else operation
        else:
            stack = node.meta.get("nn_module_stack") or {}
            path = next(reversed(stack.values()), ("", None))[0]
            path = "" if path.startswith("_empty") else path.removeprefix("L['self'].")
        words = path.replace(".", "_")
        named = words if words.endswith(operation) else "_".join(part for part in (words, operation) if part)
        node._rename(_free(named or operation or "layer"))


def _free(name: str) -> str:
    """`name`, or `name_0` where `nn.ModuleDict`, which keeps quantizers by tensor, has an attribute of that name."""
    return f"{name}_0" if hasattr(nn.ModuleDict(), name) else name


def _normalize(graph: fx.GraphModule) -> None:
    """Brings the graph to the normal form of this module, in place."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.graph.erase_node(node)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            x, weight, bias, mean, variance, momentum, epsilon = node.args
            with graph.graph.inserting_before(node):
                single = graph.graph.call_function(
                    BATCH_NORM, (x, weight, bias, mean, variance, False, momentum, epsilon, False), name=f"{x}_norm"
                )
            for user in list(node.users):
                assert user.target is operator.getitem and user.args[1] == 0
                single.meta.update(user.meta)
                user.replace_all_uses_with(single)
                graph.graph.erase_node(user)
            graph.graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            # A view demands a layout, and channels-last inputs do not have it.
            node.target = aten.reshape.default
        elif node.target is aten.clone.default and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
