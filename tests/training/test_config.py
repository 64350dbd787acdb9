from pathlib import Path

import pytest
import yaml

from ssl_vit.core.settings import as_plain, differences
from ssl_vit.models.config import EncoderConfig
from ssl_vit.objectives.dinov2 import DINOv2Config
from ssl_vit.objectives.mae import MAEConfig
from ssl_vit.training.config import BatchConfig, RunConfig, parse_run, write_config
from ssl_vit.training.optim import OptimConfig

DEFAULTS = RunConfig(objective=MAEConfig(), encoder=EncoderConfig(pos_embed="sincos"), epochs=800)


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_files_and_files_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\nobjective: {mask_ratio: 0.6, decoder_depth: 4}\nencoder: {image_size: [32, 64]}\n")
    config = parse_run(DEFAULTS, ["--objective.mask_ratio", "0.5", f"--config={path}", "--data.source=x"])
    assert config.objective == MAEConfig(mask_ratio=0.5, decoder_depth=4)
    assert config.encoder == EncoderConfig(pos_embed="sincos", image_size=(32, 64))
    assert (config.seed, config.epochs, config.data.source) == (3, 800, "x")


def test_later_files_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\nlog_every: 7\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    config = parse_run(DEFAULTS, ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")])
    assert (config.seed, config.log_every) == (2, 7)


def test_the_resolved_config_is_a_config(tmp_path: Path) -> None:
    config = parse_run(DEFAULTS, ["--fresh", "--encoder.image_size=[32,64]", "--data.mean=[0.1]", "--data.std=[0.2]"])
    assert config.fresh
    write_config(config, tmp_path / "config.yaml")
    again = parse_run(RunConfig(objective=MAEConfig()), ["--config", str(tmp_path / "config.yaml")])
    assert differences(as_plain(config), as_plain(again)) == {"fresh": (True, False)}
    assert again.encoder == config.encoder


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--objective.mask_ration", "0.5"],
            "--objective.mask_ration: no such flag; did you mean --objective.mask_ratio?",
        ),
        (["--mask_ratio", "0.5"], "--mask_ratio: no such flag; did you mean --objective.mask_ratio?"),
        (["--lr=1"], "--lr: no such flag"),
        (["--objective.mask_ratio", "1.2"], "objective.mask_ratio=1.2: must lie in (0, 1); the"),
        (["--objective.mask_ratio", "most"], "objective.mask_ratio=most: expected float"),
        (["--steps", "3.5"], "steps=3.5: expected int or null"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--encoder.pos_embed", "rope"], "encoder.pos_embed=rope: expected"),
        (["--batch.size", "0"], "batch.size=0: must be at least 1"),
        (["--optim.warmup", "40"], "optim.warmup=40.0: must lie in [0, 1); it is a share of the run"),
        (
            ["--optim.freeze_backbone_until", "0.1"],
            "optim.freeze_backbone_until=0.1: fixes the weights",
        ),
        (["--data.std", "[0.0, 1, 1]"], "data.std="),
        (["--evaluation.k", "0"], "evaluation.k=0"),
        (["--config", "missing.yaml"], "--config=missing.yaml: cannot be read: No such file"),
        (["--config"], "--config: needs the path"),
        (["stray"], "stray"),
    ],
)
def test_wrong_flags_are_named_in_one_line(args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_run(DEFAULTS, args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rate_by_layer_is_set_once() -> None:
    with pytest.raises(ValueError, match=r"^optim.layer_decay=0.9: this objective has objective.layer_decay$"):
        RunConfig(objective=DINOv2Config(), optim=OptimConfig(layer_decay=0.9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "objective: {mask_ration: 0.5}",
            "objective.mask_ration: no such setting; did you mean objective.mask_ratio?",
        ),
        ("mask_ratio: 0.5", "mask_ratio: no such setting; did you mean objective.mask_ratio?"),
        ("objective: 0.5", "objective=0.5: must hold the settings of that section"),
        ("objective: {mask_ratio: [0.5", "is no valid YAML"),
        ("- 1", "must hold `key: value` lines, holds list"),
        ("steps: many", "steps=many: expected int or null"),
        ("objective: {mask_ratio: 1.5}", "objective.mask_ratio=1.5"),
    ],
)
def test_wrong_files_are_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_run(DEFAULTS, ["--config", write(tmp_path, text)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "folder"),
    [
        ("openmoji", "runs/mae_vit_base_patch16_224_openmoji"),
        ("/data/my photos/", "runs/mae_vit_base_patch16_224_my-photos"),
        ("shards/*.parquet", "runs/mae_vit_base_patch16_224_parquet"),
        ("ILSVRC/imagenet-1k", "runs/mae_vit_base_patch16_224_imagenet-1k"),
    ],
)
def test_a_run_without_a_folder_is_named_after_what_it_does(source: str, folder: str) -> None:
    assert parse_run(DEFAULTS, [f"--data.source={source}"]).output_dir == folder
    assert parse_run(DEFAULTS, [f"--data.source={source}", "--output_dir=here"]).output_dir == "here"


def test_print_config_prints_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_run(DEFAULTS, ["--seed=5", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 5


class TestLength:
    def test_epochs_are_passes_over_the_data(self) -> None:
        config = RunConfig(objective=MAEConfig(), epochs=3, batch=BatchConfig(size=4))
        assert config.num_steps(10) == 7

    def test_steps_win(self) -> None:
        assert RunConfig(objective=MAEConfig(), epochs=3, steps=5).num_steps(10) == 5

    def test_one_of_them_is_needed(self) -> None:
        with pytest.raises(ValueError, match="--epochs N or --steps N"):
            RunConfig(objective=MAEConfig()).num_steps(10)


class TestBatch:
    @pytest.mark.parametrize(
        ("size", "per_device", "processes", "micro"),
        [(64, None, 1, 1), (64, 16, 1, 4), (64, 16, 2, 2), (60, 16, 1, 4), (7, 2, 1, 7)],
    )
    def test_is_cut_into_the_fewest_even_micro_batches_that_fit(
        self, size: int, per_device: int | None, processes: int, micro: int
    ) -> None:
        assert BatchConfig(size=size, per_device=per_device).num_micro(processes) == micro

    def test_uneven_shares_are_refused_with_the_nearest_sizes(self) -> None:
        with pytest.raises(ValueError, match=r"size=10: not divisible among 4 processes.*8 and 12"):
            BatchConfig(size=10).num_micro(4)


@pytest.mark.parametrize("text", ["fresh: true", "fresh: 1", "extend: true", "{fresh: yes, output_dir: /tmp/x}"])
def test_what_changes_a_run_is_asked_for_by_flags_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"run.yaml: \w+=.*: changes an existing run; give it as a flag"):
        parse_run(DEFAULTS, [f"--config={tmp_path / 'run.yaml'}"])


@pytest.mark.parametrize(
    "settings",
    [
        {"depth": 10**7},
        {"depth": 1001},
        {"embed_dim": 2**20},
        {"embed_dim": 65_536, "depth": 12},
        {"image_size": 10**6},
        {"image_size": 65_536, "patch_size": 1},
        {"in_chans": 10**9},
        {"patch_size": 10**6},
        {"num_heads": 10**9},
        {"mlp_ratio": 1e9},
        {"mlp_ratio": 900.0, "embed_dim": 8192, "depth": 4},
    ],
)
def test_an_encoder_that_no_machine_holds_is_refused_before_it_is_built(settings: dict) -> None:
    with pytest.raises(ValueError, match=r"must lie in|billion are the most"):
        EncoderConfig(**settings)


@pytest.mark.parametrize("settings", [{"image_size": 8192}, {"depth": 48, "embed_dim": 6144, "num_heads": 48}])
def test_the_largest_that_were_published_are_taken(settings: dict) -> None:
    assert EncoderConfig(**settings).arch
