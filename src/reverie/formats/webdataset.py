"""WebDataset: tar files of samples that are read in sequence, for sets of tens of thousands of images. Pixels of 0 to 255.

    DIR/images-000000.tar       00000000.png  00000000.cls  00000000.json  00000001.png  ...
    DIR/images-000001.tar       from image 10,000 on

    webdataset.WebDataset("DIR/images-{000000..000001}.tar").decode("pil").to_tuple("png", "cls")

`.cls` is the class, what the full-precision network says or else the label; `.json` says the image's source and what made the set.
Logits are not there: `images.safetensors` has them.
"""

import io
import json
import math
import tarfile
from dataclasses import dataclass
from pathlib import Path

from reverie.errors import check_range
from reverie.formats._pictures import check_channels, classes_of
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.store import encode_png


@dataclass(frozen=True, kw_only=True)
class WebDataset:
    """Writes tar files.

    Args:
        per_shard: At most so many images in a file.
    """

    per_shard: int = 10_000

    def __post_init__(self) -> None:
        check_range(self, per_shard=(1, math.inf))

    def check(self, contract: InputContract) -> None:
        """One channel or three."""
        check_channels(contract)

    def __call__(self, images: Images, contract: InputContract, classes: int, folder: Path) -> None:
        """Writes `images-000000.tar` and so on."""
        labels = classes_of(images)
        for shard, start in enumerate(range(0, len(images), self.per_shard)):
            with tarfile.open(folder / f"images-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as file:
                for index in range(start, min(start + self.per_shard, len(images))):
                    source = images.sources[index] if images.sources else None
                    about = {"source": source, "provenance": images.provenance}
                    _add(file, f"{index:08d}.png", encode_png(images.inputs[index], contract))
                    _add(file, f"{index:08d}.cls", str(labels[index]).encode())
                    _add(file, f"{index:08d}.json", json.dumps(about, sort_keys=True).encode())


def _add(file: tarfile.TarFile, name: str, content: bytes) -> None:
    # The time and the owner stay zero: equal sets give equal bytes.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))


METHOD = WebDataset
