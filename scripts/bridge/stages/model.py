"""[image] The base model as a Hugging Face folder: fetched whole from the hub, or a local one.   bridge model
MODEL=/folder is used as it is, smollm2 is a real small model without a hub, tiny a random one for rehearsals,
random:llama-3.2-1b random weights of a real model's shape for measuring speed."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path

from bridge import model_folder
from bridge.errors import UsageError, exit_status, full_disk_explained, nearest, read_json, refuse, say
from bridge.pages import page
from bridge.plan import Plan
from bridge.runs import record
from bridge.settings import Settings, is_local, repository_problems
from bridge.standins.models import RANDOM, convert_smollm2, make_random, make_tiny, shapes

# Says what models/NAME was made from: two organisations may use the same last name.
SOURCE_FILE = ".bridge-source.json"
LOCK = ".lock"
# The date that Llama 3's chat template itself falls back to where it is given no clock.
FROZEN_DAY = date(2024, 7, 26)
# strftime_now("%d %b %Y") in a template; in JSON its quotes are escaped.
CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>\\?["'])(?P<format>.*?)(?P=quote)\s*\)""")
OFFLINE_CURE = ("Compute nodes often have no internet: run `make model` on a login node first (WORK_DIR must be shared). "
                "Or use a folder that you have (MODEL=/folder), or the small model of a package (MODEL=smollm2).")
AGAIN = "Run `make model` again: what was fetched is kept."
# How the names of a model's weights end.
WEIGHTS = (".safetensors", ".bin")
LOGIN_CURE = "Put a token into HF_TOKEN (in .env), or log in once with `huggingface-cli login`."


def plan(settings: Settings, env: Mapping[str, str]) -> Plan:
    """Check what can be checked without asking the hub, and say what to run. A UsageError names what is wrong or missing."""
    name, folder = settings.model, settings.model_dir
    command = [sys.executable, "-m", "bridge.stages.model", str(folder) if is_local(name) else name, str(folder)]
    if name == "tiny":
        command.append(str(settings.data_dir / "train.parquet"))
    finished = already_there(name, folder)
    notes = []
    if is_local(name) and depends_on_day(folder):
        notes.append(f"the chat template in {folder} writes today's date into every prompt, so runs on two days differ. "
                     "The folder is yours and stays as it is; models that `make model` fetches get a fixed date.")
    if finished is None:
        check_source(name, settings.data_dir / "train.parquet", env)
    # A local model's own folder is only read.
    record_dir = settings.work_dir / "models" if is_local(name) else folder
    return Plan(command, {}, record_dir, keep_log=False, notes=notes, finished=finished)


def check_source(name: str, texts: Path, env: Mapping[str, str]) -> None:
    """Refuse a name of no known form, offline mode and missing data: what making a model needs."""
    if problem := name_problem(name):
        raise UsageError(problem)
    if name == "tiny":
        if not texts.is_file():
            raise UsageError(f"MODEL=tiny makes its tokenizer from {texts}, which does not exist. Run `make data` first.")
    elif is_offline(env) and name != "smollm2" and not name.startswith(RANDOM):
        raise UsageError(f"MODEL={name} is not in WORK_DIR/models yet, and HF_HUB_OFFLINE forbids fetching it. {OFFLINE_CURE}")


def name_problem(name: str) -> str | None:
    """Why a model cannot have this name; None for a name of a known form, whether the model is there or not."""
    shape = name.removeprefix(RANDOM)
    if name.startswith(RANDOM) and shape not in shapes():
        return (f"MODEL={name!r}: no such shape. There are: {', '.join(RANDOM + known for known in shapes())}."
                f"{nearest(shape.lower(), shapes())}")
    if is_local(name) or name in ("tiny", "smollm2") or name.startswith(RANDOM):
        return None
    if name.count("/") == 1:
        return next(iter(repository_problems("MODEL", name)), None)
    return (f"MODEL={name!r} is none of: a name on the hub (OWNER/NAME), a folder (/..., ./..., ~/...), smollm2, tiny, "
            f"{RANDOM}SHAPE.{nearest(name.lower(), ['smollm2', 'tiny', RANDOM])}")


