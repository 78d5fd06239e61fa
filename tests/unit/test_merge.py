"""The merge stage: what is refused, and what a merge that was killed or had no room leaves. verl's merger is stood in for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from bridge import settings
from bridge.errors import UsageError
from bridge.runs import record
from bridge.stages import merge, upload
from door import recorded

RANKS = 2


@pytest.fixture
def mesh():
    """A mesh of RANKS without processes."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield DeviceMesh("cpu", torch.arange(RANKS), mesh_dim_names=("fsdp",), _init_backend=False)
    dist.destroy_process_group()


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], base: Path, mesh: DeviceMesh | None) -> Path:
    """The model shards of FSDP: DTensors of RANKS ranks, or without a mesh the plain tensors of a single rank."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = RANKS if mesh else 1

    def part(tensor: torch.Tensor, rank: int) -> torch.Tensor:
        if mesh is None:
            return tensor
        meta = TensorMeta(tensor.shape, tensor.stride(), tensor.dtype)
        local = [*tensor.chunk(ranks), *[tensor[:0]] * ranks][rank]
        return DTensor(local, DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)

    for rank in range(ranks):
        torch.save({name: part(tensor, rank) for name, tensor in tensors.items()},
                   folder / f"model_world_size_{ranks}_rank_{rank}.pt")
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": ranks}))
    shutil.copytree(base, folder / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    return folder


def start(base: Path) -> dict[str, torch.Tensor]:
    """The weights that a training of this model begins with, in fp32."""
    return {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}


def trained(base: Path, by: float = 1e-6) -> dict[str, torch.Tensor]:
    """The same after a small step for one weight of one tensor, which is lost in bf16."""
    tensors = start(base)
    tensors["model.norm.weight"][-1] += by
    return tensors


def adapted(base: Path) -> dict[str, torch.Tensor]:
    """The same under LoRA's names, with an adapter that has learned something."""
    tensors = {f"base_model.model.{name}": tensor for name, tensor in start(base).items()}
    name = "base_model.model.model.layers.0.self_attn.q_proj."
    tensors[name + "base_layer.weight"] = weight = tensors.pop(name + "weight")
    return tensors | {name + "lora_A.default.weight": torch.ones(4, weight.shape[1]),
                      name + "lora_B.default.weight": torch.ones(weight.shape[0], 4)}


