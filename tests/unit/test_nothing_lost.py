"""A run that is started again never loses what it has: what counts as complete, what is refused, what is only put aside."""

import errno
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from shards import SAVED, plan, started, write_checkpoint

from bridge import door, settings
from bridge.errors import UsageError
from bridge.runs import checkpoints, record
from bridge.stages import merge
from door import asked

WEIGHTS_ONLY = ["trainer.checkpoint.save_contents=[model]"]


def everything(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but locks, with its contents."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
            and file.name != ".lock"}


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    # Among the tensor's bytes, so that torch.load takes it without a word.
    data[data.index(b"\0" * 64) + 8] ^= 1
    file.write_bytes(data)


MORE = "trainer.total_training_steps=6"


@pytest.mark.parametrize(("stage", "overrides", "parts"), [
    ("ppo", ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2"], ["actor"]),
    ("ppo", [], ["actor", "critic"]), ("sft", [], ["."])],
    ids=["grpo", "ppo", "sft"])
def test_a_killed_run_goes_on_from_its_newest_checkpoint_whatever_it_saves(env, stage, overrides, parts):
    folder = started(env, stage, MORE, *overrides, steps=(1, 2, 3, 4))
    before = everything(folder)
    again = plan(env, stage, MORE, *overrides)
    assert again.resume_step == 4 and f"trainer.resume_from_path='{folder}/global_step_4'" in again.command
    assert list(again.saved) == parts
    saved = again.saved
    assert checkpoints.prepare_resume(folder, stage, saved, checkpoints.newest_complete(folder, saved), 32) == []
    assert {**before, checkpoints.TRACKER: b"4"} == everything(folder)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_other_settings_are_told_before_anything_is_touched_even_where_no_checkpoint_is_usable(env, stage):
    folder = started(env, stage, steps=(1,))
    (folder / "global_step_1" / "data.pt").unlink()
    before = everything(folder.parent)
    with pytest.raises(UsageError, match="was made with other settings"):
        plan(env, stage, "data.max_prompt_length=100" if stage == "ppo" else "optim.lr=1e-3")
    assert everything(folder.parent) == before


def test_checkpoints_of_which_none_is_usable_are_refused_and_named(env):
    folder = started(env, "sft", steps=(5, 9))
    (folder / "global_step_5" / "data.pt").unlink()
    (folder / "global_step_9" / "optim_world_size_2_rank_1.pt").write_bytes(b"PK cut")
    before = everything(folder.parent)
    result = asked("sft", **env)
    assert result.returncode == 2
    assert "global_step_5: data.pt is missing" in result.stderr and "global_step_9: " in result.stderr
    assert f"mv {folder} {folder}.old" in result.stderr and "RUN=NAME" in result.stderr
    assert everything(folder.parent) == before
    # What it says works.
    shutil.move(folder, f"{folder}.old")
    assert plan(env, "sft").resume_step == 0


def test_a_shard_that_cannot_be_read_for_a_moment_is_an_error_not_a_missing_file(env, monkeypatch):
    folder = started(env, "sft", steps=(5, 9))
    before = everything(folder.parent)
    bad = folder / "global_step_9" / "model_world_size_2_rank_1.pt"

    def stale(file, *args, **options):
        if Path(file) == bad:
            raise OSError(errno.ESTALE, "Stale file handle", str(file))
        return open(file, *args, **options)

    monkeypatch.setattr(checkpoints, "open", stale, raising=False)
    with pytest.raises(OSError, match="Stale file handle"):
        plan(env, "sft")
    assert everything(folder.parent) == before


def test_an_error_of_the_disk_at_a_files_end_is_not_taken_for_a_cut(tmp_path):
    file = write_checkpoint(tmp_path, 1) / "data.pt"

    class Stream:
        def __init__(self, *_args):
            self.file = open(file, "rb")  # noqa: SIM115 - closed at the end of the with statement

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_error):
            self.file.close()

        def read(self, *_count):
            raise OSError(errno.EIO, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "open", Stream, raising=False)
        with pytest.raises(OSError, match="Input/output error"):
            checkpoints.is_whole(file)
    assert checkpoints.is_whole(file)


