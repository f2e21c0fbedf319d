"""A folder of PNG files for each class: what torchvision's `ImageFolder`, timm, Keras and `--evaluate` read. Pixels of 0 to 255.

    DIR/007/00000012.png        image 12, class 7 of more than 100

The class is the one that the full-precision network says, or else the label. Classes without images have no folder. A reader that
numbers folders by itself, as `ImageFolder` does, then has other numbers than the network: `int(dataset.classes[index])` is the network's.
"""

from dataclasses import dataclass
from pathlib import Path

from reverie.formats._pictures import check_channels, classes_of, folder_name
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.store import encode_png


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Has no settings."""

    def check(self, contract: InputContract) -> None:
        """One channel or three."""
        check_channels(contract)

    def __call__(self, images: Images, contract: InputContract, classes: int, folder: Path) -> None:
        """Writes `CLASS/NUMBER.png`."""
        for index, label in enumerate(classes_of(images)):
            place = folder / folder_name(label, classes)
            place.mkdir(exist_ok=True)
            (place / f"{index:08d}.png").write_bytes(encode_png(images.inputs[index], contract))


METHOD = ImageFolder
