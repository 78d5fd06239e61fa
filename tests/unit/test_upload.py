"""The upload stage: the real huggingface_hub client against the stand-in hub, over HTTP."""

import hashlib
import json
import re

import pytest
from hub_fixture import model_files, run_module, safetensors, write_files
from huggingface_hub import ModelCard

from bridge import settings as settings_module
from bridge.errors import UsageError
from bridge.runs import record
from bridge.stages import upload
from door import ROOT, bridge, recorded
from downloads_hub import Account, DownloadsHub, Fault

TOKENS = {"hf_writer": Account("alice", organisations=("team",)), "hf_reader": Account("alice", may_write=False),
          "hf_stranger": Account("bob"),
          "hf_scoped_reader": Account("alice", may_write=False, organisations=("team",), fine_grained=True)}
RECORDS = {"run.json": b"{}", "log.txt": b"", ".bridge-source.json": b"{}", "README.md": b"# hello"}


@pytest.fixture
def hub(tmp_path):
    with DownloadsHub(tmp_path / "hub", TOKENS) as server:
        yield server


@pytest.fixture
def merged(tmp_path):
    return write_files(tmp_path / "runs" / "default" / "ppo" / "merged", {**model_files(), **RECORDS})


def run_upload(hub, folder, *options, token="hf_writer", repo="team/ours", **env):
    result = run_module("upload", folder, repo, *options, env={**hub.env(token), **env})
    output = result.stdout + result.stderr
    assert token is None or token not in output
    assert result.returncode == 0 or "Traceback" not in output, output
    return result


def transfers(hub):
    return [path.split("/")[2] for method, path in hub.requests if method == "PUT"]


def test_upload_sends_the_model_and_nothing_else(hub, merged):
    result = run_upload(hub, merged)
    assert result.returncode == 0, result.stderr
    stored = hub.files("team/ours")
    assert stored == {**model_files(), "README.md": b"# hello"}
    commit = hub.repositories["team/ours"].commits[-1][0]
    assert result.stdout == f"{hub.url}/team/ours (commit {commit})\n"


def test_a_model_without_a_card_gets_one_and_keeps_it(hub, merged):
    (merged / "README.md").unlink()
    assert run_upload(hub, merged).returncode == 0
    card = ModelCard(hub.files("team/ours")["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert not (merged / "README.md").exists()
    hub.requests.clear()
    assert run_upload(hub, merged).returncode == 0
    assert not any("/commit/" in path for _, path in hub.requests), "the same card is no change"


def test_a_card_that_the_hub_refuses_is_said_before_weights_are_sent(hub, merged):
    hub.faults = [Fault("POST /api/validate-yaml", 400)]
    result = run_upload(hub, merged)
    assert result.returncode == 2 and f"the hub refuses the card {merged / 'README.md'}" in result.stderr
    assert transfers(hub) == []


def test_a_llama_under_another_name_is_refused_before_the_hub_is_asked(hub, merged):
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**config, "vocab_size": 128256, "rope_scaling": {"factor": 32.0}}))
    (merged / "README.md").unlink()
    result = run_upload(hub, merged)
    assert result.returncode == 2 and "Use HF_REPO=team/Llama-ours" in result.stderr and hub.requests == []
    settings = {"WORK_DIR": str(merged.parents[3]), "HF_REPO": "team/ours", "HF_TOKEN": "hf_a_token_of_a_test"}
    shown = bridge("upload", "--dry-run", **settings)
    assert shown.returncode == 2 and "Use HF_REPO=team/Llama-ours" in shown.stderr
    assert run_upload(hub, merged, repo="team/Llama-ours").returncode == 0
    assert b"**Built with Llama**" in hub.files("team/Llama-ours")["README.md"]


def test_upload_is_private_unless_public_is_asked_for(hub, merged):
    assert run_upload(hub, merged).returncode == 0
    assert hub.repositories["team/ours"].private
    assert run_upload(hub, merged, "--public", repo="team/open").returncode == 0
    assert not hub.repositories["team/open"].private


def test_write_access_is_asked_before_the_first_transfer(hub, merged):
    run_upload(hub, merged)
    paths = [path for _, path in hub.requests]
    first_transfer = next(number for number, (method, _) in enumerate(hub.requests) if method == "PUT")
    for asked in ("/api/whoami-v2", "/api/repos/create", "/api/models/team/ours/preupload/main"):
        assert paths.index(asked) < first_transfer


def test_large_files_go_in_parts(tmp_path, merged):
    big = safetensors({"x": [400_000]})
    (merged / "model-00002-of-00002.safetensors").write_bytes(big)
    with DownloadsHub(tmp_path / "hub", TOKENS, part_size=300_000) as hub:
        result = run_upload(hub, merged)
        assert result.returncode == 0, result.stderr
        assert hub.files("team/ours")["model-00002-of-00002.safetensors"] == big
        assert sum(path.endswith(("/1", "/2", "/3")) for _, path in hub.requests) == 3


