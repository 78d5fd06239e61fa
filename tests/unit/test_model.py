"""The model stage: the real huggingface_hub client against the stand-in hub, and models made without a hub."""

import datetime
import json
import struct
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hub_fixture import LLAMA_TEMPLATE, model_files, run_module, write_files

from bridge import model_folder
from bridge import settings as settings_module
from bridge.errors import UsageError, read_json
from bridge.stages import model
from bridge.standins import models
from door import TRAINER
from downloads_hub import Account, DownloadsHub

LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
NOT_NEEDED = {"original/consolidated.00.pth": b"x", "original/params.json": b"{}", "model.gguf": b"x",
              "pytorch_model.bin": b"x", ".gitattributes": b"x", "train.py": b"x", "consolidated.safetensors": b"x"}
NEEDED = {**model_files(LLAMA_TEMPLATE), "LICENSE.txt": b"Llama", "generation_config.json": b"{}"}
TOKENS = {"hf_alice": Account("alice", may_write=False), "hf_bob": Account("bob")}


@pytest.fixture
def hub(tmp_path):
    with DownloadsHub(tmp_path / "hub", TOKENS) as server:
        server.add_model(LLAMA, {**NEEDED, **NOT_NEEDED}, gated=True, granted={"alice"})
        yield server


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "models" / "Llama-3.2-1B-Instruct"


def run_model(hub, folder, name=LLAMA, token="hf_alice", **env):
    result = run_module("model", name, folder, env={**hub.env(token), **env})
    output = result.stdout + result.stderr
    assert token is None or token not in output
    assert result.returncode == 0 or "Traceback" not in output, output
    return result


