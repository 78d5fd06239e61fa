"""make submit and the job script, on a real Slurm with two nodes."""

import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from bridge.runs import metrics, record
from door import left_running

TINY = {"PROFILE": "tiny", "MODEL": "tiny", "DATA_SOURCE": "builtin"}


def running(site, stage: str, *arguments: str, **env: str) -> str:
    """A job whose stage has begun."""
    [job] = site.submit(f"STAGE={stage}", "GPUS=2", *arguments, **env).values()
    site.cluster.wait(job, "RUNNING")
    begun(site, job, stage, 0)
    return job


def begun(site, job: str, stage: str, attempt: int) -> None:
    log = site.work_dir / "jobs" / f"{job}.{attempt}.log"
    site.cluster.wait_for(lambda: log.exists() and f"{stage} on n" in log.read_text(), f"attempt {attempt} of {job} has begun")


def test_a_dry_run_shows_the_whole_call_last_and_submits_nothing(standin):
    result = standin.make("submit", "STAGE=ppo", "GPUS=4", "SBATCH_TIMELIMIT=30", "ARGS=--dry-run trainer.total_epochs=1")
    assert result.returncode == 0, result.stderr
    [call] = [line for line in result.stdout.splitlines() if line.startswith("+ ") and " sbatch " in line]
    # Half of a node's GPUs, and so of its cores.
    assert {"--gpus-per-node=4", "--cpus-per-task=8", "--signal=B:USR1@300", "--requeue", "--nodes=1"} <= set(call.split())
    assert call.endswith(f"{standin.checkout}/scripts/host/job.sh {standin.checkout} ppo trainer.total_epochs=1")
    assert "would run ppo trainer.total_epochs=1" in result.stdout and "SBATCH_TIMELIMIT=30" in result.stdout
    assert result.stdout.splitlines()[-1] == call and "the time limit is the partition's" not in result.stdout
    assert standin.cluster.run("squeue", "-h") == "" and not standin.work_dir.exists()


def test_the_time_limit_of_the_partition_is_said_where_none_is_asked_for(standin):
    for partition, said in (("", "1-00:00:00 (gpu*)"), ("urgent", "1-00:00:00 (urgent)"),
                            ("gpu,urgent", "1-00:00:00 (gpu*), 1-00:00:00 (urgent)")):
        given = [f"SBATCH_PARTITION={partition}"] if partition else []
        result = standin.make("submit", "STAGE=sft", "GPUS=1", "ARGS=--dry-run", *given)
        assert f"the time limit is the partition's: {said}\n" in result.stdout, result.stdout + result.stderr
    standin.cluster.run("scontrol", "update", "partitionname=urgent", "defaulttime=2:00:00")
    try:
        result = standin.make("submit", "STAGE=sft", "GPUS=1", "ARGS=--dry-run", "SBATCH_PARTITION=urgent")
    finally:
        standin.cluster.run("scontrol", "update", "partitionname=urgent", "defaulttime=none")
    assert "the time limit is the partition's: 2:00:00 (urgent)\n" in result.stdout


