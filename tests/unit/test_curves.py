"""tests/gpu/curves.py: what is drawn from the metrics of two runs."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bridge.runs import record
from door import ROOT, SHELL, recorded

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    """Three PPO runs of 40 steps, two of one profile; validation at two steps, left out by the last run."""
    for place, (name, profile) in enumerate((("a1", "tutorial"), ("a2", "tutorial"), ("b1", "tuned"))):
        folder = tmp_path / "runs" / name / "ppo"
        folder.mkdir(parents=True)
        rows = [{"step": step, "critic/score/mean": 0.01 * step + 0.1 * place, "actor/entropy": 1 / step,
                 **({"val/acc": 0.5} if step in (20, 40) and name != "b1" else {})} for step in range(1, 41)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["python", f"profile/ppo={profile}", "trainer.x=1"]
        record.write_json(folder / "run.json", recorded(attempts=[{"command": command}]), [])
    return tmp_path


def curves(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Call it as a person does."""
    return subprocess.run([sys.executable, ROOT / "tests/gpu/curves.py", *arguments], env={**SHELL, **env}, capture_output=True,
                          text=True, check=False)


def drawn(work_dir: Path, *arguments: str) -> ElementTree.Element:
    """Draw and read the figure."""
    result = curves(*arguments, WORK_DIR=str(work_dir))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{work_dir / 'ppo.svg'}\n"
    return ElementTree.parse(work_dir / "ppo.svg").getroot()


def texts(figure: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in figure.iter(f"{SVG}text")]


def lines(figure: ElementTree.Element, points: int) -> list[tuple[str, bool]]:
    """(colour, dashed) of every line through so many points."""
    found = []
    for path in figure.iter(f"{SVG}path"):
        if len(re.findall(r"[ML]", path.get("d"))) == points and "stroke: #" in path.get("style", ""):
            style = path.get("style")
            found.append((re.search(r"stroke: (#\w+)", style)[1], "dasharray" in style))
    return found


def test_every_run_is_a_line_in_every_panel_in_the_colour_of_its_profile(work_dir):
    figure = drawn(work_dir, "a1", "a2", "b1", "--keys=critic/score/mean,actor/entropy")
    written = texts(figure)
    for text in ("critic/score/mean", "actor/entropy", "step", "a1 (tutorial)", "a2 (tutorial)", "b1 (tuned)"):
        assert text in written
    found = lines(figure, 40)
    assert len(found) == 3 * 2 and found[:3] == found[3:]
    (first, _), (second, dashed), (other, plain) = found[:3]
    assert first == second != other and dashed and not plain


def test_a_mean_is_drawn_over_the_values(work_dir):
    figure = drawn(work_dir, "a1", "b1", "--keys=critic/score/mean", "--mean=5")
    assert len(lines(figure, 40)) == 2 * 2 and "critic/score/mean (mean of 5 steps)" in texts(figure)
    spec = importlib.util.spec_from_file_location("curves", ROOT / "tests/gpu/curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    moving_mean = module.moving_mean
    assert list(moving_mean([1, 2, 3, 4, 10], 3)) == pytest.approx([1.5, 2, 3, 17 / 3, 7])
    assert list(moving_mean([5, 7], 1)) == [5, 7]


def test_the_same_numbers_give_the_same_file_and_a_folder_elsewhere_will_do(work_dir):
    drawn(work_dir, "a1", "--keys=actor/entropy")
    before = (work_dir / "ppo.svg").read_bytes()
    drawn(work_dir, str(work_dir / "runs" / "a1"), "--keys=actor/entropy")
    assert (work_dir / "ppo.svg").read_bytes() == before


def test_a_run_without_a_metric_is_named(work_dir):
    result = curves("a1", "b1", "--keys=val/acc", f"--output={work_dir / 'x.png'}", WORK_DIR=str(work_dir))
    assert result.returncode == 0 and "b1 (tuned) has no val/acc" in result.stderr
    assert (work_dir / "x.png").read_bytes().startswith(b"\x89PNG")


def test_everything_wrong_is_named_at_once(work_dir):
    again = str(work_dir / "runs" / "a1")
    result = curves("a1", again, "c1", "--keys=critic/scor/mean", "--output=/no/such/x.doc", "--mean=0",
                    WORK_DIR=str(work_dir))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for said in ("two runs are called a1 (tutorial)", "run 'c1' has no metrics", "Did you mean critic/score/mean?",
                 ".svg or .png", "there is no folder /no/such", "--mean=0"):
        assert said in result.stderr
    assert "has no curves" in curves(STAGE="base", WORK_DIR=str(work_dir)).stderr
