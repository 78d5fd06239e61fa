"""The card of a published model (README.md, by configs/model_card.md), and what the licence of its base model asks.
Both come from the records of the stages. Of a path of this machine a card has only the end."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bridge.compose import flatten
from bridge.errors import UsageError, read_json
from bridge.pages import page
from bridge.runs import metrics, record
from bridge.settings import CONFIGS, is_local
from bridge.stages import data, eval, merge, train
from bridge.stages.model import recorded_source
from bridge.standins.models import RANDOM

# The version in the name of a Llama; TinyLlama and open_llama are not Meta's.
LLAMA = re.compile(r"(?<![a-z])llama-?(\d(?:\.\d)?)(?![\d.]*b)", re.IGNORECASE)
# Entries of Llama 3's vocabulary, and its later versions by what they stretch its positions with.
VOCABULARY, VERSIONS = 128256, {8: "3.1", 32: "3.2"}
# What a Llama's licence wants to be shown, and how it wants names to begin: no Llama, Llama 2, 3, and all later ones.
TERMS = {None: ("", ""), "2": ("", ""), "3": ("Built with Meta Llama 3", "Llama-3")}
LATER = ("Built with Llama", "Llama")


class Base(NamedTuple):
    """The model that the first training started from. source: MODEL= as it was, or its folder; licence: as cards have it."""

    folder: Path | None
    source: str
    licence: dict[str, str]
    llama: str | None


def origin(folder: Path) -> tuple[list[dict[str, Any]], Base]:
    """The trainings that a merged model went through, first to last, and its base, followed back from merge to merge."""
    trainings, base = [], folder
    while base and (merged := record.read(base.parent / "merge")):
        shards = Path(merged["attempts"][-1]["command"][-2])
        if base.parent.name != "ckpt":
            # Also where WORK_DIR was moved.
            shards = base.parent / "checkpoints" / str(shards).rpartition("/checkpoints/")[2]
        run, base = merge.run_of(shards), merge.base_of(shards)
        if not base:
            break
        recorded, step = record.read(run), (re.findall(r"global_step_(\d+)", str(shards)) or [""])[-1]
        stage, (config, inputs) = "ppo" if "critic" in recorded["config"] else "sft", record.moved(recorded, run.parents[2])
        rows = [row for row in metrics.read(run / "metrics.jsonl") if row["step"] <= int(step or row["step"])]
        source = source_of(train.data_files(config, "train_files")[0], inputs["data"]["train_files"][0])
        trainings.insert(0, {"stage": stage, "step": step, "course": metrics.course(stage, rows), "source": source,
                             "seed": inputs.get("seed"), "settings": flatten(config), **recorded["attempts"][-1]})
    return trainings, base_model(base if base != folder else None, read_json(folder / "config.json"))


def source_of(file: Path, digest: str) -> str | None:
    """The source of a file of data, if it is still the one of then."""
    return data.recorded_source(file.parent) if file.is_file() and record.sha256(file) == digest else None


def on_hub(source: str | None) -> str | None:
    """The name on the hub of what has this source; None for what is not there."""
    name = data.GSM8K if source == "hub" else (source or "").partition(":")[0]
    return name if "/" in name and not is_local(name) else None


def base_model(folder: Path | None, config: Mapping[str, Any]) -> Base:
    """What a base model's folder says of it. Which Llama it is, its name tells too, and the configuration of what it became."""
    from huggingface_hub import ModelCard

    source, licence = recorded_source(folder).get("source", str(folder)) if folder else "", {}
    if folder and (file := folder / "README.md").is_file():
        try:
            own = ModelCard.load(file, ignore_metadata_errors=True).data
        except (ValueError, yaml.YAMLError) as error:
            raise UsageError(f"{file} does not tell the base model's licence ({error}). Mend or remove its head.") from error
        licence = {key: own[key] for key in ("license", "license_name", "license_link") if isinstance(own.get(key), str)}
    if source == "smollm2":
        return Base(folder, "HuggingFaceTB/SmolLM2-135M-Instruct", {"license": "apache-2.0"}, None)
    name = source.rpartition("/")[2]
    if name == "tiny" or name.startswith((RANDOM, RANDOM.replace(":", "-"))):
        return Base(folder, source, {}, None)
    named = re.fullmatch(r"llama(\d.*)", licence.get("license_name", licence.get("license", ""))) or LLAMA.search(name)
    llama = named and named[1]
    if not llama and config["model_type"] == "llama" and config.get("vocab_size") == VOCABULARY:
        llama = VERSIONS.get((config.get("rope_scaling") or {}).get("factor"), "3")
    return Base(folder, source, licence or ({"license": f"llama{llama}"} if llama else {}), llama)


