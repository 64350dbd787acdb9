import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from scripts.pretrain_mae import DEFAULTS
from ssl_vit.data.loader import Batches
from ssl_vit.data.sampler import Mixture, StepSampler, check_weights, epoch_order
from ssl_vit.data.sources import openmoji
from ssl_vit.data.sources.source import DataConfig, Source, open_source
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.training.config import parse_run
from tests.interrupted import killed_after, run
from tests.specs import spec
from tests.test_resume import losses, same, weights

TWELVE = ("--steps=12", "--data.label_column=none")
MIXTURE = Mixture(("a", "b", "c"), (0.7, 0.2, 0.1), np.repeat([0, 1, 2], [5, 30, 8]))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of classes cat and dog (6 images) and a parquet file of classes dog and emu (10 images)."""
    folder = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(("cat", "cat", "cat", "dog", "dog", "dog")):
        (folder / "photos" / name).mkdir(parents=True, exist_ok=True)
        image_of(number).save(folder / "photos" / name / f"{number}.png")
    kinds = datasets.Features({"pixels": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "emu"])})
    rows = {"pixels": [image_of(100 + number) for number in range(10)], "label": [0, 1, 1, -1, 0, 1, 0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows, kinds).to_parquet(str(folder / "more.parquet"))
    return folder / "photos", folder / "more.parquet"


def image_of(value: int) -> Image.Image:
    pixels = np.random.default_rng(value).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    pixels[0, 0, 0] = value
    return Image.fromarray(pixels)


def mixed(sources: tuple[Path, Path], *, shares: tuple[float, float] = (3, 1), **settings: object) -> Source:
    return open_source(DataConfig(source=dict(zip(map(str, sources), shares, strict=True)), **settings))


def flag(sources: tuple[Path, Path]) -> str:
    return f"--data.source={{{sources[0]}: 0.75, {sources[1]}: 0.25}}"


def test_shares_are_exact_in_each_epoch() -> None:
    assert MIXTURE.draws().tolist() == [30, 9, 4]  # of 43: 30.1, 8.6 and 4.3
    for epoch in range(5):
        assert np.bincount(MIXTURE.origin[MIXTURE.order(0, epoch)]).tolist() == [30, 9, 4]


def test_images_of_a_source_are_seen_equally_often() -> None:
    drawn = np.concatenate([MIXTURE.order(3, epoch) for epoch in range(7)])
    counts = np.bincount(drawn, minlength=43)
    assert counts.sum() == 7 * 43
    for source in range(3):
        own = counts[MIXTURE.origin == source]
        assert own.max() - own.min() <= 1
        assert own.min() >= 1


def test_draws_are_shuffled_by_seed_and_epoch_and_sources_are_mixed() -> None:
    orders = {tuple(MIXTURE.order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert (np.diff(MIXTURE.origin[MIXTURE.order(0, 0)]) != 0).sum() > 10


def test_a_subset_keeps_the_shares_of_what_is_there() -> None:
    part = MIXTURE.subset(np.arange(20))  # none of c
    assert part.draws().tolist() == [16, 4, 0]
    assert sorted(set(part.order(0, 0))) == sorted(set(part.order(0, 0)) & set(range(20)))


def test_steps_of_two_processes_hold_what_one_draws_and_starting_later_costs_nothing() -> None:
    settings = {"num_samples": 43, "batch_size": 8, "num_steps": 20, "seed": 0, "order": MIXTURE.order}
    whole = list(StepSampler(**settings))
    assert list(StepSampler(**settings, start_step=13)) == whole[13:]
    parts = [list(StepSampler(**settings, process_index=index, num_processes=2)) for index in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole
    assert [key.index for batch in whole for key in batch][:43] == MIXTURE.order(0, 0).tolist()


def test_the_order_of_a_single_source_is_as_it_was() -> None:
    keys = [key for batch in StepSampler(num_samples=10, batch_size=5, num_steps=4, seed=7) for key in batch]
    assert [key.index for key in keys[:10]] == [8, 0, 7, 1, 3, 6, 2, 4, 5, 9]
    assert [key.index for key in keys[10:]] == epoch_order(10, 7, 1).tolist()


def test_classes_of_one_name_are_one_and_rows_keep_their_source(sources: tuple[Path, Path]) -> None:
    source = mixed(sources)
    assert source.class_names == ("cat", "dog", "emu")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, -1, 1, 2, 1, 2, 1, 2]
    reds = [int(source.image(row, 3)[0, 0, 0]) for row in range(len(source))]
    assert reds == [*range(6), *range(100, 110)]
    assert source.name == f"{{{sources[0]}: 3, {sources[1]}: 1}}"
    assert source.mixture is not None
    assert source.mixture.draws().tolist() == [12, 4]


def test_sources_without_labels_have_none_among_those_that_have(sources: tuple[Path, Path], tmp_path: Path) -> None:
    image_of(0).save(tmp_path / "0.png")
    source = mixed((tmp_path, sources[1]), shares=(1, 1))
    assert source.labels is not None
    assert source.labels[0] == -1
    assert source.class_names == ("dog", "emu")
    assert mixed(sources, label_column="none").labels is None


def test_settings_of_columns_are_said_of_the_source_that_has_them(sources: tuple[Path, Path]) -> None:
    assert len(mixed(sources, image_column="pixels")) == 16
    with pytest.raises(ValueError, match=r"^data.image_column='pixel': no such column; did you mean 'pixels'"):
        mixed(sources, image_column="pixel")


def test_the_demo_can_be_mixed_in(sources: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    demo = datasets.Dataset.from_dict({"image": ["0.png", "1.png", "2.png"], "label": [0, 0, 1]})
    monkeypatch.setattr(openmoji, "load", lambda: demo.cast_column("image", datasets.Image(decode=False)), raising=True)
    source = open_source(DataConfig(source={"openmoji": 1, str(sources[0]): 1}))
    assert source.labels is not None
    assert [source.class_names[label] for label in source.labels[:3]] == [openmoji.GROUP_NAMES[n] for n in (0, 0, 1)]
    assert source.attribution == openmoji.ATTRIBUTION


def test_errors_name_the_source_in_the_mixture(sources: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data.source='/nowhere': no such file or folder"):
        mixed((sources[0], Path("/nowhere")))
    photos = tmp_path / "photos"
    shutil.copytree(sources[0], photos)
    (photos / "dog/4.png").write_bytes(b"no image")
    source = mixed((sources[1], photos))
    with pytest.raises(ValueError, match=rf"^data.source='{photos}': row 4 \(.*dog/4.png\): "):
        source.image(14, 3)
    assert source.next_image(14, 3)[1] == 15  # of the same source
    (photos / "dog/5.png").write_bytes(b"no image")
    assert source.next_image(14, 3)[1] == 10  # wraps around within that source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: -1, b: 1}", r"^data.source={a: -1, b: 1}: the weight of 'a' is -1.0; give a number above 0"),
        ("{a: 0, b: 0}", r"^data.source={a: 0, b: 0}: the weight of 'a' is 0.0; give"),
        ("{a: .nan, b: 1}", r"^data.source={a: nan, b: 1}: the weight of 'a' is nan; give"),
        ("{a: .inf, b: 1}", r"the weight of 'a' is inf; give"),
        ("{a: much, b: 1}", r"^data.source='{a: much, b: 1}': a mixture is {SOURCE: WEIGHT, ...} with numbers"),
        ("{a: 1}", r"^data.source={a: 1}: a mixture has at least two sources"),
        ("{}", r"a mixture has at least two sources"),
    ],
)
def test_wrong_weights_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_run(DEFAULTS, [f"--data.source={text}"])
    assert "\n" not in str(caught.value)


def test_a_source_that_would_never_be_drawn_is_refused(sources: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"more.parquet' would never be drawn; give it more weight"):
        mixed(sources, shares=(1000, 1))


def test_the_same_flag_in_yaml_and_as_the_run_writes_it(sources: tuple[Path, Path], tmp_path: Path) -> None:
    given = parse_run(DEFAULTS, [flag(sources)])
    assert given.data.source == {str(sources[0]): 0.75, str(sources[1]): 0.25}
    assert given.output_dir.endswith("_photos+more.parquet")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"data": {"source": {"x": 1, "y": 2}}}))
    assert parse_run(DEFAULTS, [f"--config={tmp_path / 'a.yaml'}"]).data.source == {"x": 1, "y": 2}
    assert parse_run(DEFAULTS, [f"--config={tmp_path / 'a.yaml'}", flag(sources)]).data.source == given.data.source
    assert parse_run(DEFAULTS, ["--data.source={'2023': 1, '2024': 1}"]).data.source == {"2023": 1, "2024": 1}
    with pytest.raises(ValueError, match=r"^source={2023: 1, 2024: 1}: 2023 is no name; put quotes around"):
        check_weights({2023: 1, 2024: 1})


def test_batches_do_not_depend_on_workers(sources: tuple[Path, Path]) -> None:
    source = mixed(sources)
    assert source.mixture is not None
    transform = MAEConfig().build_transform(spec(32))
    found = []
    for num_workers in (0, 2):
        sampler = StepSampler(num_samples=16, batch_size=4, num_steps=6, seed=0, order=source.mixture.order)
        device = torch.device("cpu")
        with Batches(source, transform, sampler, num_channels=3, num_workers=num_workers, device=device) as batches:
            found.append(torch.stack([batch["images"] for batch in batches]))
    assert torch.equal(*found)


@pytest.mark.usefixtures("_fresh_state")
def test_a_killed_run_over_a_mixture_ends_with_the_same_weights_and_goes_on_with_its_own_config(
    sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "run"
    assert run(f"--output_dir={whole}", *TWELVE, flag(sources)) == 0
    text = capsys.readouterr().out
    assert f"data       {{{sources[0]}: 0.75, {sources[1]}: 0.25}}: 16 images, no labels" in text
    with killed_after(7):
        run(f"--output_dir={broken}", *TWELVE, flag(sources), "--checkpoint.every_steps=3")
    assert run(f"--output_dir={broken}", *TWELVE, f"--config={broken / 'config.yaml'}") == 0
    assert same(weights(whole), weights(broken)) == []
    assert losses(whole) == losses(broken)
    described = json.loads((broken / "config.json").read_text())["ssl_vit"]
    assert described["source"] == {sources[0].name: 0.75, sources[1].name: 0.25}
