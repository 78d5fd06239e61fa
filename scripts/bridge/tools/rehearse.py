"""bridge rehearse: the whole chain, small, with verl's real trainers, on this machine (CPU or one GPU).
Works in WORK_DIR/rehearsal, where it first removes what an earlier one made. The upload is only shown: nothing is sent."""

import json
import time
from collections.abc import Mapping

import pyarrow.parquet

from bridge import hardware, model_folder
from bridge.errors import UsageError, say
from bridge.pages import page
from bridge.runs import checkpoints, metrics
from bridge.settings import Settings, is_local
from bridge.stages.eval import RESULT_FILE
from bridge.tools import trial

# Only shown. A MODEL= that is a Llama wants its name.
REPOSITORY = "rehearsal/Llama-bridge"
# The stages, and what their environment has besides. A node that is to stay offline, or has no login, shows the upload, too.
STEPS = {"data": {}, "model": {}, "sft": {}, "merge sft": {"STAGE": "sft"},
         "ppo": {"INIT": "sft"}, "merge ppo": {"STAGE": "ppo"}, "eval": {"LIMIT": "8"},
         "upload": {"STAGE": "ppo", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "nothing-is-sent"}}


def run(settings: Settings, env: Mapping[str, str], arguments: list[str]) -> int:
    """Run the chain and print the table; stops at the first stage that fails and returns its exit status."""
    if arguments:
        raise UsageError(f"rehearse takes no arguments; got {' '.join(arguments)}. MODEL=, DATA_SOURCE= and GPUS= apply.")
    gpus = hardware.visible_gpus(env)
    ranks = settings.gpus or (1 if gpus else 2)
    name = env.get("MODEL") or "tiny"
    # A relative folder is meant from where the person stands, which stays the same here.
    chain, chain_env = trial.inside(
        settings.work_dir / "rehearsal", env, MODEL=name, DATA_SOURCE=env.get("DATA_SOURCE") or "builtin",
        PROFILE=profile(name, ranks), GPUS=str(ranks), ALGO=settings.algo, HF_REPO=REPOSITORY)
    if env.get("MODEL") and not gpus and not is_local(settings.model) and ("/" in settings.model or ":" in settings.model):
        # On the hub, or of a real model's shape: exported for the real run, most likely.
        raise UsageError(f"MODEL={settings.model} is too large to rehearse without a GPU. Use `make rehearse MODEL=tiny "
                         "DATA_SOURCE=builtin`, MODEL=smollm2 or a folder with a small model.")
    with trial.own_folder(chain, env, trial.made(chain), new_model=True):
        rows = []
        for name, more in STEPS.items():
            say(f"--- {name}")
            started = time.monotonic()
            shown = ["--dry-run"] if name == "upload" else []
            if status := trial.stage(name.split()[0], {**chain_env, **more}, shown):
                say(f"the rehearsal stopped at {name}; the next one begins anew")
                return status
            rows.append((name, time.monotonic() - started, outcome(name, chain)))
    print(page("stages.txt", rows=rows))
    return 0


def profile(model_name: str, ranks: int) -> str:
    """The file of configs/profile/ that fits this model and so many ranks."""
    return "eight" if ranks > 2 else "tiny" if model_name == "tiny" else "rehearsal"


def outcome(name: str, settings: Settings) -> str:
    """What a step left behind, read from its files."""
    if name == "data":
        return " + ".join(str(pyarrow.parquet.read_metadata(settings.data_dir / f"{split}.parquet").num_rows)
                          for split in ("train", "test")) + " rows"
    if name == "model":
        return f"{settings.model_dir.name}, {model_folder.parameter_count(settings.model_dir) / 1e6:.3g} M parameters"
    if name in ("sft", "ppo"):
        return metrics.course(name, metrics.read(settings.stage_dir(name) / "metrics.jsonl"))
    if name.startswith("merge "):
        merged = settings.merged_dir(name.split()[1])
        return f"{checkpoints.size(merged) / 1e6:.3g} MB, {merged}"
    if name == "eval":
        found = json.loads((settings.stage_dir("eval") / RESULT_FILE).read_text())
        return f"{found['rows']} rows, accuracy " + ", ".join(
            f"{which} {result['accuracy']:.3f}" for which, result in found["models"].items())
    return f"only shown: {settings.merged_dir('ppo')} would go to the hub"
