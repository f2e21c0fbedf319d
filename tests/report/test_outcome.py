import pytest

from reverie.report import outcome


def test_the_headline_gives_accuracy_with_its_interval_size_and_speed(labelled):
    assert outcome.headline(labelled) == (
        "tiny at W4A8 reads 93.50 % of 200 labelled images right, full precision 95.00 %: -1.50 (-3.00 to +0.00) points. "
        "The file is 6.0 times smaller; it runs 2.00 times as fast as the FP32 file in ONNX Runtime."
    )


def test_the_headline_without_labels_gives_agreement_and_says_that_accuracy_is_unknown(unlabelled):
    assert outcome.headline(unlabelled).startswith(
        "tiny at W4A8 gives the class of full precision on 96.88 % of 32 held-out synthetic images; "
        "its accuracy is unknown without labelled ones. "
    )


@pytest.mark.parametrize(
    ("drop", "high", "said"),
    [
        (0.018, 0.041, "1.8 points (90 % interval 0.6 to 4.1)"),
        (None, None, "more than 0.6 points (further than the estimate was calibrated)"),
    ],
)
def test_the_headline_without_labels_gives_the_estimate_of_the_drop(unlabelled, drop, high, said):
    unlabelled["estimate"] = {"images": 32, "distance": 0.0931, "drop": drop, "low": 0.006, "high": high}
    assert outcome.headline(unlabelled).startswith(
        "tiny at W4A8 gives the class of full precision on 96.88 % of 32 held-out synthetic images; "
        f"without labels, its accuracy is estimated to be lower by {said}. The file is "
    )
    assert (
        outcome.notes(unlabelled)[2] == f"estimated drop: {said}, from answers that are 0.0931 apart on 32 images made for it"
    )


def test_with_labels_the_truth_is_the_headline(labelled):
    before = outcome.headline(labelled)
    labelled["estimate"] = {"images": 32, "distance": 0.09, "drop": 0.018, "low": 0.006, "high": 0.041}
    assert outcome.headline(labelled) == before


def test_the_headline_owns_up_to_a_slower_file(labelled):
    labelled["latency_ms"]["ratio"] = 0.8
    assert outcome.headline(labelled).endswith("it runs at 0.80 of the speed of the FP32 file in ONNX Runtime.")


def test_the_headline_of_what_was_not_exported_is_about_the_simulation(simulated):
    assert outcome.headline(simulated) == (
        "tiny at W4A8 reads 94.00 % of 200 labelled images right, full precision 95.00 %: -1.00 (-2.50 to +0.50) points. "
        "Nothing was exported, so nothing was timed."
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"activation_bits": 4}, "W4A4 (stem and sums in 8)"),
        ({"activation_bits": 4, "stem_bits": 4}, "W4A4 (sums in 8)"),
        ({"activation_bits": 4, "sum_bits": 4}, "W4A4 (stem in 8)"),
        ({"activation_bits": 4, "stem_bits": 6}, "W4A4 (stem in 6, sums in 8)"),
        ({"activation_bits": 4, "stem_bits": 4, "sum_bits": 4}, "W4A4"),
        ({"activation_bits": 4, "placement": "literature"}, "W4A4"),
    ],
)
def test_bits_of_stem_and_sums_are_told_where_they_are_more(labelled, settings, text):
    assert outcome.bits_text({"quantization": labelled["quantization"] | settings}) == text


def test_the_headline_without_any_images_says_so(simulated):
    blind = simulated | {"agreement": {}, "quantized": {"top1": None}}
    assert outcome.headline(blind) == (
        "tiny at W4A8 was not compared with full precision, for want of images. Nothing was exported, so nothing was timed."
    )


