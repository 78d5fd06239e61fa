"""The door from outside: what a person types, what is said, that nothing is written when it is wrong."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from shards import started

from bridge import environment, settings
from bridge.door import TOOLS
from bridge.errors import UsageError, exit_status
from bridge.runs import record
from bridge.stages import train
from bridge.stages.table import STAGES
from door import DOOR, ROOT, SHELL, asked, bridge, recorded, run_python


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(env: dict[str, str], *arguments: str) -> str:
    """Ask, see that it was refused as a user's mistake and wrote nothing; returns what was said."""
    folder = Path(env["WORK_DIR"])
    before = tree(folder) if folder.is_dir() else None
    result = asked(*arguments, **env)
    assert result.returncode == 2, result.stdout + result.stderr
    assert (tree(folder) if folder.is_dir() else None) == before
    return result.stderr


def write_parquet(env: dict[str, str], **columns) -> None:
    """Give the run data of its own."""
    folder = Path(env["WORK_DIR"]) / "data"
    folder.unlink()
    (folder / "gsm8k").mkdir(parents=True)
    for name in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "gsm8k" / f"{name}.parquet")


def test_help_lists_every_stage():
    result = bridge("--help")
    assert result.returncode == 0
    assert all(re.search(rf"^  {name} ", result.stdout, re.MULTILINE) for name in [*STAGES, *TOOLS])


def test_help_and_a_dry_run_import_nothing_slow(env):
    # torch takes seconds; a dry run is to answer at once.
    for arguments in (["--help"], ["ppo", "--dry-run"]):
        code = ("import sys; from bridge.door import main; sys.argv[1:] = sys.argv[1:]; main(); "
                "print('SLOW', [name for name in ('torch', 'transformers', 'ray', 'vllm', 'verl') if name in sys.modules])")
        result = subprocess.run([sys.executable, "-c", code, *arguments], env={**SHELL, **env}, capture_output=True, text=True,
                                check=True)
        assert "SLOW []" in result.stdout


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_dry_run_prints_a_command_that_can_be_pasted_and_writes_nothing(env, stage):
    before = tree(Path(env["WORK_DIR"]))
    result = bridge(stage, "--dry-run", "trainer.project_name='a b'", **env)
    assert result.returncode == 0, result.stderr
    [line] = result.stdout.splitlines()
    words = shlex.split(line.removeprefix("+ "))
    assert words[0] == "env" and words[-1] == "trainer.project_name='a b'"
    assert tree(Path(env["WORK_DIR"])) == before


def test_no_secret_is_in_the_dry_run(env):
    secrets = {"HF_TOKEN": "hf_very_secret", "WANDB_API_KEY": "wandb_very_secret"}
    result = bridge("ppo", "--dry-run", **env, **secrets)
    assert result.returncode == 0
    assert "very_secret" not in result.stdout + result.stderr
    # With a key there wandb is online.
    assert "WANDB_MODE=offline" not in result.stdout


def test_eight_gpus_are_planned_on_a_machine_without_any_with_a_warning(env):
    result = asked("ppo", "--dry-run", **{**env, "PROFILE": "tutorial", "GPUS": "8", "CUDA_VISIBLE_DEVICES": "-1"})
    assert result.returncode == 0
    assert "no GPU visible" in result.stderr and "trainer.n_gpus_per_node=8" in result.stdout


def test_without_a_gpu_only_the_rehearsal_starts(env):
    said = refused({**env, "PROFILE": "tutorial", "CUDA_VISIBLE_DEVICES": "-1"}, "sft")
    assert "no GPU visible" in said and "PROFILE=rehearsal" in said


def test_a_stage_names_everything_that_is_missing(env):
    said = refused({**env, "GPUS": "eight", "RUN": "a/b"}, "upload")
    assert "HF_REPO" in said and "GPUS='eight'" in said and "RUN='a/b'" in said


def test_a_large_model_is_not_rehearsed_on_cpu(env):
    said = refused({**env, "MODEL": "meta-llama/Llama-3.2-1B-Instruct", "CUDA_VISIBLE_DEVICES": "-1"}, "rehearse")
    assert "MODEL=tiny" in said


