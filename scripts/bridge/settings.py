"""Every setting a person may give: read from the environment once, checked all at once. .env.example explains each name.
`.env` itself is read on the host (scripts/host/container.sh)."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from bridge.errors import nearest, refuse

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
# The settings that only have a default, a least value or a form.
SIMPLE = yaml.safe_load((CONFIGS / "settings.yaml").read_text(encoding="utf-8"))
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN")
# What the tutorial left for the reader to replace.
PLACEHOLDER = re.compile(r"YOU_[A-Z_]+")
# Names become folders, run names (wandb's have at most 128 characters) and parts of a command.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
NUMBER = re.compile(r"[0-9]{1,9}")
REWARD = re.compile(r"(.+\.py):([A-Za-z_]\w*)")
# Control characters, and what Python makes of bytes that are not UTF-8.
UNREADABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# datasets (PPO, eval) and vLLM take a path with one of these for a pattern, and find other files or none.
PATTERN = re.compile(r"[\[*?]|::")


@dataclass(frozen=True)
class Settings:
    """The checked settings. Paths are absolute; numbers that were not given are None (then they are measured)."""

    work_dir: Path
    run: str
    profile: str
    algo: str
    model: str
    data_source: str
    question: str
    answer: str
    reward: tuple[Path, str] | None
    seed: int | None
    init: str
    stage: str | None
    step: int | None
    ckpt: Path | None
    limit: int | None
    gpus: int | None
    nodes: int
    tp: int | None
    share_gpu: bool
    keep: int | None
    hang_seconds: int | None
    hf_repo: str | None
    public: bool
    wandb_project: str

    @property
    def data_dir(self) -> Path:
        """Folder of train.parquet and test.parquet."""
        return self.work_dir / "data" / "gsm8k"

    @property
    def model_dir(self) -> Path:
        """Folder of the base model: a local MODEL as it is, any other below models/ under its own name."""
        if is_local(self.model):
            return Path(os.path.abspath(os.path.expanduser(self.model)))
        name = {"smollm2": "SmolLM2-135M-Instruct"}.get(self.model, self.model.rsplit("/", 1)[-1])
        # random:SHAPE: a colon is a trouble in paths.
        return self.work_dir / "models" / name.replace(":", "-")

    @property
    def run_dir(self) -> Path:
        return self.work_dir / "runs" / self.run

    def stage_dir(self, stage: str) -> Path:
        return self.run_dir / stage

    def merged_dir(self, stage: str) -> Path:
        return self.stage_dir(stage) / "merged"


def is_local(name: str) -> bool:
    """Tell a folder from a name on the hub: folders are written with a leading /, ./, ../ or ~."""
    return name.startswith(("/", "./", "../", "~"))


def path_problems(name: str, value: str, path: Path) -> list[str]:
    """What is wrong with a folder's name, whether the folder is there or not."""
    cure = "Use a folder of another name, or a symbolic link of another name to this one."
    problems = []
    if value.startswith("~") and os.path.expanduser(value) == value:
        problems.append(f"{name}={value!r}: it is not known here which folder {value.split('/')[0]} is. Write the whole path.")
    if found := PATTERN.search(str(path)):
        problems.append(f"{name}={str(path)!r} has {found[0]!r} in it, which libraries take for a pattern of names. {cure}")
    if name == "WORK_DIR" and "global_step_" in str(path):
        problems.append(f"{name}={str(path)!r} has 'global_step_' in it, where verl reads a checkpoint's step. {cure}")
    return problems