def test_a_shard_of_any_number_of_tensors_is_whole_and_cut_anywhere_it_is_not(tmp_path):
    file = tmp_path / "shard.pt"
    # Its table of contents is larger than 64 KB, and than what is read at first.
    for count, size in ((2000, 4 << 16), (20_000, 4 << 20)):
        torch.save({str(number): torch.zeros(1) for number in range(count)}, file)
        assert file.stat().st_size > size and checkpoints.is_whole(file)
    torch.save({"x": torch.zeros(4)}, file)
    data = file.read_bytes()
    assert checkpoints.is_whole(file)
    for length in range(len(data)):
        file.write_bytes(data[:length])
        assert not checkpoints.is_whole(file)


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1)

    def closed(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr("os.scandir", closed)
    with pytest.raises(PermissionError):
        checkpoints.list_checkpoints(tmp_path, SAVED["sft"])


def test_what_is_not_whole_is_put_aside_which_a_dry_run_announces_and_goes_once_its_step_is_reached_again(env):
    folder = started(env, "sft", steps=(5, 9))
    (folder / "global_step_9" / "data.pt").unlink()
    said = asked("sft", "--dry-run", **env)
    assert said.returncode == 0
    assert "global_step_9 is incomplete (data.pt is missing or cut short): it will be set aside" in said.stderr
    assert (folder / "global_step_9").is_dir()
    saved = plan(env, "sft").saved
    checkpoints.prepare_resume(folder, "sft", saved, checkpoints.newest_complete(folder, saved), steps_per_epoch=32)
    aside = folder / "global_step_9.set-aside"
    assert not (folder / "global_step_9").exists() and (aside / "model_world_size_2_rank_0.pt").is_file()
    housekeeping = checkpoints.Housekeeping(folder, saved, 2)
    write_checkpoint(folder, 8)
    housekeeping.look()
    assert aside.is_dir()
    write_checkpoint(folder, 10)
    housekeeping.look()
    assert not aside.exists() and {path.name for path in folder.glob("global_*")} == {"global_step_8", "global_step_10"}


def test_what_was_put_aside_twice_is_there_twice(tmp_path):
    for _ in range(3):
        checkpoints.set_aside(write_checkpoint(tmp_path, 7))
    assert {path.name for path in tmp_path.iterdir()} == {
        "global_step_7.set-aside", "global_step_7.set-aside-2", "global_step_7.set-aside-3"}


# ---- damage


@pytest.mark.parametrize("file", ["model_world_size_2_rank_1.pt", "optim_world_size_2_rank_0.pt"])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_taken(env, file):
    folder = started(env, "sft", steps=(5, 9))
    flip_a_bit(folder / "global_step_9" / file)
    planned = plan(env, "sft")
    assert planned.resume_step == 9
    [done] = checkpoints.set_aside_damaged(folder, planned.saved)
    assert "global_step_9" in done and file in done and "checksum" in done
    assert plan(env, "sft").resume_step == 5 and (folder / "global_step_9.set-aside").is_dir()


def test_a_checkpoint_without_recorded_checksums_is_taken_and_that_is_said(env, capsys):
    folder = started(env, "sft", steps=(5, 9))
    (folder / "global_step_9" / checkpoints.CHECKSUMS).unlink()
    assert checkpoints.set_aside_damaged(folder, plan(env, "sft").saved) == []
    assert "global_step_9 has no checksums.json: whether its files are what was saved is not known" in capsys.readouterr().err


def test_the_door_itself_looks_before_it_continues_and_says_from_where(env, monkeypatch, capsys):
    folder = started(env, "sft", steps=(5, 9))
    flip_a_bit(folder / "global_step_9" / "model_world_size_2_rank_1.pt")
    ran = []
    monkeypatch.setattr(door, "run_plan", lambda name, planned, _env: ran.append(planned) or 0)
    assert door.run(["sft"], env) == 0
    assert ran[0].resume_step == 5 and (folder / "global_step_9.set-aside").is_dir()
    assert "bridge: continuing from step 5\n" in capsys.readouterr().err


def test_where_all_are_damaged_nothing_is_touched(env):
    folder = started(env, "sft", steps=(5, 9))
    for step in (5, 9):
        flip_a_bit(folder / f"global_step_{step}" / "model_world_size_2_rank_1.pt")
    before = everything(folder)
    result = asked("sft", **env)
    assert result.returncode == 2 and "global_step_5: model_world_size_2_rank_1.pt is not what was saved" in result.stderr
    assert everything(folder) == before


@pytest.mark.parametrize(("change", "fault"), [
    (lambda path: (path / "fsdp_config.json").write_text('{"world_size": 2, "x": 1}'), "fsdp_config.json has "),
    (lambda path: (path / "extra_state_world_size_2_rank_1.pt").unlink(), "extra_state_world_size_2_rank_1.pt is missing"),
    (lambda path: (path / checkpoints.CHECKSUMS).write_text("[1]"), "checksums.json is damaged itself"),
    (lambda path: (path / checkpoints.CHECKSUMS).write_text('{"data.pt": 1}'), "checksums.json is damaged itself"),
])
def test_any_file_that_is_continued_from_counts(tmp_path, change, fault):
    path = write_checkpoint(tmp_path, 1)
    checkpoints.record_checksums(path)
    assert checkpoints.damage(path) == []
    change(path)
    assert fault in checkpoints.damage(path)[0]


def test_a_model_merged_into_the_checkpoint_by_hand_is_no_damage(env):
    # As the tutorial does it: --target_dir .../global_step_4/actor/huggingface.
    folder = started(env, "ppo", MORE, steps=(2, 4))
    merged = folder / "global_step_4" / "actor" / "huggingface"
    (merged / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}')
    (merged / "model.safetensors").write_bytes(b"weights")
    assert checkpoints.set_aside_damaged(folder, SAVED["ppo"]) == [] and plan(env, "ppo", MORE).resume_step == 4


def test_the_data_loaders_state_put_aside_at_an_epochs_end_is_no_damage(tmp_path):
    path = write_checkpoint(tmp_path, 14)
    checkpoints.record_checksums(path)
    checkpoints.prepare_resume(tmp_path, "sft", SAVED["sft"], checkpoints.newest_complete(tmp_path, SAVED["sft"]), 7)
    assert (path / checkpoints.EPOCH_END).is_file() and checkpoints.damage(path) == []


# ---- weights only


def test_weights_alone_are_merged_but_continued_only_when_asked(env):
    folder = started(env, "sft", *WEIGHTS_ONLY, steps=(5, 9))
    with pytest.raises(UsageError, match=r"begin anew with sft: optimizer, sft: extra.*load_contents=\[model\]"):
        plan(env, "sft", *WEIGHTS_ONLY)
    asked = plan(env, "sft", *WEIGHTS_ONLY, "trainer.checkpoint.load_contents=[model]")
    assert asked.resume_step == 9
    assert str(folder / "global_step_9") in merge.plan(settings.read(env), env).command


def test_a_save_cut_short_after_the_weights_can_be_merged_but_not_continued_from(env):
    folder = started(env, "sft", steps=(5, 9))
    (folder / "global_step_9" / "optim_world_size_2_rank_1.pt").unlink()
    assert plan(env, "sft").resume_step == 5
    assert str(folder / "global_step_9") in merge.plan(settings.read(env), env).command


@pytest.mark.parametrize("words", ["[optimizer,extra]", "[modle]", "[model,optimiser]"])
def test_a_run_that_would_save_nothing_of_use_is_refused(env, words):
    with pytest.raises(UsageError, match=r"save_contents=.* has to name model"):
        plan(env, "sft", f"trainer.checkpoint.save_contents={words}")


# ---- what may differ


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_begun_with_one_memory_preset_continues_with_any_other(env, stage):
    started(env, stage, MORE, f"memory/{stage}=80gb", steps=(4,))
    for preset in ("24gb", "40gb", "141gb"):
        # The smallest turns gradient checkpointing and offloading on, the largest keeps vLLM's cache: the machine's business.
        assert plan(env, stage, MORE, f"memory/{stage}={preset}").resume_step == 4


def test_a_reward_that_was_edited_is_another_run(env, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def compute_score(**_): return 1.0\n")
    mine = [MORE, f"custom_reward_function.path={reward}"]
    folder = started(env, "ppo", *mine, steps=(4,))
    assert plan(env, "ppo", *mine).resume_step == 4
    reward.write_text("def compute_score(**_): return 0.0\n")
    with pytest.raises(UsageError, match=r"code\.custom_reward_function\.path: .* -> "):
        plan(env, "ppo", *mine)
    # A run of before such hashes were recorded goes on.
    recorded = record.read(folder.parent)
    del recorded["inputs"]["code"]
    record.write_json(folder.parent / "run.json", recorded, [])
    assert plan(env, "ppo", *mine).resume_step == 4


def test_a_model_with_other_weights_of_the_same_size_is_another_run(env, tmp_path):
    # Read anew at each start where there is a reference model; a merge of another step leaves files of the same sizes.
    model = tmp_path / "mine"
    shutil.copytree(Path(env["WORK_DIR"], "models", "tiny"), model)
    mine = {**env, "MODEL": str(model)}
    folder = started(mine, "ppo", MORE, "actor_rollout_ref.actor.use_kl_loss=True", steps=(4,))
    [file] = model.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UsageError, match=r"weights: .* -> "):
        plan(mine, "ppo", MORE, "actor_rollout_ref.actor.use_kl_loss=True")
    # A run of before they were recorded goes on.
    recorded = record.read(folder.parent)
    del recorded["inputs"]["weights"]
    record.write_json(folder.parent / "run.json", recorded, [])
    assert plan(mine, "ppo", MORE, "actor_rollout_ref.actor.use_kl_loss=True").resume_step == 4


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_second_place_for_checkpoints_is_refused_and_a_run_that_has_one_goes_on_without(env, stage):
    # verl's PPO trainer would save there nothing, and raise NotImplementedError at every resume.
    with pytest.raises(UsageError, match="trainer.default_hdfs_dir is set by the bridge. Use WORK_DIR="):
        plan(env, stage, "trainer.default_hdfs_dir=hdfs://there")
    folder = started(env, stage, MORE, steps=(4,))
    recorded = record.read(folder.parent)
    recorded["config"]["trainer"]["default_hdfs_dir"] = "hdfs://there"
    record.write_json(folder.parent / "run.json", recorded, [])
    assert plan(env, stage, MORE).resume_step == 4


def test_verls_older_way_to_keep_one_checkpoint_is_refused(env):
    with pytest.raises(UsageError, match=r"Use KEEP= instead of '\+trainer.remove_previous_ckpt_in_save=True'"):
        plan(env, "ppo", "+trainer.remove_previous_ckpt_in_save=True")


def test_the_disk_that_is_looked_at_is_the_one_that_checkpoints_go_to(env, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    folder = started(env, "sft", MORE)
    folder.symlink_to(scratch)
    usage, full = shutil.disk_usage(scratch), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full.append(Path(path).resolve()) or usage)
    plan(env, "sft", MORE)
    assert full[-1] == scratch


# ---- a fresh start, and housekeeping


def test_a_fresh_start_keeps_the_log_and_metrics_of_the_try_before(tmp_path):
    for name in ("log.txt", "metrics.jsonl"):
        (tmp_path / name).write_text(f"{name} of before")
    record.keep_previous(tmp_path)
    assert everything(tmp_path) == {f"previous-{name}": f"{name} of before".encode() for name in ("log.txt", "metrics.jsonl")}
    record.keep_previous(tmp_path)
    assert len(everything(tmp_path)) == 2
    for step in ("10", "20"):
        (tmp_path / "samples").mkdir()
        (tmp_path / "samples" / f"{step}.jsonl").touch()
        record.keep_previous(tmp_path)
    # Only those of the last try: a report would mix them.
    assert [file.name for file in tmp_path.glob("*samples/*")] == ["20.jsonl"] and not (tmp_path / "samples").exists()


def test_each_new_checkpoint_gets_its_checksums_once_it_is_whole_and_the_oldest_goes(tmp_path):
    write_checkpoint(tmp_path, 1)
    housekeeping = checkpoints.Housekeeping(tmp_path, SAVED["sft"], 2)
    (write_checkpoint(tmp_path, 2) / "data.pt").unlink()
    housekeeping.look()
    assert not list(tmp_path.glob("*/checksums.json"))
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"global_step_{step}", ignore_errors=True)
        write_checkpoint(tmp_path, step)
        housekeeping.look()
        assert checkpoints.damage(tmp_path / f"global_step_{step}") == []
    assert {path.name for path in tmp_path.iterdir()} == {"global_step_2", "global_step_3"}
    recorded = json.loads((tmp_path / "global_step_3" / checkpoints.CHECKSUMS).read_text())
    assert set(recorded) == {str(file.relative_to(tmp_path / "global_step_3")) for file in (tmp_path / "global_step_3").rglob("*")
                             if file.is_file() and file.name != checkpoints.CHECKSUMS}


