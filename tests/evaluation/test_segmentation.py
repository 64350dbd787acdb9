import json
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor

from ssl_vit.data.augment.evaluation import EvalTransform
from ssl_vit.evaluation import command
from ssl_vit.evaluation.masks import MaskedSource
from ssl_vit.evaluation.segmentation import (
    SegmentationConfig,
    _enlarge,
    _loss,
    bootstrap_interval,
    evaluate_segmentation,
    intersection_over_union,
    mean_iou,
    pixel_counts,
)
from ssl_vit.export import export_backbone
from ssl_vit.models.vit import ViT
from tests.specs import GREY

QUICK = ["--steps=60", "--batch_size=8", "--base_lrs=[0.01,0.1]", "--crop_pct=1", "--precision=no"]


def run(*args: object) -> int:
    return command.main(evaluate_segmentation, {"": SegmentationConfig()}, None, [str(arg) for arg in args])


@pytest.fixture
def backbone(tiny_encoder: ViT, tmp_path: Path) -> Path:
    export_backbone(tiny_encoder, tmp_path / "backbone", normalization=GREY, provenance={})
    return tmp_path / "backbone"


def write(file: Path, num: int, *, shuffled: bool = False, classes: int = 2) -> Path:
    """Images of blocks of 8 pixels, whose colour is the class; the first row of pixels belongs to none."""
    rng = np.random.default_rng(0)
    images, masks = [], []
    for _ in range(num):
        blocks = rng.integers(0, classes, (4, 4))
        mask = blocks.repeat(8, 0).repeat(8, 1).astype(np.uint8)
        pixels = np.stack([mask * 100, 100 - mask * 50, rng.integers(0, 30, mask.shape)], axis=-1).astype(np.uint8)
        images.append(Image.fromarray(pixels))
        if shuffled:
            mask = rng.integers(0, classes, (4, 4)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        mask[0] = 255
        masks.append(Image.fromarray(mask))
    kinds = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    datasets.Dataset.from_dict({"image": images, "mask": masks}, kinds).to_parquet(str(file))
    return file


def test_iou_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(-1, 4, (30, 20), generator=generator)
    predictions = torch.randint(0, 4, (30, 20), generator=generator)
    counts = pixel_counts(predictions, mask, 6)
    known = mask >= 0
    theirs = jaccard_score(mask[known], predictions[known], average=None)
    assert list(intersection_over_union(counts)) == [0, 1, 2, 3]  # 4 and 5 are neither there nor predicted
    assert list(intersection_over_union(counts).values()) == pytest.approx(theirs.tolist())
    assert mean_iou(counts) == pytest.approx(theirs.mean())
    right = accuracy_score(mask[known], predictions[known])
    assert float(counts[0].sum() / counts[1].sum()) == pytest.approx(right)


def test_iou_by_hand() -> None:
    mask = torch.tensor([[0, 0, 1, 1, -1]])
    predictions = torch.tensor([[0, 1, 1, 1, 0]])  # the last pixel belongs to no class and never counts
    counts = pixel_counts(predictions, mask, 3)
    assert counts.tolist() == [[1, 2, 0], [2, 2, 0], [1, 3, 0]]
    assert intersection_over_union(counts) == {0: 0.5, 1: 2 / 3}


@pytest.mark.parametrize(("size", "padding"), [((32, 32), (0, 0)), ((36, 44), (4, 4)), ((30, 7), (2, 1))])
def test_the_enlargement_is_torchs_bilinear_one(size: tuple[int, int], padding: tuple[int, int]) -> None:
    transform = EvalTransform(size, GREY, padding=padding)
    logits = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    whole = (size[0] + padding[0], size[1] + padding[1])
    expected = F.interpolate(logits, whole, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    found = _enlarge(logits, transform)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((values * weights).sum(), logits)[0] for values in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_the_loss_is_that_of_known_pixels_and_sums_in_a_fixed_order_on_cuda() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator, requires_grad=True)
    masks = torch.randint(-1, 3, (2, 16, 16), generator=generator)
    enlarged = _enlarge(logits, EvalTransform((16, 16), GREY))
    loss = _loss(enlarged, masks)
    torch.testing.assert_close(loss, F.cross_entropy(enlarged, masks, ignore_index=-1))
    assert _loss(enlarged, torch.full_like(masks, -1)) == 0
    pending, names = [loss.grad_fn], []
    while pending:
        node = pending.pop()
        if node is not None:
            names.append(node.name())
            pending += [parent for parent, _ in node.next_functions]
    assert not [name for name in names if "NllLoss2D" in name or "Upsample" in name]


def test_the_interval_holds_the_value_and_narrows_with_more_images() -> None:
    generator = torch.Generator().manual_seed(0)
    recognised, missed, wrong = torch.randint(0, 20, (3, 200, 3), generator=generator)
    recognised += 20
    counts = torch.stack([recognised, recognised + missed, recognised + wrong], dim=1)
    widths = []
    for num in (20, 200):
        low, high = bootstrap_interval(counts[:num], seed=0, draws=200)
        assert low < mean_iou(counts[:num].sum(dim=0)) < high
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]
    assert bootstrap_interval(counts, seed=0, draws=50) == bootstrap_interval(counts, seed=0, draws=50)


