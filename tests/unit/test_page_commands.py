"""The commands that the pages show are taken: their targets, settings, values and chains; a training's are tried in a dry run."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from bridge import settings
from bridge.door import TOOLS
from bridge.stages import reward
from bridge.stages.table import STAGES
from door import ROOT, SHELL, asked

PAGES = [ROOT / name for name in ("README.md", "README.ja.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").rglob("*.md"))
HOST = ROOT / "scripts" / "host"
# A word before it may start it: srun, say.
COMMAND = re.compile(r"(?<![\w/.-])(?:make|bridge|apptainer run) [^#;]*")
# Of Apptainer's options: whether a value follows.
OPTIONS = {"--nv": False, "--bind": True, "--app": True}


def shown(text: str) -> list[str]:
    """The code of a page: lines of its shell blocks, those that are indented, and what stands in the text."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*(line for block in blocks for line in block.splitlines()), *re.findall(r"^    ([a-z].*)", text, re.MULTILINE),
            *re.findall(r"`((?:make|bridge|apptainer run) [^`\n]+)`", text)]


def commands(pages: list[Path]) -> list[str]:
    """Each command of these pages once, without what stands for more (...)."""
    found = (re.sub(r" \.\.\.(?= |$)", "", part.strip()) for page in pages for line in shown(page.read_text())
             for part in COMMAND.findall(line.split("  # ")[0]))
    return sorted({command for command in found if len(command.split()) > 1})