REFUSED = {
    "no stage": ((), "Which stage?"),
    "unknown stage": (("STAGE=dpo",), "dpo is no stage"),
    "stage and chain": (("STAGE=sft", "CHAIN=ppo", "GPUS=1"), "give one of them"),
    "no nodes": (("STAGE=data", "NODES=0"), "NODES=0"),
    "more nodes than there are": (("STAGE=ppo", "GPUS=8", "NODES=3"), "NODES=3: the default partition has 2"),
    "no GPUs": (("STAGE=ppo",), "ppo needs GPUs"),
    "zero GPUs": (("STAGE=ppo", "GPUS=0"), "GPUS=0"),
    "more GPUs than a node has": (("STAGE=ppo", "GPUS=9"), "a node of the default partition has 8"),
    "no such partition": (("STAGE=ppo", "GPUS=8", "SBATCH_PARTITION=nope"), "invalid partition specified: nope"),
    "longer than the partition allows": (("STAGE=ppo", "GPUS=8", "SBATCH_TIMELIMIT=9-0"), "Requested time limit is invalid"),
    "no time limit": (("STAGE=ppo", "GPUS=8", "SBATCH_TIMELIMIT=1h"), "SBATCH_TIMELIMIT=1h is no time limit"),
    "too short": (("STAGE=ppo", "GPUS=8", "SBATCH_TIMELIMIT=0:6:59"), "is 419 s: too short"),
    "a signal to the steps": (("STAGE=ppo", "GPUS=8", "SBATCH_SIGNAL=TERM@60"), "SBATCH_SIGNAL=TERM@60"),
    "how often": (("STAGE=ppo", "GPUS=8", "REQUEUE=always"), "REQUEUE=always"),
    "a gap": (("CHAIN=sft,,ppo", "GPUS=8"), "has an empty item"),
    "twice": (("CHAIN=sft,sft", "GPUS=8"), "sft is twice"),
    "order": (("CHAIN=merge:sft,sft", "GPUS=8"), "sft cannot come after merge:sft"),
    "not merged": (("CHAIN=sft,eval", "GPUS=8"), "put merge:sft before it"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_work_is_refused_before_anything_is_submitted(standin, name):
    arguments, words = REFUSED[name]
    result = standin.make("submit", *arguments)
    assert result.returncode == 2
    assert words in result.stderr and "line " not in result.stderr, result.stderr
    assert standin.cluster.run("squeue", "-h") == "" and not standin.work_dir.exists()


def test_a_name_that_sbatch_does_not_read_is_refused(standin, tmp_path):
    # The program itself is asked, and not run: the other tests have a script around it, as some sites do.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").symlink_to(shutil.which("sbatch", path=standin.cluster.env["PATH"]))
    result = standin.make("submit", "STAGE=ppo", "GPUS=8", "SBATCH_TIME=9", "SBATCH_TIMELIMIT=30", "SBATCH_CPUS_PER_TASK=2",
                          PATH=f"{tmp_path / 'bin'}:{standin.cluster.bin}:{os.environ['PATH']}")
    assert result.returncode == 2 and "SBATCH_TIME=9: sbatch reads no such name" in result.stderr
    assert result.stderr.count("no such name") == 1


def test_all_mistakes_are_named_at_once(standin):
    result = standin.make("submit", "CHAIN=sft,dpo,ppo", "NODES=0", "REQUEUE=x", "SBATCH_TIMELIMIT=1")
    for words in ("dpo is no stage", "NODES=0", "REQUEUE=x", "SBATCH_TIMELIMIT=1", "sft needs GPUs"):
        assert words in result.stderr


@pytest.mark.parametrize("limit", ["7", "7:00", "0:07:00", "1-0", "0-0:7", "0-0:7:00"])
def test_every_way_to_write_a_time_limit_is_understood(standin, limit):
    result = standin.make("submit", "STAGE=sft", "GPUS=1", f"SBATCH_TIMELIMIT={limit}", "ARGS=--dry-run")
    assert result.returncode == 0, result.stderr


def test_without_slurm_it_says_so(standin):
    result = standin.make("submit", "STAGE=sft", "GPUS=1", PATH="/usr/bin:/bin")
    assert result.returncode == 2 and "no Slurm here" in result.stderr


@pytest.mark.parametrize(("given", "start"), [((), "sft"), (("INIT=base",), "base")])
def test_ppo_after_a_merge_of_sft_starts_from_it_without_an_sft_in_the_chain(standin, given, start):
    result = standin.make("submit", "CHAIN=merge:sft,ppo", "GPUS=1", "ARGS=--dry-run", *given)
    assert result.returncode == 0 and f"bridge: INIT={start}: PPO starts from" in result.stderr, result.stderr
    assert f"INIT={start} " in result.stdout.splitlines()[-1]


def test_what_the_stage_itself_would_refuse_is_refused_now(standin):
    result = standin.make("submit", "STAGE=sft", "GPUS=1", WOULD_FAIL="2")
    assert result.returncode == 2
    assert "would run sft" in result.stderr and "nothing was submitted" in result.stderr
    assert standin.cluster.run("squeue", "-h") == ""


def test_a_job_gets_the_settings_given_and_no_secret(standin):
    standin.env_file.write_text("WANDB_API_KEY=plantedInTheFile\n")
    result = standin.make("submit", "STAGE=sft", "GPUS=2", "RUN=named", HF_TOKEN="hf_plantedInTheShell", UNKNOWN="here",
                          https_proxy="http://ada:plantedInTheProxy@proxy:1")
    assert result.returncode == 0, result.stderr
    assert "not in .env: HF_TOKEN https_proxy" in result.stderr
    seen = standin.work_dir / "runs" / "named" / "sft" / "environment"
    standin.cluster.wait_for(seen.exists, "the stage has begun")
    standin.cluster.wait_for(lambda: b"RUN=named" in seen.read_bytes(), "it has written its environment")
    env = dict(entry.split("=", 1) for entry in seen.read_text().split("\0") if entry)
    assert env["GPUS"] == "2" and env["WORK_DIR"] == str(standin.work_dir) and env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert not {"HF_TOKEN", "WANDB_API_KEY", "https_proxy", "UNKNOWN", "STAGE"} & set(env)
    # Nor does Slurm keep one: it stores the environment of a job with the job.
    stored = [file for file in standin.cluster.folder.rglob("environment") if "state" in file.parts or "spool" in str(file)]
    assert stored and any(b"RUN=named" in file.read_bytes() for file in stored)
    held = [file for folder in (standin.cluster.folder, standin.work_dir) for file in folder.rglob("*")
            if file.is_file() and not file.is_relative_to(standin.cluster.folder / "root") and b"planted" in file.read_bytes()]
    assert held == []


def test_what_apptainer_reads_reaches_a_job_but_for_its_secrets(standin):
    given = {"APPTAINER_BIND": "/dev/infiniband,/data:/data:ro", "SINGULARITY_CACHEDIR": "/scratch/it"}
    standin.submit("STAGE=sft", "GPUS=1", **given, APPTAINER_DOCKER_PASSWORD="planted", APPTAINERENV_HF_TOKEN="planted")
    seen = standin.work_dir / "runs" / "default" / "sft" / "environment"
    standin.cluster.wait_for(lambda: seen.exists() and b"WORK_DIR=" in seen.read_bytes(), "the stage has begun")
    env = dict(entry.split("=", 1) for entry in seen.read_text().split("\0") if entry)
    assert {name: value for name, value in env.items() if name.startswith(("APPTAINER", "SINGULARITY"))} == given


def test_the_acceptance_test_of_a_node_is_a_job_with_its_gpus(standin):
    [job] = standin.submit("STAGE=accept", "GPUS=4", "NODES=2").values()
    seen = standin.work_dir / "runs" / "default" / "accept" / "environment"
    standin.cluster.wait_for(lambda: seen.exists() and b"WORK_DIR=" in seen.read_bytes(), "the test has begun")
    assert {"CUDA_VISIBLE_DEVICES=0,1,2,3", "SLURM_CPUS_PER_TASK=8", "SLURM_JOB_NUM_NODES=1"} <= set(seen.read_text().split("\0"))
    (standin.work_dir / "end-accept").write_text("0")
    assert standin.cluster.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"


def test_a_merge_asks_for_memory_where_nodes_have_it(standin):
    def asked(**env: str) -> list[str]:
        result = standin.make("submit", "CHAIN=sft,merge:sft", "GPUS=1", "ARGS=--dry-run", **env)
        assert result.returncode == 0, result.stderr
        return re.findall(r" (--mem=\S+) .* (?:merge|sft)$", result.stdout, re.MULTILINE)

    # Not for the training before it.
    assert asked() == ["--mem=16G"] and asked(SBATCH_MEM_PER_CPU="8G") == []
    # Slurm does not know the memory of nodes of which nobody has told it, and refuses who asks for some.
    untold = standin.work_dir.parent / "bin"
    shutil.copytree(standin.cluster.bin, untold)
    (untold / "sinfo").write_text(f"#!/bin/sh\n{standin.cluster.bin}/sinfo \"$@\" | sed 's/ 64000$/ 1/'\n")
    assert asked(PATH=f"{untold}:{os.environ['PATH']}") == []


def ask_by_time_limit(site, job: str) -> None:
    site.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=1")


def is_watched(site) -> bool:
    """Whether the job's small step has begun to wait for a preemption (what came before that would end it)."""
    for found in psutil.process_iter(["name", "cmdline"]):
        command = " ".join(found.info["cmdline"] or ())
        if found.info["name"] == "bash" and "bridge: preempted" in command and str(site.work_dir) in command:
            with suppress(OSError):
                caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{found.pid}/status").read_text())[1]
                return bool(int(caught, 16) >> signal.SIGTERM - 1 & 1)
    return False


def ask_by_signal(site, job: str) -> None:
    site.cluster.wait_for(lambda: is_watched(site), "a step waits for a preemption")
    site.cluster.run("scancel", "--signal=TERM", job)


def ask_by_preemption(site, job: str) -> None:
    site.cluster.wait_for(lambda: is_watched(site), "a step waits for a preemption")
    subprocess.run(["sbatch", "--partition=urgent", "--nodes=2", "--gpus-per-node=8", "--output=/dev/null", "--wrap=sleep 3"],
                   env=site.env, check=True, capture_output=True)


@pytest.mark.parametrize("how", [ask_by_time_limit, ask_by_signal, ask_by_preemption])
def test_a_training_is_asked_to_stop_and_the_job_goes_on_later(standin, how):
    job = running(standin, "ppo", "SBATCH_SIGNAL=B:USR1@30")
    how(standin, job)
    begun(standin, job, "ppo", 1)
    (standin.work_dir / "end-ppo").write_text("0")
    assert standin.cluster.wait(job, "COMPLETED")["Restarts"] == "1"
    log = standin.log(f"{job}.log")
    assert "attempt 0" in log and "put back into the queue" in log and "attempt 1" in log and "ended with 0" in log
    if how is ask_by_time_limit:
        assert "the time limit is near" in log


def test_a_job_is_put_back_no_more_often_than_requeue_says(standin):
    job = running(standin, "sft", "REQUEUE=1")
    ask_by_signal(standin, job)
    begun(standin, job, "sft", 1)
    ask_by_signal(standin, job)
    assert standin.cluster.wait(job, "FAILED")["ExitCode"] == "75:0"
    assert "put back 1 times (REQUEUE=1)" in standin.log(f"{job}.log")


def test_a_stage_that_a_preemption_ends_before_it_can_save_is_put_back_too(standin):
    script = standin.checkout / "scripts" / "host" / "container.sh"
    script.write_text(script.read_text().replace("exit 75", "kill -TERM $$"))
    job = running(standin, "sft")
    ask_by_signal(standin, job)
    begun(standin, job, "sft", 1)
    assert standin.cluster.job(job)["Restarts"] == "1"
    # The same end without a request is a failure.
    (standin.work_dir / "end-sft").write_text("143")
    assert standin.cluster.wait(job, "FAILED")["ExitCode"] == "143:0"


def test_the_time_limit_is_watched_where_no_step_can_be_started(standin):
    broken = standin.work_dir.parent / "bin"
    shutil.copytree(standin.cluster.bin, broken)
    (broken / "srun").write_text("#!/bin/sh\necho no steps here >&2; exit 1\n")
    job = running(standin, "sft", "SBATCH_SIGNAL=B:USR1@30", PATH=f"{broken}:{os.environ['PATH']}")
    ask_by_time_limit(standin, job)
    begun(standin, job, "sft", 1)
    assert "no step can watch for a preemption" in standin.log(f"{job}.0.log")


@pytest.mark.parametrize("stage", ["sft", "data"])
def test_a_cancelled_job_leaves_nothing_running_and_is_not_put_back(standin, stage):
    job = running(standin, stage, "NET_PARTITION=gpu")
    assert left_running(standin.work_dir) != []
    standin.cluster.run("scancel", job)
    standin.cluster.wait(job, "CANCELLED")
    standin.cluster.wait_for(lambda: left_running(standin.work_dir) == [], "nothing runs")
    assert "put back" not in standin.log(f"{job}.log")


def test_a_failed_job_of_a_chain_cancels_the_rest(standin):
    standin.work_dir.mkdir()
    (standin.work_dir / "end-sft").write_text("3")
    jobs = standin.submit("CHAIN=sft,merge:sft,ppo", "GPUS=1")
    assert standin.cluster.wait(jobs["sft"], "FAILED")["ExitCode"] == "3:0"
    for stage in ("merge:sft", "ppo"):
        standin.cluster.wait(jobs[stage], "CANCELLED")
    assert not (standin.work_dir / "runs" / "default" / "ppo").exists()


def test_a_chain_waits_for_a_job_that_is_put_back_and_hands_on_what_it_says(standin):
    result = standin.make("submit", "CHAIN=sft,merge:sft,ppo,merge:ppo,upload", "GPUS=1", "ARGS=a=b")
    assert "INIT=sft: PPO starts from the SFT model of this chain" in result.stderr
    assert "left out. When the jobs have ended: make upload" in result.stderr
    jobs = [line.split()[4].rstrip(".") for line in result.stdout.splitlines() if " is job " in line]
    assert len(jobs) == 4
    begun(standin, jobs[0], "sft", 0)
    ask_by_signal(standin, jobs[0])
    begun(standin, jobs[0], "sft", 1)
    assert standin.cluster.job(jobs[1])["JobState"] == "PENDING"
    for stage in ("sft", "merge", "ppo"):
        (standin.work_dir / f"end-{stage}").write_text("0")
    for job in jobs:
        standin.cluster.wait(job, "COMPLETED")
    given = {stage: (standin.work_dir / "runs" / "default" / stage / "environment").read_text().split("\0")
             for stage in ("sft", "merge", "ppo")}
    assert "STAGE=ppo" in given["merge"] and "INIT=sft" in given["ppo"]
    assert not [entry for entry in given["sft"] + given["ppo"] if entry.startswith("STAGE=")]
    # The GPUs are for those that need them, and ARGS for the trainings.
    assert not [entry for entry in given["merge"] if entry.startswith("CUDA_VISIBLE_DEVICES=0")]
    assert "with a=b" in standin.log(f"{jobs[2]}.0.log") and "with a=b" not in standin.log(f"{jobs[1]}.0.log")


def test_a_chain_of_which_a_job_is_not_taken_is_cancelled(standin):
    refusing = standin.work_dir.parent / "bin"
    shutil.copytree(standin.cluster.bin, refusing)
    (refusing / "sbatch").write_text(f"""#!/bin/sh
case "$*" in *--test-only*) ;; *bridge-ppo*) echo "sbatch: error: full" >&2; exit 1 ;; esac
exec {standin.cluster.bin}/sbatch "$@"
""")
    result = standin.make("submit", "CHAIN=sft,merge:sft,ppo", "GPUS=1", PATH=f"{refusing}:{os.environ['PATH']}")
    assert result.returncode == 2
    assert "sbatch: error: full" in result.stderr and "Cancelled: " in result.stderr
    for job in result.stderr.partition("Cancelled: ")[2].split("\n")[0].split():
        standin.cluster.wait(job, "CANCELLED")


def test_a_shell_on_a_node(standin):
    (standin.checkout / "scripts" / "host" / "container.sh").write_text("#!/bin/sh\nexec bash\n")
    typed = "echo $(hostname) $SLURM_JOB_NAME gpus=$CUDA_VISIBLE_DEVICES cores=$SLURM_CPUS_PER_TASK\nexit\n"
    # --pty needs a terminal.
    result = subprocess.run(["script", "-qec", "make --no-print-directory shell SLURM=1 GPUS=2 SBATCH_JOB_NAME=mine NODES=2",
                             "/dev/null"], cwd=standin.checkout, env=standin.env, capture_output=True, text=True,
                            timeout=120, check=False, input=typed)
    assert any(f"{node} mine gpus=0,1 cores=4" in result.stdout for node in ("n1", "n2")), result.stdout
    assert "NODES=2: a shell is on one node" in result.stdout


def test_the_chain_of_real_stages(site):
    jobs = site.submit("CHAIN=data,model", "NET_PARTITION=gpu", **TINY)
    assert list(jobs) == ["data", "model"]
    for job in jobs.values():
        site.cluster.wait(job, "COMPLETED", "FAILED")
    jobs |= site.submit("CHAIN=sft,merge:sft", "GPUS=1", **TINY)
    for job in jobs.values():
        assert site.cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")["JobState"] == "COMPLETED", site.log(f"{job}.0.log")
    assert (site.work_dir / "runs" / "default" / "sft" / "merged" / "config.json").exists()
    # Before it is submitted again, and not in its job only.
    again = site.make("submit", "STAGE=sft", "GPUS=1", **TINY)
    assert again.returncode == 0 and "bridge: sft of run 'default' is finished (" in again.stdout, again.stderr


def test_a_real_training_at_its_time_limit_saves_and_goes_on_from_there(site):
    for stage in ("data", "model"):
        assert site.make(stage, **TINY).returncode == 0
    # Slurm looks at time limits twice a minute only: it trains for longer, however fast this machine is.
    [job] = site.submit("STAGE=sft", "GPUS=1", "SBATCH_SIGNAL=B:USR1@90", "ARGS=trainer.save_freq=-1 trainer.total_epochs=200",
                        **TINY).values()
    folder = site.work_dir / "runs" / "default" / "sft"
    site.cluster.wait_for(lambda: metrics.read(folder / "metrics.jsonl"), "the first step is made")
    site.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=2")
    site.cluster.wait_for(lambda: site.cluster.job(job)["Restarts"] == "1", "put back")
    site.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=60")
    saved = record.read(folder)["last_step"]
    assert saved > 1
    site.cluster.wait_for(lambda: metrics.read(folder / "metrics.jsonl")[-1]["step"] > saved + 1, "it goes on")
    again = site.make("submit", "STAGE=sft", "GPUS=1", "ARGS=trainer.save_freq=-1 trainer.total_epochs=200", **TINY)
    assert again.returncode == 0 and f"bridge: another run works in {folder} (process " in again.stdout, again.stderr
    # It is refused there, if it was not too early for that.
    second = re.search(r"is job (\d+)", again.stdout)[1]
    site.cluster.run("scancel", second)
    site.cluster.wait(second, "CANCELLED", "FAILED")
    site.cluster.run("scancel", job)
    site.cluster.wait(job, "CANCELLED")
    recorded = record.read(folder)
    steps = [row["step"] for row in metrics.read(folder / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert [attempt.get("exit_status") for attempt in recorded["attempts"]] == [75, 143]
    assert recorded["attempts"][1]["from_step"] == saved
