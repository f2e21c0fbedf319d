"""Whatever is wrong is one line on standard error, whole here, and says how to mend it; nothing is written before it."""

import json
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.cli.conftest import SHAPE, TINY, message, refused
from tests.cli.test_commands import COMMANDS

from reverie.cli import main
from reverie.runs import RunDirectory, write_record


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (
            "embedded:digit",
            "unknown embedded network 'digit'; choose one of digits, or did you mean 'digits'?",
        ),
        (
            "embeded:digits",
            "unknown network source 'embeded'; choose one of embedded, onnx, package, timm, torchvision, or did you mean 'embedded'?",
        ),
        (
            "resnet18",
            "a network must be SOURCE:NAME with SOURCE one of embedded, onnx, package, timm, torchvision, "
            "or path/to/file.py:FACTORY, got 'resnet18'; did you mean 'timm:resnet18'?",
        ),
        (
            "wibble",
            "a network must be SOURCE:NAME with SOURCE one of embedded, onnx, package, timm, torchvision, "
            "or path/to/file.py:FACTORY, got 'wibble'",
        ),
        (
            "timm:ResNet18x",
            "unknown timm network 'ResNet18x'; did you mean one of resnet18, resnet18d, skresnet18, seresnet18, resnetv2_18?",
        ),
        ("nowhere.py:net", "nowhere.py:net: nowhere.py must be a Python file, got nothing there"),
    ],
)
def test_an_unknown_network_is_refused(capsys, network, expected):
    shape = SHAPE if ".py" in network else []
    assert refused(capsys, "quantize", network, *shape) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--recipe", "adaruond"],
            "unknown recipe 'adaruond'; choose one of adaround, best, brecq, clusterq, dsg, dsg_adaround, dsg_generator, fdda, gdfq, "
            "genie_m, gptq, noise, qdrop, squant, zeroq, or did you mean 'adaround'?",
        ),
        (
            ["--recipe", "mine.toml"],
            "mine.toml: a recipe file must exist, got none; `reverie recipe adaround` prints one to start from",
        ),
        (
            ["--set", "rounding.method=adaruond"],
            "recipe zeroq: [rounding]: unknown rounding method 'adaruond'; choose one of adaround, gptq, nearest, "
            "squant, or did you mean 'adaround'?",
        ),
        (
            ["--set", "synthesis.step=10"],
            "recipe zeroq: [synthesis]: unknown key 'step'; choose one of batch, clamp, class_weight, input_weight, "
            "learning_rate, level, start, steps, swing, variation_weight, or did you mean 'steps'?",
        ),
        (
            ["--set", "sede=1"],
            "recipe zeroq: unknown key 'sede'; choose one of activations, bits, calibration_images, clipping, distillation, "
            "estimate_images, export, held_out, image_scale, images, mixed_precision, mosaic, quantization, real_apart, real_share, "
            "reconstruction, rounding, seed, synthesis, weights, or did you mean 'seed'?",
        ),
        (
            ["--set", "iterations=50"],
            "recipe zeroq: unknown key 'iterations'; choose one of activations, bits, calibration_images, clipping, distillation, "
            "estimate_images, export, held_out, image_scale, images, mixed_precision, mosaic, quantization, real_apart, real_share, "
            "reconstruction, rounding, seed, synthesis, weights, or did you mean 'reconstruction.iterations'?",
        ),
        (
            ["--set", "reconstruction.unit=blok"],
            "recipe zeroq: [reconstruction]: unit must be 'layer', 'block' or 'network', got 'blok'; did you mean 'block'?",
        ),
        (["--set", "synthesis.steps=few"], "recipe zeroq: [synthesis]: steps must be a valid integer, got 'few'"),
        (
            ["--set", "images.more=1"],
            "recipe zeroq: images.more must be a key of a table, got the single value 'images'; leave out '.more'",
        ),
        (["--weight-bits", "9"], "recipe zeroq: [quantization]: weight_bits must be 2 to 8, got 9"),
        (["--weight-bits", "1"], "recipe adaround: [quantization]: weight_bits must be 2 to 8, got 1"),
        (["--activation-bits", "16"], "recipe zeroq: [quantization]: activation_bits must be 2 to 8, got 16"),
        (["--images", "-1"], "recipe zeroq: images must be at least 0, got -1"),
        (["--set", "synthesis.batch=0"], "recipe zeroq: [synthesis]: batch must be at least 1, got 0"),
        (["--set", "synthesis.learning_rate=nan"], "recipe zeroq: [synthesis]: learning_rate must be finite, got nan"),
        (
            ["--set", "weights.percentile=200", "--set", "weights.method=percentile"],
            "recipe zeroq: [weights]: percentile must be 50 to 100, got 200.0",
        ),
        (
            ["--images", "0"],
            "images must be at least 1 without --calibration, got 0; give a folder of images or synthesize some",
        ),
        (["--device", "abacus"], "device must be one that PyTorch can use here, got 'abacus'; use 'cpu'"),
        (
            ["--budget", "0"],
            "budget must be a number of minutes above 0, got 0; leave it out for the recipe's own steps",
        ),
        (
            ["--budget", "nan"],
            "budget must be a number of minutes above 0, got nan; leave it out for the recipe's own steps",
        ),
        (["--mean", "0.5"], "embedded:digits: got the option 'mean'; it takes no options"),
        (
            ["--set", "quantization.placement=literature"],
            "the literature placement must not be exported, got export = 'onnx'; it is for comparison with papers: "
            "use --set export.method=none",
        ),
        (
            ["--placement", "papers"],
            "recipe zeroq: [quantization]: placement must be 'integer' or 'literature', got 'papers'",
        ),
        (
            ["--recipe", "fdda"],
            "embedded:digits: fdda needs labelled real images, one for each class, got none; give --calibration with a folder "
            "of them (one sub-folder a class) or --capsule with a file that `reverie capsule` wrote",
        ),
        (
            ["--recipe", "fdda", "--capsule", "centres.safetensors"],
            "centres.safetensors: must be a file that `reverie capsule` wrote, got no such file; check the path",
        ),
    ],
)
def test_a_wrong_request_is_refused(capsys, tmp_path, arguments, expected):
    assert refused(capsys, "quantize", "embedded:digits", *arguments) == expected
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_file_that_is_no_toml_is_refused(capsys, tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    assert refused(capsys, "recipe", "mine.toml") == "mine.toml: must be TOML in UTF-8, got other bytes"


def test_weights_of_another_architecture_are_refused(capsys, nets, tmp_path):
    save_file({"0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "w.safetensors")
    assert refused(capsys, "quantize", f"{nets}:normal", *SHAPE, "--weights", "w.safetensors") == (
        f"{nets}:normal: w.safetensors: weights must fit the architecture, got no '0.bias' (4,) (and 6 more); "
        "'0.weight' (4, 3, 3, 3) for (4, 1, 3, 3); use the weights of this very network"
    )


def test_weights_that_are_not_finite_are_refused(capsys, nets, weights):
    state = load_file(weights)
    state["5.weight"][1, 2] = torch.nan
    save_file(state, weights)
    assert refused(capsys, "inspect", f"{nets}:normal", *SHAPE, "--weights", weights) == (
        f"{nets}:normal: weights must be finite, got 1 NaN or infinite values in '5.weight'; "
        "use a checkpoint from before the training diverged"
    )


@pytest.mark.parametrize("command", [["quantize"], ["synthesize", "--output", "out"]])
def test_a_network_without_batch_norm_is_refused_by_zeroq(capsys, nets, tmp_path, command):
    assert refused(capsys, *command, f"{nets}:plain", *SHAPE) == (
        f"{nets}:plain: zeroq needs a batch norm with running statistics, got none in the network; "
        "use --calibration with a folder of images and --images 0 --set held_out=0, or --set synthesis.method=noise as a baseline"
    )
    assert list(tmp_path.iterdir()) == [nets]


@pytest.mark.parametrize("option", ["--calibration", "--evaluate", "--unlabelled"])
def test_an_empty_folder_of_images_is_refused(capsys, tmp_path, option):
    (tmp_path / "pictures").mkdir()
    assert refused(capsys, "quantize", "embedded:digits", option, "pictures") == (
        f"{option}: pictures: must hold images (.bmp, .jpeg, .jpg, .png, .webp), got none"
    )


def test_unreadable_images_are_refused_by_name(capsys, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "b.png").write_bytes(b"not an image")
    assert refused(capsys, "quantize", "embedded:digits", "--calibration", "pictures") == (
        "--calibration: pictures: all images must be readable, got 1 unreadable: b.png; remove them"
    )


def test_images_with_another_channel_count_are_refused(capsys, tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((2, 32, 32, 3), np.uint8), labels=np.zeros(2, np.int64))
    assert refused(capsys, "quantize", "embedded:digits", "--evaluate", "set.npz") == (
        "--evaluate: set.npz: images must have 1 channels, got shape (32, 32, 3); convert them first"
    )


def test_labels_outside_the_classes_are_refused(capsys, tmp_path):
    np.savez(tmp_path / "set.npz", images=np.zeros((2, 32, 32, 1), np.uint8), labels=np.array([3, 10]))
    assert refused(capsys, "quantize", "embedded:digits", "--evaluate", "set.npz") == (
        "--evaluate: set.npz: labels must be 0 to 9, got 10 for set.npz[1]; check that these images belong to this network"
    )


def test_the_held_out_set_of_a_network_that_brings_none_is_refused(capsys, nets):
    assert refused(capsys, "quantize", f"{nets}:normal", *SHAPE, "--evaluate", "held-out") == (
        f"--evaluate held-out: the network must bring a labelled set along, got none with {nets}:normal; "
        "give a folder of labelled images"
    )


@pytest.mark.parametrize("command", ["quantize", "synthesize"])
def test_an_output_folder_that_is_not_ours_is_refused_and_left_alone(capsys, tmp_path, command):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    assert refused(capsys, command, "embedded:digits", "--output", "thesis") == (
        "thesis: must be empty or hold a run, got other files in it; choose another --output"
    )
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


@pytest.mark.parametrize("option", ["--calibration", "--evaluate", "--unlabelled"])
def test_the_output_folder_is_looked_at_before_any_image(capsys, monkeypatch, tmp_path, option):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    monkeypatch.setattr("reverie.images.folder.read_folder", lambda *_, **__: pytest.fail("images were read"))
    assert refused(capsys, "quantize", "embedded:digits", option, "pictures", "--output", "thesis") == (
        "thesis: must be empty or hold a run, got other files in it; choose another --output"
    )


def test_an_output_that_is_a_file_or_below_one_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(capsys, "quantize", "embedded:digits", "--output", "file") == (
        "file: must be a folder, got a file; choose another --output"
    )
    assert refused(capsys, "synthesize", "embedded:digits", *TINY, "--output", "file/run") == (
        "file/run: must be writable, got 'Not a directory'; choose another --output"
    )


def test_an_output_with_another_run_is_refused(capsys, finished):
    said = refused(capsys, "synthesize", "embedded:digits", *TINY, "--output", finished)
    assert said.startswith(f"{finished}: must be new or hold the same run, got one with recipe '")
    # What `finished` has, beside what zeroq has; three by name.
    more = r"' \(.*; rounding\.method adaround instead of nearest; \d settings more\); choose another --output, or delete the folder"
    assert re.search(more, said)


@pytest.mark.slow
def test_without_space_left_what_is_there_stays_whole_and_the_same_command_resumes(tmp_path):
    command = [sys.executable, "-m", "reverie", "synthesize", "embedded:digits", *TINY, "--output", "dreams"]
    quota = 16_000

    def limit():
        # The system's own refusal (EFBIG), as a full disk gives ENOSPC.
        resource.setrlimit(resource.RLIMIT_FSIZE, (quota, quota))

    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit)
    assert failed.returncode == 1
    # A part is kept once a second has passed, so the first file that is too large depends on the machine.
    part, whole = "dreams/checkpoints/images/images-0.safetensors", "dreams/images.safetensors"
    assert failed.stderr.splitlines()[-1] in [
        f"reverie: {file}: no space left to write it; free some space and run the same command again, it resumes"
        for file in (part, whole)
    ]
    assert json.loads((tmp_path / "dreams" / "run.json").read_text())["complete"] is False
    assert not list((tmp_path / "dreams").rglob("*.partial*"))
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


@pytest.mark.parametrize("command", [["evaluate", "--data", "x"], ["export"]])
def test_a_folder_that_is_no_run_is_refused(capsys, tmp_path, command):
    assert (
        refused(capsys, *command, tmp_path) == f"{tmp_path}: must be a run directory, got no run.json written by Reverie in it"
    )


@pytest.mark.parametrize("command", [["evaluate", "--data", "x"], ["export"]])
def test_a_run_that_is_not_complete_is_refused(capsys, tmp_path, finished, command):
    record = json.loads((finished / "run.json").read_text())
    write_record(tmp_path, record | {"complete": False})
    assert refused(capsys, *command, tmp_path) == (
        f"{tmp_path}: must be a complete run, got an interrupted one; run the same `reverie quantize` again"
    )


def test_a_run_of_another_network_is_refused(capsys, finished, nets):
    said = refused(capsys, "export", finished, "--network", f"{nets}:normal", *SHAPE)
    assert said.startswith(f"{finished}: must be of this very network (")
    assert said.endswith("); name the right one with --network and --weights")


def test_an_unknown_export_target_is_refused(capsys, finished):
    assert (
        refused(capsys, "export", finished, "--target", "tflite")
        == "unknown target 'tflite'; choose one of onnx, openvino, portable, qnn, tensorrt, torch"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quantize"], 'Command "quantize" parameter NETWORK requires an argument. See --help.'),
        (
            ["quantise", "x"],
            f"unknown command 'quantise'; choose one of {', '.join(COMMANDS)}, or did you mean 'quantize'?",
        ),
        (
            ["quantize", "embedded:digits", "--bits", "4"],
            "unknown option '--bits' of quantize; did you mean --weight-bits?",
        ),
        (
            ["quantize", "embedded:digits", "--calibraton=x"],
            "unknown option '--calibraton' of quantize; did you mean --calibration?",
        ),
        (["methods", "--wibble"], "unknown option '--wibble' of methods; `reverie methods --help` lists them"),
        (
            ["inspect", "nets.py:net", "--mean", "0.5", "0.5", "0.5"],
            "inspect: got more words than it takes, '0.5', '0.5'; numbers of one option are one word, such as --mean 0.485,0.456,0.406",
        ),
        (
            ["inspect", "nets.py:net", "more.py:net"],
            "inspect: got more words than it takes, 'more.py:net'; `reverie inspect --help` lists what it takes",
        ),
        (
            ["--jsno", "methods"],
            "unknown option '--jsno'; `reverie --help` lists them, and options of a command stand behind it",
        ),
        (
            ["quantize", "embedded:digits", "--weight-bits", "four"],
            'Invalid value for --weight-bits: unable to convert "four" into int. See --help.',
        ),
        (
            ["quantize", "embedded:digits", "--budget", "soon"],
            'Invalid value for --budget: unable to convert "soon" into float. See --help.',
        ),
        (
            ["quantize", "x.py:net", "--mean", "a,b"],
            "Invalid value for --mean: could not convert string to float: 'a' See --help.",
        ),
        (
            ["quantize", "embedded:digits", "--set", "steps"],
            "Invalid value \"('steps',)\" for --set. It must be KEY=VALUE. See --help.",
        ),
    ],
)
def test_wrong_usage_is_one_line_with_status_2(capsys, arguments, expected):
    assert main(arguments) == 2
    assert message(capsys) == expected


def test_an_interrupted_command_says_how_to_go_on_with_status_130(capsys, nets):
    assert main(["inspect", f"{nets}:interrupted", *SHAPE]) == 130
    assert message(capsys) == "interrupted; run the same command again to resume"


def test_an_error_of_our_own_is_not_hidden(monkeypatch, nets):
    monkeypatch.setattr("reverie.graph.summary.summarize", None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        main(["inspect", f"{nets}:plain", *SHAPE])


def test_a_folder_with_another_run_is_refused_before_any_image_is_read(capsys, monkeypatch, tmp_path):
    output = tmp_path / "run"
    RunDirectory.open(output, {"recipe": "0" * 16, "network": "n", "input": "i"}).close()
    monkeypatch.setattr("reverie.images.folder.read_folder", None)
    told = refused(capsys, "quantize", "embedded:digits", "--output", str(output), "--unlabelled", str(tmp_path))
    start = f"{output}: must be new or hold the same run, got one with recipe '0000000000000000' instead of "
    assert told.startswith(start), told
    assert told.endswith("; choose another --output, or delete the folder")


@pytest.mark.parametrize("command", ["quantize", "synthesize"])
def test_a_network_with_random_weights_is_refused(capsys, nets, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, command, "nets.py:normal", *SHAPE, "--output", "run") == (
        "nets.py:normal: must have trained weights, got other ones each time that it is made; give them with --weights, or load them in "
        "nets.py:normal"
    )
    assert not (tmp_path / "run").exists()


def test_means_of_pixels_up_to_255_are_refused(capsys, nets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = [*SHAPE[:2], "--mean", "123", *SHAPE[4:]]
    assert refused(capsys, "inspect", "nets.py:normal", *shape) == (
        "nets.py:normal: InputContract.mean must be of pixels in 0..1, got 123; divide mean and std by 255"
    )