def in_bash(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Run what is sourced from scripts/host, with no line of this checkout's .env."""
    return subprocess.run(["bash", "-euc", script, "_", *arguments], env={**SHELL, "ENV_FILE": str(ROOT / ".env.example"), **env},
                          cwd=HOST, capture_output=True, text=True, check=False)


def words_of(command: str, work_dir: Path) -> list[str]:
    """The words of a command, with a folder for what stands for one."""
    return [re.sub(r"\$?\bWORK_DIR/", f"{work_dir}/", word) for word in shlex.split(command)]


def tried(stage: str, arguments: list[str], env: dict[str, str]) -> None:
    """A dry run of one stage, where one needs no result of a training."""
    assert stage in STAGES or stage in TOOLS
    if stage in STAGES and (STAGES[stage].trains or stage in ("data", "model")):
        result = asked(stage, *arguments, *(["--dry-run"] if "--dry-run" not in arguments else []), **env)
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def work_dir(prepared: Path, tmp_path_factory) -> Path:
    """With data, a model, and an SFT's result that was merged."""
    made = tmp_path_factory.mktemp("work")
    for name in ("data", "models"):
        (made / name).symlink_to(prepared / name)
    merged = made / "runs" / "default" / "sft" / "merged"
    merged.parent.mkdir(parents=True)
    merged.symlink_to(prepared / "models" / "tiny")
    return made


@pytest.mark.parametrize("command", [command for command in commands(PAGES) if command.startswith("make ")])
def test_a_make_command_of_a_page_is_taken(command, work_dir, tmp_path):
    words = words_of(command, work_dir)[1:]
    values = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    made = subprocess.run(["make", "--dry-run", "--directory", ROOT, *words], env=SHELL, capture_output=True, text=True,
                          check=False)
    assert made.returncode == 0, made.stderr
    assert all((ROOT / script).is_file() for script in re.findall(r"(?:scripts/host|\.ci)/[\w.]+", made.stdout))
    read = in_bash("source ./read_env.sh; read_settings", MAKE_NAMES=" ".join(values))
    assert read.returncode == 0, read.stderr
    if "submit" in targets:
        chain = values.pop("CHAIN", values.pop("STAGE", "sft"))
        assert in_bash('source ./chain.sh; problems=(); read_chain "$1"; printf %s "${problems[@]}"', chain).stdout == ""
    arguments = shlex.split(values.pop("ARGS", ""))
    if "test" in targets:
        return
    env = {"MODEL": "tiny", **values, "WORK_DIR": str(work_dir)}
    settings.read(env, several_runs="report" in targets)
    for stage in {*targets} & {*STAGES, *TOOLS}:
        tried(stage, arguments, {**env, "WORK_DIR": str(tmp_path)} if stage == "data" else env)


@pytest.mark.parametrize("command", [command for command in commands(PAGES) if not command.startswith("make ")])
def test_a_command_without_make_is_taken(command, work_dir):
    words = words_of(command, work_dir)
    if words[0] == "apptainer":
        words, given = words[2:], {}
        while words and words[0] in OPTIONS:
            name = words.pop(0)
            given[name] = words.pop(0) if OPTIONS[name] else ""
        assert not words or words.pop(0).endswith(".sif"), "no image, or an option that is not known here"
        words = [given["--app"], *words] if "--app" in given else words
    else:
        words = words[1:]
    if words:
        tried(words[0], words[1:], {"MODEL": "tiny", "WORK_DIR": str(work_dir)})


def test_what_is_no_command_is_found_out(work_dir, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("`make pppo GPUS=8`\n\n```sh\nmake ppo GPU=8   # so\nsrun --pty make image\n```\n\n"
                    "    make sft ARGS=memory/sft=25gb\n")
    assert commands([page]) == ["make image", "make ppo GPU=8", "make pppo GPUS=8", "make sft ARGS=memory/sft=25gb"]
    for command in ("make ppo GPU=8", "make pppo GPUS=8", "make sft ARGS=memory/sft=25gb", "make submit CHAIN=ppo,sft"):
        with pytest.raises(AssertionError):
            test_a_make_command_of_a_page_is_taken(command, work_dir, tmp_path)
    with pytest.raises(AssertionError):
        test_a_command_without_make_is_taken("bridge ppo trainer.epochs=1", work_dir)


def test_every_page_has_its_commands_looked_at():
    assert len(commands(PAGES)) > 50 and all(len(commands([ROOT / name])) > 12 for name in ("README.md", "README.ja.md"))


def test_the_settings_of_own_data_are_taken(tmp_path):
    (block,) = re.findall(r"^    # own\.env.*\n((?:    \S.*\n)+)", (ROOT / "docs" / "own_data.md").read_text(), re.MULTILINE)
    file = tmp_path / "own.env"
    file.write_text(re.sub("^    ", "", block, flags=re.MULTILINE))
    read = in_bash("source ./read_env.sh; read_settings; env", ENV_FILE=str(file))
    assert read.returncode == 0 and "DATA_SOURCE=/shared/mine.csv\n" in read.stdout, read.stderr


@pytest.mark.parametrize(("file", "name", "truth", "scores"), [
    ("reward.py", "short_and_right", "18", {"It is 1,018 and then 18": 1.0, "18 " + "or so " * 100: 0.5, "17": 0.0, "": 0.0}),
    ("fraction.py", "words_found", "the red fox", {"A red FOX": 2 / 3, "the red fox": 1.0, "": 0.0})])
def test_a_reward_of_the_page_gives_what_it_says(file, name, truth, scores, tmp_path):
    text = (ROOT / "docs" / "own_data.md").read_text()
    (block,) = re.findall(rf"^    # {re.escape(file)}.*\n((?:(?:    .*)?\n)+?)(?=\S|    make)", text, re.MULTILINE)
    (tmp_path / file).write_text(re.sub("^    ", "", block, flags=re.MULTILINE))
    judge = reward.load(tmp_path / file, name)
    row = {"data_source": "own", "reward_model": {"ground_truth": truth}, "extra_info": {"question": "?"}}
    assert {answer: reward.score(judge, row, answer) for answer in scores} == pytest.approx(scores)


def test_what_the_page_says_of_a_jobs_variables_is_so():
    page = (ROOT / "docs" / "cluster.md").read_text()
    # What submit.sh gives a job beside the settings.
    [names] = re.findall(r"^names=.*apptainers=\((.*)\)$", (HOST / "submit.sh").read_text(), re.MULTILINE)
    given = in_bash(f"echo {names}").stdout.split()
    assert {name.partition("_")[0] for name in given} == {"APPTAINER", "SINGULARITY"} and "`SINGULARITY_...`" in page
    assert {f"`_{name.partition('_')[2]}`" in page or f"`{name}`" in page for name in given if name.startswith("A")} == {True}
    for name in ("LD_LIBRARY_PATH", "APPTAINER_DOCKER_PASSWORD"):
        assert name not in given and in_bash('source ./read_env.sh; is_known "$1"', name).returncode == 1
    assert "`LD_LIBRARY_PATH`" in page