def with_header(header) -> bytes:
    """A file of safetensors of two bytes, whatever its header says."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(2)


def objects_fetched(hub):
    return [path for method, path in hub.requests if method == "GET" and path.startswith("/objects/")]


# ---- from the hub

def test_only_what_is_needed_is_fetched(hub, folder):
    result = run_model(hub, folder)
    assert result.returncode == 0, result.stderr
    assert {file.name for file in folder.iterdir()} == {*NEEDED, model.SOURCE_FILE}
    unchanged = NEEDED.keys() - {"tokenizer_config.json"}
    assert all((folder / name).read_bytes() == NEEDED[name] for name in unchanged)
    assert json.loads((folder / model.SOURCE_FILE).read_text())["source"] == LLAMA
    assert "48 parameters" in result.stdout
    assert not list(folder.parent.glob(".*"))


def test_access_is_asked_before_anything_is_fetched(hub, folder):
    run_model(hub, folder)
    assert hub.requests[0] == ("GET", f"/api/models/{LLAMA}/auth-check")


def test_a_model_that_is_there_is_not_asked_for_again(hub, folder):
    run_model(hub, folder)
    hub.requests.clear()
    result = run_model(hub, folder)
    assert result.returncode == 0 and "is there and whole" in result.stdout
    assert hub.requests == []


def test_bin_weights_are_fetched_where_there_are_no_safetensors():
    assert model.wanted_files(["config.json", "pytorch_model.bin", "x.bin"]) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(("token", "cure"), [(None, "HF_TOKEN"), ("hf_bob", "account whose token this is")])
def test_gated_model_names_the_licence_page_and_the_cure(hub, folder, token, cure):
    result = run_model(hub, folder, token=token)
    assert result.returncode == 2
    assert f"gated: its licence must be accepted at {hub.url}/{LLAMA} first" in result.stderr and cure in result.stderr
    assert not folder.parent.exists()


@pytest.mark.parametrize(("name", "token", "said"), [
    ("meta-llama/Llama-3.2-2B", "hf_alice", "is private and your token may not read it"),
    ("meta-llama/Llama-3.2-2B", None, "is private and your token may not read it"),
    (LLAMA, "hf_wrong", "does not accept your token (401)"),
])
def test_refusals_are_explained(hub, folder, name, token, said):
    result = run_model(hub, folder, name=name, token=token)
    assert result.returncode == 2 and said in result.stderr and "HF_TOKEN" in result.stderr
    assert not folder.parent.exists()


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_no_network_names_the_ways_out(hub, folder, env):
    result = run_model(hub, folder, **env)
    assert result.returncode == 2
    assert all(cure in result.stderr for cure in ("login node", "MODEL=/folder", "MODEL=smollm2"))


def test_interrupted_download_is_continued(hub, folder):
    # One file arrives whole, the next is cut in the middle, then the links have expired.
    hub.transfers_allowed = 1
    result = run_model(hub, folder)
    assert result.returncode == 2 and "un `make model` again" in result.stderr
    assert not folder.exists(), "an unfinished model must not look like one"
    partial = folder.with_name(f".{folder.name}.partial")
    arrived = {file.name for file in partial.glob("*.safetensors")}
    assert len(arrived) == 1
    hub.transfers_allowed, hub.requests[:] = None, []
    result = run_model(hub, folder)
    assert result.returncode == 0 and "continuing the download" in result.stderr
    assert len(objects_fetched(hub)) == 1
    assert not any("config.json" in path for _, path in hub.requests)
    assert all((folder / name).read_bytes() == NEEDED[name] for name in NEEDED if name.endswith("safetensors"))
    assert not partial.exists()


def test_two_at_once_do_not_get_into_each_others_way(hub, folder):
    partial = folder.with_name(f".{folder.name}.partial")
    write_files(partial, {"half": b"of the first one's download"})
    code = ("import sys\nfrom pathlib import Path\nfrom bridge.runs import record\n"
            "with record.locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", code, str(partial)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        result = run_model(hub, folder)
        assert result.returncode == 2 and f"another run works in {partial} (process {holder.pid}" in result.stderr
        assert "Wait for it: this command then finds the model there." in result.stderr
        assert (partial / "half").read_bytes() and not folder.exists() and objects_fetched(hub) == []
    finally:
        holder.communicate()
    assert run_model(hub, folder).returncode == 0
    assert {file.name for file in folder.iterdir()} == {*NEEDED, model.SOURCE_FILE}


def test_what_another_process_has_made_meanwhile_is_taken(tmp_path, monkeypatch):
    folder = tmp_path / "models" / "Llama-3.2-1B-Instruct"

    def asked(name: str) -> None:
        write_files(folder, {**model_files(), model.SOURCE_FILE: json.dumps({"source": name}).encode()})

    monkeypatch.setattr(model, "ask_hub", asked)
    assert "is there and whole" in model.make(LLAMA, folder, tmp_path)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")])
def test_a_disk_that_fills_while_a_model_is_made_is_named(tmp_path, monkeypatch, error):
    def full(*_arguments):
        raise error

    monkeypatch.setattr(model, "convert_smollm2", full)
    with pytest.raises(UsageError, match=f"the disk is full: .*Make room in {tmp_path}.*Run `make model` again"):
        model.make("smollm2", tmp_path / "smollm2", tmp_path)


def test_another_error_while_a_model_is_made_stays_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "convert_smollm2", lambda _folder: [][0])
    with pytest.raises(IndexError):
        model.make("smollm2", tmp_path / "smollm2", tmp_path)


def test_a_record_of_the_source_that_was_cut_off_starts_the_download_afresh(hub, folder):
    partial = folder.with_name(f".{folder.name}.partial")
    write_files(partial, {model.SOURCE_FILE: b"", "old": b"x"})
    assert run_model(hub, folder).returncode == 0
    assert {file.name for file in folder.iterdir()} == {*NEEDED, model.SOURCE_FILE}
    (folder / model.SOURCE_FILE).write_text("[1]")
    result = run_model(hub, folder)
    assert result.returncode == 2 and "`make model` did not make it" in result.stderr


def test_interrupted_download_of_an_older_version_is_started_afresh(hub, folder):
    hub.transfers_allowed = 1
    run_model(hub, folder)
    hub.transfers_allowed = None
    hub.add_model(LLAMA, {**NEEDED, "LICENSE.txt": b"new"})
    result = run_model(hub, folder)
    assert result.returncode == 0 and "continuing" not in result.stderr
    assert (folder / "LICENSE.txt").read_bytes() == b"new"


def test_same_last_name_of_another_organisation_is_refused(hub, folder):
    run_model(hub, folder)
    hub.add_model("someone/Llama-3.2-1B-Instruct", NEEDED)
    hub.requests.clear()
    result = run_model(hub, folder, name="someone/Llama-3.2-1B-Instruct")
    assert result.returncode == 2 and f"holds {LLAMA}, not MODEL=someone/" in result.stderr
    assert hub.requests == []


def test_model_without_chat_template_is_refused_before_its_weights_are_fetched(hub, folder):
    hub.add_model("org/base", {**NEEDED, "tokenizer_config.json": b"{}"})
    result = run_model(hub, folder, name="org/base")
    assert result.returncode == 2 and "has no chat template" in result.stderr
    assert objects_fetched(hub) == []


def test_an_empty_folder_does_not_count_as_a_model(hub, folder):
    folder.mkdir(parents=True)
    assert run_model(hub, folder).returncode == 0
    assert (folder / "config.json").is_file() and not (folder / ".lock").exists()


def test_damaged_model_is_refused(hub, folder):
    run_model(hub, folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    result = run_model(hub, folder)
    assert result.returncode == 2
    assert "lacks model-00002-of-00002.safetensors" in result.stderr and "Remove" in result.stderr


# ---- the date

def rendered(folder, monkeypatch, day):
    """The prompt that transformers makes on a day."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return day

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    chat_template_utils._compile_jinja_template.cache_clear()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_prompt_does_not_depend_on_the_day(tmp_path, monkeypatch, where):
    from tokenizers import Tokenizer, models

    files = model_files(LLAMA_TEMPLATE)
    if where == "chat_template.jinja":
        files |= {"tokenizer_config.json": b'{"bos_token": "<s>"}', where: LLAMA_TEMPLATE.encode()}
    write_files(tmp_path / "m", files)
    Tokenizer(models.BPE()).save(str(tmp_path / "m" / "tokenizer.json"))
    days = datetime.datetime(2025, 1, 2), datetime.datetime(2026, 3, 4)
    before = [rendered(tmp_path / "m", monkeypatch, day) for day in days]
    assert "02 Jan 2025" in before[0] and "04 Mar 2026" in before[1]
    assert model.depends_on_day(tmp_path / "m")
    assert model.freeze_folder(tmp_path / "m")
    assert not model.depends_on_day(tmp_path / "m") and not model.freeze_folder(tmp_path / "m")
    after = [rendered(tmp_path / "m", monkeypatch, day) for day in days]
    assert after[0] == after[1] == before[0].replace("02 Jan 2025", "26 Jul 2024")