@pytest.mark.parametrize(("arguments", "message"), [
    (["ppoo"], "Did you mean ppo?"),
    (["data", "trainer.total_epochs=1"], "takes no arguments"),
    (["sft", "--fast"], "is no option"),
    (["sft", "trainer.totl_epochs=1"], "Did you mean trainer.total_epochs?"),
    (["sft", "data.train_batch_size=0"], "data.train_batch_size has to be a whole number of at least 1"),
    (["ppo", "data.train_batch_size=null"], "data.train_batch_size cannot be null"),
    (["sft", "~optim.lr"], "optim.lr would be gone"),
])
def test_a_wrong_command_line_is_refused(env, arguments, message):
    assert message in refused(env, *arguments)


@pytest.mark.parametrize(("stage", "settings", "message"), [
    ("ppo", {"PROFILE": "tutorial", "GPUS": "3"}, "Possible with these settings: GPUS=1, 2, 4, 8, 16."),
    ("sft", {"PROFILE": "tutorial", "GPUS": "9"}, "data.train_batch_size=256 does not divide by 9 GPUs"),
    ("ppo", {"GPUS": "2", "TP": "3"}, "TP=3 does not divide 2 GPUs"),
    ("ppo", {"PROFILE": "tutorial", "GPUS": "8", "TP": "8"}, "TP=8 does not divide the model's 4 attention heads"),
    ("sft", {"GPUS": "eight"}, "GPUS='eight'"),
    ("sft", {"GPUS": "0"}, "GPUS='0'"),
    ("sft", {"PROFILE": "rehersal"}, "Did you mean rehearsal?"),
])
def test_numbers_that_do_not_divide_are_refused_with_those_that_would(env, stage, settings, message):
    assert message in refused({**env, **settings}, stage, "--dry-run")


def test_a_model_folder_that_is_not_there_is_refused_with_the_cure(env):
    assert "make model" in refused({**env, "MODEL": "smollm2"}, "sft")
    assert "does not exist" in refused({**env, "MODEL": "/no/such/model"}, "sft")


def test_a_model_without_a_tokenizer_is_refused(env, prepared, tmp_path):
    folder = tmp_path / "no tokenizer"
    folder.mkdir()
    for file in (prepared / "models" / "tiny").iterdir():
        if not file.name.startswith("token"):
            (folder / file.name).write_bytes(file.read_bytes())
    assert "tokenizer" in refused({**env, "MODEL": str(folder)}, "sft")


def test_missing_data_is_refused_with_the_cure(env):
    (Path(env["WORK_DIR"]) / "data").unlink()
    assert "make data" in refused(env, "sft")


def test_data_without_the_columns_is_refused(env):
    write_parquet(env, question=["a"], answer=["b"])
    assert "has no column extra_info.question, extra_info.answer (it has question, answer)" in refused(env, "sft")
    assert "has no column prompt, data_source, reward_model.ground_truth" in refused(env, "ppo")


def test_data_that_is_no_parquet_is_refused(env):
    write_parquet(env, question=["a"])
    (Path(env["WORK_DIR"]) / "data" / "gsm8k" / "train.parquet").write_text("hello")
    assert "is no parquet file" in refused(env, "sft")


def test_a_damaged_parquet_file_is_named_whatever_is_wrong_with_it(tmp_path):
    files = {f"{key}_files": str(tmp_path / f"{key}.parquet") for key in ("train", "val")}
    for file in files.values():
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), file)
    whole, broken = Path(files["train_files"]).read_bytes(), 0
    for place in range(1, len(whole)):
        Path(files["train_files"]).write_bytes(whole[:-place] + b"\xff" + whole[len(whole) - place + 1:])
        problems = []
        assert (train.data_problems({"data": files}, ["prompt"], problems) is None) == bool(problems)
        broken += any("is no parquet file" in problem for problem in problems)
    assert broken > 50
    Path(files["train_files"]).unlink()
    Path(files["train_files"]).mkdir()
    problems = []
    train.data_problems({"data": files}, ["prompt"], problems)
    assert problems == [f"no data at {files['train_files']}. Run `make data` first."]


def test_too_little_data_is_refused_before_verl_would_end_without_a_step(env):
    write_parquet(env, extra_info=[{"question": "a", "answer": "b"}] * 3)
    said = refused(env, "sft")
    assert "3 training rows are less than one batch of 16" in said and "3 validation rows are less than 8" in said