def source_problems(name: str, folder: Path) -> list[str]:
    """Why a folder below models/ that `make model` made is not this model's; nothing if it is, is not there, or elsewhere."""
    source = recorded_source(folder).get("source", name)
    return [] if is_local(name) or source == name else [
        f"{folder} holds {source}, not MODEL={name}. Move it away, or use another WORK_DIR for this one."]


def is_offline(env: Mapping[str, str]) -> bool:
    """Whether huggingface_hub was told not to use the network; the words are its own."""
    return env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


# ---- whether there is anything left to do

def already_there(name: str, folder: Path) -> str | None:
    """Why nothing is left to do; None if the model has yet to be made. A folder damaged, or another model's: a UsageError."""
    if is_local(name):
        refuse(model_folder.check_model_folder(folder, "Give the folder of a whole Hugging Face model: MODEL=/folder."))
        return f"MODEL={folder} is whole and used as it is ({model_folder.parameter_count(folder):,} parameters)"
    if not folder.exists() or not any(folder.iterdir()):
        return None
    source = recorded_source(folder).get("source")
    if source is None:
        raise UsageError(f"{folder} is there, but `make model` did not make it. Use it as it is with MODEL={folder}, "
                         "or move it away.")
    refuse(source_problems(name, folder)
           or model_folder.check_model_folder(folder, f"Remove {folder} and run `make model` again."))
    return f"{folder} is there and whole ({name}, {model_folder.parameter_count(folder):,} parameters)"


def recorded_source(folder: Path) -> dict[str, str]:
    """What a folder was made from; nothing where that is not recorded, or the record was cut off."""
    with suppress(ValueError):
        if (folder / SOURCE_FILE).is_file() and isinstance(source := read_json(folder / SOURCE_FILE), dict):
            return source
    return {}


# ---- the date in the chat template

def depends_on_day(folder: Path) -> bool:
    """Whether the chat template asks for today's date."""
    return any("strftime_now(" in file.read_text(encoding="utf-8") for file in model_folder.template_files(folder))


def freeze_folder(folder: Path) -> bool:
    """Replace today's date in the chat template by FROZEN_DAY, its own fallback; tell whether there was one."""
    changed = False
    for file in model_folder.template_files(folder):
        text = file.read_text(encoding="utf-8")
        frozen = CLOCK.sub(lambda call: f"{call['quote']}{FROZEN_DAY.strftime(call['format'])}{call['quote']}", text)
        if frozen != text:
            file.write_text(frozen, encoding="utf-8")
            changed = True
    if depends_on_day(folder):
        say("the chat template asks for today's date in a way that is not known here: runs depend on the day")
    return changed


# ---- from the hub

@contextmanager
def hub_errors_explained(what: str, **cures: str | bool) -> Iterator[None]:
    """Turn the hub's refusals into what the user can do about them: configs/pages/hub.txt, which says what is asked for here."""
    import requests
    from huggingface_hub import constants

    try:
        yield
    except (ConnectionError, requests.exceptions.RequestException) as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        if said := page("hub.txt", what=what, error=error, kinds=kinds, hub=constants.ENDPOINT, login=LOGIN_CURE, **cures):
            raise UsageError(said) from error
        raise


def wanted_files(names: list[str]) -> list[str]:
    """Which files of a repository are fetched; .bin weights only where there are no safetensors."""
    wanted = [name for name in names if "/" not in name and model_folder.is_model_file(name)]
    if any(name.endswith(".safetensors") for name in wanted):
        wanted = [name for name in wanted if not name.startswith("pytorch_model")]
    return wanted