def test_freezing_the_date_is_said_and_changes_nothing_else(hub, folder):
    result = run_model(hub, folder)
    assert "26 Jul 2024" in result.stderr and "do not depend on the day" in result.stderr
    fetched = NEEDED["tokenizer_config.json"].decode()
    frozen = (folder / "tokenizer_config.json").read_text()
    assert frozen == fetched.replace(r'strftime_now(\"%d %b %Y\")', r'\"26 Jul 2024\"') != fetched


# ---- a local folder

def planned(tmp_path, name, **env):
    return model.plan(settings_module.read({"WORK_DIR": str(tmp_path), "MODEL": str(name)}), env)


def test_local_folder_is_used_as_it_is(tmp_path):
    folder = write_files(tmp_path / "mine", model_files(LLAMA_TEMPLATE))
    plan = planned(tmp_path, folder)
    assert "used as it is (48 parameters)" in plan.finished
    assert any("today's date" in note for note in plan.notes)
    result = run_module("model", *plan.command[3:], env={})
    assert result.returncode == 0 and "used as it is" in result.stdout
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == model_files(LLAMA_TEMPLATE)


def test_everything_wrong_with_a_local_folder_is_named_at_once(tmp_path):
    folder = write_files(tmp_path / "mine", {"README.md": b""})
    with pytest.raises(UsageError) as caught:
        planned(tmp_path, folder)
    text = str(caught.value)
    for missing in ("lacks config.json", "lacks a tokenizer", "lacks tokenizer_config.json", "lacks weights"):
        assert missing in text
    assert all("MODEL=/folder" in problem for problem in caught.value.problems)


