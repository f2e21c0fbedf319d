"""Sony's Model Compression Toolkit: images from batch-norm statistics, then post-training quantization with or without gradients.

    python mct.py synthesize --assets ASSETS --network resnet20 --seed 0 --output IMAGES
    python mct.py quantize --assets ASSETS --network resnet20 --seed 0 --output RUN --images IMAGES/images.npy [--epochs 50]

Settings are those of MCT's tutorials ("Data-Free Quantization", "Gradient-Based PTQ"): 256 images in batches of 128, 500 iterations of
RAdam at a rate of 16 on images 32 px larger that are cropped and smoothed; activations and weights by smallest squared error, bias
correction; gradients: 50 epochs, Hessian-weighted, activations quantized gradually. `--images` and `--iterations` shorten it for large networks.

The target platform is described below as near to Reverie's `integer` placement as MCT allows: the same tensors on grids, weights symmetric
per channel, activations asymmetric per tensor (MCT's default target wants powers of two). Biases stay in float.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import task
import torch
from torch import Tensor, fx

task.prepare_torchvision()

import model_compression_toolkit as mct  # noqa: E402
from mct_quantizers import PytorchActivationQuantizationHolder, PytorchQuantizationWrapper, QuantizationMethod  # noqa: E402
from model_compression_toolkit.core.common.network_editors import NodeNameFilter  # noqa: E402
from model_compression_toolkit.target_platform_capabilities.constants import BIAS_ATTR, KERNEL_ATTR  # noqa: E402
from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema  # noqa: E402

_BATCH = 32
_END_BITS = 8


def synthesize(given: task.Task) -> None:
    """Writes `images.npy`, network inputs (count, 3, side, side) in float32."""
    options = given.options
    began = time.perf_counter()
    images = mct.data_generation.pytorch_data_generation_experimental(
        model=given.module,
        n_images=options.count,
        output_image_size=given.side,
        data_generation_config=mct.data_generation.get_pytorch_data_generation_config(
            n_iter=options.iterations,
            data_gen_batch_size=min(128, options.count),
            output_loss_multiplier=1e-6,
        ),
    )
    made = torch.cat(list(images)).detach().float().cpu()
    seconds = time.perf_counter() - began
    np.save(given.folder / "images.npy", made.numpy())
    given.write(
        seconds={"images": seconds},
        settings=f"{len(made)} images, {options.iterations} iterations of data generation",
        versions=task.versions("model-compression-toolkit", "torch"),
    )


def quantize(given: task.Task) -> None:
    """Quantizes on the images of `synthesize`, and judges MCT's own quantized module."""
    options = given.options
    images = torch.from_numpy(np.load(options.images))
    exceptions = task.places(fx.symbolic_trace(given.module))
    bits = mct.core.BitWidthConfig()
    # MCT names a convolution and the batch norm that it folds together.
    bits.set_manual_weights_bit_width(NodeNameFilter(f"{exceptions.first.name}_bn"), _END_BITS, "weight")
    if options.activation_bits != _END_BITS:
        names = [f"{node.name}_bn" for node in exceptions.summed]
        bits.set_manual_activation_bit_width([NodeNameFilter(name) for name in names], _END_BITS)
    common = {
        "representative_data_gen": _batches(images),
        "core_config": mct.core.CoreConfig(bit_width_config=bits),
        "target_platform_capabilities": platform(options.weight_bits, options.activation_bits),
    }
    began = time.perf_counter()
    if options.epochs:
        configuration = mct.gptq.get_pytorch_gptq_config(n_epochs=options.epochs)
        quantized, _ = mct.gptq.pytorch_gradient_post_training_quantization(given.module, gptq_config=configuration, **common)
    else:
        quantized, _ = mct.ptq.pytorch_post_training_quantization(given.module, **common)
    seconds = time.perf_counter() - began
    quantized.eval()
    given.write(
        seconds={"quantize": seconds},
        full_precision=given.judge(given.module),
        quantized=given.judge(quantized),
        settings=f"GPTQ, {options.epochs} epochs of {len(images)} images" if options.epochs else f"PTQ, {len(images)} images",
        placement=_placement(quantized),
        versions=task.versions("model-compression-toolkit", "torch"),
    )


