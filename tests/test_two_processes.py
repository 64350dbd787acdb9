"""Two processes on CPUs: what is not finite in one of them, and FSDP2 beside DDP."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ssl_vit.data.sampler import StepSampler
from ssl_vit.export import load_backbone
from ssl_vit.export.run import export_run
from ssl_vit.runs.checkpoint import checkpoint_folder
from tests.conftest import ROOT, SMALL_DINO, SMALL_RUN, last_weights, losses
from tests.training.test_faults import same, state_at

OBJECTIVES = ("mae", "dino", "dinov2")
STEPS = 4
ONE_STEP = "--max_hours=1e-9"


@pytest.fixture(scope="module")
def runs(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int | str]]:
    """Folders and exit codes of all runs, by name; one launch for all of them, since it takes longer than they do."""
    desk = tmp_path_factory.mktemp("two_processes")
    jobs: list[dict] = []

    def add(name: str, objective: str, *flags: str, **more: object) -> None:
        settings = [f"--data.source={photo_folder}", "--data.label_column=none", f"--steps={STEPS}"]
        settings += ["--encoder.drop_path_rate=0", "--checkpoint.every_steps=1", "--checkpoint.keep=9"]
        jobs.append(
            {"name": name, "objective": objective, "flags": [*settings, f"--output_dir={desk / name}", *flags], **more}
        )

    for objective in OBJECTIVES:
        # Sinkhorn-Knopp and KoLeo are over a micro-batch, so DINOv2 has only one.
        flags = ["--optim.clip_grad=0.5"] + ([] if objective == "dinov2" else ["--batch.per_device=2"])
        flags += {"dino": ["--optim.clip_over=parameter"], "dinov2": ["--optim.clip_over=module"]}.get(objective, [])
        add(f"{objective}_ddp", objective, *flags)
        add(f"{objective}_fsdp", objective, *flags, fsdp2=True)
        add(f"{objective}_nan", objective, *flags, plant=["nan", 1, [2]])
    for kind in ("ddp", "fsdp"):
        muon = ["--optim.optimizer=muon", "--optim.clip_grad=0.5", "--batch.per_device=2"]
        add(f"muon_{kind}", "dino", *muon, fsdp2=kind == "fsdp")
        add(f"muon_{kind}_nan", "dino", *muon, fsdp2=kind == "fsdp", plant=["nan", 1, [2]])
    flags = ["--optim.clip_grad=0.5", "--batch.per_device=2", "--optim.clip_over=parameter"]
    for fsdp2, limit in ((False, [ONE_STEP]), (True, [ONE_STEP]), (False, [])):
        add("switched", "dino", *flags, *limit, fsdp2=fsdp2)
    add("fsdp_nan", "dino", *flags, fsdp2=True, plant=["nan", 1, [2]])
    add("fsdp_checkpointing", "dino", *flags, "--encoder.grad_checkpointing=true", fsdp2=True)
    add("inf", "mae", plant=["inf", 1, [2]])
    add("all_skipped", "mae", ONE_STEP, plant=["inf", 1, [0]])
    add("no_memory", "mae", plant=["memory", 1, [2]])
    add("stopped", "mae", "--max_skipped_steps=2", plant=["inf", 1, [2, 3]])
    add("jump", "dino", "--rewind_on_spike=2", plant=["jump", 1, [2]])
    for fsdp2 in (False, True):
        add(f"bf16_{fsdp2}", "dino", "--precision=bf16", fsdp2=fsdp2)
    add("auto", "mae", "--batch.auto=true", fits=[4, 2])
    file = desk / "jobs.json"
    file.write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*launcher, "-m", "tests.launched", str(file)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=600, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(file.with_suffix(".results").read_text())
    return {job["name"]: (desk / job["name"], code) for job, code in zip(jobs, codes, strict=True)}


@pytest.mark.parametrize(
    "name", ["mae_nan", "dino_nan", "dinov2_nan", "fsdp_nan", "muon_ddp_nan", "muon_fsdp_nan", "inf"]
)
def test_what_is_not_finite_in_one_process_skips_the_step_in_both(
    runs: dict[str, tuple[Path, int | str]], name: str
) -> None:
    """Nothing moves in either: a rank of its own mind would be another model at the next step."""
    run, code = runs[name]
    assert code == 0
    assert same(state_at(run, 2), state_at(run, 3))
    assert not same(state_at(run, 3), state_at(run, 4))
    assert all(value.isfinite().all() for value in state_at(run, 4).values())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped_steps"] for record in records] == [0, 0, 1, 1]


def test_a_run_is_saved_where_no_step_was_taken_yet(runs: dict[str, tuple[Path, int | str]]) -> None:
    run, code = runs["all_skipped"]
    assert code == 75  # of max_hours
    saved = load_file(checkpoint_folder(run, 1) / "optimizer.safetensors")
    steps = {name: value.item() for name, value in saved.items() if name.endswith("/step")}
    assert set(steps.values()) == {0}


def test_a_run_that_stops_lists_the_samples_of_both(runs: dict[str, tuple[Path, int | str]]) -> None:
    run, message = runs["stopped"]
    assert "steps 2 to 3 were skipped" in str(message)
    entries = json.loads((run / "skipped_steps.json").read_text())
    assert [(entry["step"], entry["process"]) for entry in entries] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert [entry["loss"] == "inf" for entry in entries] == [False, True, False, True]
    keys = StepSampler(num_samples=40, batch_size=8, num_steps=STEPS, seed=0).of_step(3)[0]
    assert [sample["row"] for entry in entries[2:] for sample in entry["samples"]] == [key.index for key in keys]


@pytest.mark.parametrize("name", [*OBJECTIVES, "muon"])
def test_fsdp2_learns_what_ddp_learns(runs: dict[str, tuple[Path, int | str]], name: str) -> None:
    """With accumulation, clipping, a teacher, weight norm and a layer that has no moments yet."""
    (ddp, _), (fsdp, code) = runs[f"{name}_ddp"], runs[f"{name}_fsdp"]
    assert code == 0
    assert losses(fsdp) == pytest.approx(losses(ddp), rel=1e-4)
    expected, found = state_at(ddp, STEPS), state_at(fsdp, STEPS)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.dtype == found[name].dtype
        if not name.startswith("optimizer "):
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4)


def test_fsdp2_learns_what_ddp_learns_in_bf16(runs: dict[str, tuple[Path, int | str]]) -> None:
    """Autocast alone decides what is computed in bf16: no parameter, input or loss is cast."""
    (ddp, _), (fsdp, code) = runs["bf16_False"], runs["bf16_True"]
    assert code == 0
    assert losses(fsdp)[:3] == pytest.approx(losses(ddp)[:3], rel=1e-4)
    assert losses(fsdp) == pytest.approx(losses(ddp), rel=1e-2)  # a last bit, such as that of a norm, grows in bf16
    assert losses(ddp) != pytest.approx(losses(runs["dino_ddp"][0]), rel=1e-6)  # it is bf16


def test_memory_that_does_not_suffice_backward_is_explained(runs: dict[str, tuple[Path, int | str]]) -> None:
    """The objective is tried alone, although DDP had its hooks on it."""
    assert str(runs["no_memory"][1]).endswith("As tried, 2 fit: --batch.per_device 2; the batch of a step stays 8")


def test_a_jump_in_one_process_takes_both_back(runs: dict[str, tuple[Path, int | str]]) -> None:
    run, code = runs["jump"]
    assert code == 0
    assert same(state_at(run, 2), state_at(run, 3))
    assert not same(state_at(run, 3), state_at(run, 4))
    assert '{"step": 3, "rewound_to": 2}' in (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_sharded_run_ends_with_a_whole_backbone(runs: dict[str, tuple[Path, int | str]], objective: str) -> None:
    run, _ = runs[f"{objective}_fsdp"]
    prefix = "encoder." if objective == "mae" else "teacher_encoder."
    weights, backbone = last_weights(run), load_backbone(run)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, weights[f"{prefix}{name}"]), name
    finished = (run / "backbone.safetensors").read_bytes()
    assert export_run(run).read_bytes() == finished
    provenance = json.loads((run / "config.json").read_text())["ssl_vit"]
    assert provenance["objective"].lower() == objective


def test_a_run_goes_from_ddp_to_fsdp2_and_back(runs: dict[str, tuple[Path, int | str]]) -> None:
    run, code = runs["switched"]
    assert code == 0
    assert losses(run) == pytest.approx(losses(runs["dino_ddp"][0]), rel=1e-4)
    for name, value in last_weights(runs["dino_ddp"][0]).items():
        torch.testing.assert_close(last_weights(run)[name], value, rtol=1e-3, atol=2e-4)
    assert load_file(checkpoint_folder(run, 2) / "model.safetensors").keys() == last_weights(run).keys()


def test_shards_and_checkpointed_activations_go_together(runs: dict[str, tuple[Path, int | str]]) -> None:
    run, code = runs["fsdp_checkpointing"]
    assert code == 0
    assert losses(run) == pytest.approx(losses(runs["dino_fsdp"][0]), rel=1e-6)


def test_the_micro_batch_found_is_what_fits_in_both(runs: dict[str, tuple[Path, int | str]]) -> None:
    run, code = runs["auto"]
    assert code == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["batch"]["per_device"] == 2
    assert losses(run)[:2] == pytest.approx(losses(runs["inf"][0])[:2], rel=1e-4)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("none", marks=pytest.mark.slow)])
def test_where_one_process_is_killed_the_other_says_so_and_ends(
    photo_folder: Path, tmp_path: Path, launcher: str
) -> None:
    run = tmp_path / "run"
    settings = [f"--data.source={photo_folder}", f"--output_dir={run}", "--data.label_column=none", "--steps=100000"]
    script = [str(ROOT / "scripts" / "pretrain_mae.py"), *SMALL_RUN, *settings]
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        started = [subprocess.Popen([*torchrun, *script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)]
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = [
            subprocess.Popen(
                [sys.executable, *script],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in (1, 0)
        ]
    heartbeat = run / "heartbeat.json"
    while not heartbeat.exists() or json.loads(heartbeat.read_text())["step"] < 2:
        assert started[0].poll() is None
        time.sleep(0.1)
    os.kill(json.loads(heartbeat.read_text())["pid"], signal.SIGKILL)
    _, text = started[0].communicate(timeout=60)
    started[-1].communicate(timeout=60)
    assert started[0].returncode == 1
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: another process of this run ended or cannot be reached (")
    assert line.endswith("The same command goes on from the newest checkpoint, or begins anew where there is none.")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_launch_file_of_fsdp2_learns_what_that_of_ddp_learns(photo_folder: Path, tmp_path: Path) -> None:
    for name in ("eight_gpus", "fsdp2"):
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2"]
        launcher.append(f"--config_file={ROOT / 'configs' / 'accelerate' / name}.yaml")
        settings = [f"--data.source={photo_folder}", f"--output_dir={tmp_path / name}", f"--steps={STEPS}"]
        settings += ["--data.label_column=none", "--encoder.drop_path_rate=0", "--precision=bf16"]
        script = [str(ROOT / "scripts" / "pretrain_dino.py"), *SMALL_DINO, *settings]
        done = subprocess.run([*launcher, *script], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "2 processes on cuda" in done.stdout
    assert losses(tmp_path / "fsdp2") == pytest.approx(losses(tmp_path / "eight_gpus"), rel=1e-3)
