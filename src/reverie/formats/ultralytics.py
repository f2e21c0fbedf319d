"""A folder that Ultralytics calibrates from when it exports to int8. Pixels of 0 to 255, which it scales by itself.

    yolo export model=yolo11n.pt format=openvino quantize=8 data=DIR/data.yaml       detection and the like
    yolo export model=yolo11n-cls.pt format=openvino quantize=8 data=DIR             classification

It calibrates on `val`, and wants a `train` with the same classes beside it, so that every picture is there twice. There are no
boxes: for detection the images are background, which is enough to calibrate and no use for training or validation.
"""

from dataclasses import dataclass
from pathlib import Path

from reverie.formats._pictures import check_channels, classes_of, folder_name
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.store import encode_png


@dataclass(frozen=True, kw_only=True)
class Ultralytics:
    """Has no settings."""

    def check(self, contract: InputContract) -> None:
        """One channel or three."""
        check_channels(contract)

    def __call__(self, images: Images, contract: InputContract, classes: int, folder: Path) -> None:
        """Writes `data.yaml`, `train/CLASS/NUMBER.png` and `val/CLASS/NUMBER.png`."""
        for index, label in enumerate(classes_of(images)):
            picture = encode_png(images.inputs[index], contract)
            for part in ("train", "val"):
                place = folder / part / folder_name(label, classes)
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{index:08d}.png").write_bytes(picture)
        # Without `path`, places are relative to the file, and the folder can be moved.
        names = "".join(f"  {label}: '{folder_name(label, classes)}'\n" for label in range(classes))
        (folder / "data.yaml").write_text(f"train: train\nval: val\nchannels: {contract.channels}\nnames:\n{names}")


METHOD = Ultralytics