def platform(weight_bits: int, activation_bits: int) -> schema.TargetPlatformCapabilities:
    """Convolutions, linear layers, activations and sums on `activation_bits`; what the target does not name (input, averages) on 8 bits."""
    names = schema.OperatorSetNames
    free = schema.AttributeQuantizationConfig()
    kernel = schema.AttributeQuantizationConfig(
        weights_quantization_method=QuantizationMethod.SYMMETRIC,
        weights_per_channel_threshold=True,
        enable_weights_quantization=True,
    )

    def on_grid(bits: int, weights: int | None = None, **settings: bool) -> schema.OpQuantizationConfig:
        attributes = {KERNEL_ATTR: kernel.clone_and_edit(weights_n_bits=weights), BIAS_ATTR: free} if weights else {}
        settings = {"enable_activation_quantization": True, "quantization_preserving": False} | settings
        return schema.OpQuantizationConfig(
            default_weight_attr_config=free,
            attr_weights_configs_mapping=attributes,
            activation_quantization_method=QuantizationMethod.UNIFORM,
            activation_n_bits=bits,
            supported_input_activation_n_bits=tuple(sorted({activation_bits, _END_BITS})),
            signedness=schema.Signedness.AUTO,
            **settings,
        )

    def choice(base: schema.OpQuantizationConfig, *others: schema.OpQuantizationConfig) -> schema.QuantizationConfigOptions:
        distinct = (base, *(other for other in others if other != base))
        return schema.QuantizationConfigOptions(quantization_configurations=distinct, base_config=base)

    # The first convolution has 8-bit weights, those that only sums read 8-bit outputs; `quantize` names them.
    layers = choice(on_grid(activation_bits, weight_bits), on_grid(activation_bits, _END_BITS), on_grid(_END_BITS, weight_bits))
    others = choice(on_grid(activation_bits))
    # The last layer's answer stays in float.
    last = choice(on_grid(_END_BITS, _END_BITS, enable_activation_quantization=False))
    moved = choice(on_grid(activation_bits, enable_activation_quantization=False, quantization_preserving=True))
    convolution = schema.OperatorsSet(name=names.CONV, qc_options=layers)
    norm, relu, relu6, add = (
        schema.OperatorsSet(name=name, qc_options=others) for name in (names.BATCH_NORM, names.RELU, names.RELU6, names.ADD)
    )
    clipping = schema.OperatorSetGroup(operators_set=[relu, relu6])
    fused = [(convolution, norm, clipping), (convolution, norm), (convolution, clipping), (add, clipping)]
    kept = [names.PAD, names.GET_ITEM, names.FLATTEN, names.RESHAPE, names.DROPOUT]
    return schema.TargetPlatformCapabilities(
        default_qco=choice(on_grid(_END_BITS)),
        operator_set=(
            convolution,
            schema.OperatorsSet(name=names.FULLY_CONNECTED, qc_options=last),
            *(norm, relu, relu6, add),
            *(schema.OperatorsSet(name=name, qc_options=moved) for name in kept),
        ),
        fusing_patterns=tuple(schema.Fusing(operator_groups=groups) for groups in fused),
        add_metadata=False,
        name="integer",
    )


def _batches(images: Tensor) -> Callable[[], Iterator[list[Tensor]]]:
    def batches() -> Iterator[list[Tensor]]:
        for some in images.split(_BATCH):
            yield [some]

    return batches


def _placement(quantized: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Bits of every weight and tensor, read from MCT's own quantizers."""
    modules = dict(quantized.named_modules())
    weights = {
        name: module.weights_quantizers["weight"].num_bits
        for name, module in modules.items()
        if isinstance(module, PytorchQuantizationWrapper) and "weight" in module.weights_quantizers
    }
    activations = {
        name.removesuffix("_activation_holder_quantizer"): module.activation_holder_quantizer.num_bits
        for name, module in modules.items()
        if isinstance(module, PytorchActivationQuantizationHolder)
    }
    return {"weights": weights, "activations": activations}


def main() -> None:
    """Runs one of the two steps."""
    parser = task.parser(__doc__)
    parser.add_argument("step", choices=["synthesize", "quantize"])
    parser.add_argument("--count", type=int, default=256, help="images to make")
    parser.add_argument("--iterations", type=int, default=500, help="of data generation")
    parser.add_argument("--images", help="images.npy of the first step, for the second")
    parser.add_argument("--epochs", type=int, default=0, help="of gradient-based quantization; 0: without gradients")
    options: argparse.Namespace = parser.parse_args()
    {"synthesize": synthesize, "quantize": quantize}[options.step](task.begin(options))


if __name__ == "__main__":
    main()
