"""Facts in exported files, and the hash of everything else."""

import warnings

import onnx
import pytest
import torch

from reverie.errors import ExportError
from reverie.export._metadata import add_facts, content_hash, read_facts

XML = '<?xml version="1.0"?>\n<net name="reverie" version="11"><layers><layer id="0" name="x"/></layers>{}</net>\n'


@pytest.fixture
def onnx_file(written, tmp_path):
    path = tmp_path / "network.onnx"
    path.write_bytes(written(4, 4, 8)[1].read_bytes())
    return path


@pytest.fixture
def xml_file(tmp_path):
    path = tmp_path / "network.xml"
    path.write_text(XML.format('<rt_info><reverie><network value="net"/></reverie></rt_info>'))
    path.with_suffix(".bin").write_bytes(b"weights")
    return path


@pytest.fixture
def pt2_file(tmp_path):
    path = tmp_path / "network.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),), strict=False)
        torch.export.save(program, path, extra_files={"reverie.network": "net"})
    return path


@pytest.fixture(params=["onnx_file", "xml_file", "pt2_file"])
def file(request):
    return request.getfixturevalue(request.param)


def test_facts_come_back_and_replace_those_of_the_same_name(file):
    before = read_facts(file)
    assert before
    add_facts(file, {"reverie.parity": '{"a": [1, "ä<"]}', "reverie.more": "x" * 300})
    add_facts(file, {"reverie.more": "y"})
    assert read_facts(file) == before | {"reverie.parity": '{"a": [1, "ä<"]}', "reverie.more": "y"}


def test_facts_do_not_change_the_hash_and_anything_else_does(file):
    before = content_hash(file)
    add_facts(file, {"reverie.parity": "{}"})
    assert content_hash(file) == before
    changed = file.with_suffix(".bin") if file.suffix == ".xml" else file
    damaged = bytearray(changed.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    changed.write_bytes(damaged)
    try:
        assert content_hash(file) != before
    except ExportError as error:
        assert ": must be a whole file, got " in str(error)


def test_onnx_reads_the_facts_and_the_network_stays_what_it_was(onnx_file, written):
    add_facts(onnx_file, {"reverie.parity": "{}"})
    proto, before = onnx.load(onnx_file), onnx.load(written(4, 4, 8)[1])
    assert {entry.key: entry.value for entry in proto.metadata_props}["reverie.parity"] == "{}"
    assert proto.graph == before.graph
    assert proto.opset_import == before.opset_import
    onnx.checker.check_model(proto)


def test_torch_reads_the_facts_and_the_program_stays_what_it_was(pt2_file):
    before = torch.export.load(pt2_file).module()(torch.ones(1, 2))
    add_facts(pt2_file, {"reverie.parity": "{}"})
    facts = {"reverie.parity": "", "reverie.network": ""}
    program = torch.export.load(pt2_file, extra_files=facts)
    assert facts == {"reverie.parity": "{}", "reverie.network": "net"}
    assert torch.equal(program.module()(torch.ones(1, 2)), before)


def test_an_archive_that_breaks_off_is_named(pt2_file):
    whole = pt2_file.read_bytes()
    pt2_file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError) as caught:
        content_hash(pt2_file)
    assert str(caught.value) == f"{pt2_file}: must be a whole file, got 'File is not a zip file'; export it again"


def test_a_file_that_breaks_off_is_named(onnx_file):
    onnx_file.write_bytes(onnx_file.read_bytes()[:-5])
    with pytest.raises(ExportError) as caught:
        content_hash(onnx_file)
    assert str(caught.value) == (f"{onnx_file}: must be a whole file, got one that breaks off or is damaged; export it again")


def test_weights_that_are_missing_are_named(xml_file):
    weights = xml_file.with_suffix(".bin")
    weights.unlink()
    with pytest.raises(ExportError) as caught:
        content_hash(xml_file)
    assert str(caught.value) == f"{weights}: must be a file, got 'No such file or directory'; export it again"


def test_an_xml_file_that_breaks_off_is_named(xml_file):
    xml_file.write_text("<net>")
    with pytest.raises(ExportError) as caught:
        content_hash(xml_file)
    assert str(caught.value) == (f"{xml_file}: must be a whole file, got 'no element found: line 1, column 5'; export it again")