def test_upload_continued_after_an_interruption_sends_only_what_is_missing(hub, merged):
    hub.transfers_allowed = 1
    result = run_upload(hub, merged)
    assert result.returncode == 2
    assert "refused a request for HF_REPO=team/ours (403" in result.stderr and "make upload` again" in result.stderr
    assert hub.files("team/ours") == {}, "others must not see half a model"
    stored = {file.name for file in hub.objects.iterdir()}
    hub.transfers_allowed, hub.requests[:] = None, []
    assert run_upload(hub, merged).returncode == 0
    assert len(transfers(hub)) == 1 and not stored.intersection(transfers(hub))
    assert hub.files("team/ours").keys() == {*model_files(), "README.md"}


def test_upload_run_twice_transfers_nothing_and_makes_no_commit(hub, merged):
    first = run_upload(hub, merged)
    hub.requests.clear()
    second = run_upload(hub, merged)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert transfers(hub) == [] and not any("/commit/" in path for _, path in hub.requests)


def test_weights_of_an_earlier_upload_are_removed(hub, merged):
    run_upload(hub, merged)
    for file in merged.glob("model*"):
        file.unlink()
    (merged / "model.safetensors").write_bytes(safetensors({"x": [3]}))
    assert run_upload(hub, merged).returncode == 0
    assert [name for name in hub.files("team/ours") if name.startswith("model")] == ["model.safetensors"]


@pytest.mark.parametrize(("token", "repo", "said"), [
    ("hf_wrong", "team/ours", "does not accept your token (401)"),
    ("hf_reader", "alice/ours", "may only read"),
    ("hf_stranger", "team/ours", "Your token may not write there"),
    ("hf_writer", "elsewhere/ours", "Your token may not write there"),
    (None, "team/ours", "needs a token"),
])
def test_missing_rights_are_said_with_the_cure_before_anything_is_sent(hub, merged, token, repo, said):
    result = run_upload(hub, merged, token=token, repo=repo)
    assert result.returncode == 2 and said in result.stderr
    assert "HF_TOKEN" in result.stderr or "write access" in result.stderr
    assert transfers(hub) == [] and repo not in hub.repositories


def test_a_repository_of_others_is_refused_before_anything_is_sent(hub, merged):
    # Here create_repo of the client would take the hub's 403 for success.
    hub.add_model("team/ours", {"README.md": b""})
    result = run_upload(hub, merged, "--public", token="hf_stranger")
    assert result.returncode == 2 and "Your token may not write there" in result.stderr
    assert transfers(hub) == []


def test_an_existing_public_repository_is_refused_unless_public_is_asked_for(hub, merged):
    hub.add_model("team/ours", {"README.md": b""})
    result = run_upload(hub, merged)
    assert result.returncode == 2 and "is public" in result.stderr and "PUBLIC=1" in result.stderr
    assert transfers(hub) == []
    assert run_upload(hub, merged, "--public").returncode == 0


def test_an_existing_private_repository_stays_private(hub, merged):
    hub.add_model("team/ours", {}, private=True)
    result = run_upload(hub, merged, "--public")
    assert result.returncode == 0 and "stays so" in result.stderr
    assert hub.repositories["team/ours"].private


