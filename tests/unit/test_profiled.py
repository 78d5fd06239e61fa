"""What profiled.py writes of a phase; verl's own phases, and the kernels of a GPU, need one."""

import profiled
import pytest
import torch


class Phase:
    def work(self, size: int, fails: bool = False) -> float:
        if fails:
            raise ValueError("no")
        return float((torch.ones(size, size) @ torch.ones(size, size)).sum())


@pytest.fixture
def watched(tmp_path, monkeypatch):
    monkeypatch.setattr(Phase, "work", Phase.work)
    profiled.watch(Phase, "work", tmp_path / "profile/work.txt")
    return tmp_path / "profile/work.txt"


def test_the_second_call_is_timed_and_the_third_traced(watched):
    phase, written = Phase(), []
    for size in (2, 3, 4, 5):
        assert phase.work(size) == size ** 3
        written.append(watched.read_text() if watched.exists() else "")
    assert written[0] == "" and written[3] == written[2]
    took, collected = (float(line.split()[0]) for line in written[1].splitlines())
    assert 0 <= collected <= took
    report = written[2].removeprefix(written[1]).splitlines()
    assert report[0].endswith("s of kernels")
    assert any(line.endswith("1 x aten::mm") for line in report[1:])


def test_a_phase_that_fails_fails_as_before(watched):
    phase = Phase()
    phase.work(2)
    with pytest.raises(ValueError, match="no"):
        phase.work(2, fails=True)
    assert not watched.exists()


def test_the_phases_are_methods_that_verl_has(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(profiled, "watch", lambda owner, method, file: seen.setdefault(file.stem, getattr(owner, method)))
    profiled.watch_all(tmp_path)
    assert set(seen) == {"weights_to_vllm", "generation", "vllm_to_sleep", "log_probs", "values", "critic_update", "actor_update"}
