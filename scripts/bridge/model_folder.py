"""What a Hugging Face model folder must hold, and what its small files and headers tell. No torch is needed."""

import math
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from bridge.errors import UsageError, naming, read_json

# What a model folder consists of. Nothing else is fetched or uploaded: no original/*.pth, no GGUF, no records of runs.
MODEL_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*",
               "NOTICE*", "USE_POLICY*", "README*")
OTHER_FILES = (".*", "run.json", "log.txt", "requirements.txt", "consolidated*")


def longest_sequence(folder: Path) -> int | None:
    """Tokens that a model can look at, as vLLM reads its config.json; None for one that does not say."""
    config = read_json(folder / "config.json")
    longest, scaling = config.get("max_position_embeddings"), config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    # These have the factor in max_position_embeddings already.
    if longest is None or kind in (None, "default", "llama3", "longrope", "su"):
        return longest
    if kind == "yarn":
        longest = scaling.get("original_max_position_embeddings", longest)
    return int(longest * scaling.get("factor", 1))


def check_model_folder(folder: Path, cure: str) -> list[str]:
    """What is wrong with a Hugging Face model folder, each with the cure; nothing if it is whole.
    Cheap: reads the small files and the headers of the weights, which also shows files that were cut off."""
    if not folder.is_dir():
        return [f"{folder} does not exist. {cure}"]
    if list(folder.glob("model_world_size_*.pt")):
        return [f"{folder} holds verl's shards (model_world_size_*.pt), not a Hugging Face model. Merge them first: "
                "make merge STAGE=sft, STAGE=ppo or STAGE=ckpt."]
    return [f"{folder} {problem}. {cure}"
            for problem in (*config_problems(folder), *tokenizer_problems(folder), *weight_problems(folder))]


def config_problems(folder: Path) -> list[str]:
    """What is wrong with config.json."""
    if not (folder / "config.json").is_file():
        return ["lacks config.json"]
    try:
        config = read_json(folder / "config.json")
    except ValueError as error:
        return [f"has a config.json that is not JSON ({error})"]
    return [] if isinstance(config, dict) and "model_type" in config else ["has a config.json without model_type"]


def tokenizer_problems(folder: Path) -> list[str]:
    """Which files of a chat model's tokenizer are missing or damaged."""
    problems = []
    for file in (folder / "tokenizer.json", *template_files(folder)):
        try:
            if file.is_file() and file.suffix == ".json" and not isinstance(read_json(file), dict):
                problems.append(f"has a damaged {file.name} (no JSON object)")
            elif file.suffix == ".jinja":
                file.read_text(encoding="utf-8")
        except ValueError as error:
            problems.append(f"has a damaged {file.name} ({error})")
    if problems:
        return problems
    vocabularies = (["tokenizer.json"], ["tokenizer.model"], ["vocab.json", "merges.txt"])
    if not any(all((folder / name).is_file() for name in names) for names in vocabularies):
        problems.append("lacks a tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)")
    if not (folder / "tokenizer_config.json").is_file():
        problems.append("lacks tokenizer_config.json")
    elif not any('"chat_template"' in file.read_text(encoding="utf-8") if file.suffix == ".json" else True
                 for file in template_files(folder)):
        problems.append("has no chat template (a base model? The stages need one that was tuned for chat, "
                        "usually named ...-Instruct)")
    return problems


def weight_problems(folder: Path) -> list[str]:
    """Which weights are missing or damaged."""
    try:
        files = weight_files(folder)
    except ValueError as error:
        return [f"has an index of weights that cannot be read ({error})"]
    if not files:
        return ["lacks weights (model.safetensors, or its parts with model.safetensors.index.json)"]
    problems = []
    for file in files:
        if not file.is_file():
            problems.append(f"lacks {file.name}, which its index names")
        elif file.suffix == ".safetensors":
            try:
                tensor_shapes(file)
            except ValueError as error:
                problems.append(f"has a damaged {file.name} ({error})")
    return problems


def template_files(folder: Path) -> list[Path]:
    """The files that may hold a chat template."""
    names = ("tokenizer_config.json", "chat_template.json", "chat_template.jinja")
    return [folder / name for name in names if (folder / name).is_file()]


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that transformers would load, there or not; safetensors before .bin.
    An index that is not of the known form is a ValueError."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            content = read_json(index)
            if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
                raise ValueError(f"{index.name} has no weight_map")
            if not all(isinstance(part, str) and Path(part).name == part for part in content["weight_map"].values()):
                raise ValueError(f"the weight_map of {index.name} holds what is no file's name")
            return sorted({folder / part for part in content["weight_map"].values()})
    return []


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor in a file of safetensors; a ValueError where it is of another format or was cut off."""
    from safetensors import SafetensorError, safe_open

    try:
        with naming(file), safe_open(file, framework="np") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise ValueError(f"{error}: cut off, or only a pointer of git-lfs?") from error


def parameter_count(folder: Path) -> int:
    """Parameters of a whole model folder; embeddings that are tied count once, even if they are stored twice.
    .bin files have no header: their size and the configuration's dtype tell."""
    config = read_json(folder / "config.json")
    shapes, count = {}, 0
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            shapes.update(tensor_shapes(file))
        else:
            count += file.stat().st_size // (2 if config.get("torch_dtype") in ("bfloat16", "float16") else 4)
    if config.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    return count + sum(math.prod(shape) for shape in shapes.values())


def attention_heads(folder: Path) -> int | None:
    """Number of attention heads, which tensor parallelism divides; None for an architecture that names them otherwise."""
    heads = read_json(folder / "config.json").get("num_attention_heads")
    return heads if isinstance(heads, int) else None


def is_model_file(name: str) -> bool:
    """Whether a file directly in the folder belongs to the model."""
    return (any(fnmatchcase(name, pattern) for pattern in MODEL_FILES)
            and not any(fnmatchcase(name, pattern) for pattern in OTHER_FILES))


def check_space(folder: Path, size: int) -> None:
    """Refuse a download that the disk cannot hold: a UsageError with both sizes."""
    fetched = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if size - fetched > free:
        raise UsageError(f"the model needs {(size - fetched) / 1e9:.1f} GB more, and only {free / 1e9:.1f} GB are free at "
                         f"{folder.parent}. Make room, or set WORK_DIR to a larger disk.")
