"""TensorFlow Lite's converter, calibrated with synthetic images: pip install -e '.[digits]' tensorflow

    python examples/calibrate_tflite.py

The network is `embedded:digits`, or one of the same kinds of layer: `forward` says it in TensorFlow, channels last.
"""

from pathlib import Path

import numpy as np
import task
import tensorflow as tf
from torch import nn

import reverie


def forward(module: nn.Module, x: tf.Tensor) -> tf.Tensor:
    """What the PyTorch module answers, in TensorFlow."""
    if isinstance(module, nn.Sequential):
        for part in module:
            x = forward(part, x)
        return x
    if isinstance(module, nn.Conv2d):
        margin, stride = module.padding[0], module.stride[0]
        x = tf.pad(x, [[0, 0], [margin, margin], [margin, margin], [0, 0]])
        weight = module.weight.detach().permute(2, 3, 1, 0).numpy()
        if module.groups == 1:
            return tf.nn.conv2d(x, weight, stride, "VALID")
        return tf.nn.depthwise_conv2d(x, weight.transpose(0, 1, 3, 2), [1, stride, stride, 1], "VALID")
    if isinstance(module, nn.BatchNorm2d):
        gain = (module.weight / (module.running_var + module.eps).sqrt()).detach()
        return x * gain.numpy() + (module.bias - gain * module.running_mean).detach().numpy()
    if isinstance(module, nn.Linear):
        return tf.matmul(x, module.weight.detach().numpy(), transpose_b=True) + module.bias.detach().numpy()
    if hasattr(module, "shortcut"):
        return tf.nn.relu(forward(module.body, x) + forward(module.shortcut, x))
    if hasattr(module, "residual"):
        return x + forward(module.body, x) if module.residual else forward(module.body, x)
    # Averaged without the two spatial axes, a tensor is flat already.
    simple = {nn.ReLU: tf.nn.relu, nn.ReLU6: tf.nn.relu6, nn.Identity: tf.identity, nn.Flatten: tf.identity}
    simple[nn.AdaptiveAvgPool2d] = lambda value: tf.reduce_mean(value, axis=[1, 2])
    return simple[type(module)](x)


def quantize(network: reverie.Network, images: reverie.Images, folder: Path) -> task.Predict:
    """8 bits throughout, executed by TensorFlow Lite's interpreter. Writes nothing into `folder`."""
    channels, height, width = network.input.shape
    model = tf.Module()
    answer = tf.function(lambda x: forward(network.module, x)).get_concrete_function(
        tf.TensorSpec([1, height, width, channels])
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([answer], model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = reverie.calibration("tflite", images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def one(inputs: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(source, inputs.transpose(1, 2, 0)[None])
        interpreter.invoke()
        return interpreter.get_tensor(target)[0]

    return lambda inputs: np.stack([one(image) for image in inputs])


if __name__ == "__main__":
    task.parse().compare("TFLite", quantize)