def test_missing_local_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        planned(tmp_path, tmp_path / "nowhere")


@pytest.mark.parametrize(("name", "data", "said"), [
    ("model-00002-of-00002.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "only a pointer of git-lfs"),
    ("model-00001-of-00002.safetensors", model_files()["model-00001-of-00002.safetensors"][:-1], "cut off"),
    ("model.safetensors.index.json", b"{}", "no weight_map"),
    ("config.json", b"{", "not JSON"),
    ("config.json", b"{}", "without model_type"),
    ("model_world_size_2_rank_0.pt", b"", "make merge"),
    ("config.json", b"\xff\xfe", "not JSON"),
    ("config.json", b"[" * 100_000, "not JSON"),
    ("tokenizer.json", b'{"model": {"vocab"', "a damaged tokenizer.json"),
    ("tokenizer.json", b"\xff\xfe\x00", "a damaged tokenizer.json"),
    ("tokenizer.json", b"[]", "a damaged tokenizer.json"),
    ("tokenizer_config.json", b'{"chat_template": "\xff"}', "a damaged tokenizer_config.json"),
    ("chat_template.jinja", b"\xff\xfe", "a damaged chat_template.jinja"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": 5}}', "what is no file's name"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "../b"}}', "what is no file's name"),
    ("model.safetensors.index.json", b"\xff", "an index of weights that cannot be read"),
    ("model-00002-of-00002.safetensors", b"", "damaged model-00002"),
    ("model-00002-of-00002.safetensors", with_header({"a": {"dtype": "BF16", "shape": [1]}}), "damaged model-00002"),
    ("model-00002-of-00002.safetensors", with_header({"a": {"dtype": "BF16", "shape": "x", "data_offsets": [0, 2]}}), "damaged"),
    ("model-00002-of-00002.safetensors", with_header({"a": {"dtype": "BF16", "shape": [9], "data_offsets": [0, 2]}}), "damaged"),
    ("model-00002-of-00002.safetensors", with_header({"a": 3}), "damaged model-00002"),
    ("model-00002-of-00002.safetensors", with_header([]), "damaged model-00002"),
])
def test_damaged_files_are_recognised(tmp_path, name, data, said):
    folder = write_files(tmp_path / "mine", {**model_files(), name: data})
    [problem] = model_folder.check_model_folder(folder, "Mend it.")
    assert said in problem


def test_parameters_are_counted_once_where_embeddings_are_tied(tmp_path):
    files = model_files()
    folder = write_files(tmp_path / "tied", files)
    assert model_folder.parameter_count(folder) == 8 * 4 + 4 * 4
    untied = write_files(tmp_path / "untied", {**files, "config.json": b'{"model_type": "llama"}'})
    assert model_folder.parameter_count(untied) == 2 * 8 * 4 + 4 * 4
    assert (model_folder.attention_heads(folder), model_folder.attention_heads(untied)) == (4, None)
    odd = write_files(tmp_path / "odd", {**files, "config.json": b'{"model_type": "x", "num_attention_heads": "8"}'})
    assert model_folder.attention_heads(odd) is None


# ---- what the door asks before the start

def test_plan_of_a_hub_model(tmp_path):
    plan = planned(tmp_path, LLAMA)
    assert plan.command[1:] == ["-m", "bridge.stages.model", LLAMA, str(tmp_path / "models" / "Llama-3.2-1B-Instruct")]
    assert plan.record_dir == tmp_path / "models" / "Llama-3.2-1B-Instruct" and plan.finished is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "env", "said"), [
    ("Smollm", {}, "Did you mean smollm2"),
    ("Llama-3.2-1B-Instruct", {}, "OWNER/NAME"),
    ("llama", {}, "OWNER/NAME.*smollm2, tiny, random:SHAPE"),
    ("random:Llama3.2-1B", {}, "no such shape. There are: .* Did you mean llama-3.2-1b"),
    ("random", {}, "Did you mean random:"),
    ("tiny", {}, "Run `make data` first"),
    ("me/-x", {}, "MODEL='me/-x' is no name on the hub"),
    ("me/x/y", {}, "OWNER/NAME"),
    (LLAMA, {"HF_HUB_OFFLINE": "1"}, "login node"),
])
def test_plan_refuses_what_cannot_work(tmp_path, name, env, said):
    with pytest.raises(UsageError, match=said):
        planned(tmp_path, name, **env)


