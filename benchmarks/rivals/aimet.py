"""Qualcomm's AIMET: batch norms folded, AdaRound on Reverie's synthetic images, activations by signal-to-noise ratio.

    python aimet.py --assets ASSETS --network resnet20 --seed 0 --output RUN --images REVERIE_RUN/images.safetensors --iterations 1500

The order of steps and all settings but the number of iterations are those of AIMET's AdaRound example: `prepare_model`,
`fold_all_batch_norms`, `Adaround.apply_adaround`, a `QuantizationSimModel` with the rounding frozen, `compute_encodings`, the scheme
"tf_enhanced" for weights and activations, every image in batches of 32. AIMET's default is 15,000 iterations a layer below 8 bits.

Placement: AIMET's per-channel configuration (weights symmetric per channel, activations asymmetric per tensor, convolutions and sums fused with what
clips them), with the same exceptions as Reverie's `integer`: 8 bits at the ends and for what only sums read, logits in float. Biases stay in float.
"""

import argparse
import copy
import time
from pathlib import Path

import task
import torch
from torch import Tensor, fx, nn

task.prepare_torchvision()

import aimet_torch  # noqa: E402
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters  # noqa: E402
from aimet_torch.batch_norm_fold import fold_all_batch_norms  # noqa: E402
from aimet_torch.common.defs import QuantScheme  # noqa: E402
from aimet_torch.model_preparer import prepare_model  # noqa: E402
from aimet_torch.nn import BaseQuantizationMixin  # noqa: E402
from aimet_torch.quantsim import QuantizationSimModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

_BATCH = 32
_END_BITS = 8
_SCHEME = QuantScheme.post_training_tf_enhanced
_PLACEMENT = Path(aimet_torch.__file__).parent / "common" / "quantsim_config" / "default_config_per_channel.json"


def quantize(given: task.Task) -> None:
    """Rounds, calibrates, and judges AIMET's own simulation."""
    options = given.options
    images = load_file(options.images)["inputs"]
    batches = list(images.split(_BATCH))
    began = time.perf_counter()
    # Preparing shares the modules into which batch norms are folded next.
    prepared = prepare_model(copy.deepcopy(given.module))
    exceptions = task.places(prepared)
    fold_all_batch_norms(prepared, tuple(images[:1].shape))
    named = dict(prepared.named_modules())
    ends = [named[str(node.target)] for node in (exceptions.first, exceptions.last)]
    dummy = images[:1]
    rounded = Adaround.apply_adaround(
        prepared,
        dummy,
        AdaroundParameters(
            data_loader=batches,
            num_batches=len(batches),
            default_num_iterations=options.iterations,
            forward_fn=lambda module, inputs: module(inputs),
        ),
        path=str(given.folder),
        filename_prefix="adaround",
        default_param_bw=options.weight_bits,
        param_bw_override_list=[(end, _END_BITS) for end in ends],
        default_quant_scheme=_SCHEME,
        default_config_file=str(_PLACEMENT),
    )
    simulation = QuantizationSimModel(
        rounded,
        dummy_input=dummy,
        quant_scheme=_SCHEME,
        default_output_bw=options.activation_bits,
        default_param_bw=options.weight_bits,
        config_file=str(_PLACEMENT),
    )
    _except(simulation.model, exceptions)
    simulation.set_and_freeze_param_encodings(encoding_path=str(given.folder / "adaround.encodings"))
    simulation.compute_encodings(lambda module: _feed(module, batches))
    seconds = time.perf_counter() - began
    given.write(
        seconds={"quantize": seconds},
        full_precision=given.judge(given.module),
        quantized=given.judge(simulation.model),
        settings=f"AdaRound, {options.iterations:,} iterations a layer, {len(images):,} images",
        placement=_placement(simulation.model),
        versions=task.versions("aimet-torch", "torch"),
    )


def _except(model: nn.Module, exceptions: task.Places) -> None:
    """Puts the ends and what only sums read on 8 bits, and logits in float."""
    quantized = dict(model.named_modules())

    def module(node: fx.Node) -> BaseQuantizationMixin:
        return quantized[str(node.target)]

    for layer in (exceptions.first, exceptions.last):
        module(layer).param_quantizers["weight"].bitwidth = _END_BITS
    module(exceptions.first).input_quantizers[0].bitwidth = _END_BITS
    # A function such as flatten has no quantizer of its own.
    for node in (node for node in (*exceptions.summed, *exceptions.last_reads) if node.op == "call_module"):
        for quantizer in module(node).output_quantizers:
            if quantizer is not None:
                quantizer.bitwidth = _END_BITS
    module(exceptions.last).output_quantizers[0] = None


@torch.no_grad()
def _feed(module: nn.Module, batches: list[Tensor]) -> None:
    for inputs in batches:
        module(inputs)


def _placement(model: nn.Module) -> dict[str, dict[str, int]]:
    """Bits of every weight and tensor, read from AIMET's own quantizers."""
    found: dict[str, dict[str, int]] = {"weights": {}, "activations": {}}
    for name, module in model.named_modules():
        if not isinstance(module, BaseQuantizationMixin):
            continue
        if "weight" in module.param_quantizers:
            found["weights"][name] = module.param_quantizers["weight"].bitwidth
        for kind in ("input", "output"):
            for quantizer in getattr(module, f"{kind}_quantizers"):
                if quantizer is not None:
                    found["activations"][f"{kind} of {name}"] = quantizer.bitwidth
    return found


def main() -> None:
    """Runs."""
    parser = task.parser(__doc__)
    parser.add_argument("--images", type=Path, required=True, help="images.safetensors of a Reverie run")
    parser.add_argument("--iterations", type=int, required=True, help="of AdaRound, for each layer")
    options: argparse.Namespace = parser.parse_args()
    quantize(task.begin(options))


if __name__ == "__main__":
    main()
