"""What the targets of pictures share: which images PNG can hold, the class of each, and the names of classes' folders."""

from reverie.errors import ConfigError
from reverie.images import Images
from reverie.images.contract import InputContract


def check_channels(contract: InputContract) -> None:
    """Refuses images that no PNG of 8 bits can hold.

    Raises:
        ConfigError: Neither one channel nor three.
    """
    if contract.channels not in (1, 3):
        raise ConfigError(
            f"images must have 1 or 3 channels to be PNG files, got {contract.channels}; choose a target of arrays, such as onnxruntime"
        )


def classes_of(images: Images) -> list[int]:
    """The class of every image: what the full-precision network says it shows, or else its label.

    A label of a synthetic image is the class that was asked for, and the network's answer the one that came out; readers of folders
    believe what they are told.

    Raises:
        ConfigError: Neither is known.
    """
    if images.logits is not None:
        return [int(label) for label in images.logits.argmax(dim=1)]
    if images.labels is not None:
        return [int(label) for label in images.labels]
    raise ConfigError(
        "images must have the network's logits or labels to be sorted by class, got neither; choose a target of arrays"
    )


def folder_name(label: int, classes: int) -> str:
    """The class's number, with as many digits as the last one's, since readers number folders in the order of their names."""
    return f"{label:0{len(str(classes - 1))}d}"
