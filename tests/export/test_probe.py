"""Codes are read only where reading them leaves the answers as they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from reverie.errors import ExportError
from reverie.export import _verify as verify
from reverie.export._certificate import prove
from reverie.export._probe import undisturbed
from reverie.runtimes import Probe
from reverie.runtimes.onnxruntime import OnnxRuntime

ONNX_RUNTIME = OnnxRuntime()


@dataclass(frozen=True)
class Disturbed:
    """Answers of ONNX Runtime, moved a little."""

    probe: Probe
    disturbs: bool
    unrounded: frozenset[str] = frozenset()

    def __call__(self, images):
        logits, codes = self.probe(images)
        return (np.nextafter(logits, np.float32(np.inf)) if self.disturbs else logits), codes


@dataclass(frozen=True, kw_only=True)
class Shy:
    """ONNX Runtime, but it answers otherwise where it is asked for certain tensors, or for more than so many together."""

    hides: frozenset[str] = frozenset()
    together: int = 1000
    library: ClassVar[str] = "onnxruntime"
    reads: ClassVar[frozenset[str]] = frozenset({".onnx"})

    def open(self, path: Path, *, threads: int = 1):
        return ONNX_RUNTIME.open(path, threads=threads)

    def probe(self, path: Path, names: Sequence[str], *, threads: int = 1):
        found = ONNX_RUNTIME.probe(path, names, threads=threads)
        return Disturbed(found, not self.hides.isdisjoint(names) or len(names) > self.together)

    def float_layers(self, path: Path, layers):
        return ONNX_RUNTIME.float_layers(path, layers)


@pytest.fixture
def names(written):
    network, _ = written(8, 8, 8)
    return list(network.activations)


def test_tensors_that_disturb_each_other_are_read_apart_and_all_are_seen(written, images, names):
    _, path = written(8, 8, 8)
    batch = images[:4].numpy()
    probe = undisturbed(Shy(together=2), path, names, batch)
    logits, codes = probe(batch)
    assert len(probe.probes) > 1
    assert probe.unseen == frozenset()
    together, expected = ONNX_RUNTIME.probe(path, names)(batch)
    assert np.array_equal(logits, together)
    assert codes.keys() == expected.keys() == set(names)
    assert all(np.array_equal(codes[name], expected[name]) for name in names)


def test_one_probe_is_enough_where_nothing_is_disturbed(written, images, names):
    _, path = written(8, 8, 8)
    assert len(undisturbed(ONNX_RUNTIME, path, names, images[:4].numpy()).probes) == 1


def test_a_tensor_that_disturbs_alone_is_unseen_and_the_others_are_compared(written, images, names):
    network, path = written(8, 8, 8)
    hidden = names[len(names) // 2]
    parity = verify.measure_parity(network, path, images, runtime=Shy(hides=frozenset({hidden})))
    verify.assert_parity(parity)
    assert parity.unseen == (hidden,)
    assert parity.per_tensor.keys() == set(names) - {hidden}


def test_suspects_are_asked_one_by_one_and_the_rest_is_not_halved_for_their_sake(written, images, names):
    _, path = written(8, 8, 8)
    asked, hidden = [], frozenset(names[1::3])

    class Counting(Shy):
        def probe(self, path, names, *, threads=1):
            asked.append(list(names))
            return super().probe(path, names, threads=threads)

    found = undisturbed(Counting(hides=hidden), path, names, images[:4].numpy(), suspects={*hidden, names[0]})
    suspects = [name for name in names if name in {*hidden, names[0]}]
    # Those that do no harm are read together in the end.
    assert asked == [names, *([name] for name in suspects), [name for name in names if name not in suspects], [names[0]]]
    assert found.unseen == hidden and found.unrounded == frozenset()
    assert found(images[:4].numpy())[1].keys() == set(names) - hidden


def test_what_sums_read_is_suspected(written, images):
    network, path = written(8, 8, 8)
    asked = []

    class Counting(Shy):
        def probe(self, path, names, *, threads=1):
            asked.append(list(names))
            return super().probe(path, names, threads=threads)

    verify.measure_parity(network, path, images[:2], runtime=Counting(together=5))
    names = list(network.activations)
    alone = [one for (one,) in (group for group in asked if len(group) == 1)]
    nodes = {node.name: node for node in network.graph.graph.nodes}
    sums = [node for node in nodes.values() if node.target is torch.ops.aten.add.Tensor]
    read = {source.target.rpartition(".")[2] for node in sums for source in node.all_input_nodes if source.op == "call_module"}
    assert len(sums) == 2 and read and alone[: len(read)] == [name for name in names if name in read]


def test_a_runtime_that_shows_nothing_without_computing_otherwise_is_refused(written, images, names):
    network, path = written(8, 8, 8)
    with pytest.raises(ExportError) as caught:
        verify.measure_parity(network, path, images, runtime=Shy(together=0))
    assert str(caught.value) == (
        f"{path}: reading codes must not change the logits, got other ones with each of the {len(names)} tensors; "
        "this version of test_probe optimizes what is probed differently, try another"
    )


def test_answers_that_are_no_numbers_are_named_as_such(written, images, names):
    _, path = written(8, 8, 8)

    class Overflowing(Shy):
        def open(self, path, *, threads=1):
            session = super().open(path, threads=threads)

            def answer(batch):
                logits = session(batch).copy()
                logits[0, 0], logits[0, 1] = np.inf, np.nan
                return logits

            return answer

    with pytest.raises(ExportError) as caught:
        undisturbed(Overflowing(), path, names, images[:4].numpy())
    assert str(caught.value) == (
        f"{path}: logits must be finite, got 2 NaN or infinite ones on 4 images in test_probe; "
        "quantize with more bits, or compare on other images"
    )


def test_a_tensor_that_changes_the_answer_for_one_image_alone_is_unseen_too(written, images, names):
    """A tipped rounding shows where it meets an image that it matters for, so all of them are asked."""
    _, path = written(8, 8, 8)

    class Seldom(Shy):
        def probe(self, path, asked, *, threads=1):
            found = ONNX_RUNTIME.probe(path, asked, threads=threads)

            def answer(batch):
                last = names[0] in asked and np.array_equal(batch[-1], images[-1].numpy())
                return Disturbed(found, last)(batch)

            answer.unrounded = frozenset()
            return answer

    assert undisturbed(Seldom(), path, names, images.numpy(), batch=8).unseen == {names[0]}
    assert undisturbed(Seldom(), path, names, images[:8].numpy(), batch=8).unseen == frozenset()


def test_a_certificate_does_not_say_where_a_file_lay_when_it_was_refused(written, images):
    network, path = written(8, 8, 8)
    failure = prove(network, path, images, {"shy": Shy(together=0)})["shy"].failure
    assert failure.startswith("this file: reading codes must not change the logits, got ")
    assert str(path.parent) not in failure
