"""What photographs have in common whatever they show: brightness, contrast, spectrum, and channels that nearly agree.

Gradient descent on pixels that starts there, and not at white noise, needs a fraction of the steps (docs/log.md): fine
contrasts, of which white noise is full, are what it removes slowest, and what spoils the statistics of the first layers.

    amplitude of spatial frequency f  proportional to  1 / max(f, 1 / side)
    channel = grey + CHROMA (own - grey),   grey the mean of the channels

Reference for the spectrum: Field 1987, "Relations between the statistics of natural images and the response properties of cortical
cells", J. Opt. Soc. Am. A 4(12). No image is read here: this is the noise that has these two properties and no other.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from reverie.images.contract import InputContract

# Mean and deviation of the pixels of photographs, 0 to 1.
_PHOTOGRAPH = (0.45, 0.25)
# Deviations of normalization constants that come from data lie in between; 0.5 and 1/255 do not.
_FROM_DATA = (0.1, 0.4)
# What a channel has of its own: three channels then correlate by 0.87.
_CHROMA = 0.22


def to_inputs(contract: InputContract) -> tuple[Float[Tensor, "channels 1 1"], Float[Tensor, "channels 1 1"]]:
    """Gain and offset from channels of mean 0 and deviation 1 to network inputs with the brightness and contrast of photographs.

    Where the normalization was made of data statistics these are 1 and 0.
    """
    ones = torch.ones(contract.channels, 1, 1)
    if all(_FROM_DATA[0] <= deviation <= _FROM_DATA[1] for deviation in contract.std):
        return ones, 0 * ones
    mean, deviation = _PHOTOGRAPH
    offset = contract.normalize(mean * ones)
    return contract.normalize((mean + deviation) * ones) - offset, offset


def natural_noise(
    noise: Float[Tensor, "count channels height width"],
) -> Float[Tensor, "count channels height width"]:
    """White `noise` with the spectrum and the colours of photographs; each channel has mean 0 and deviation 1 over all images."""
    height, width = noise.shape[2:]
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = torch.hypot(rows, columns).clamp(min=1 / max(height, width)).to(noise.device)
    own = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(height, width))
    grey = own.mean(dim=1, keepdim=True)
    coloured = grey + _CHROMA * (own - grey)
    deviation, mean = torch.std_mean(coloured, dim=(0, 2, 3), keepdim=True, correction=0)
    natural: Tensor = (coloured - mean) / deviation
    return natural
