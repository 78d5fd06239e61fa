"""Plan the two stages that verl trains, sft and ppo: what they share."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml

from bridge import hardware, model_folder
from bridge.compose import compose, compose_checked, flatten, quote
from bridge.environment import lock_problems
from bridge.errors import UsageError, refuse
from bridge.pages import page
from bridge.plan import Plan
from bridge.runs import checkpoints, record, tracking
from bridge.settings import CONFIGS, Settings, is_local
from bridge.stages import data, model, ppo, reward, sft

TRAINERS = {"sft": sft, "ppo": ppo}
# Keys that only the door sets, and the setting that does.
OWNED: dict[str, str] = yaml.safe_load((CONFIGS / "owned.yaml").read_text(encoding="utf-8"))
# Keys that SEED= sets. (Of the rest takes care trainers.loopback.)
SEEDS = {"sft": ("trainer.seed",), "ppo": ("data.seed", "actor_rollout_ref.rollout.seed")}
# Profiles small enough for a machine without a GPU.
ON_CPU = ("rehearsal", "tiny", "eight")
# Profiles whose micro batches are so many rows, whatever the GPU. All others get a file of configs/memory/.
BY_ROWS = ("tutorial", *ON_CPU)
# What the users have: shown in a dry run where no GPU is visible.
ASSUMED_MEMORY = 80
# What verl's configuration asks of the environment, where only its numbers are looked at.
NAMES = dict.fromkeys(("WORK_DIR", "BRIDGE_MODEL_DIR", "BRIDGE_STAGE_DIR", "BRIDGE_RUN_NAME", "WANDB_PROJECT"), "")
DATA_KEYS = ("train_files", "val_files")


def plan(stage: str, settings: Settings, env: Mapping[str, str], overrides: list[str], dry_run: bool) -> Plan:
    """Check one training stage and say what to run. A UsageError names all that is wrong with what it is given."""
    trainer = TRAINERS[stage]
    notes: list[str] = []
    problems: list[str] = interface_problems(env)
    gpus, on_cpu = choose_hardware(settings, env, notes, problems, dry_run)
    stage_dir = settings.stage_dir(stage)
    model_dir = settings.merged_dir("sft") if stage == "ppo" and settings.init == "sft" else settings.model_dir
    from_sft = model_dir != settings.model_dir
    called = settings.algo if stage == "ppo" else stage
    if stage == "ppo":
        notes.append(f"INIT={settings.init}: actor and critic start from {model_dir}")
    own_env = {
        "WORK_DIR": str(settings.work_dir),
        "BRIDGE_MODEL_DIR": str(model_dir),
        "BRIDGE_STAGE_DIR": str(stage_dir),
        "BRIDGE_RUN_NAME": f"{settings.run}_{called}{'_from_sft' if from_sft else ''}",
        "WANDB_PROJECT": settings.wandb_project,
        "WANDB_DIR": str(stage_dir),
        # Everything was fetched before: a compute node without internet must not wait for the hub.
        "HF_HUB_OFFLINE": "1",
        # For what verl draws without a setting: trainers.loopback.
        **({} if settings.seed is None else {"BRIDGE_SEED": str(settings.seed)}),
        **trainer.environment(env),
    }
    tp = [f"actor_rollout_ref.rollout.tensor_model_parallel_size={settings.tp}"] if stage == "ppo" and settings.tp else []
    own = [f"profile/{stage}={settings.profile}", *([f"device/{stage}=cpu"] if on_cpu else []),
           *([f"algo={settings.algo}"] if stage == "ppo" and settings.algo != "ppo" else []), *tp,
           *([f"++{key}={settings.seed}" for key in SEEDS[stage]] if settings.seed is not None else [])]
    if stage == "ppo" and settings.reward:
        own += [f"custom_reward_function.{key}={quote(str(value))}" for key, value in zip(("path", "name"), settings.reward,
                                                                                          strict=True)]
    if settings.profile not in BY_ROWS and not any(text.startswith(f"memory/{stage}=") for text in overrides):
        own.append(f"memory/{stage}={memory_preset(stage, hardware.visible_gpus(env), notes)}")
    if gpus is None:
        # A dry run on a machine without GPUs: shown for as many as the configuration says.
        gpus = compose(stage, own, own_env)["trainer"]["n_gpus_per_node"]
        notes.append(f"GPUS is not given and no GPU is visible here: shown for {gpus}")
    own.append(f"trainer.n_gpus_per_node={gpus}")
    nodes = settings.nodes
    world = gpus * nodes
    if nodes > 1:
        own.append(f"trainer.nnodes={nodes}")
        problems += node_problems(settings, env, gpus, dry_run)
    try:
        config = compose_checked(stage, own, overrides, own_env, OWNED)
    except UsageError as error:
        # The rest is checked without them, so that all mistakes are named at once.
        problems += error.problems
        config, overrides = compose(stage, own, own_env), []
    problems += whole_run_problems(stage, config) + trainer.setting_problems(config, overrides)
    rows = data_problems(config, trainer.columns(config), problems)
    name_problem = None if from_sft else model.name_problem(settings.model)
    cure = page("first_model.txt", from_sft=from_sft, name=settings.model, local=is_local(settings.model))
    model_problems = [name_problem] if name_problem else model_folder.check_model_folder(model_dir, cure) or (
        [] if from_sft else model.source_problems(settings.model, model_dir))
    problems += model_problems
    heads = None if model_problems else model_folder.attention_heads(model_dir)
    visible = hardware.visible_gpus(env)
    if stage == "ppo":
        problems += trainer.folder_problems(own_env["RAY_TMPDIR"]) + hardware.vllm_problems(visible)
        problems += [] if model_problems else trainer.model_problems(config, model_dir, visible)
    if faults := trainer.divisibility(config, world, heads):
        possible = [n for n in range(1, 65) if not trainer.divisibility(config, n * nodes, heads)]
        problems += page("not_divisible.txt", gpus=gpus, nodes=nodes, faults=faults, possible=possible).split("\n")
    if rows and settings.profile not in ON_CPU and data.recorded_source(settings.data_dir) == "builtin":
        notes.append(f"warning: {settings.data_dir} holds made-up problems, not GSM8K. Move it away, then `make data "
                     "DATA_SOURCE=hub`")
    if rows:
        problems += step_problems(config, rows[0]) + trainer.validation_problems(config, world, rows[1])
        if data.is_own(data.recorded_source(settings.data_dir)) and not model_problems:
            files = tuple(file for key in DATA_KEYS for file in data_files(config, key))
            lengths = data.lengths(files, trainer.TEXTS, model_dir, " ".join(map(record.sha256, files)))
            problems += data.length_problems(config["data"], lengths, notes)
        if stage == "ppo":
            problems += reward_problems(settings, config, notes)
    refuse(problems)

    made = Plan(
        command=[], env=own_env, record_dir=stage_dir, keep_log=True, notes=notes, config=config,
        inputs={"seed": settings.seed,
                "data": {key: [record.sha256(file) for file in data_files(config, key)] for key in DATA_KEYS},
                "model": model_fingerprint(model_dir),
                # A reference model is read anew at each start, and a merge of another step has files of the same sizes.
                "weights": [checkpoints.checksum(file) for file in sorted(model_dir.glob("*.safetensors"))],
                # The user's own code (a reward, a data set), by the key that names it.
                "code": {key: record.sha256(Path(value)) for key, value in flatten(config).items()
                         if str(value).endswith(".py") and Path(value).is_file()}},
        checkpoints=stage_dir / "checkpoints", saved=checkpoints.contents(stage, config), keep=settings.keep,
        hang_seconds=settings.hang_seconds,
        # The last, smaller batch of an epoch is dropped.
        steps_per_epoch=(in_one := rows[0] // config["data"]["train_batch_size"]),
        steps=config["trainer"]["total_training_steps"] or in_one * config["trainer"]["total_epochs"])
    newest, finished = check_continuation(stage, settings, made, overrides)
    if finished:
        return Plan(**{**vars(made), "notes": [], "finished": finished})
    check_disk(stage, settings, made, model_folder.parameter_count(model_dir), notes)
    resume_step = newest.step if newest else 0
    resume = (["trainer.resume_mode=disable"] if newest is None else
              ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={quote(str(newest.path))}"])
    if newest:
        notes += [f"{checkpoint.path.name} is incomplete ({checkpoint.faults[0]}): it will be set aside"
                  for checkpoint in checkpoints.newer_incomplete(made.checkpoints, made.saved, newest.step)]
        notes.append(f"continuing from {newest.path} (step {newest.step})")
    tracking.go_offline(config, env, own_env, notes, dry_run)
    if stage == "ppo":
        resume.append(f"ray_init.num_cpus={trainer.cpus(config, gpus, hardware.cpu_count())}")
        if on_cpu:
            own_env["BRIDGE_CPU_RANKS"] = str(gpus)
    if not on_cpu:
        limit_gpus(gpus, env, own_env, notes)
        if visible and (few := hardware.core_problem(hardware.cpu_count(), gpus)):
            notes.append(f"warning: {few}")
        notes += [f"warning: {problem}" for problem in (*hardware.driver_problems(hardware.driver_version()),
                                                        *hardware.infiniband()[1], *lock_problems(settings.work_dir))]
    notes.insert(0, page("training.txt", called=called, gpus=gpus, on_cpu=on_cpu, settings=settings, from_sft=from_sft))
    arguments = ["--config-dir", str(CONFIGS), "--config-name", stage, *own, *resume, *overrides]
    command = trainer.command(gpus, [*(["bridge.trainers.on_cpu"] if on_cpu else []), *trainer.modules(config)], arguments, nodes)
    return Plan(**{**vars(made), "command": command, "resume_step": resume_step})


def choose_hardware(settings: Settings, env: Mapping[str, str], notes: list[str], problems: list[str],
                    dry_run: bool) -> tuple[int | None, bool]:
    """Return (GPUs or ranks, whether on CPU). What is wrong with the hardware is a problem, in a dry run only a note."""
    gpus = hardware.visible_gpus(env)
    if not gpus and settings.profile in ON_CPU:
        notes.append(f"no GPU visible: on {hardware.cpu_count()} CPU cores, over gloo")
        return settings.gpus or 2, True
    if len(gpus) < (settings.gpus or 1):
        found = [page("too_few_gpus.txt", settings=settings, gpus=gpus, visible=env.get("CUDA_VISIBLE_DEVICES"))]
    else:
        found = busy_problems(settings, gpus[:settings.gpus])
    problems += [] if dry_run else found
    notes += [f"warning: {problem}" for problem in found if dry_run]
    return settings.gpus or len(gpus) or None, False


def node_problems(settings: Settings, env: Mapping[str, str], gpus: int, dry_run: bool) -> list[str]:
    """What keeps several nodes from training together."""
    problems = []
    if not (env.get("BRIDGE_NODES_DIR") or dry_run):
        problems.append(f"NODES={settings.nodes}: make submit starts trainings over several nodes. Use it, or NODES=1.")
    if env.get("NCCL_SOCKET_IFNAME", "").lstrip("=") == "lo":
        problems.append("NCCL_SOCKET_IFNAME=lo: over lo no node reaches another. Leave it out, or name a network card.")
    if gpus % (settings.tp or 1):
        problems.append(f"TP={settings.tp} does not divide the {gpus} GPUs of a node: one copy of the model has to fit into it.")
    return problems


def memory_preset(stage: str, gpus: list[hardware.Gpu], notes: list[str]) -> str:
    """Name of the file of configs/memory/ for the smallest of these GPUs: the largest that is not larger (24gb below all)."""
    presets = sorted(int(file.stem.removesuffix("gb")) for file in CONFIGS.glob(f"memory/{stage}/*gb.yaml"))
    memory = min((gpu.memory for gpu in gpus), default=ASSUMED_MEMORY * 10**9)
    chosen = max([preset for preset in presets if preset * 10**9 <= memory], default=presets[0])
    seen = f"{gpus[0].name}, {memory / 10**9:.0f} GB" if gpus else f"no GPU visible; {ASSUMED_MEMORY} GB assumed"
    notes.append(f"memory/{stage}={chosen}gb: how many tokens go onto a GPU at once ({seen})")
    return f"{chosen}gb"


def busy_problems(settings: Settings, gpus: list[hardware.Gpu]) -> list[str]:
    """One problem, if any of the GPUs is in use and may not be shared; nothing else."""
    busy = [gpu for gpu in gpus if gpu.memory_used > 0.1 * gpu.memory]
    if settings.share_gpu or not busy:
        return []
    return ["; ".join(f"GPU {gpu.device} is in use ({gpu.memory_used / 2**30:.0f} of {gpu.memory / 2**30:.0f} GiB)"
                      for gpu in busy) + ". Name free ones with CUDA_VISIBLE_DEVICES=, or use SHARE_GPU=1."]


def limit_gpus(gpus: int, env: Mapping[str, str], own_env: dict[str, str], notes: list[str]) -> None:
    """Let the trainer see only as many GPUs as it uses: the first of those visible."""
    visible = hardware.visible_gpus(env)
    names = ",".join(gpu.device for gpu in visible[:gpus])
    if len(visible) > gpus or names != env.get("CUDA_VISIBLE_DEVICES", names):
        own_env["CUDA_VISIBLE_DEVICES"] = names
        notes.append(f"CUDA_VISIBLE_DEVICES={names} (the first {gpus} of {len(visible)})")
    elif env.get("CUDA_VISIBLE_DEVICES"):
        notes.append(f"CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']} (as given)")


def interface_problems(env: Mapping[str, str], folder: Path = Path("/sys/class/net")) -> list[str]:
    """NCCL_SOCKET_IFNAME that matches no card of this machine: NCCL would stop minutes later (nccl#1837).
    Its grammar: names or beginnings of names, by comma; "=" before them asks for the whole name, "^" excludes."""
    wanted = env.get("NCCL_SOCKET_IFNAME", "")
    cards = sorted(card.name for card in folder.iterdir()) if folder.is_dir() else []
    exact, names = wanted.startswith("="), wanted.lstrip("=").split(",")
    if not wanted or wanted.startswith("^") or any(
            card == name or (not exact and card.startswith(name)) for card in cards for name in names):
        return []
    return [f"NCCL_SOCKET_IFNAME={wanted}: no such network card here; there are {', '.join(cards)}. Name one of them, or leave "
            "it out (then it is lo, which is as fast within a node)."]


def whole_run_problems(stage: str, config: Mapping[str, Any]) -> list[str]:
    """What verl would take, and then train or save something else."""
    problems = [f"{key}={rank}: only whole models are trained here. verl's merger drops LoRA's adapters, so that the merged "
                f"model would be the untouched base, and vLLM's multi-step engine does not take them. Use {key}=0."
                for key, rank in flatten(config).items() if key.endswith("model.lora_rank") and (rank or 0) > 0]
    problems += [f"{key}={old}: this module is called {new} now. Use {key}={new}."
                 for key, value in flatten(config).items() if key.endswith("external_lib")
                 for old, new in record.RENAMED_MODULES.items() if value == old]
    known = (*checkpoints.ALL, "hf_model")
    problems += [f"save_contents=[{', '.join(kinds)}] of {part if stage == 'ppo' else stage}: it has to name model, and no other "
                 f"words than {', '.join(known)}." for part, kinds in checkpoints.contents(stage, config).items()
                 if "model" not in kinds or set(kinds) - set(known)]
    if "console" not in config["trainer"]["logger"]:
        problems.append(f"trainer.logger={config['trainer']['logger']}: metrics and progress are read from what verl prints. Use "
                        "[console], or [console,wandb].")
    return problems


def step_problems(config: Mapping[str, Any], rows: int) -> list[str]:
    """Too few training rows for a step, or for all steps: verl would end well without any, or without the last checkpoint."""
    asked, epochs = config["trainer"]["total_training_steps"], config["trainer"]["total_epochs"]
    batch = config["data"]["train_batch_size"]
    in_one = rows // batch
    if in_one and (asked is None or asked <= in_one * epochs):
        return []
    return [page("too_few_rows.txt", rows=rows, batch=batch, in_one=in_one, asked=asked, epochs=epochs)]


def data_files(config: Mapping[str, Any], key: str) -> list[Path]:
    """The parquet files that a configuration names; verl takes one name or a list."""
    value = config["data"][key]
    return [Path(os.path.expanduser(file)) for file in (value if isinstance(value, list) else [value])]


def data_problems(config: Mapping[str, Any], columns: list[str], problems: list[str]) -> tuple[int, int] | None:
    """Training and validation rows; None where a file or a column ("a.b": a field of a struct) is missing, said in problems."""
    counts = dict.fromkeys(DATA_KEYS, 0)
    before = len(problems)
    for key in DATA_KEYS:
        for path in data_files(config, key):
            if not path.is_file():
                problems.append(f"no data at {path}. Run `make data` first.")
                continue
            try:
                parquet = pyarrow.parquet.ParquetFile(path)
            except (ValueError, OSError) as error:
                # Arrow has no number for what it cannot read in a file, the system has.
                if getattr(error, "errno", None):
                    raise
                problems.append(f"{path} is no parquet file ({error}). Run `make data` again.")
                continue
            names = parquet.schema_arrow.names
            present = {*names, *parquet.schema_arrow.empty_table().flatten().column_names}
            if missing := [column for column in columns if column not in present]:
                problems.append(f"{path} has no column {', '.join(missing)} (it has {', '.join(names)}). "
                                "Make it with `make data`.")
            counts[key] += parquet.metadata.num_rows
    return None if len(problems) > before else tuple(counts.values())


def reward_problems(settings: Settings, config: Mapping[str, Any], notes: list[str]) -> list[str]:
    """Answers that only a reward of one's own can judge where there is none, or one that does not do."""
    own = config["custom_reward_function"]
    if not own["path"]:
        made = record.read(settings.data_dir)
        return [] if not made or made["attempts"][-1]["command"][-2] != "text" else [
            f"the answers in {settings.data_dir} were taken as they are, and verl's scorer wants a number. Say what judges them: "
            "REWARD=FILE.py:FUNCTION."]
    file = Path(own["path"])
    try:
        notes.append(reward.tried(file, own["name"], record.sha256(file) if file.is_file() else "",
                                  json.dumps(own.get("reward_kwargs") or {}), data_files(config, "train_files")[0]))
    except UsageError as error:
        return error.problems
    return []


def model_fingerprint(folder: Path) -> dict[str, Any]:
    """What identifies a model folder without reading gigabytes: its configuration's hash and the sizes of its weights."""
    return {"config": record.sha256(folder / "config.json"),
            "weights": {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}}


def check_continuation(stage: str, settings: Settings, planned: Plan,
                       overrides: Sequence[str]) -> tuple[checkpoints.Checkpoint | None, str | None]:
    """Compare with what the run folder holds, and change nothing there.
    Returns the checkpoint to continue from (None: a fresh start), and why nothing is left to do (None if something is)."""
    recorded, folder = record.read(planned.record_dir), planned.checkpoints
    found = checkpoints.list_checkpoints(folder, planned.saved)
    newest = next((checkpoint for checkpoint in reversed(found) if checkpoint.complete), None)
    if recorded is None:
        if found:
            raise UsageError(f"{folder} holds checkpoints but no run.json beside it says what they were made "
                             "with. Give this run another name (RUN=NAME), or move them away.")
        return None, None
    reached = newest.step if newest else 0
    # A run ended after its last save is finished too (verl would do one step more), unless that checkpoint was lost since.
    done = reached >= planned.steps or (recorded["status"] == "finished" and reached >= recorded["last_step"])
    if not found and not done:
        # Nothing to continue: a run that failed before its first checkpoint may be started with other settings.
        if recorded["last_step"]:
            planned.notes.append(f"warning: {folder} held step {recorded['last_step']} and is empty: this run begins anew")
        return None, None
    if lines := record.difference(recorded, planned):
        raise UsageError(page("other_settings.txt", run=settings.run, folder=planned.record_dir, lines=lines, owned=OWNED))
    if done:
        where = f"newest checkpoint: {newest.path}" if newest else "it was to save no checkpoint"
        return newest, f"{stage} of run {settings.run!r} is finished ({where}). Nothing to do; RUN=NAME starts another."
    if newest is None:
        raise UsageError(checkpoints.none_usable(
            folder, [f"{checkpoint.path.name}: {'; '.join(checkpoint.faults[:3])}" for checkpoint in found]))
    lost = [f"{part if stage == 'ppo' else stage}: {kind}" for part, kinds in planned.saved.items()
            for kind in checkpoints.ALL if kind not in kinds]
    if lost and not any("load_contents" in text for text in overrides):
        raise UsageError(page("begun_anew.txt", path=newest.path, lost=lost, saved=planned.saved,
                              keys=checkpoints.LOAD_CONTENTS[stage]))
    return newest, None


def check_disk(stage: str, settings: Settings, planned: Plan, parameters: int, notes: list[str]) -> None:
    """Compare the disk that checkpoints need with what is free: a UsageError if that is too little."""
    if planned.config["trainer"]["save_freq"] <= 0 and stage == "ppo":
        return
    one = checkpoints.expected_size(planned.saved, parameters)
    # SFT without save_freq saves once, at the end. While one is written, the others are still there.
    most = 1 if planned.config["trainer"]["save_freq"] <= 0 else (settings.keep or 1) + 1
    folder = planned.checkpoints
    used = sum(checkpoints.size(path) for _, path in checkpoints.step_folders(folder))
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    needed, free = max(0, most * one - used), shutil.disk_usage(existing).free
    notes.append(page("disk.txt", one=one, keep=settings.keep, needed=needed, free=free, work_dir=settings.work_dir))
    if needed > free:
        raise UsageError(f"too little disk in {settings.work_dir}: {most} checkpoints of {one / 1e9:.3g} GB need "
                         f"{needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free. Make room, or put WORK_DIR elsewhere.")