def repository_problems(name: str, value: str) -> list[str]:
    """What is wrong with the name of a repository on the hub, as the hub's own client judges."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(value)
    except HFValidationError as error:
        return [f"{name}={value!r} is no name on the hub: {error}"]
    return [] if value.count("/") == 1 else [f"{name}={value!r} is not of the form OWNER/NAME."]


def read(env: Mapping[str, str], several_runs: bool = False) -> Settings:
    """Read and check the settings; an empty value counts as not given. A UsageError names every mistake found.
    several_runs: RUN= is a list by comma."""
    problems: list[str] = []

    def given(name: str, default: str | None = None) -> str | None:
        value = env.get(name, "").strip()
        if PLACEHOLDER.search(value):
            problems.append(f"{name}={value!r} still holds the tutorial's placeholder. Put your own name there.")
        if UNREADABLE.search(value):
            problems.append(f"{name}={value!r} holds a control character, or bytes that are not UTF-8. Leave them out.")
        return value or default

    def choice(name: str, known: list[str], default: str | None) -> str | None:
        value = given(name, default)
        if value is not None and value not in known:
            problems.append(f"{name}={value!r} is unknown. Use one of: {', '.join(known)}.{nearest(value, known)}")
        return value

    def number(name: str, least: int, example: str) -> int | None:
        value = given(name)
        if value is not None and NUMBER.fullmatch(value) and int(value) >= least:
            return int(value)
        if value is not None:
            problems.append(f"{name}={value!r} is not {example}. Use a whole number of at least {least}.")
        return None

    run = given("RUN", "default")
    # verl looks for "global_step_" in the whole path of a checkpoint.
    problems += [f"RUN={name!r} is not a run's name. Use letters, digits, '.', '_' and '-', at most 100 of them: RUN=lr-2e-6."
                 for name in (run.split(",") if several_runs else [run]) if not NAME.fullmatch(name) or "global_step_" in name]
    keep = None if env.get("KEEP", "").strip() == "all" else number(
        "KEEP", 2, "a number of checkpoints (while one is written the other must still be there), or all") or 2
    repo = given("HF_REPO")
    problems += repository_problems("HF_REPO", repo) if repo else []
    given("WANDB_ENTITY")
    problems += [f"{name} {otherwise}" for name, (form, otherwise) in SIMPLE["forms"].items()
                 if env.get(name) and not re.fullmatch(form, env[name])]
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        if env.get(name) and not os.path.exists(env[name]):
            problems.append(f"{name}={env[name]!r}: no such file here. Give the whole path of a file with certificates.")
    reward = given("REWARD", "")
    if not (found := REWARD.fullmatch(reward)) and reward:
        problems.append(f"REWARD={reward!r} is not of the form FILE.py:FUNCTION.")
    work_dir = given("WORK_DIR", "work")
    settings = Settings(
        work_dir=Path(os.path.abspath(os.path.expanduser(work_dir))),
        run=run,
        profile=choice("PROFILE", sorted({file.stem for file in CONFIGS.glob("profile/*/*.yaml")}), "tuned"),
        algo=choice("ALGO", ["ppo", *sorted(file.stem for file in CONFIGS.glob("algo/*.yaml"))], "ppo"),
        reward=(Path(os.path.abspath(os.path.expanduser(found[1]))), found[2]) if found else None,
        init=choice("INIT", ["base", "sft"], "base"),
        stage=choice("STAGE", ["base", "sft", "ppo", "ckpt"], None),
        ckpt=Path(os.path.abspath(os.path.expanduser(ckpt))) if (ckpt := given("CKPT")) else None,
        nodes=number("NODES", 1, "a number of nodes") or 1,
        share_gpu=choice("SHARE_GPU", ["0", "1"], "0") == "1",
        keep=keep,
        hf_repo=repo,
        public=choice("PUBLIC", ["0", "1"], "0") == "1",
        **{name.lower(): given(name, default) for name, default in SIMPLE["texts"].items()},
        **{name.lower(): number(name, *limits) for name, limits in SIMPLE["numbers"].items()},
    )
    problems += path_problems("WORK_DIR", work_dir, settings.work_dir)
    if is_local(settings.model):
        problems += path_problems("MODEL", settings.model, settings.model_dir)
    refuse(problems)
    return settings