def test_no_connection_names_the_cure(hub, merged):
    result = run_upload(hub, merged, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 2 and "no connection to http://127.0.0.1:9" in result.stderr


def test_token_of_an_existing_login_is_used(hub, merged, tmp_path):
    (tmp_path / "token").write_text("hf_writer")
    result = run_upload(hub, merged, token=None, HF_TOKEN_PATH=str(tmp_path / "token"))
    assert result.returncode == 0, result.stderr
    assert "hf_writer" not in result.stdout + result.stderr


# ---- what the hub may do; docs/faults.md has a row for each

COMMIT, FILE, PREUPLOAD = "POST /api/models/team/ours/commit/main", "PUT /objects/.*", "POST /api/models/.*/preupload/.*"
SECOND = "model-00002-of-00002.safetensors"
# Large enough that the client is still sending when the connection is cut.
LARGE = safetensors({"x": [4_000_000]})
ONE_FILE = f"PUT /objects/{hashlib.sha256(LARGE).hexdigest()}"
HUB_FAULTS = {
    "a file is answered with 500 twice": [Fault(FILE, 500, "Internal Error", times=2)],
    "the commit is answered with 500": [Fault(COMMIT, 500, "Internal Error")],
    "the commit is answered with 409": [Fault(COMMIT, 409, "Another commit is in progress")],
    "the commit is answered with 412": [Fault(COMMIT, 412, "A commit has happened since")],
    "a question is answered with 429 and Retry-After": [Fault(PREUPLOAD, 429, "Too many requests", {"Retry-After": "60"})],
    "a file is answered with 429 and Retry-After": [Fault(ONE_FILE, 429, "Too many requests", {"Retry-After": "60"})],
    "the connection is cut in a file, once": [Fault(ONE_FILE, None)],
    "the connection is cut in a file, again and again": [Fault(ONE_FILE, None, times=100)],
    "the connection is cut at the commit": [Fault(COMMIT, None)],
    "the link for a file has expired": [Fault(ONE_FILE, 403, "Request has expired")],
    "the token may only read": "hf_reader",
    "the token is fine-grained and may only read": "hf_scoped_reader",
}


def rows_of_hub_faults():
    text = (ROOT / "docs" / "faults.md").read_text()
    table = text[text.index("## Hub faults and what each gave"):].partition("\n## ")[0]
    return {fault: cells for fault, *cells in re.findall(r"^\| (.+?) \| (.*?) ?\| (.+) \|$", table, re.MULTILINE)
            if fault != "fault"}


def test_each_hub_fault_has_its_row_and_no_row_is_left_over():
    assert rows_of_hub_faults().keys() == HUB_FAULTS.keys()


# The client tries again for half a minute where a connection is cut again and again.
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * ("again" in name)) for name in HUB_FAULTS])
def test_a_hub_fault_gives_what_its_row_says(hub, merged, name):
    (merged / SECOND).write_bytes(LARGE)
    fault = HUB_FAULTS[name]
    token, hub.faults = (fault, []) if isinstance(fault, str) else ("hf_writer", fault)
    first = run_upload(hub, merged, token=token)
    said = [line.removeprefix("bridge: ") for line in first.stderr.splitlines() if line.startswith("bridge: ")]
    said = said[-1].replace(hub.url, "HUB") if first.returncode else ""
    assert "Traceback" not in first.stderr
    if first.returncode:
        assert first.returncode == 2
        assert not ("team/ours" in hub.repositories and hub.files("team/ours")), "others must not see half a model"
    hub.faults, hub.requests[:] = [], []
    again = run_upload(hub, merged)
    assert again.returncode == 0 and hub.files("team/ours")[SECOND] == LARGE
    assert [said, f"{len(transfers(hub))} of 2 files of weights"] == rows_of_hub_faults()[name]


# ---- what the door asks before the start

def planned(tmp_path, **env):
    env = {"WORK_DIR": str(tmp_path), "HF_TOKEN": "hf_secret", "HF_REPO": "team/ours",
           "HF_TOKEN_PATH": "/nonexistent/token", **env}
    return upload.plan(settings_module.read(env), env)


def test_plan_names_the_repository_and_never_the_token(tmp_path, merged):
    plan = planned(tmp_path)
    assert plan.command[1:] == ["-m", "bridge.stages.upload", str(merged), "team/ours"]
    assert plan.record_dir == tmp_path / "runs" / "default" / "ppo" / "upload"
    assert "hf_secret" not in repr(plan)
    assert "STAGE is not given: uploading the ppo model" in plan.notes
    assert any("team/ours, private" in note for note in plan.notes)
    assert planned(tmp_path, PUBLIC="1").command[-1] == "--public"


def test_plan_says_which_step_the_model_is_of(tmp_path, merged):
    # The run may have gone on since it was merged.
    folder = merged.parent / "merge"
    folder.mkdir()
    shards = merged.parent / "checkpoints" / "global_step_100" / "actor"
    command = ["python", "-m", "bridge.stages.merge", str(shards), str(merged)]
    record.write_json(folder / "run.json", recorded(attempts=[{"command": command, "started": "2026-01-01"}]), [])
    assert f"merged from {shards}, 2026-01-01" in planned(tmp_path).notes


def test_everything_missing_is_named_at_once(tmp_path):
    with pytest.raises(UsageError) as caught:
        planned(tmp_path, HF_TOKEN="", HF_REPO="", STAGE="sft")
    text = str(caught.value)
    assert "make merge STAGE=sft" in text and "HF_REPO" in text and "HF_TOKEN" in text


def test_unmerged_folder_is_refused(tmp_path, merged):
    (merged / "model_world_size_2_rank_0.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="Merge them first"):
        planned(tmp_path)


def test_damaged_folder_is_refused(tmp_path, merged):
    (merged / "tokenizer.json").unlink()
    weights = merged / "model-00001-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UsageError) as caught:
        planned(tmp_path)
    assert "lacks a tokenizer" in str(caught.value) and "damaged model-00001-of-00002" in str(caught.value)
