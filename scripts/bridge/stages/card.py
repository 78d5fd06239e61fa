"""The card of a published model (README.md, by configs/model_card.md), and what the licence of its base model asks.

Both come from the records of the stages. Of a path of this machine a card has only the end.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bridge.compose import flatten
from bridge.errors import UsageError, read_json
from bridge.runs import metrics, record
from bridge.settings import CONFIGS, is_local
from bridge.stages import data, eval, merge, train
from bridge.stages.model import recorded_source
from bridge.standins.models import RANDOM

# What `make model` takes from a package: its name on the hub and its licence.
PACKAGED = {"smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
# The version in the name of a Llama; TinyLlama and open_llama are not Meta's.
LLAMA = re.compile(r"(?<![a-z])llama-?(\d(?:\.\d)?)(?![\d.]*b)", re.IGNORECASE)
# Entries of Llama 3's vocabulary, and its later versions by what they stretch its positions with.
VOCABULARY, VERSIONS = 128256, {8: "3.1", 32: "3.2"}
# What a Llama's licence wants to be shown, and how it wants names to begin.
TERMS = {None: ("", ""), "2": ("", ""), "3": ("Built with Meta Llama 3", "Llama-3")}
LATER = ("Built with Llama", "Llama")
# Settings of verl's that a card shows, given or not.
SHOWN = re.compile(r"(.*\.)?optim\.lr|data\.(train_batch_size|max_\w*length)|trainer\.total_epochs|algorithm\.adv_estimator")
DATA = {None: (None, "data of which no record is left"), "hub": (data.GSM8K, "GSM8K"),
        "builtin": (None, "made-up word problems in GSM8K's form")}


class Base(NamedTuple):
    """The model that the first training started from: what is known of it."""

    folder: Path | None
    source: str  # MODEL=, as it was, or the folder
    hub: str | None  # its name there
    licence: dict[str, str]  # license, license_name and license_link, as cards have them
    llama: str | None  # which Llama it is or was made from


def origin(folder: Path) -> tuple[list[dict[str, Any]], Base]:
    """The trainings that a merged model went through, first to last, and its base, followed back from merge to merge."""
    trainings, base = [], folder
    while base and len(trainings) < 9 and (merged := record.read(base.parent / "merge")):
        shards = Path(merged["attempts"][-1]["command"][-2])
        if base.parent.name != "ckpt":
            # Also where WORK_DIR was moved.
            shards = base.parent / "checkpoints" / str(shards).rpartition("/checkpoints/")[2]
        run, base = merge.run_of(shards), merge.base_of(shards)
        if not (recorded := record.read(run)) or not recorded["config"]:
            break
        stage, (config, inputs) = "ppo" if "critic" in recorded["config"] else "sft", record.moved(recorded, run.parents[2])
        step = (re.findall(r"global_step_(\d+)", str(shards)) or [""])[-1]
        rows = [row for row in metrics.read(run / "metrics.jsonl") if row["step"] <= int(step or row["step"])]
        trainings.insert(0, {
            "stage": stage, "step": step, "course": metrics.course(stage, rows), "attempt": recorded["attempts"][-1],
            "source": source_of(train.data_files(config, "train_files")[0], inputs["data"]["train_files"][0]),
            "seed": inputs.get("seed"),
            "settings": {key: value for key, value in flatten(config).items() if SHOWN.fullmatch(key)}})
    return trainings, base_model(base if base != folder else None, read_json(folder / "config.json"))


def source_of(file: Path, digest: str) -> str | None:
    """The source of a file of data, if it is still the one of then."""
    return data.recorded_source(file.parent) if file.is_file() and record.sha256(file) == digest else None


def named_data(source: str | None) -> tuple[str | None, str]:
    """A data set's name on the hub, if it is there, and what to call it."""
    return DATA.get(source) or ((None, "own data") if is_local(source) else (source.partition(":")[0],) * 2)


def base_model(folder: Path | None, config: Mapping[str, Any]) -> Base:
    """What a base model's folder says of it. Which Llama it is, its name tells too, and the configuration of what it became."""
    from huggingface_hub import ModelCard

    source = recorded_source(folder).get("source", str(folder)) if folder else ""
    hub, known = PACKAGED.get(source, (None if is_local(source) or "/" not in source else source, None))
    licence = {"license": known} if known else {}
    if folder and (file := folder / "README.md").is_file():
        try:
            own = ModelCard.load(file, ignore_metadata_errors=True).data
        except (ValueError, yaml.YAMLError) as error:
            raise UsageError(f"{file} does not tell the base model's licence ({error}). Mend or remove its head.") from error
        licence = {key: own[key] for key in ("license", "license_name", "license_link") if isinstance(own.get(key), str)}
    name = source.rpartition("/")[2]
    named = re.fullmatch(r"llama(\d.*)", licence.get("license_name", licence.get("license", "")))
    llama = (named or LLAMA.search(name) or (None, None))[1]
    if not llama and config["model_type"] == "llama" and config.get("vocab_size") == VOCABULARY:
        llama = VERSIONS.get((config.get("rope_scaling") or {}).get("factor"), "3")
    if name in ("tiny", *PACKAGED) or name.startswith((RANDOM, RANDOM.replace(":", "-"))):
        llama = None
    return Base(folder, source, hub, licence or ({"license": f"llama{llama}"} if llama else {}), llama)