def test_empty_data_is_refused(env):
    extra_info = pyarrow.array([], pyarrow.struct([("question", pyarrow.string()), ("answer", pyarrow.string())]))
    write_parquet(env, extra_info=extra_info)
    assert "0 training rows" in refused(env, "sft")


def test_ppo_from_sft_before_a_merge_is_refused(env):
    assert "make merge STAGE=sft" in refused({**env, "INIT": "sft"}, "ppo")


def test_merging_without_checkpoints_is_refused(env):
    assert "no checkpoints in" in refused({**env, "STAGE": "sft"}, "merge")
    assert "CKPT=" in refused({**env, "CKPT": "/no/such"}, "merge")


def test_merging_a_half_written_checkpoint_is_refused_and_says_what_is_missing(env):
    folder = Path(env["WORK_DIR"]) / "runs" / "default" / "sft" / "checkpoints" / "global_step_5"
    folder.mkdir(parents=True)
    (folder / "fsdp_config.json").write_text('{"world_size": 2}')
    (folder / "model_world_size_2_rank_0.pt").write_bytes(b"PK\x03\x04 cut")
    said = refused({**env, "STAGE": "sft"}, "merge")
    assert "model_world_size_2_rank_0.pt is cut short" in said and "model_world_size_2_rank_1.pt is missing" in said
    assert "model_world_size_2_rank_0.pt is cut short" in refused({**env, "CKPT": str(folder)}, "merge")
    assert "STEP=7: no such checkpoint" in refused({**env, "STAGE": "sft", "STEP": "7"}, "merge")


def test_a_missing_parent_of_the_work_folder_is_refused(tmp_path):
    said = refused({"WORK_DIR": str(tmp_path / "no" / "such")}, "data")
    assert "its parent folder" in said and "does not exist" in said


def test_a_work_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused({"WORK_DIR": str(tmp_path / "file")}, "data")