def test_folder_that_make_model_did_not_make_is_refused(tmp_path):
    write_files(tmp_path / "models" / "tiny", model_files())
    with pytest.raises(UsageError, match="did not make it. Use it as it is with MODEL=/"):
        planned(tmp_path, "tiny")


# ---- without a hub

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two tiny models, made one after the other: in a new Python, and in one that has another order of its sets."""
    work = tmp_path_factory.mktemp("tiny")
    rows = [{"prompt": [{"role": "user", "content": f"Tom has {n} apples and buys {n + 2}. How many apples has Tom?"}],
             "extra_info": {"answer": f"{n} + {n + 2} = {2 * n + 2} apples.\n#### {2 * n + 2}"}} for n in range(300)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), work / "train.parquet")
    for name, preloaded in (("one", None), ("two", TRAINER)):
        result = run_module("model", "tiny", work / name, work / "train.parquet", env={}, preloaded=preloaded)
        assert result.returncode == 0, result.stderr
    return work


def test_tiny_is_the_same_every_time(tiny):
    files = sorted(file.name for file in (tiny / "one").iterdir())
    assert files == sorted(file.name for file in (tiny / "two").iterdir())
    assert all((tiny / "one" / name).read_bytes() == (tiny / "two" / name).read_bytes() for name in files)


def test_tiny_is_a_whole_small_model(tiny):
    assert model_folder.check_model_folder(tiny / "one", "Mend it.") == []
    assert model_folder.attention_heads(tiny / "one") == 4
    assert 100_000 < model_folder.parameter_count(tiny / "one") < 200_000
    assert "is there and whole" in model.already_there("tiny", tiny / "one")


def test_tiny_writes_any_text_and_ends_its_answers(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "one")
    network = AutoModelForCausalLM.from_pretrained(tiny / "one")
    assert sum(weight.numel() for weight in network.parameters()) == model_folder.parameter_count(tiny / "one")
    text = "Tom has 12,345 apples.\n日本語 too"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    settings = network.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    prompt = [{"role": "user", "content": "How many?"}]
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
    assert network.generate(inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs.shape[1]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The real small model; its conversion takes half a minute."""
    folder = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    result = run_module("model", "smollm2", folder, env={})
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.long
def test_smollm2_is_a_whole_bf16_model(smollm2):
    assert model_folder.check_model_folder(smollm2, "Mend it.") == []
    assert model_folder.parameter_count(smollm2) == 134_515_008
    assert model_folder.attention_heads(smollm2) == 9
    assert not (smollm2 / "tokenizer.model").exists()
    assert sum(file.stat().st_size for file in smollm2.iterdir()) < 280e6