def stand_in_merger(command: list[str], check: bool) -> subprocess.CompletedProcess:
    """What verl's merger leaves: the model's folder, in bf16. Made of a single rank's shards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shards, raw = Path(command[command.index("--local_dir") + 1]), Path(command[command.index("--target_dir") + 1])
    shutil.copytree(shards / "huggingface", raw)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(raw), torch_dtype=torch.bfloat16)
    weights = torch.load(shards / "model_world_size_1_rank_0.pt")
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(raw)
    return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def base(prepared) -> Path:
    return prepared / "models" / "tiny"


@pytest.fixture
def run_merge(tmp_path, base, monkeypatch):
    """Merge shards of a trained model into tmp_path/merged."""
    def run(*options: str, shards: Path | None = None) -> Path:
        shards = shards or write_shards(tmp_path / "shards", trained(base, 0.25), base, None)
        monkeypatch.setattr(sys, "argv", ["merge", *options, str(shards), str(tmp_path / "merged")])
        merge.main()
        return tmp_path / "merged"

    monkeypatch.setattr(merge.subprocess, "run", stand_in_merger)
    return run


def earlier_model(folder: Path) -> Path:
    """A model that was merged before; known by its only file."""
    folder.mkdir(parents=True)
    (folder / "earlier").touch()
    return folder


# ---- a training that changed nothing

@pytest.mark.parametrize("with_mesh", [True, False], ids=["DTensors of two ranks", "plain tensors of one"])
def test_shards_that_equal_the_base_are_known_in_their_own_precision(tmp_path, base, mesh, with_mesh):
    mesh = mesh if with_mesh else None
    for number, (tensors, equal) in enumerate([(start(base), True), (trained(base), False), (adapted(base), True)]):
        assert merge.equal_to_base(write_shards(tmp_path / str(number), tensors, base, mesh), base) is equal
    assert torch.equal(trained(base)["model.norm.weight"].bfloat16(), start(base)["model.norm.weight"].bfloat16())


def test_comparing_ends_with_the_first_weight_that_differs(tmp_path, base, monkeypatch):
    shards = write_shards(tmp_path / "shards", {name: tensor + 1 for name, tensor in start(base).items()}, base, None)
    asked = []
    monkeypatch.setattr(torch, "equal", lambda *tensors: asked.append(tensors))
    assert merge.equal_to_base(shards, base) is False and len(asked) == 1


@pytest.mark.parametrize("tensors", [start, adapted], ids=["no step", "LoRA"])
def test_a_model_that_equals_its_base_is_not_merged_and_replaces_none(tmp_path, base, run_merge, tensors):
    earlier_model(tmp_path / "merged")
    shards = write_shards(tmp_path / "shards", tensors(base), base, None)
    with pytest.raises(UsageError, match="changed nothing.*LoRA"):
        run_merge(base, shards=shards)
    assert {file.name for file in tmp_path.iterdir()} == {"shards", "merged"}
    assert (tmp_path / "merged" / "earlier").exists()


def test_a_trained_model_is_merged(base, run_merge):
    assert not torch.equal(load_file(run_merge(base) / "model.safetensors")["model.norm.weight"],
                           load_file(base / "model.safetensors")["model.norm.weight"])


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "of other names"])
def test_a_base_that_cannot_be_compared_is_said_and_the_merge_goes_on(tmp_path, run_merge, capsys, gone):
    from safetensors.torch import save_file

    folder = tmp_path / "base"
    if not gone:
        folder.mkdir()
        save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
    assert (run_merge(folder) / "model.safetensors").is_file()
    assert f"{folder}, which this training started from, is gone or holds no safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "config"), [
    ("sft", {"model": {"partial_pretrain": "WORK/models/tiny"}}),
    ("ppo", {"actor_rollout_ref": {"model": {"path": "WORK/models/tiny"}}})])
def test_the_plan_names_the_model_that_the_training_started_from(env, base, stage, config):
    # Recorded in a WORK_DIR that was moved here since; and given by its folder, from any WORK_DIR.
    work_dir = Path(env["WORK_DIR"])
    run = work_dir / "runs" / "default" / stage
    shards = run / "checkpoints" / "global_step_1" / ("actor" if stage == "ppo" else ".")
    write_shards(shards, {"model.norm.weight": torch.zeros(2)}, base, None)
    (run / "run.json").write_text(json.dumps(recorded(
        config=json.loads(json.dumps(config).replace("WORK", "/somewhere/else")), work_dir="/somewhere/else")))
    for ckpt in (run / "checkpoints" / "global_step_1", shards):
        planned = merge.plan(settings.read({"WORK_DIR": "/another", "CKPT": str(ckpt)}), {})
        assert planned.command[4] == f"{work_dir}/models/tiny" and "warning" not in "".join(planned.notes)
    (run / "run.json").unlink()
    planned = merge.plan(settings.read({"WORK_DIR": "/another", "CKPT": str(shards)}), {})
    assert len(planned.command) == 6 and "not compared" in planned.notes[-1]


def test_a_checkpoint_of_a_training_that_goes_on_is_called_perhaps_not_the_last(env, base):
    run = Path(env["WORK_DIR"]) / "runs" / "default" / "sft"
    write_shards(run / "checkpoints" / "global_step_2", trained(base), base, None)
    trains = subprocess.Popen([sys.executable, "-c", "import sys\nfrom pathlib import Path\nfrom bridge.runs import record\n"
                               "with record.locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()", str(run)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert trains.stdout.readline() == "held\n"
    said = "\n".join(merge.plan(settings.read(env), {}).notes)
    assert f"warning: sft still trains (process {trains.pid} on " in said and "step 2 may not be its last" in said
    trains.communicate()
    assert "still trains" not in "\n".join(merge.plan(settings.read(env), {}).notes)


# ---- killed, and full

class Killed(BaseException):
    """Stands for SIGKILL: whatever the program would still do to files is not done."""


def killed_before(number: int, monkeypatch) -> None:
    """Let a merge be killed before its call of that number: each rename and removal of a folder, and the work itself."""
    calls = iter(range(100))
    dead = []

    def counted(call):
        def instead(*args, **options):
            if dead or next(calls) == number:
                dead.append(True)
                raise Killed
            return call(*args, **options)
        return instead

    for owner, name in ((os, "rename"), (shutil, "rmtree"), (merge, "complete_and_verify")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


def test_a_merge_killed_at_any_of_its_steps_loses_no_model_and_the_same_command_ends_well(tmp_path, base, run_merge, monkeypatch):
    shards = write_shards(tmp_path / "shards", trained(base, 0.25), base, None)
    ends = []
    for number in range(40):
        earlier_model(tmp_path / "merged")
        with monkeypatch.context() as patched:
            killed_before(number, patched)
            try:
                run_merge(shards=shards)
                break
            except Killed:
                ends.append({folder.name for folder in tmp_path.iterdir()} - {"shards"})
        assert any((folder / "earlier").exists() or ((folder / "model.safetensors").exists() and not (folder / "raw").exists())
                   for folder in tmp_path.glob("merged*")), number
        merged = run_merge(shards=shards)
        assert (merged / "model.safetensors").is_file() and not (merged / "earlier").exists()
        assert {folder.name for folder in tmp_path.iterdir()} == {"shards", "merged"}, number
        shutil.rmtree(merged)
    # Between the two renames, too.
    assert {"merged.old", "merged.tmp"} in ends and {"merged", "merged.tmp"} in ends and {"merged", "merged.old"} in ends


def test_a_merge_that_is_refused_after_a_killed_one_puts_the_earlier_model_back(tmp_path, base, run_merge):
    earlier_model(tmp_path / "merged.old")
    (tmp_path / "merged.tmp").mkdir()
    shards = write_shards(tmp_path / "shards", start(base), base, None)
    with pytest.raises(UsageError, match="changed nothing"):
        run_merge(base, shards=shards)
    assert (tmp_path / "merged" / "earlier").exists() and not (tmp_path / "merged.tmp").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(122, "Disk quota exceeded"), SafetensorError(
    'Error while serializing: I/O error: No space left on device (os error 28)')], ids=["full", "quota", "safetensors"])
def test_a_disk_that_fills_during_a_merge_is_named_and_the_earlier_model_stays(tmp_path, run_merge, monkeypatch, error):
    def full(*_args):
        raise error

    earlier_model(tmp_path / "merged")
    monkeypatch.setattr(merge, "complete_and_verify", full)
    with pytest.raises(UsageError, match="the disk is full.*GB are free.*stays as it was"):
        run_merge()
    assert {file.name for file in tmp_path.iterdir()} == {"shards", "merged"}
    assert (tmp_path / "merged" / "earlier").exists()


def test_a_merge_is_not_begun_without_room_for_it(tmp_path, run_merge, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage._replace(free=1000))
    with pytest.raises(UsageError, match="too little disk: the merge needs .* GB"):
        run_merge()
    assert not (tmp_path / "merged").exists()


def test_a_failure_of_verls_merger_is_passed_on_without_a_second_traceback(tmp_path, run_merge, monkeypatch):
    monkeypatch.setattr(merge.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    with pytest.raises(UsageError, match=r"verl's merger failed \(exit status 1\); the reason is above"):
        run_merge()


# ---- what may be published

def record_merge(folder: Path, status: str) -> None:
    folder.mkdir(parents=True)
    record.write_json(folder / "run.json", recorded(status=status), [])


@pytest.mark.parametrize("status", ["failed", "running"])
def test_a_model_is_not_published_while_its_newest_merge_is_not_finished(prepared, base, tmp_path, status):
    # The folder holds the model of an earlier merge, which nobody asked for any more.
    env = {"WORK_DIR": str(tmp_path), "HF_REPO": "team/ours", "STAGE": "sft"}
    folder = tmp_path / "runs" / "default" / "sft"
    shutil.copytree(base, folder / "merged")
    assert upload.plan(settings.read(env), {"HF_TOKEN": "hf_x"})
    record_merge(folder / "merge", status)
    with pytest.raises(UsageError, match=f"(?s){status}.*make merge STAGE=sft"):
        upload.plan(settings.read(env), {"HF_TOKEN": "hf_x"})


def test_without_stage_the_sft_model_is_not_published_in_place_of_a_ppo_model_that_was_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "runs" / "default" / "sft" / "merged")
    record_merge(tmp_path / "runs" / "default" / "ppo" / "merge", "failed")
    with pytest.raises(UsageError, match="make merge STAGE=ppo"):
        upload.plan(settings.read({"WORK_DIR": str(tmp_path), "HF_REPO": "team/ours"}), {"HF_TOKEN": "hf_x"})