def term_problems(folder: Path, repo: str) -> list[str]:
    """What keeps a model from being published under this name: the licence of its base model."""
    llama, own = origin(folder)[1].llama, folder / "README.md"
    shown, begin = TERMS.get(llama, LATER)
    lacking = own if own.is_file() and shown not in own.read_text(encoding="utf-8") else None
    return page("llama_terms.txt", repo=repo, llama=llama, begin=begin, shown=shown, lacking=lacking).splitlines()


def accuracies(folder: Path) -> dict[str, Any]:
    """What eval.json says; nothing if this model was not asked, or was merged anew since."""
    output = folder.parent.parent / "eval"
    merged, recorded = record.read(folder.parent / "merge"), record.read(output)
    if not (merged and recorded) or recorded["status"] != "finished" or (
            recorded["attempts"][-1]["started"] < merged["attempts"][-1]["ended"]):
        return {}
    result = read_json(output / eval.RESULT_FILE)
    source = source_of(folder.parents[3] / "data" / "gsm8k" / "test.parquet", recorded["inputs"]["data"])
    return {**result, "source": source} if folder.parent.name in result["models"] else {}


def command(training: Mapping[str, Any], start: str) -> str:
    """What makes a training's model again, with the settings that were given; `start`: MODEL=... or INIT=sft."""
    start, *arguments = (re.sub(r"(?<![\w:/])~?/.*/", ".../", part) for part in (start, *training["command"])
                         if "=" in part and not part.startswith("--"))
    # The door's own settings, what continues a run, and the user's.
    end = next(place for place, part in enumerate(arguments) if part.startswith("trainer.resume_mode="))
    own = {key: value.strip("'") for key, _, value in (part.partition("=") for part in arguments[:end])}
    user = [part for part in arguments[end + 1:] if not part.startswith(("trainer.resume_from_path=", "ray_init.num_cpus="))]
    given = {word: value for key, value in own.items() if re.fullmatch("[A-Z]+=", word := train.OWNED.get(key, ""))}
    given |= {"SEED=": training["seed"], "ARGS=": shlex.join(user), "REWARD=": ":".join(
        own[key] for key in ("custom_reward_function.path", "custom_reward_function.name") if key in own)}
    return shlex.join(["make", training["stage"], start,
                       *(f"{word}{value}" for word, value in given.items() if value not in ("", None))])


def make(folder: Path, repo: str) -> str:
    """The card of a merged model that is published under this name."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    (trainings, base), name = origin(folder), repo.partition("/")[2]
    found, trained_on, results = accuracies(folder), trainings and on_hub(trainings[-1]["source"]), None
    # A reward of one's own gives scores that are no accuracy.
    if found and "reward" not in found:
        figures, asked = found["models"][folder.parent.name], on_hub(found["source"]) or "own"
        results = [EvalResult(task_type="text-generation", dataset_type=asked, dataset_name=asked, dataset_split="test",
                              metric_type="accuracy", metric_name=f"accuracy (%), {figures['rows']} problems",
                              metric_value=round(100 * figures["accuracy"], 2))]
    card = ModelCardData(base_model=on_hub(base.source), **base.licence, datasets=[trained_on] if trained_on else None,
                         library_name="transformers", pipeline_tag="text-generation", eval_results=results,
                         tags=["verl", *(training["stage"] for training in trainings)], model_name=results and name)
    return str(ModelCard.from_template(
        card, str(CONFIGS / "model_card.md"), repo=repo, name=name, base=base, evaluation=found, trainings=trainings,
        stage=folder.parent.name, on_hub=on_hub, command=command, shown=TERMS.get(base.llama, LATER)[0]))
