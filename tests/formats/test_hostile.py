"""The script beside an array is run by people: nothing that a file of images says becomes code in it."""

import ast

import pytest
import torch

from reverie import formats, plugins
from reverie.formats import write
from reverie.images import Images
from reverie.models import InputContract

GREY = InputContract(channels=1, height=4, width=4, mean=(0.5,), std=(0.5,))


def script(tmp_path, words):
    images = Images(inputs=torch.zeros(2, 1, 4, 4), sources=("a", "b"), provenance={"method": words})
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    write(plugins.load(formats, "onnxruntime")(), images, GREY, 3, folder)
    return ast.parse((folder / "calibration.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "words", ['"""\nraise SystemExit\n"""', '\\"""\nraise SystemExit\n"""', 'x"', "x\\", "{0}", "\r\n\x00"]
)
def test_words_in_a_docstring_do_not_end_it(tmp_path, words):
    plain, hostile = (script(tmp_path, text) for text in ("zeroq", words))
    assert "zeroq" in ast.get_docstring(plain)
    assert [ast.dump(part) for part in hostile.body[1:]] == [ast.dump(part) for part in plain.body[1:]]
    assert isinstance(hostile.body[0].value, ast.Constant)
