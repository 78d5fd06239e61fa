"""[image] The merged model of a stage -> HF_REPO on the hub, private unless PUBLIC=1.   bridge upload
The token comes from HF_TOKEN or an existing login; it is in no command line and in no output."""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bridge.errors import UsageError, exit_status, refuse, say, write_whole
from bridge.model_folder import check_model_folder, is_model_file
from bridge.plan import Plan
from bridge.runs import record
from bridge.settings import Settings
from bridge.stages import card
from bridge.stages.model import LOGIN_CURE, hub_errors_explained, is_offline

AGAIN = "Run `make upload` again: files that are there already are not sent twice."
OFFLINE_CURE = "It needs internet, which a login node has, for instance."
# Weights of an earlier upload that was cut into other files: transformers would find both.
STALE = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin",
         "pytorch_model.bin.index.json"]


def plan(settings: Settings, env: Mapping[str, str]) -> Plan:
    """Check the folder, the name and that there is a token, and say what to run. A UsageError names all that is missing."""
    notes, stage = [], settings.stage
    if stage is None:
        # Also where a merge of it was refused or killed: then it is what has to be mended, and no reason to publish another.
        stage = "ppo" if settings.merged_dir("ppo").exists() or record.read(settings.stage_dir("ppo") / "merge") else "sft"
        notes.append(f"STAGE is not given: uploading the {stage} model")
    folder = settings.merged_dir(stage)
    problems = folder_problems(folder, stage) if stage != "base" else [
        "STAGE=base: the base model is not ours to publish (only eval takes it). Use sft, ppo or ckpt."]
    if settings.hf_repo is None:
        problems.append("upload needs HF_REPO=OWNER/NAME, the repository on the hub. Set it in .env (see .env.example).")
    elif not problems:
        problems += card.term_problems(folder, settings.hf_repo)
    # Where huggingface_hub looks for one; the door sets HF_TOKEN_PATH, if nobody else did.
    if not (env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN") or os.path.isfile(os.path.expanduser(env["HF_TOKEN_PATH"]))):
        problems.append(f"upload needs a token that may write. {LOGIN_CURE}")
    if is_offline(env):
        problems.append("HF_HUB_OFFLINE forbids uploading. Run `make upload` where there is internet (a login node), "
                        "with HF_HUB_OFFLINE=0.")
    refuse(problems)
    if merged := record.read(folder.parent / "merge"):
        notes.append(f"merged from {merged['attempts'][-1]['command'][-2]}, {merged['attempts'][-1]['started']}")
    notes.append(f"{folder} goes to {settings.hf_repo}, " + ("PUBLIC: anyone can see it" if settings.public else "private"))
    public = ["--public"] if settings.public else []
    return Plan([sys.executable, "-m", "bridge.stages.upload", str(folder), settings.hf_repo, *public], {},
                settings.stage_dir(stage) / "upload", notes=notes)


def folder_problems(folder: Path, stage: str) -> list[str]:
    """Why a folder cannot be uploaded: missing, not merged, not whole, or left by a merge before the newest."""
    problems = check_model_folder(folder, f"Make it with `make merge STAGE={stage}`.")
    recorded = record.read(folder.parent / "merge")
    if recorded and recorded["status"] != "finished":
        problems.append(f"the newest merge of {stage} did not end well (it is recorded as {recorded['status']!r}), so {folder} "
                        f"is not what it was to be. Run `make merge STAGE={stage}` again (STEP= takes another step).")
    if not problems and not list(folder.glob("*.safetensors")):
        problems = [f"{folder} has no safetensors. Make them with `make merge STAGE={stage}`."]
    return problems


def check_rights(repo: str, public: bool, folder: Path) -> None:
    """Ask the hub before anything large is sent: whose token, whether it may write there, and who can see it."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise UsageError(f"upload needs a token that may write. {LOGIN_CURE}")
    api = HfApi()
    account = api.whoami()
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UsageError(f"the token of {account['name']} may only read. Make one with write access at "
                         f"{api.endpoint}/settings/tokens and put it into HF_TOKEN (in .env).")
    try:
        private = api.model_info(repo).private
    except RepositoryNotFoundError:
        # exist_ok: a private repository that this token may not see is answered with 409 or 403, and 403 follows.
        api.create_repo(repo, private=not public, exist_ok=True)
        private = not public
    if not private and not public:
        raise UsageError(f"HF_REPO={repo} exists and is public: anyone could see the model. Make it private at "
                         f"{api.endpoint}/{repo}/settings , use another HF_REPO, or say PUBLIC=1.")
    if private and public:
        say(f"{repo} exists and is private, and stays so. To publish it: {api.endpoint}/{repo}/settings")
    # create_repo is no test of write access: where the repository exists, the client takes its 403 for success. The
    # question how a file would be sent is one (huggingface_hub#1182), and sends nothing for a small text file.
    api.preupload_lfs_files(repo, [CommitOperationAdd("config.json", folder / "config.json")])
    say(f"{account['name']} may write to {repo} ({'private' if private else 'public'})")


def upload(folder: Path, repo: str) -> tuple[str, str]:
    """Send what is missing, in one commit; return the repository's address and the commit.
    upload_large_folder would commit in pieces, so that others see half a model, retry a refusal for ever, and trust notes that
    it keeps in our folder. After an interruption both send only the large files that are not there yet."""
    from huggingface_hub import HfApi
    from requests.exceptions import RequestException

    api, files = HfApi(), published(folder, repo)
    say(f"uploading {len(files)} files, {sum(file.stat().st_size for file in files.values()) / 1e9:.2f} GB")
    try:
        with tempfile.TemporaryDirectory() as links:
            for name, file in files.items():
                os.symlink(file, os.path.join(links, name))
            commit = api.upload_folder(
                repo_id=repo, folder_path=links, delete_patterns=STALE,
                commit_message=f"Upload the {folder.parent.name} model of run {folder.parent.parent.name}")
    except RuntimeError as error:
        # The client wraps what went wrong with one file.
        if isinstance(error.__cause__, RequestException):
            raise error.__cause__ from None
        raise
    except ValueError as error:
        # What the hub says of a README.md's front matter comes as words only.
        if "README.md" not in str(error):
            raise
        raise UsageError(f"the hub refuses the card {files['README.md']}: {error}") from error
    return f"{api.endpoint}/{repo}", commit.oid


def published(folder: Path, repo: str) -> dict[str, Path]:
    """What is sent, by its name there: the model, its base's licence, and its card, which is made unless the folder has one."""
    files = {file.name: file for part in (card.origin(folder)[1].folder, folder) if part and part.is_dir()
             for file in sorted(part.iterdir()) if file.is_file() and (
                 is_model_file(file.name) if part == folder else file.name.startswith(("LICENSE", "NOTICE", "USE_POLICY")))}
    if "README.md" not in files:
        made = files["README.md"] = folder.parent / "upload" / "README.md"
        made.parent.mkdir(exist_ok=True)
        write_whole(made, card.make(folder, repo))
        say(f"the card is {made}; a README.md of yours in {folder} would be taken instead")
    return files


def main() -> None:
    """What the stage runs: the merged model's folder, OWNER/NAME, and --public where a new repository is to be."""
    folder, repo, *public = sys.argv[1:]
    folder = Path(folder)
    refuse(folder_problems(folder, folder.parent.name) or card.term_problems(folder, repo))
    with hub_errors_explained(f"HF_REPO={repo}", again=AGAIN, offline=OFFLINE_CURE, asks_rights=True):
        check_rights(repo, bool(public), folder)
    # From here on 403 is of a file's link that has expired, for instance.
    with hub_errors_explained(f"HF_REPO={repo}", again=AGAIN, offline=OFFLINE_CURE, asks_rights=False):
        address, commit = upload(folder, repo)
    print(f"{address} (commit {commit})")


if __name__ == "__main__":
    sys.exit(exit_status(main))