def test_a_work_folder_that_is_a_dangling_link_is_refused(tmp_path):
    for target in (tmp_path / "gone", tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        [problem] = environment.work_dir_problems(tmp_path / "link")
        assert f"is a symbolic link to {target}, which is not there" in problem


@pytest.mark.parametrize(("options", "message"), [("ro,size=200m", "cannot be written to"), ("size=1m", "is full")])
def test_a_read_only_or_full_work_folder_is_refused(tmp_path, options, message):
    if os.getuid() != 0:
        pytest.skip("mounting a file system needs root")
    command = f"mount -t tmpfs -o {options} none {shlex.quote(str(tmp_path))} && exec {sys.executable} -m bridge data"
    result = subprocess.run(["unshare", "--mount", "bash", "-c", command], capture_output=True, text=True, check=False,
                            env={**SHELL, "WORK_DIR": str(tmp_path), "DATA_SOURCE": "builtin"})
    assert result.returncode == 2 and message in result.stderr, result.stderr


def test_checkpoints_that_cannot_fit_on_the_disk_are_refused_before_the_start(env, prepared):
    if os.getuid() != 0:
        pytest.skip("mounting a file system needs root")
    runs_dir = Path(env["WORK_DIR"]) / "runs"
    runs_dir.mkdir()
    # The folder of runs on a disk of its own, with room for a log but not for the checkpoints of a larger model.
    command = f"mount -t tmpfs -o size=2m none {shlex.quote(str(runs_dir))} && exec {sys.executable} -m bridge sft"
    result = subprocess.run(["unshare", "--mount", "bash", "-c", command], capture_output=True, text=True, check=False,
                            env={**SHELL, **env})
    assert result.returncode == 2 and "too little disk" in result.stderr, result.stderr


def test_amd_variables_and_python_paths_are_unset_and_that_is_said(env):
    hostile = {"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0", "PYTHONPATH": "/nowhere"}
    result = bridge("sft", "--dry-run", **env, **hostile)
    assert result.returncode == 0
    assert all(f"unset {name}" in result.stderr for name in hostile)


def test_a_lower_limit_of_virtual_memory_is_raised_and_that_is_said(env):
    result = subprocess.run(["bash", "-c", f"ulimit -S -v 40000000; {sys.executable} -m bridge sft --dry-run"],
                            env={**SHELL, **env}, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "ulimit -v raised from 40000000 KiB to unlimited" in result.stderr


def test_what_was_compiled_for_other_packages_is_not_taken(monkeypatch, tmp_path):
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT")
    found = []
    for content in ("torch==2.6.0", "torch==2.6.1"):
        (tmp_path / "requirements.lock").write_text(content)
        monkeypatch.setattr(environment, "ROOT", tmp_path)
        cleaned = environment.clean_environment(settings.read({"WORK_DIR": "/w"}), {})
        found.append([cleaned[name] for name in names])
    assert all(path.startswith("/w/cache/compiled/") for path in found[0] + found[1])
    assert not set(found[0]) & set(found[1])


@pytest.mark.parametrize(("given", "order"), [({}, "PCI_BUS_ID"), ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, "FASTEST_FIRST")])
def test_cuda_counts_gpus_as_the_door_does_unless_told_otherwise(given, order):
    assert environment.clean_environment(settings.read({"WORK_DIR": "/w"}), given)["CUDA_DEVICE_ORDER"] == order


def test_a_network_card_that_is_not_there_is_refused_with_those_that_are(env):
    # The tutorial's own value: one site's card.
    assert "there are" in refused({**env, "NCCL_SOCKET_IFNAME": "enp25s0np0"}, "sft")


@pytest.mark.parametrize("name", ["eth0", "eth", "=eth0", "^docker", "ib,eth", ""])
def test_network_cards_are_named_as_nccl_has_it(tmp_path, name):
    (tmp_path / "eth0").mkdir()
    assert train.interface_problems({"NCCL_SOCKET_IFNAME": name}, tmp_path) == []
    assert train.interface_problems({"NCCL_SOCKET_IFNAME": "=eth"}, tmp_path) != []


def test_work_dir_may_have_spaces_and_any_letters(prepared, tmp_path):
    folder = tmp_path / "作業 folder's, ü:1"
    folder.mkdir()
    (folder / "data").symlink_to(prepared / "data")
    (folder / "models").symlink_to(prepared / "models")
    result = bridge("sft", "--dry-run", WORK_DIR=str(folder), MODEL="tiny", PROFILE="rehearsal")
    assert result.returncode == 0, result.stderr
    assert f"WORK_DIR={folder}" in shlex.split(result.stdout.removeprefix("+ "))


# ---- runs


def finished_run(env: dict[str, str], **changes) -> Path:
    """A run folder as a finished sft without checkpoints leaves it; `changes` are made to its record."""
    plan = STAGES["sft"].plan(settings.read(env), {**SHELL, **env}, [], True)
    plan.record_dir.mkdir(parents=True)
    record.write_json(plan.record_dir / "run.json", {**record.begin(plan, {**SHELL, **env}), "status": "finished", **changes}, [])
    return plan.record_dir


def test_a_finished_stage_is_not_started_again(env):
    finished_run(env)
    result = bridge("sft", **env)
    assert result.returncode == 0 and "is finished" in result.stderr and result.stdout == ""


def test_the_record_of_a_run_that_was_killed_after_its_last_save_says_finished_once_that_is_seen(env):
    override = "trainer.total_training_steps=2"
    folder = started(env, "sft", override, steps=(2,)).parent
    left = record.read(folder)
    [attempt] = left["attempts"]
    del attempt["ended"], attempt["exit_status"]
    record.write_json(folder / "run.json", {**left, "status": "running", "last_step": 0}, [])
    # To look changes nothing.
    assert "is finished" in asked("sft", "--dry-run", override, **env).stderr
    assert record.read(folder)["status"] == "running"
    result = bridge("sft", override, **env)
    assert result.returncode == 0 and "is finished" in result.stderr and result.stdout == ""
    assert record.read(folder) == {**left, "status": "finished", "last_step": 2}


def test_a_run_with_other_settings_is_neither_continued_nor_overwritten(env):
    finished_run(env)
    said = refused(env, "sft", "optim.lr=1e-3")
    assert "optim.lr: 0.006 -> 0.001" in said and "RUN=NAME" in said


def test_a_run_whose_data_changed_is_not_continued(env):
    folder = finished_run(env)
    recorded = record.read(folder)
    recorded["inputs"]["data"]["train_files"] = ["0" * 64]
    (folder / "run.json").write_text(json.dumps(recorded))
    assert "data.train_files" in refused(env, "sft")


def test_names_and_housekeeping_may_differ(env):
    finished_run(env)
    assert "is finished" in asked("sft", **{**env, "KEEP": "5", "WANDB_PROJECT": "other"}).stderr


def test_a_finished_run_whose_last_checkpoint_is_gone_is_not_taken_for_finished(env):
    finished_run(env, last_step=64)
    result = asked("sft", "--dry-run", **env)
    assert result.returncode == 0 and "is finished" not in result.stderr
    assert "trainer.resume_mode=disable" in result.stdout
    assert "checkpoints held step 64 and is empty: this run begins anew" in result.stderr


def test_a_damaged_record_is_named_without_a_traceback(env):
    (finished_run(env) / "run.json").write_text("{")
    assert "run.json is damaged" in refused(env, "sft")


@pytest.mark.parametrize("content", [
    b"{}", b"[]", b"null", b"\xff\xfe\x00", b'"text"', b"[" * 100_000, b'{"attempts": []}',
    json.dumps(recorded(attempts=[])).encode(), json.dumps(recorded(attempts=[{}])).encode(),
    json.dumps(recorded(attempts=[["a"]])).encode(), json.dumps(recorded(config=[1])).encode(),
    json.dumps(recorded(last_step="3")).encode()])
def test_what_is_no_record_is_named_as_such(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(UsageError, match="run.json is damaged"):
        record.read(tmp_path)


def test_a_whole_record_is_read(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(recorded(config={"a": "ü"})))
    assert record.read(tmp_path) == recorded(config={"a": "ü"})


# ---- what the file system refuses


def test_what_the_file_system_refuses_is_one_line_with_the_file_and_a_cure(tmp_path, capsys):
    def entry(number: int, *files: str) -> None:
        raise OSError(number, os.strerror(number), *files)

    for number, cure in ((errno.ENOSPC, "Make room"), (errno.EACCES, "permission"), (errno.EIO, "administrator"),
                         (errno.ESTALE, "administrator"), (errno.ENOTDIR, "See what is there")):
        assert exit_status(lambda number=number: entry(number, "/x/run.json")) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"/x/run.json: {os.strerror(number)}. " in said and cure in said
    assert exit_status(lambda: os.replace(tmp_path / "a", tmp_path / "b")) == 2
    assert f"{tmp_path}/a -> {tmp_path}/b: No such file" in capsys.readouterr().err


def test_a_mistake_of_the_program_keeps_its_traceback():
    for error in (KeyError("x"), OSError("no number and no file"), ConnectionResetError(errno.ECONNRESET, "by peer")):
        def entry(error=error) -> None:
            raise error
        with pytest.raises(type(error)):
            exit_status(entry)


def test_a_disk_that_is_full_at_a_write_is_named(tmp_path, monkeypatch):
    def full(*_arguments, **_more) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="run.json") as caught:
        record.write_json(tmp_path / "run.json", recorded(), [])
    assert caught.value.errno == errno.ENOSPC


def test_ctrl_c_ends_without_a_traceback(capsys):
    def entry() -> None:
        raise KeyboardInterrupt

    assert exit_status(entry) == 130 and "Ctrl-C" in capsys.readouterr().err


def test_mistakes_of_every_kind_are_named_at_once(env):
    said = refused({**env, "MODEL": "/no/model", "GPUS": "3", "PROFILE": "tutorial", "CUDA_VISIBLE_DEVICES": "-1"}, "sft",
                   "trainer.totl_epochs=1")
    for part in ("/no/model", "does not divide by 3 GPUs", "no GPU visible", "trainer.total_epochs?"):
        assert part in said, said


def test_made_up_data_in_a_real_run_are_warned_of(env):
    result = asked("sft", "--dry-run", **{**env, "PROFILE": "tutorial", "GPUS": "8"})
    assert "made-up problems" in result.stderr


def test_a_work_folder_that_moved_is_no_difference(env, tmp_path_factory):
    finished_run(env)
    moved = tmp_path_factory.mktemp("moved") / "work ü"
    Path(env["WORK_DIR"]).rename(moved)
    result = asked("sft", **{**env, "WORK_DIR": str(moved)})
    assert "is finished" in result.stderr, result.stderr


def test_two_runs_in_one_folder_at_once_are_refused(env):
    folder = Path(env["WORK_DIR"]) / "runs" / "default" / "sft"
    folder.mkdir(parents=True)
    code = ("import sys, time\nfrom pathlib import Path\nfrom bridge.runs import record\n"
            "with record.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder)],
                              stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        said = refused(env, "sft")
        assert f"another run works in {folder}" in said and f"process {holder.pid}" in said
        # A dry run says it, too, and is in nobody's way.
        result = asked("sft", "--dry-run", **env)
        assert result.returncode == 0 and f"another run works in {folder} (process {holder.pid} on " in result.stderr
        assert "a second is refused; RUN=NAME is another" in result.stderr
    finally:
        holder.kill()
        holder.communicate()
    # The lock goes with its process, however that ended.
    assert "another run" not in asked("sft", "--dry-run", **env).stderr
    with record.locked(folder):
        pass


def test_the_record_masks_a_secret_that_slipped_into_a_value(tmp_path):
    record.write_json(tmp_path / "run.json", {"config": {"x": "abc-s3cret"}}, ["s3cret"])
    assert json.loads((tmp_path / "run.json").read_text()) == {"config": {"x": "abc-***"}}


def test_masking_leaves_keys_numbers_and_structure_as_they_are(tmp_path):
    kept = {"trainer.test_freq": 10, "status": "x", "list": [1, None, True, {"test": 0.5}], "ü": "say \"hello\""}
    # What JSON itself consists of, too: a digit, a quote, a bracket.
    for secret in ("test", "0", '"', "{", "\\"):
        record.write_json(tmp_path / "x.json", {**kept, "text": f"a{secret}b"}, [secret])
        read = json.loads((tmp_path / "x.json").read_text())
        assert read.pop("text") == "a***b" and read.pop("ü").replace("***", '"') == kept["ü"]
        assert read == {key: value for key, value in kept.items() if key != "ü"}


def test_the_record_says_what_was_run_with_what(env):
    recorded = record.read(finished_run(env))
    [attempt] = recorded["attempts"]
    assert attempt["lock_sha256"] == record.sha256(ROOT / "requirements.lock")
    assert attempt["command"][0] == sys.executable
    assert {"host", "python", "gpus", "driver", "git_commit", "configs_sha256", "started", "from_step"} <= attempt.keys()
    assert recorded["config"]["trainer"]["n_gpus_per_node"] == 2


@pytest.mark.parametrize("trial", [False, True])
def test_only_a_run_that_is_not_a_trial_says_that_the_same_command_continues_it(tmp_path, trial):
    # In a process of its own: the door takes all that is left running as its own.
    said = run_python(f"""
import contextlib, io
from pathlib import Path
from bridge import door
from bridge.plan import Plan
folder = Path({str(tmp_path)!r})
plan = Plan(["sh", "-c", "kill -TERM $$"], {{}}, folder, True, checkpoints=folder / "checkpoints")
with contextlib.redirect_stderr(io.StringIO()) as said:
    status = door.run_plan("sft", plan, {{"PATH": "/bin:/usr/bin", **({{"BRIDGE_TRIAL": "1"}} if {trial} else {{}})}})
print(status, said.getvalue().replace(chr(10), " "))""", preloaded=DOOR)
    assert said.startswith("143 ") and "sft was ended by a signal" in said
    assert ("the same command continues it" in said) is not trial


@pytest.mark.parametrize(("asked", "stays"), [(-10, False), (10, True)], ids=["left over", "since this run has the folder"])
def test_a_request_to_stop_that_was_left_over_is_removed_and_one_that_just_came_is_not(tmp_path, asked, stays):
    (tmp_path / "stopped").touch()
    (tmp_path / "stop-requested").touch()
    (tmp_path / ".lock").touch()
    now = (tmp_path / ".lock").stat().st_mtime
    os.utime(tmp_path / "stop-requested", (now + asked, now + asked))
    said = run_python(f"""
import os
from pathlib import Path
from bridge import door
from bridge.plan import Plan
folder = Path({str(tmp_path)!r})
plan = Plan(["sh", "-c", f"ls {{folder}} > {{folder}}/seen"], {{}}, folder, True, checkpoints=folder / "checkpoints")
print(door.run_plan("sft", plan, {{"PATH": "/bin:/usr/bin"}}))""", preloaded=DOOR)
    assert said == "0"
    seen = (tmp_path / "seen").read_text().split()
    assert ("stop-requested" in seen) is stays and "stopped" not in seen
