"""The door: `bridge STAGE [--dry-run] [key=value ...]`. Make, Slurm and `apptainer run` all come in here."""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module

from bridge import settings as settings_module
from bridge.environment import clean_environment, work_dir_problems
from bridge.errors import Tolerance, UsageError, exit_status, nearest, refuse, say
from bridge.pages import page
from bridge.plan import Plan
from bridge.stages.table import STAGES

# Exit status of a training that saved and ended before its end because it was asked to: to be tried again later.
STOPPED = os.EX_TEMPFAIL
# Lines of its log that are shown of a training that failed.
TAIL = 20
# Not stages of the chain: they run in the door's own process and leave no record.
TOOLS = {
    "check": "test this environment (--json)",
    "rehearse": "the whole chain, small, on this machine",
    "bench": "how fast the trainings are (CASES=)",
    "follow": "watch a training of another terminal or node (RUN=, STAGE=)",
    "accept": "the acceptance test of a GPU node, about ten minutes",
    "report": "how runs went, on one page (RUN=a,b)",
    "join": "take part in a training over several nodes (make submit NODES=2 starts it)",
}


def main() -> int:
    """Entry of the `bridge` program; returns its exit status."""
    return exit_status(lambda: run(sys.argv[1:], os.environ))


def run(argv: list[str], env: Mapping[str, str]) -> int:
    if not argv or argv[0] == "help" or {"-h", "--help"} & set(argv):
        print(page("usage.txt", stages=STAGES.values(), tools=TOOLS))
        return 0
    name, arguments = argv[0], argv[1:]
    known = [*STAGES, *TOOLS]
    if name not in known:
        raise UsageError(f"{name!r} is no stage. Stages: {', '.join(known)}.{nearest(name, known)}")
    if name in TOOLS:
        return import_module(f"bridge.tools.{name}").run(
            settings_module.read(env, several_runs=name == "report"), env, arguments)
    overrides = [argument for argument in arguments if argument != "--dry-run"]
    return run_stage(name, env, overrides, dry_run="--dry-run" in arguments)


def run_stage(name: str, env: Mapping[str, str], overrides: list[str], dry_run: bool) -> int:
    """Check, plan, show and run one stage; returns its command's exit status."""
    stage = STAGES[name]
    problems = []
    if overrides and not stage.trains:
        problems.append(f"stage {name!r} takes no arguments but --dry-run; got {' '.join(overrides)}. "
                        "Its settings come from the environment (see .env.example).")
    try:
        settings = settings_module.read(env)
        problems += work_dir_problems(settings.work_dir)
    except UsageError as error:
        # Where these are right, a stage names what it lacks itself, together with all else that is wrong.
        problems = error.problems + problems + [f"stage {name!r} needs {setting}. Set it in .env (see .env.example)."
                                                for setting in stage.needs if not env.get(setting)]
    refuse(problems)
    child_env = clean_environment(settings, env)
    plan = stage.plan(settings, child_env, overrides, dry_run)
    for note in plan.notes:
        say(note)
    from bridge.runs import checkpoints, record

    if dry_run and stage.trains and (working := record.holder(plan.record_dir)):
        say(f"another run works in {plan.record_dir} ({working}). Until it has ended, a second is refused; RUN=NAME is another")
    # One that was killed after its last save has a record that says otherwise.
    if plan.finished and (dry_run or not stage.trains or record.read(plan.record_dir)["status"] == "finished"):
        say(plan.finished)
        return 0
    if dry_run:
        plan.show()
        return 0
    if plan.keep_log:
        plan.record_dir.mkdir(parents=True, exist_ok=True)
    announced = plan.resume_step
    with record.locked(plan.record_dir) if plan.keep_log else nullcontext():
        while stage.trains:
            # What another run did here before the lock was ours counts, and so does damage, which only reading shows.
            plan = stage.plan(settings, child_env, overrides, dry_run)
            aside = [] if plan.finished else checkpoints.set_aside_damaged(plan.checkpoints, plan.saved)
            for done in aside:
                say(done)
            if not aside:
                break
        if plan.finished:
            record.finish(plan, child_env)
            say(plan.finished)
            return 0
        if plan.resume_step != announced:
            say(f"continuing from step {plan.resume_step}")
        plan.show()
        return run_plan(name, plan, child_env)


