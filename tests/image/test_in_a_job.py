"""bridge.sif in jobs of a real Slurm (tests/slurm/cluster.py), as people use it on a cluster."""

import shutil
from collections.abc import Iterator

import pytest
from cluster import Cluster, NotHere, Site

from bridge.runs import record
from door import ROOT
from standin_hub import StandInHub

TOKEN = "token-of-the-stand-in-hub"
SETTINGS = {"PROFILE": "tiny", "MODEL": "tiny", "DATA_SOURCE": "builtin", "GPUS": "1", "NET_PARTITION": "gpu"}


@pytest.fixture
def site(tmp_path, tmp_path_factory) -> Iterator[Site]:
    if not (ROOT / "bridge.sif").is_file() or not shutil.which("apptainer"):
        pytest.skip("needs bridge.sif (make image) and apptainer on PATH")
    try:
        cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    except NotHere as why:
        pytest.skip(str(why))
    made = Site(cluster, tmp_path, ROOT)
    made.env["ENGINE"] = "apptainer"
    yield made
    cluster.end()


def test_a_chain_of_jobs_of_which_one_trains_over_two_nodes(site):
    jobs = site.submit("CHAIN=data,model,sft,merge:sft", "NODES=2", "ARGS=trainer.total_training_steps=4", **SETTINGS)
    assert list(jobs) == ["data", "model", "sft", "merge:sft"]
    for stage, job in jobs.items():
        state = site.cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED", seconds=600)["JobState"]
        assert state == "COMPLETED", (stage, site.log(f"{job}.0.log"))
    folder = site.work_dir / "runs" / "default" / "sft"
    recorded = record.read(folder)
    assert recorded["status"] == "finished" and recorded["config"]["trainer"]["nnodes"] == 2
    assert recorded["attempts"][0]["image"] == str(ROOT / "bridge.sif") and recorded["attempts"][0]["job"] == jobs["sft"]
    assert (folder / "merged" / "config.json").exists()
    assert "node 1 (n2, 10.77.0.12) joins" in site.log(f"{jobs['sft']}.0.log")
    with StandInHub(site.work_dir.parent / "hub", TOKEN) as hub:
        result = site.make("upload", "STAGE=sft", "HF_REPO=someone/bridge", **hub.env(TOKEN))
    assert result.returncode == 0, result.stderr
    assert "config.json" in hub.repositories["someone/bridge"] and TOKEN not in result.stdout + result.stderr
