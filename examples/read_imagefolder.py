"""Synthetic images as a folder of PNG files, read by torchvision and by the network they were made from.

    python examples/read_imagefolder.py

needs pip install -e '.[digits,models]'.
"""

import tempfile
from pathlib import Path

import task
import torch

from reverie.formats import write
from reverie.formats.imagefolder import ImageFolder as Target


def main() -> None:
    """Prints how many images the network takes for what it took them for before they were rounded to 8 bits."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Grayscale, Lambda, PILToTensor

    given = task.parse()
    network, contract = given.network, given.network.input
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        write(Target(), given.images, contract, network.classes, folder)
        steps = [PILToTensor(), Lambda(lambda levels: contract.normalize(levels.float() / 255))]
        if contract.channels == 1:
            steps.insert(0, Grayscale())
        dataset = ImageFolder(folder, Compose(steps))
        inputs, places = zip(*dataset, strict=True)
    # The reader numbers folders by itself; their names are the network's classes.
    classes = torch.tensor([int(dataset.classes[place]) for place in places])
    with torch.no_grad():
        same = network.module(torch.stack(inputs)).argmax(dim=1) == classes
    print(f"{int(same.sum())} of {len(same)} images are still of the class whose folder they are in")


if __name__ == "__main__":
    main()