def test_the_table_has_a_row_for_each_model(labelled):
    head, rows = outcome.table(labelled)
    assert head == [
        "", "accuracy", "difference, points (95 %)", "agrees, synthetic", "agrees, evaluation", "size", "latency", "speed",
    ]  # fmt: skip
    assert rows == [
        ["full precision", "95.00 %", "-", "-", "-", "6.0 MB", "3 ms", "1.00 x"],
        ["fake-quantized", "94.00 %", "-1.00 (-2.50 to +0.50)", "100.00 %", "98.00 %", "900 bytes", "-", "-"],
        ["exported (ONNX Runtime)", "93.50 %", "-1.50 (-3.00 to +0.00)", "96.88 %", "97.50 %", "1.0 MB", "1.5 ms", "2.00 x"],
    ]


def test_the_table_without_labels_says_so_in_every_row(unlabelled):
    head, rows = outcome.table(unlabelled)
    assert head == ["", "accuracy", "agrees, synthetic", "size", "latency", "speed"]
    assert [row[1] for row in rows] == ["no labels"] * 3


def test_the_table_of_what_was_not_exported_has_no_row_for_it(simulated):
    _, rows = outcome.table(simulated)
    assert [row[0] for row in rows] == ["full precision", "fake-quantized"]


def test_the_notes_are_a_line_each(labelled):
    assert outcome.notes(labelled) == [
        "parity: codes of ONNX Runtime and the student at most 1 step apart (below 0.01 % differ), "
        "same class on 99.00 % of 64 images",
        "images: 66 (64 zeroq, 2 real), 33 22 11 of each class, batch-norm distance 0.02, class coverage 0.9, entropy 0.01, "
        "feature similarity 0.415",
        "seconds: capture 1.0, synthesize 9.0, total 10.0; peak memory 0.6 GiB",
    ]


@pytest.mark.parametrize(
    ("histogram", "text"),
    [
        ([0] * 19 + [66], f"{'0 ' * 19}66 of each class"),
        ([0] * 998 + [63, 3], "2 of 1000 classes seen, at most 63 of one"),
    ],
)
def test_many_classes_are_counted_rather_than_listed(labelled, histogram, text):
    labelled["images"]["diversity"]["class_histogram"] = histogram
    assert outcome.images_text(labelled["images"]).startswith(f"66 (64 zeroq, 2 real), {text}, batch-norm distance")


@pytest.mark.parametrize(
    ("share", "text"), [(None, "-"), (0.0, "0.00 %"), (0.00004, "below 0.01 %"), (0.9967, "99.67 %"), (1.0, "100.00 %")]
)
def test_a_share_that_is_not_nothing_does_not_look_like_nothing(share, text):
    assert outcome.percent(share) == text


def test_the_certificate_is_told_runtime_by_runtime_and_tensor_by_tensor(certified):
    assert outcome.other_runtimes(certified) == [
        "in OpenVINO 3.4 codes at most 1 step apart, same class on 100.00 % of 64 images, 2 of 3 layers in integers",
        "in PyTorch 2.13 no float8 here",
    ]
    assert outcome.reference_opinion(certified) == (
        "and ONNX Runtime: codes at most 1 step apart, same class on 100.00 % of 5 images, 3 of 3 layers in integers, "
        "25.00 % of codes differ"
    )
    runtimes, rows = outcome.certified(certified)
    assert runtimes == ["ONNX Runtime", "OpenVINO"]
    assert rows == [("quiet", ["0", "not seen"]), ("often", ["1, 2.00 %", "1, 50.00 %"])]


def test_what_was_not_certified_is_not_told(labelled):
    assert outcome.reference_opinion(labelled) is None
    assert outcome.certified(labelled) == ([], [])


def timed(form, runtime, speed):
    return {
        "form": form,
        "runtime": runtime,
        "latency_ms": {"1": {"times_full_precision": speed}, "32": {"times_full_precision": 1.5}},
    }


def test_a_file_that_is_slower_than_full_precision_is_said_to_buy_size_only():
    rows = [
        timed("float", "onnxruntime", 1.0),
        timed("network.onnx", "onnxruntime", 0.9),
        timed("network.xml", "openvino", 2.0),
    ]
    assert outcome.benchmark_notes(rows, [8, 8], full_precision="float") == [
        "network.onnx is slower than full precision in ONNX Runtime at batch 1: there it buys size only"
    ]