def test_what_cannot_be_removed_is_said_once_and_tried_again(tmp_path, monkeypatch, capsys):
    housekeeping = checkpoints.Housekeeping(tmp_path, SAVED["sft"], 2)
    rmtree, fails = shutil.rmtree, [True, True, False]

    def busy(path):
        if fails.pop(0):
            # What NFS leaves of a file that somebody still has open.
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    for expected in (False, False, True):
        assert housekeeping.tolerance(housekeeping.look) == expected
    said = capsys.readouterr().err
    assert said.count("Directory not empty") == 1 and "works again" in said
    assert {path.name for path in tmp_path.iterdir()} == {"global_step_2", "global_step_3"}


def test_a_checkpoint_that_cannot_be_removed_keeps_no_other_from_going(tmp_path, monkeypatch):
    rmtree = shutil.rmtree

    def held(path):
        if path.name == "global_step_1":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", held)
    housekeeping = checkpoints.Housekeeping(tmp_path, SAVED["sft"], 2)
    for step in range(1, 6):
        write_checkpoint(tmp_path, step)
        housekeeping.tolerance(housekeeping.look)
    assert {path.name for path in tmp_path.iterdir()} == {"global_step_1", "global_step_4", "global_step_5"}
    assert housekeeping.tolerance.failing