def term_problems(folder: Path, repo: str) -> list[str]:
    """What keeps a model from being published under this name: the licence of its base model."""
    llama, own = origin(folder)[1].llama, folder / "README.md"
    (shown, begin), (owner, _, name) = TERMS.get(llama, LATER), repo.partition("/")
    problems = [] if name.startswith(begin) else [
        f"HF_REPO={repo}: this model was made from Llama {llama}, whose licence wants its name to begin with {begin}. "
        f"Use HF_REPO={owner}/{begin}-{name}, for instance."]
    if own.is_file() and shown not in own.read_text(encoding="utf-8"):
        problems.append(f"{own} does not say {shown!r}, which the licence of Llama {llama} wants. Add it, or remove the file: "
                        "then a card is made.")
    return problems


def accuracies(folder: Path, base: Base) -> dict[str, Any]:
    """What eval.json says of the base and this model; nothing if this one was not asked, or was merged anew since."""
    output, stage = folder.parent.parent / "eval", folder.parent.name
    merged, recorded = record.read(folder.parent / "merge"), record.read(output)
    if not recorded or recorded["status"] != "finished" or (
            merged and recorded["attempts"][-1]["started"] < merged["attempts"][-1].get("ended", "")):
        return {}
    result = read_json(output / eval.RESULT_FILE)
    models = {name: found for name, found in result["models"].items() if name == stage or (
        name == "base" and base.folder and base.folder.name == Path(found["folder"]).name)}
    source = source_of(folder.parents[3] / "data" / "gsm8k" / "test.parquet", recorded["inputs"]["data"])
    return {**result, "models": models, "source": source} if stage in models else {}


def command(training: Mapping[str, Any], base: Base | None) -> str:
    """What makes a training's model again, with the settings that were given; base: of the first training."""
    arguments = [part for part in training["attempt"]["command"] if "=" in part and not part.startswith("--")]
    # The door's own settings, what continues a run, and the user's.
    end = next(place for place, part in enumerate(arguments) if part.startswith("trainer.resume_mode="))
    own = {key: value.strip("'") for key, _, value in (part.partition("=") for part in arguments[:end])}
    user = [part for part in arguments[end + 1:] if not part.startswith(("trainer.resume_from_path=", "ray_init.num_cpus="))]
    given = {"MODEL=": base.source} if base else {"INIT=": "sft"}
    given |= {word: value for key, value in own.items() if re.fullmatch("[A-Z]+=", word := train.OWNED.get(key, ""))}
    given |= {"SEED=": training["seed"], "ARGS=": shlex.join(user), "REWARD=": ":".join(
        own[key] for key in ("custom_reward_function.path", "custom_reward_function.name") if key in own)}
    again = ["make", training["stage"], *(f"{word}{value}" for word, value in given.items() if value not in ("", None))]
    return re.sub(r"(?<![\w:/])~?/[^\s'\"=,\]]*/", ".../", shlex.join(again))


def make(folder: Path, repo: str) -> str:
    """The card of a merged model that is published under this name."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    (trainings, base), name = origin(folder), repo.partition("/")[2]
    found = accuracies(folder, base)
    trained_on, asked = (named_data(made["source"] if made else None) for made in (trainings and trainings[-1], found))
    results, figures = None, found.get("models", {}).get(folder.parent.name)
    # A reward of one's own gives scores that are no accuracy.
    if figures and "reward" not in found:
        results = [EvalResult(
            task_type="text-generation", dataset_type=asked[0] or "own", dataset_name=asked[1], dataset_split="test",
            metric_type="accuracy", metric_name=f"accuracy (%), {figures['rows']} problems",
            metric_value=round(100 * figures["accuracy"], 2))]
    card = ModelCardData(
        base_model=base.hub, **base.licence, datasets=trained_on[0] and [trained_on[0]], library_name="transformers",
        pipeline_tag="text-generation", tags=["verl", *(training["stage"] for training in trainings)],
        model_name=name if results else None, eval_results=results)
    return str(ModelCard.from_template(
        card, str(CONFIGS / "model_card.md"), repo=repo, name=name, base=base, shown=TERMS.get(base.llama, LATER)[0],
        trained_on=trained_on, asked=asked, evaluation=found, trainings=[
            {**training, "command": command(training, None if number else base)} for number, training in enumerate(trainings)]))