def test_colours_that_give_the_class_are_found_and_shuffled_masks_are_not(backbone: Path, tmp_path: Path) -> None:
    flags = [*QUICK, "--baselines=[]"]
    source, test = write(tmp_path / "train.parquet", 40), write(tmp_path / "test.parquet", 16)
    assert run(backbone, f"--source={source}", f"--test_source={test}", *flags) == 0
    found = json.loads((backbone / "segmentation.json").read_text())
    assert found["backbone"]["miou"] > 0.75  # edges are blurred by the enlargement
    assert found["backbone"]["pixel_accuracy"] > 0.85
    assert set(found["backbone"]["held_out"]) == {"0.01", "0.1"}
    assert (found["num_classes"], found["num_train"]) == (2, 40)
    assert found["weights"] == str(backbone / "backbone.safetensors")
    shuffled = write(tmp_path / "shuffled.parquet", 40, shuffled=True)
    output = tmp_path / "shuffled.json"
    flags += [f"--output={output}", "--base_lrs=[0.1]"]
    assert run(backbone, f"--source={shuffled}", f"--test_source={test}", *flags) == 0
    assert json.loads(output.read_text())["backbone"]["miou"] < 0.5
    assert json.loads((backbone / "segmentation.json").read_text()) == found


def test_without_a_test_source_a_fifth_is_held_out_and_the_result_repeats_itself(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "train.parquet", 20, classes=3)
    command = [backbone, f"--source={source}", *QUICK, "--steps=10", "--num_layers=2"]
    assert run(*command) == 0
    text = capsys.readouterr().out
    assert "tested on a held-out 20% of" in text
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[3:5]] == ["untrained", "backbone"]
    assert [line.split()[0] for line in lines[8:11]] == ["0", "1", "2"]
    assert run(*command) == 0
    assert capsys.readouterr().out == text


def masked(file: Path, masks: list[np.ndarray]) -> Path:
    """Black images with the given masks."""
    kinds = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    rows = {"image": [Image.new("RGB", (32, 32))] * len(masks), "mask": [Image.fromarray(mask) for mask in masks]}
    datasets.Dataset.from_dict(rows, kinds).to_parquet(str(file))
    return file


@pytest.mark.parametrize("alone", range(6))
def test_a_class_of_a_single_image_is_learned_wherever_the_image_lies(
    backbone: Path, tmp_path: Path, alone: int
) -> None:
    masks = [np.eye(32, dtype=np.uint8) for _ in range(6)]
    masks[alone][0] = 2
    flags = [*QUICK, "--steps=1", "--baselines=[]"]
    assert run(backbone, f"--source={masked(tmp_path / 'rare.parquet', masks)}", *flags) == 0
    found = json.loads((backbone / "segmentation.json").read_text())
    assert found["num_classes"] == 3
    assert found["num_train"] + found["num_test"] == 6


