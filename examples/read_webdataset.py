"""Synthetic images as WebDataset shards, read by the network they were made from: pip install -e '.[digits]' webdataset

python examples/read_webdataset.py
"""

import tempfile
from pathlib import Path

import numpy as np
import task
import torch
import webdataset

from reverie.formats import write
from reverie.formats.webdataset import WebDataset


def main() -> None:
    """Prints how many images the network takes for what the shards say they are."""
    given = task.parse()
    network, contract = given.network, given.network.input
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        write(WebDataset(per_shard=20), given.images, contract, network.classes, folder)
        shards = sorted(str(path) for path in folder.iterdir())
        # WebDataset's names: "pil" is a picture in colour, "pill" one in grey.
        decoder = "pill" if contract.channels == 1 else "pil"
        samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode(decoder).to_tuple("png", "cls"))
    levels = torch.tensor(np.stack([np.atleast_3d(np.asarray(picture)) for picture, _ in samples])).permute(0, 3, 1, 2)
    with torch.no_grad():
        answers = network.module(contract.normalize(levels.float() / 255)).argmax(dim=1)
    same = int((answers == torch.tensor([label for _, label in samples])).sum())
    print(f"{len(shards)} shards, {same} of {len(samples)} images are still of the class that the shards say")


if __name__ == "__main__":
    main()
