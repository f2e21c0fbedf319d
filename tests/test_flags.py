"""Options as words of a command line."""

import pytest

from reverie.flags import words


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"input_size": 32, "mean": (0.5, 0.25)}, ["--input-size", "32", "--mean", "0.5,0.25"]),
        ({"std": [1.0]}, ["--std", "1.0"]),
        ({"execute_weights": True, "weights": "a b.pt"}, ["--execute-weights", "--weights", "a b.pt"]),
        ({"execute_weights": False, "weights": None}, []),
    ],
)
def test_options_become_words(options, expected):
    assert words(options) == expected
