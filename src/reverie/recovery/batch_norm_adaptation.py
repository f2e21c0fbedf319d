"""Adaptive batch normalization (ABN): statistics that quantization shifted are put right, layer by layer.

    y' = m_t + g (y - m_s),   g = s_t / s_s

    batch norm kept     mu' = m_s - (m_t - mu) / g,  var' = var / g^2     y: what the batch norm reads
    batch norm folded   scale' = g scale,  b' = m_t + g (b - m_s)         y = scale * codes . x + b, what the layer writes

per channel. m_s, s_s are mean and deviation of y in the student, m_t, s_t those in the teacher, over all positions of the same
images; mu, var are the running statistics. Affine parameters and codes stay as they are, so the folded form is a gain per
channel that an integer runtime executes as it executes any scale. Layers are taken in execution order, and each one's
expectation is over what comes through the adapted layers before it.

This follows the abstract of ACQ (He et al., arXiv:2204.04215); no body text or code was available (algorithms section 6). The
abstract says that batch norms of the quantized network are adapted to remove the shift that quantization introduces: running
statistics become those of the student, mu' = m_s, var' = s_s^2. We do not, because synthetic images have statistics of their
own: set to them, a batch norm forgets the training data even where quantization shifted nothing. Compared with the teacher on
the same images, that cancels to first order. On a ResNet-20 (CIFAR-10, ZeroQ images, two seeds at W4A4, `literature`):

            not adapted          mu' = m_s, var' = s_s^2     as here
    W4A4    97.3 and 96.95 %     94.75 and 95.05 %           97.8 and 98.4 %
    W3A3    79.85 %              81.0 %                      87.75 %

The folded form is ours: the abstract does not know it.

Against `recovery/bias_correction.py`: with g = 1 the folded form is bias correction, except that activations stay quantized
here. So mean and deviation count what clipping took as well, and this comes instead of bias correction, not before or after
it. On that ResNet-20 (`integer` placement) it gives 97 % where bias correction gives 97 % and neither 94 % (W4A4), and 84 %
where those give 37 % and 57 % (W3A3). With activations in float meanwhile it does harm (88 % at W4A4). Our guess: rounding
noise adds to a deviation, clipping takes from it, and a gain for the one without the other shrinks the signal.

Not here: batch norms in training mode, exponential averages (all images count alike), and layers without a batch norm.
"""

from collections import Counter

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from reverie.graph.batch_norm import BatchNorm, batch_norms
from reverie.graph.operators import BATCH_NORM, arguments, attribute, set_attribute
from reverie.graph.placement import Layer, Student
from reverie.graph.walk import Walk
from reverie.progress import Progress
from reverie.recovery.ranges import BIAS_LIMIT

# A channel whose deviation changed more than twofold is beyond what a gain repairs: it lost most of its codes or inputs.
GAIN_BOUNDS = (0.5, 2.0)

# Share of a typical deviation below which a channel counts as constant: its own deviation is no unit to measure in.
_DEAD = 1e-3

_Channels = Float[Tensor, " channels"]


@torch.no_grad()
def adapt_batch_norms(
    teacher: fx.GraphModule,
    student: Student,
    inputs: Float[Tensor, "count *shape"],
    *,
    fix_codes: bool = True,
    progress: Progress,
) -> dict[str, tuple[float, float]]:
    """Adapts every batch norm of the student, and every layer that one was folded into, in place.

    Args:
        teacher: The graph that `student` was placed on; unchanged.
        student: Calibrated, its weights rounded. Weights of folded layers that have no codes yet get the nearest ones.
        inputs: Calibration images.
        fix_codes: Decide the codes of folded layers that have none yet; else their weights are scaled along with their
            grids (which are the same codes but for ties) and can still be learned.

    Returns:
        For each batch norm (before its affine parameters) or folded layer, in execution order, the error of its output before
        and after,

            mean over channels of ((m_s - m_t) / s_t)^2 + (s_s / s_t - 1)^2

        on the images, with everything before it adapted already. Channels that are constant in the teacher do not count.
        Empty for a network without batch norms.
    """
    _part_statistics_(student.graph)
    norms = {norm.name: norm for norm in batch_norms(student.graph)}
    folded = {name for name, layer in student.layers.items() if _had_batch_norm(layer)}
    nodes = [node for node in student.graph.graph.nodes if node.name in norms or node.name in folded]
    # By node, the tensor that is compared. A batch norm of the student may read a quantizer, which the teacher has not.
    ours = {name: name for name in folded} | {name: norm.tensor for name, norm in norms.items()}
    theirs = {name: name for name in folded} | {norm.name: norm.tensor for norm in batch_norms(teacher)}
    ahead = Walk(teacher, inputs, batch=64, keep=theirs.values())
    behind = Walk(student.graph, inputs, batch=64, keep=ours.values())
    errors: dict[str, tuple[float, float]] = {}
    with progress.stage("adapt batch norms", total=len(nodes)) as step:
        for node in nodes:
            name = node.name
            ahead.to(theirs[name])
            target = moments(ahead.value(theirs[name]))
            behind.to(ours[name])
            values = behind.value(ours[name])
            found = moments(values)
            if name in norms:
                gain, shift = _adapt_(norms[name], arguments(node)["eps"], found, target)
            else:
                gain, shift = _rescale_(student, name, found, target, fix_codes)
                # Later nodes read the adapted output; recomputing it would give the same.
                values.mul_(_column(gain, values)).add_(_column(shift, values))
            errors[name] = (distance(found, target), distance((gain * found[0] + shift, gain * found[1]), target))
            # Batch norms that read it too are ahead, and hold it.
            ahead.release(theirs[name])
            behind.release(ours[name])
            step()
    return errors