def test_of_a_checkpoint_that_was_moved_elsewhere_only_the_link_is_removed(tmp_path):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in (1, 2, 3):
        write_checkpoint(folder, step)
    shutil.move(folder / "global_step_1", elsewhere)
    (folder / "global_step_1").symlink_to(elsewhere / "global_step_1")
    assert [path.name for path in checkpoints.prune(folder, SAVED["sft"], 2)] == ["global_step_1"]
    assert (elsewhere / "global_step_1" / "data.pt").is_file() and not (folder / "global_step_1").is_symlink()


def test_what_cannot_be_removed_keeps_no_checkpoint_from_getting_its_checksums(tmp_path, monkeypatch):
    housekeeping = checkpoints.Housekeeping(tmp_path, SAVED["sft"], 2)
    monkeypatch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(errno.ENOTEMPTY, "not empty", str(path))))
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    assert not housekeeping.tolerance(housekeeping.look)
    recorded = [path for path in tmp_path.iterdir() if (path / checkpoints.CHECKSUMS).is_file()]
    assert len(recorded) == 3 and all(checkpoints.damage(path) == [] for path in recorded)


def test_a_removal_that_was_killed_half_way_is_finished_by_the_next_one(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    # What it got to: verl's own file is gone, the shards are there.
    (tmp_path / "global_step_1" / "data.pt").unlink()
    newest = checkpoints.newest_complete(tmp_path, SAVED["sft"])
    assert newest.step == 3 and checkpoints.prepare_resume(tmp_path, "sft", SAVED["sft"], newest, 32) == []
    assert [path.name for path in checkpoints.prune(tmp_path, SAVED["sft"], 2)] == ["global_step_1"]
    assert {path.name for path in tmp_path.glob("global_*")} == {"global_step_2", "global_step_3"}


def test_nothing_is_opened_as_long_as_no_checkpoint_has_appeared(tmp_path, monkeypatch):
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    housekeeping = checkpoints.Housekeeping(tmp_path, SAVED["sft"], 2)
    opened = []
    monkeypatch.setattr(checkpoints, "open", lambda file, *_args, **_options: opened.append(file), raising=False)
    housekeeping.look()
    assert opened == []


def test_a_run_that_ends_in_a_hurry_does_not_wait_for_checksums(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(checkpoints, "record_checksums", lambda _path: release.wait(60))
    monkeypatch.setattr(checkpoints.Housekeeping, "SECONDS", 0.01)
    housekeeping = checkpoints.Housekeeping(tmp_path, SAVED["sft"], 2)
    housekeeping.start()
    write_checkpoint(tmp_path, 1)
    housekeeping.close(hurry=True)
    assert housekeeping.is_alive() or not release.is_set()
    release.set()
    housekeeping.join(10)
    assert not housekeeping.is_alive()


def test_keep_all_keeps_every_checkpoint_and_asks_the_disk_for_all_of_them(env, tmp_path):
    kept = plan({**env, "KEEP": "all"}, "sft", "trainer.save_freq=4")
    assert kept.keep is None
    # 64 steps, one checkpoint in 4.
    [said] = [note for note in kept.notes if note.startswith("checkpoints: ")]
    assert "kept: all" in said, said
    folder = tmp_path / "checkpoints"
    housekeeping = checkpoints.Housekeeping(folder, SAVED["sft"], kept.keep)
    for step in (1, 2, 3, 4):
        write_checkpoint(folder, step)
        housekeeping.look()
    assert list(checkpoints.prune(folder, SAVED["sft"], kept.keep)) == []
    assert [found.step for found in checkpoints.list_checkpoints(folder, SAVED["sft"])] == [1, 2, 3, 4]


# ---- a file system without locks


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys, error):
    def without_locks(*_arguments):
        raise OSError(error, "no locks")

    monkeypatch.setattr(record.fcntl, "lockf", without_locks)
    with record.locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith("process ")
    assert f"{tmp_path} is on a file system without locks" in capsys.readouterr().err


def test_another_error_of_a_lock_is_no_file_system_without_locks(tmp_path, monkeypatch):
    def fails(*_arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(record.fcntl, "lockf", fails)
    with pytest.raises(OSError, match="Input/output error"), record.locked(tmp_path):
        raise AssertionError("it was taken for held")