@pytest.mark.long
def test_smollm2_has_the_tokenizer_of_the_hub(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (1, 2, 49152)
    # No bos is put before a text, digits stand alone, and blank lines before a digit stay together.
    assert tokenizer.tokenize("has 12\n\n34") == ["has", "Ġ", "1", "2", "ĊĊ", "3", "4"]
    assert tokenizer("has").input_ids == tokenizer.convert_tokens_to_ids(["has"])
    text = "She pays $1,234.50 -- 日本語.\n\n#### 7"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.long
def test_smollm2_answers_and_stops(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                          add_generation_prompt=True, return_tensors="pt")
    answer = network.generate(asked, attention_mask=asked.new_ones(asked.shape), max_new_tokens=40, do_sample=False)
    answer = answer[0, asked.shape[1]:]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


# ---- random weights of a shape

@pytest.mark.parametrize(("shape", "count"), [
    # Those of the models on the hub.
    ("llama-3.2-1b", 1_235_814_400), ("llama-3.2-3b", 3_212_749_824),
    ("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304)])
def test_a_shape_has_the_parameters_of_the_real_model(shape, count):
    assert models.empty_model(shape).num_parameters() == count


def test_every_shape_has_its_parameters_tested():
    [counted] = [mark for mark in test_a_shape_has_the_parameters_of_the_real_model.pytestmark if mark.name == "parametrize"]
    assert {shape for shape, _ in counted.args[1]} == set(models.shapes())


@pytest.fixture(scope="module")
def random_models(tmp_path_factory):
    """The same small shape made twice; its vocabulary is larger than the tokenizer's, as with the real shapes."""
    small = {**read_json(models.SHAPES / "llama-3.2-1b.json"), "vocab_size": 50000, "hidden_size": 128, "intermediate_size": 256,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    folders = [tmp_path_factory.mktemp("random") / "random-small" for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        shapes = tmp_path_factory.mktemp("shapes")
        (shapes / "small.json").write_text(json.dumps(small))
        patch.setattr(models, "SHAPES", shapes)
        for folder in folders:
            model.make("random:small", folder, folder / "none.parquet")
    return folders


def test_a_random_model_is_whole_and_the_same_every_time(random_models):
    one, two = random_models
    assert model_folder.check_model_folder(one, "Mend it.") == []
    assert "is there and whole" in model.already_there("random:small", one)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_a_random_model_has_weights_of_a_training_that_starts(random_models):
    import torch
    from safetensors.torch import load_file

    weights = load_file(random_models[0] / "model.safetensors")
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values()) and "lm_head.weight" not in weights
    for name, weight in weights.items():
        if weight.dim() > 1:
            assert weight.float().std() == pytest.approx(0.02, rel=0.05) and abs(weight.float().mean()) < 0.001, name
        else:
            assert (weight == 1).all(), name


def test_a_random_model_is_asked_and_answers_to_the_full_length_with_what_has_a_text_or_not(random_models):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = (kind.from_pretrained(random_models[0]) for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert network.config.eos_token_id == network.generation_config.eos_token_id == tokenizer.eos_token_id
    assert network.config.rope_scaling["rope_type"] == "llama3"
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "2+2?"}], add_generation_prompt=True, return_tensors="pt")
    torch.manual_seed(0)
    answers = network.generate(asked.repeat(8, 1), attention_mask=asked.new_ones(8, asked.shape[1]), max_new_tokens=64,
                               do_sample=True)[:, asked.shape[1]:]
    assert answers.shape == (8, 64) and not (answers == tokenizer.eos_token_id).any()
    # Some of them are beyond the tokenizer's vocabulary.
    assert answers.max() >= len(tokenizer)
    assert all(tokenizer.decode(answer) for answer in answers) and tokenizer.decode([len(tokenizer)]) == ""


def test_a_random_model_lies_under_its_shape(tmp_path):
    plan = planned(tmp_path, "random:llama-3.2-1b", HF_HUB_OFFLINE="1")
    assert plan.command[3:] == ["random:llama-3.2-1b", str(tmp_path / "models" / "random-llama-3.2-1b")]