def moments(values: Float[Tensor, "count channels *space"]) -> tuple[_Channels, _Channels]:
    """Mean and deviation of every channel, over images and positions."""
    variance, mean = torch.var_mean(values, dim=[0, *range(2, values.dim())], correction=0)
    return mean, variance.sqrt()


def distance(found: tuple[_Channels, _Channels], target: tuple[_Channels, _Channels]) -> float:
    """How far means and deviations are from `target`, in units of its deviations; channels that are constant there left out."""
    mean, deviation = target
    alive = _alive(deviation)
    errors = ((found[0] - mean) / deviation).square() + (found[1] / deviation - 1).square()
    return float(errors[alive].mean()) if bool(alive.any()) else 0.0


def _part_statistics_(graph: fx.GraphModule) -> None:
    """Gives batch norms that share running statistics (one module called twice) their own."""
    keys = ("running_mean", "running_var")
    nodes = [node for node in graph.graph.nodes if node.op == "call_function" and node.target is BATCH_NORM]
    stored = [arguments(node)[key] for node in nodes for key in keys if arguments(node)[key] is not None]
    uses = Counter(source.target for source in stored)
    for node in nodes:
        for key in keys:
            source = arguments(node)[key]
            if source is None or uses[source.target] == 1:
                continue
            value = attribute(graph, source)
            assert value is not None
            name = f"{source.target}_of_{node.name}"
            set_attribute(graph, name, value.clone())
            with graph.graph.inserting_before(node):
                own = graph.graph.get_attr(name)
            node.replace_input_with(source, own)
    graph.recompile()


def _had_batch_norm(layer: Layer) -> bool:
    # `fold_batch_norms` stores what it makes under this name.
    return layer.bias is not None and layer.bias.rpartition(".")[2].startswith("folded_bias")


def _gain(found: tuple[_Channels, _Channels], target: tuple[_Channels, _Channels]) -> _Channels:
    alive = _alive(found[1]) & _alive(target[1])
    return torch.where(alive, target[1] / found[1], 1.0).clamp(*GAIN_BOUNDS)


def _adapt_(
    norm: BatchNorm, epsilon: float, found: tuple[_Channels, _Channels], target: tuple[_Channels, _Channels]
) -> tuple[_Channels, _Channels]:
    """Adapts what a batch norm remembers; the gain and shift that this is to what it reads."""
    gain, mean, variance = _gain(found, target), norm.mean.clone(), norm.variance.clone()
    norm.mean.copy_(found[0] - (target[0] - mean) / gain)
    norm.variance.copy_(variance / gain.square())
    done = ((variance + epsilon) / (norm.variance + epsilon)).sqrt()
    return done, mean - done * norm.mean


def _rescale_(
    student: Student,
    name: str,
    found: tuple[_Channels, _Channels],
    target: tuple[_Channels, _Channels],
    fix_codes: bool,
) -> tuple[_Channels, _Channels]:
    """Adapts weight scale and bias of a folded layer; the gain and shift that this is to its output."""
    layer, quantizer = student.layers[name], student.weights[name]
    assert layer.bias is not None
    weight, bias = student.graph.get_buffer(layer.weight), student.graph.get_buffer(layer.bias)
    if quantizer.codes is None and fix_codes:
        # Rounded on the new scale they would be others.
        quantizer.set_codes(quantizer.final_codes(weight).to(weight.dtype))
    coded = student.biases.get(name, nn.Identity())
    # What the layer adds is the bias on its grid, whose steps are not small where both operands have few bits.
    added = coded(bias)
    gain = _gain(found, target)
    adapted = target[0] + gain * (added - found[0])
    if name in student.biases:
        assert layer.source is not None
        limit = student.activations[layer.source].scale * quantizer.scale.flatten() * gain * BIAS_LIMIT
        fits = adapted.abs() <= limit
        gain, adapted = torch.where(fits, gain, 1.0), torch.where(fits, adapted, bias)
    quantizer.scale.mul_(gain.view(quantizer.scale.shape))
    if quantizer.codes is None:
        weight.mul_(gain.view(quantizer.scale.shape))
    bias.copy_(adapted)
    shift = coded(bias) - gain * added
    return gain, shift


def _alive(deviation: _Channels) -> Tensor:
    return deviation > _DEAD * deviation.mean()


def _column(values: _Channels, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 2))
