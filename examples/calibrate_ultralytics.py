"""An Ultralytics network exported to int8 for OpenVINO, calibrated with synthetic images: pip install -e . 'ultralytics>=8.4' openvino nncf

    python examples/calibrate_ultralytics.py --model yolo11n-cls.pt --images dreams/ultralytics

`dreams/ultralytics` is what `reverie synthesize NETWORK --for ultralytics --output dreams` wrote; without it, images of
`embedded:digits` are made, which show how it goes and are no photographs. Prints where the exported network is, and its size.
"""

import argparse
import tempfile
from pathlib import Path

import task

import reverie
from reverie.formats import write
from reverie.formats.ultralytics import Ultralytics


def main() -> None:
    """Exports the network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolo11n-cls.yaml", help="a .pt file, or a .yaml for a network that is not trained")
    parser.add_argument("--images", type=Path)
    options = parser.parse_args()
    from ultralytics import YOLO

    with tempfile.TemporaryDirectory() as place:
        folder = options.images
        if folder is None:
            network = reverie.load_network("embedded:digits")
            folder = Path(place) / "images"
            write(Ultralytics(), task.images_for(network), network.input, network.classes, folder)
        model = YOLO(options.model)
        data = folder if model.task == "classify" else folder / "data.yaml"
        exported = Path(model.export(format="openvino", quantize=8, data=str(data)))
    print(f"{exported}: {sum(file.stat().st_size for file in exported.rglob('*.bin')) / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
