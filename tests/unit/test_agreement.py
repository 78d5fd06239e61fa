"""Facts that have to stand in two places say the same in both."""

import re

import pytest

from bridge import settings
from bridge.door import TOOLS
from bridge.stages.table import STAGES
from door import ROOT

README, JAPANESE = (ROOT / "README.md").read_text(), (ROOT / "README.ja.md").read_text()


def shell_commands(text: str) -> list[str]:
    """The commands in the sh blocks of a README, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.split("#")[0].strip()]


def test_make_has_a_target_for_every_stage_and_tool():
    stages = re.search(r"^STAGES := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    # shell is no stage: it opens the image. join is for the nodes of a job.
    assert set(stages) == {*STAGES, *TOOLS, "shell"} - {"join"}


def test_the_two_readmes_give_the_same_commands():
    assert shell_commands(README) == shell_commands(JAPANESE)
    assert len(shell_commands(README)) > 8


@pytest.mark.parametrize("text", [README, JAPANESE], ids=["English", "Japanese"])
def test_every_make_command_of_the_readme_is_a_target(text):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {word for line in re.findall(r"`make ([^`]+)`", text) + [line[5:] for line in shell_commands(text)
            if line.startswith("make ")] for word in line.split() if re.fullmatch("[a-z]+", word)}
    assert used and used <= targets


@pytest.mark.parametrize("text", [README, JAPANESE], ids=["English", "Japanese"])
def test_every_file_that_the_readme_names_is_there(text):
    tree = re.search(r"```\n(Makefile .*?)```", text, re.DOTALL)[1]
    for name in re.findall(r"^(\S+)  ", tree, re.MULTILINE):
        assert (ROOT / name).exists(), name


def test_env_example_names_every_profile():
    line = re.search(r"# Settings of sft and ppo.*", (ROOT / ".env.example").read_text())[0]
    assert all(profile in line for profile in {file.stem for file in settings.CONFIGS.glob("profile/*/*.yaml")})


@pytest.mark.parametrize("name", ["WORK_DIR", "RUN", "PROFILE", "MODEL", "DATA_SOURCE", "SHARE_GPU", "INIT", "KEEP", "PUBLIC",
                                  "WANDB_PROJECT"])
def test_env_example_shows_the_default_where_there_is_one(name):
    shown = re.search(rf"^#{name}=(.*)", (ROOT / ".env.example").read_text(), re.MULTILINE)[1]
    assert settings.read({name: shown}) == settings.read({}) != settings.read({name: other(name)})


def other(name: str) -> str:
    """A value of this setting that is no default."""
    return {"PROFILE": "tutorial", "INIT": "sft", "KEEP": "3"}.get(name, "1")


def test_every_module_of_the_door_is_named_by_the_table_or_imported_by_one_that_is():
    modules = {file.stem for file in (ROOT / "scripts" / "bridge").rglob("*.py")}
    # A configuration may name one for verl to import.
    files = [*(ROOT / "scripts" / "bridge").rglob("*.py"), *settings.CONFIGS.rglob("*.yaml")]
    sources = "\n".join(file.read_text() for file in files)
    unused = {module for module in modules - {"__init__", "__main__", "door", *STAGES, *TOOLS}
              if not re.search(rf"from bridge[\w.]* import [^\n]*\b{module}\b|bridge\.[\w.]*\b{module}\b", sources)}
    assert unused == set()


def test_the_peoples_ci_calls_the_make_targets_that_our_own_does_and_pins_its_actions():
    workflow, own = ((ROOT / name).read_text() for name in (".github/workflows/ci.yml", ".ci/run"))
    called = [set(re.findall(r"\bmake (lint|image|oci|rehearse|test)\b", text)) for text in (workflow, own)]
    assert called[0] == called[1] == {"lint", "image", "oci", "rehearse", "test"}
    uses = re.findall(r"uses: (\S+)", workflow)
    assert uses and all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action) for action in uses)