def test_images_without_a_known_pixel_are_not_tested(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, unknown = np.eye(32, dtype=np.uint8), np.full((32, 32), 255, np.uint8)
    border = unknown.copy()
    border[:2] = 1  # outside of the centre crop
    flags = [f"--source={masked(tmp_path / 'train.parquet', [known] * 6)}", *QUICK, "--steps=1", "--baselines=[]"]
    tests = {
        name: f"--test_source={masked(tmp_path / f'{name}.parquet', masks)}"
        for name, masks in {"some": [unknown, known, unknown], "none": [unknown], "border": [border] * 2}.items()
    }
    assert run(backbone, *flags, tests["some"]) == 0
    text = (backbone / "segmentation.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["num_test"] == 1
    capsys.readouterr()
    assert run(backbone, *flags, tests["none"]) == 2
    assert "hold no class; name other images with --test_source" in capsys.readouterr().err
    assert run(backbone, *flags, tests["border"], "--crop_pct=0.5") == 2
    assert "holds a pixel of a class in its centre; give --crop_pct 1" in capsys.readouterr().err


def test_heads_that_no_pixel_was_held_out_for_are_not_compared(backbone: Path, tmp_path: Path) -> None:
    known, unknown = np.eye(32, dtype=np.uint8), np.full((32, 32), 255, np.uint8)
    source = masked(tmp_path / "one.parquet", [unknown, known, unknown, unknown])
    test = masked(tmp_path / "test.parquet", [known])
    assert run(backbone, f"--source={source}", f"--test_source={test}", *QUICK, "--steps=1", "--baselines=[]") == 0
    assert "NaN" not in (backbone / "segmentation.json").read_text()


def test_folders_of_images_and_masks_of_any_size(backbone: Path, tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(10):
        mask = np.zeros((50, 70), dtype=np.uint8)
        mask[:, 30 + number :] = 1
        Image.fromarray(np.stack([mask * 200] * 3, axis=-1)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    flags = [*QUICK, "--steps=10", "--image_size=[36,44]", "--indivisible=pad", "--baselines=[]"]
    assert run(backbone, f"--source={tmp_path / 'images'}", f"--mask_source={tmp_path / 'masks'}", *flags) == 0
    assert json.loads((backbone / "segmentation.json").read_text())["backbone"]["miou"] > 0.3


def test_masks_of_0_and_255_are_classes_when_told(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    masks = [Image.fromarray(rng.choice(np.array([0, 255], np.uint8), (32, 32))) for _ in range(10)]
    kinds = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    source = tmp_path / "binary.parquet"
    rows = {"image": [mask.convert("RGB") for mask in masks], "mask": masks}
    datasets.Dataset.from_dict(rows, kinds).to_parquet(str(source))
    flags = [*QUICK, "--steps=2", "--baselines=[]"]
    capsys.readouterr()
    assert run(backbone, f"--source={source}", *flags) == 2
    message = capsys.readouterr().err
    assert "hold only class 0; segmentation needs at least two; 255 is taken for pixels of no class" in message
    assert message.rstrip().endswith("give --ignore_index -1")
    assert run(backbone, f"--source={source}", *flags, "--ignore_index", "-1") == 0
    iou = json.loads((backbone / "segmentation.json").read_text())["backbone"]["iou"]
    assert {"0", "255"} <= set(iou)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps=0"], "steps=0: must be at least 1"),
        (["--base_lrs=[]"], "base_lrs=(): give at least one value, and none twice"),
        (["--baselines=[pixels]"], "no 'pixels'; there is untrained"),
        (
            ["--num_layers=3"],
            "num_layers=3: the last 2 blocks of vit_small_patch16_224 share width and grid",
        ),
        (["--mask_column=masks"], "mask_column='masks': no such column; did you mean 'mask'"),
        (["--test_source=OTHER"], "hold classes that the training masks lack: 2; add images of them to"),
        (["--ignore_index=1"], "the masks hold"),
    ],
)
def test_what_cannot_work_is_one_line(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    source = write(tmp_path / "train.parquet", 10)
    if "--ignore_index=1" in flags:
        source = tmp_path / "one.parquet"
        kinds = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
        blank = {"image": [Image.new("RGB", (32, 32))] * 9, "mask": [Image.new("L", (32, 32), 4)] * 9}
        datasets.Dataset.from_dict(blank, kinds).to_parquet(str(source))
    if "--test_source=OTHER" in flags:
        flags = [f"--test_source={write(tmp_path / 'other.parquet', 10, classes=3)}"]
    capsys.readouterr()
    assert run(backbone, f"--source={source}", *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "examples" not in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_pairs_that_cannot_be_decoded_are_left_out(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = datasets.Dataset.from_parquet(str(write(tmp_path / "whole.parquet", 20)))
    rows = table.cast(datasets.Features(dict.fromkeys(("image", "mask"), datasets.Image(decode=False))))[:]
    rows["image"][3] = {"bytes": b"broken", "path": None}
    rows["mask"][8] = {"bytes": rows["mask"][8]["bytes"][:50], "path": None}
    kinds = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    bad, good = tmp_path / "bad.parquet", tmp_path / "good.parquet"
    datasets.Dataset.from_dict(rows, kinds).to_parquet(str(bad))
    kept = {name: [item for row, item in enumerate(items) if row not in (3, 8)] for name, items in rows.items()}
    datasets.Dataset.from_dict(kept, kinds).to_parquet(str(good))
    flags = [*QUICK, "--steps=5", "--base_lrs=[0.1]", "--baselines=[]"]
    assert run(backbone, f"--source={bad}", *flags) == 2
    assert (
        "--max_bad_share=0.05: 2 or more of the 20 images cannot be used; the first: --source="
        in capsys.readouterr().err
    )
    scores = []
    for file, more in ((bad, ["--max_bad_share=0.1"]), (good, [])):
        assert run(backbone, f"--source={file}", *flags, *more, f"--output={file}.json") == 0
        scores.append(json.loads(Path(f"{file}.json").read_text()))
    assert (scores[0]["num_bad"], scores[1]["num_bad"]) == (2, 0)
    assert (scores[0]["num_train"], scores[0]["num_test"]) == (15, 3)
    assert scores[0]["backbone"] == scores[1]["backbone"]
    listed = list(map(json.loads, (tmp_path / "bad.parquet.bad_images.jsonl").read_text().splitlines()))
    assert [item["row"] for item in listed] == [3, 8]
    assert run(backbone, f"--source={bad}", *flags, "--on_bad_image=raise") == 2


@pytest.mark.parametrize("on_bad_image", ["skip", "raise"])
def test_a_worker_that_is_killed_names_the_image_it_was_at(
    on_bad_image: str,
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own, process = MaskedSource.pair, os.getpid()

    def crash(source: MaskedSource, index: int, num_channels: int) -> tuple[Tensor, Tensor]:
        if "row 3 " in f"{source.images.where(index)} " and os.getpid() != process:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(source, index, num_channels)

    monkeypatch.setattr(MaskedSource, "pair", crash)
    source = write(tmp_path / "train.parquet", 20)
    assert run(backbone, f"--source={source}", "--num_workers=1", f"--on_bad_image={on_bad_image}") == 2
    assert "row 3: the loader worker at this image was killed (Killed)" in capsys.readouterr().err
