"""Conditional image generators: noise and a class in, network inputs out.

    z ~ N(0, I) of `latent` numbers
    Linear -> (width, s, s), s a quarter of the image's side -> norm
    nearest x2 -> Conv3x3(width -> width)     -> norm -> LeakyReLU(0.2)
    nearest x2 -> Conv3x3(width -> width / 2) -> norm -> LeakyReLU(0.2)
    Conv3x3(-> channels) -> Tanh -> batch norm without affine -> input units

How the class enters (algorithms 1.5):

    "norms"      categorical conditional batch norm (CCBN): every norm's gain and bias are looked up by class. The
                 literature's choice for ImageNet: 41,405,315 parameters for 1000 classes, 224 px, latent 100, width 128,
                 40.5 million of them in the linear layer.
    "embedding"  plain batch norms; z is multiplied by a learned vector of the class. The literature's choice for CIFAR.

The last norm gives every channel of a batch mean 0 and deviation 1, which is put onto the pixels' mean and deviation, so
that no term has to keep pixels in range. What still sticks out (4 to 5 % of the pixels of an untrained generator for CIFAR
or ImageNet) is clamped, which the papers do not do: images stay valid, and such a pixel has no gradient of its own. Where a
network's normalization was made of data statistics, unit deviation is that of its own input units, as in the papers; where
it was not (0.5 and 0.5, or raw pixels), it would be far from any image's, and the statistics of photographs stand in.

The generator always runs in training mode: its norms use the statistics of the batch, as in all repositories of the family.

Reference: Xu et al. 2020 (GDFQ), arXiv:2003.03603; CCBN: de Vries et al. 2017, arXiv:1707.00683. `epsilon` of the two inner
norms is 0.8: in the released code that number stands where the momentum was meant to be; it damps the norms and we keep it.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from reverie.images.contract import InputContract
from reverie.randomness import Seed
from reverie.synthesis._photographs import to_inputs

Conditioning = Literal["auto", "norms", "embedding"]
CONDITIONINGS = get_args(Conditioning)

# From this side on, "auto" conditions the norms; the literature knows 32 and 224.
_LARGE = 64


class Generator(nn.Module):
    """Makes images of given classes.

    Args:
        contract: What the network expects of an image.
        classes: Number of classes.
        latent: Length of the noise vector.
        width: Channels of the widest layers.
        conditioning: How the class enters; "auto" chooses by the image's size.
        epsilon: Of the two inner norms.
        seed: Of the initial weights.
    """

    def __init__(
        self,
        contract: InputContract,
        classes: int,
        *,
        latent: int,
        width: int,
        conditioning: Conditioning,
        epsilon: float = 0.8,
        seed: Seed,
    ) -> None:
        super().__init__()
        if conditioning == "auto":
            conditioning = "norms" if min(contract.height, contract.width) >= _LARGE else "embedding"
        self.latent, self._size = latent, (contract.height, contract.width)
        self._start = (width, -(-contract.height // 4), -(-contract.width // 4))
        narrow = max(width // 2, 1)
        # The layers draw their initial weights from the global generator, which is put back afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed.derived())
            self.embedding = nn.Embedding(classes, latent) if conditioning == "embedding" else None
            self.linear = nn.Linear(latent, width * self._start[1] * self._start[2])
            self.convolutions = nn.ModuleList(
                nn.Conv2d(inputs, outputs, 3, padding=1)
                for inputs, outputs in ((width, width), (width, narrow), (narrow, contract.channels))
            )
            self.norms = nn.ModuleList(
                _Norm(classes if conditioning == "norms" else None, channels, epsilon)
                for channels, epsilon in ((width, 1e-5), (width, epsilon), (narrow, epsilon))
            )
        self.last_norm = nn.BatchNorm2d(contract.channels, affine=False)
        gain, offset = to_inputs(contract)
        low, high = contract.bounds(gain)
        for name, value in {"gain": gain, "offset": offset, "low": low, "high": high}.items():
            self.register_buffer(name, value, persistent=False)

    gain: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def forward(
        self, noise: Float[Tensor, "batch latent"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Network inputs; their mean and deviation over the batch are fixed."""
        if self.embedding is not None:
            noise = self.embedding(labels) * noise
        x = self.norms[0](self.linear(noise).view(-1, *self._start), labels)
        for convolution, norm in zip(self.convolutions[:2], self.norms[1:], strict=True):
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            x = functional.leaky_relu(norm(convolution(x), labels), 0.2)
        x = torch.tanh(self.convolutions[2](x))
        x = self.last_norm(x[..., : self._size[0], : self._size[1]])
        return torch.clamp(x * self.gain + self.offset, self.low, self.high)

    @property
    def parameter_count(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.numel() for parameter in self.parameters())


class _Norm(nn.Module):
    """Batch norm whose gain and bias depend on the class; with `classes` None, a plain one."""

    def __init__(self, classes: int | None, channels: int, epsilon: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=epsilon, affine=classes is None)
        self.gain = self.bias = None
        if classes is not None:
            self.gain, self.bias = nn.Embedding(classes, channels), nn.Embedding(classes, channels)
            nn.init.ones_(self.gain.weight)
            nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.norm(x)
        if self.gain is None or self.bias is None:
            return x
        return torch.addcmul(self.bias(labels)[..., None, None], self.gain(labels)[..., None, None], x)
