"""Reading any tensor of a graph by name."""

from collections.abc import Iterable

from torch import Tensor, fx

from reverie.errors import ConfigError


def tap(graph: fx.GraphModule, tensors: Iterable[str]) -> fx.GraphModule:
    """A graph module that shares the weights of `graph` and returns `{name: tensor}` for the names given.

    What no tapped tensor needs is not computed.

    Raises:
        ConfigError: A name is not a node of the graph.
    """
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copied.graph_copy(graph.graph, mapping)
    by_name = {node.name: new for node, new in mapping.items()}
    wanted = list(tensors)
    for name in wanted:
        if name not in by_name:
            raise ConfigError(f"tap: tensors must be nodes of the graph, got {name!r}; see `reverie inspect` for the names")
    copied.output({name: by_name[name] for name in wanted})
    tapped = fx.GraphModule(graph, copied, class_name="Tapped")
    tapped.graph.eliminate_dead_code()
    tapped.recompile()
    return tapped


def shapes(graph: fx.GraphModule, example: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of every computed tensor for this example input."""
    found: dict[str, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result: object = super().run_node(n)
            if isinstance(result, Tensor):
                found[n.name] = tuple(result.shape)
            return result

    Recorder(graph).run(example)
    return found