def ask_hub(name: str):
    """What the hub says of a model (huggingface_hub's ModelInfo). One without weights that can be trained is a UsageError."""
    from huggingface_hub import HfApi

    api = HfApi()
    # A gated model's information is public. This asks whether its files may be read, before minutes of fetching.
    api.auth_check(name)
    info = api.model_info(name, files_metadata=True)
    if not any(file.endswith(WEIGHTS) for file in wanted_files([file.rfilename for file in info.siblings])):
        raise UsageError(f"MODEL={name} has no weights that can be trained (no safetensors). Use another MODEL.")
    return info


def fetch(name: str, info, folder: Path) -> None:
    """Fetch a model of which the hub has said `info` into a folder that may hold part of it. A UsageError if that cannot be."""
    from huggingface_hub import snapshot_download

    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    wanted = wanted_files(list(sizes))
    weights = [file for file in wanted if file.endswith(WEIGHTS)]
    source = {"source": name, "commit": info.sha}
    if recorded_source(folder) == source:
        say(f"continuing the download in {folder}")
    else:
        empty(folder)
    (folder / SOURCE_FILE).write_text(json.dumps(source))
    model_folder.check_space(folder, sum(sizes[file] for file in wanted))
    for files in ([file for file in wanted if file not in weights], weights):
        # Weights last: a model without a chat template is refused within seconds. By commit: uploads cannot mix versions.
        snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=files)
        # Where the hub cannot be reached snapshot_download only warns and returns what is there.
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise UsageError(f"the hub could not be reached while fetching MODEL={name}; still missing: "
                             f"{', '.join(missing)}. {AGAIN}")
        refuse(f"MODEL={name} {problem}. Use another MODEL."
               for problem in (*model_folder.config_problems(folder), *model_folder.tokenizer_problems(folder)))
    if freeze_folder(folder):
        say(f"the chat template of {name} writes today's date into every prompt; in our copy it is "
            f"{FROZEN_DAY:%d %b %Y}, the template's own fallback, so that runs do not depend on the day")
    # The client's notes for continuing, and its locks.
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def empty(folder: Path) -> None:
    """Remove what is in a folder, but for its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


# ---- whole or not at all

def make(name: str, folder: Path, texts: Path) -> str:
    """Make the model's folder unless it is there; return what there is to say about it."""
    if finished := already_there(name, folder):
        return finished
    made_here = name in ("tiny", "smollm2") or name.startswith(RANDOM)
    # What the hub refuses leaves nothing behind.
    info = None if made_here else ask_hub(name)
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with (record.locked(partial, "Wait for it: this command then finds the model there."),
          full_disk_explained(lambda: f"Make room in {folder.parent}, or set WORK_DIR to a larger disk. {AGAIN}")):
        # Another process may have made it before the lock was ours.
        if finished := already_there(name, folder):
            shutil.rmtree(partial, ignore_errors=True)
            return finished
        if not made_here:
            fetch(name, info, partial)
        else:
            empty(partial)
            if name == "tiny":
                make_tiny(partial, texts)
            elif name == "smollm2":
                convert_smollm2(partial)
            else:
                make_random(name.removeprefix(RANDOM), partial)
            (partial / SOURCE_FILE).write_text(json.dumps({"source": name}))
        refuse(model_folder.check_model_folder(partial, f"Remove {partial} and run `make model` again."))
        os.rename(partial, folder)
        (folder / LOCK).unlink()
    return f"{name}: {model_folder.parameter_count(folder):,} parameters in {folder}"


def main() -> None:
    """What the stage runs: MODEL, the folder where it will be, and the data from which tiny's tokenizer is made."""
    name, folder, *texts = sys.argv[1:]
    with hub_errors_explained(f"MODEL={name}", again=AGAIN, offline=OFFLINE_CURE, asks_rights=False):
        print(make(name, Path(folder), Path(*texts)))


if __name__ == "__main__":
    sys.exit(exit_status(main))