def run_plan(name: str, plan: Plan, env: Mapping[str, str]) -> int:
    """Run what was planned, keeping the record; returns the exit status."""
    from bridge.runs import checkpoints, failure, hang, launch, progress, record
    from bridge.runs.metrics import Metrics
    from bridge.trainers import nodes, stoppable

    secrets = record.secret_values(env)
    recorded = record.begin(plan, env)
    log = plan.record_dir / "log.txt" if plan.keep_log else None
    request, answer = plan.record_dir / stoppable.REQUEST, plan.record_dir / stoppable.ANSWER
    metrics = housekeeping = display = newest = None
    env = {**env, **plan.env}
    if "RAY_TMPDIR" in plan.env:
        env["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-", dir=plan.env["RAY_TMPDIR"])
        record.keep_ray_folder(env["RAY_TMPDIR"])
    if plan.keep_log and not plan.resume_step:
        record.keep_previous(plan.record_dir)
    if plan.checkpoints:
        plan.checkpoints.mkdir(exist_ok=True)
        newest = checkpoints.newest_complete(plan.checkpoints, plan.saved)
        for done in checkpoints.prepare_resume(plan.checkpoints, name, plan.saved, newest, plan.steps_per_epoch):
            say(done)
        metrics = Metrics(plan.record_dir / "metrics.jsonl", plan.resume_step)
        housekeeping = checkpoints.Housekeeping(plan.checkpoints, plan.saved, plan.keep)
        display = progress.Display(name, plan.record_dir, lambda: (recorded, metrics.before + metrics.rows))
        say(f"what the trainer itself says is in {log}")
        answer.unlink(missing_ok=True)
        # One that was left over, and not one that came since this run has the folder.
        if request.exists() and request.stat().st_mtime < (plan.record_dir / ".lock").stat().st_mtime:
            request.unlink()
    if plan.keep_log:
        record.write_json(plan.record_dir / "run.json", recorded, secrets)
    start = log.stat().st_size if log and log.is_file() else 0
    status = 128
    if housekeeping:
        housekeeping.start()
    # From here on no error of the file system ends the run.
    try:
        watch = hang.Watch(plan.hang_seconds, metrics, log) if plan.checkpoints else None
        status = launch.run(plan.command, env, log, metrics, secrets, watch or (lambda: False), display)
        if status == 0 and watch and watch.hung:
            status = hang.HUNG
        elif status == 0 and stoppable.is_answered(answer):
            status = STOPPED
    finally:
        if "BRIDGE_NODES_DIR" in env:
            # However it has ended: then the other nodes end, too.
            nodes.listening().unlink(missing_ok=True)
        if metrics:
            Tolerance("writing to metrics.jsonl").at_last(metrics.write)
            housekeeping.close(hurry=status >= 128)
        if "RAY_TMPDIR" in plan.env:
            shutil.rmtree(env["RAY_TMPDIR"], ignore_errors=True)

    def end() -> None:
        nonlocal status, newest
        newest = checkpoints.newest_complete(plan.checkpoints, plan.saved) if plan.checkpoints else None
        step = newest.step if newest else 0
        lacking = plan.checkpoints and checkpoints.newer_incomplete(plan.checkpoints, plan.saved, step)
        if lacking and status in (0, STOPPED):
            say(f"{lacking[-1].path.name}, which was saved last, is not whole: {lacking[-1].faults[0]}")
            status = 1
        if plan.keep_log or (status == 0 and plan.record_dir.is_dir()):
            record.write_json(plan.record_dir / "run.json", record.end(recorded, status, step), secrets)

    Tolerance("writing run.json").at_last(end)
    if status == STOPPED:
        say(f"{name} was asked to stop ({request}) and did: the same command continues it")
    elif status == 0 and plan.checkpoints:
        found = f" Its newest checkpoint is {newest.path}." if newest else ""
        more = f" Next: make merge STAGE={name} RUN={plan.record_dir.parent.name}" if newest and "BRIDGE_TRIAL" not in env else ""
        say(f"{name} has made all its steps.{found}{more}")
    elif status:
        if log and status < 128 and status != hang.HUNG:
            if display and any(lines := failure.last_lines(log, TAIL, start)):
                say("the last lines of the log:\n" + "\n".join(f"    {line}" for line in lines))
            if why := failure.reason(log, start):
                say(why)
        ended = {hang.HUNG: "hung"}.get(status, "was ended by a signal" if status > 128 else "failed")
        say(f"{name} {ended} (exit status {status})"
            + ("; the same command continues it from its newest checkpoint, if any" if ended != "failed"
               and plan.checkpoints and not env.get("BRIDGE_TRIAL") else "") + (f"; the log is {log}" if log else ""))
    return status
