"""What `bridge check` says of a site: each trouble is provoked once, and a good site has none. NVML's part is in test_nvml.py."""

import errno
import functools
import shutil
import tempfile
from pathlib import Path

import pytest

from bridge import environment, hardware, settings
from bridge.errors import UsageError
from bridge.stages import train
from bridge.tools import check

QUIET = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def site(work_dir: Path, **env: str) -> dict[str, tuple[str, str]]:
    """The lines of the report by their names; the servers are not asked unless env says so."""
    env = {**QUIET, "WORK_DIR": str(work_dir), **env}
    return {row.check: (row.status, row.seen) for row in check.site(settings.read(env), env)}


@pytest.fixture
def cards(tmp_path, monkeypatch) -> Path:
    """The root of a node with two cards, the first with an active port, links as the kernel lays them; check looks there."""
    root = tmp_path / "root"
    for number, state in enumerate(("4: ACTIVE", "1: DOWN")):
        card = root / f"sys/devices/pci{number}/infiniband/mlx5_{number}"
        (card / "ports/1").mkdir(parents=True)
        (card / "ports/1/state").write_text(state + "\n")
        (card.parents[1] / f"infiniband_verbs/uverbs{number}").mkdir(parents=True)
        (card / "device").symlink_to("../..")
        (root / "sys/class/infiniband").mkdir(parents=True, exist_ok=True)
        (root / f"sys/class/infiniband/mlx5_{number}").symlink_to(card)
    (root / "dev/infiniband").mkdir(parents=True)
    monkeypatch.setattr(hardware, "infiniband", functools.partial(hardware.infiniband, root))
    return root


def test_a_good_site_has_no_trouble(tmp_path, cards, no_proxy, server, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: usage._replace(free=usage.total // 2))
    (cards / "dev/infiniband/uverbs0").touch()
    address = server(200)
    found = site(tmp_path, HF_HUB_OFFLINE="", WANDB_MODE="", HF_ENDPOINT=address, WANDB_BASE_URL=address)
    assert {name: line for name, line in found.items() if line[0] != "ok"} == {}
    assert found["InfiniBand"] == ("ok", "mlx5_0") and found["hub"] == found["W&B"] == ("ok", "answers")


def test_without_cards_there_is_nothing_to_miss(tmp_path):
    assert hardware.infiniband(tmp_path) == ([], [])


def test_cards_whose_device_the_container_was_not_given_fail_with_its_name(tmp_path, cards):
    # That of the card without an active port is not missed.
    (cards / "dev/infiniband/uverbs1").touch()
    status, seen = site(tmp_path)["InfiniBand"]
    assert status == "FAIL" and f"{cards}/dev/infiniband/uverbs0 cannot be opened" in seen and "uverbs1" not in seen
    assert "export APPTAINER_BIND=/dev/infiniband" in seen
    # Where the kernel does not say which it is.
    shutil.rmtree(cards / "sys/devices/pci0/infiniband_verbs")
    assert "/dev/infiniband/uverbs* cannot be opened" in site(tmp_path)["InfiniBand"][1]


@pytest.mark.parametrize(("value", "status"), [("1", "warn"), ("0", "ok"), ("", "ok")])
def test_infiniband_that_is_switched_off_is_a_warning(tmp_path, cards, value, status):
    (cards / "dev/infiniband/uverbs0").touch()
    found, seen = site(tmp_path, NCCL_IB_DISABLE=value)["InfiniBand"]
    assert found == status and ("NCCL_IB_DISABLE is set" in seen) == (status == "warn")


def test_nccl_may_be_kept_from_infiniband_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "infiniband", functools.partial(hardware.infiniband, tmp_path))
    assert site(tmp_path, NCCL_IB_DISABLE="1")["InfiniBand"][0] == "ok"


def test_a_network_card_that_is_not_there_fails(tmp_path):
    assert site(tmp_path, NCCL_SOCKET_IFNAME="lo")["network card"] == ("ok", "lo")
    status, seen = site(tmp_path, NCCL_SOCKET_IFNAME="enp25s0np0")["network card"]
    assert status == "FAIL" and "no such network card here; there are" in seen


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, None])
def without_locks(request, monkeypatch):
    """A file system that refuses each lock, or (None) gives each to everybody."""
    def flock(file, operation):
        if request.param:
            raise OSError(request.param, "no locks")

    monkeypatch.setattr(environment.fcntl, "flock", flock)


def test_locks_that_work_leave_nothing_behind(tmp_path):
    assert site(tmp_path)["locks in WORK_DIR"] == ("ok", "given") and list(tmp_path.iterdir()) == []
    # One that is yet to be made is not made by looking.
    assert site(tmp_path / "new")["locks in WORK_DIR"] == ("ok", "given") and list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_fails_with_the_cure(tmp_path, without_locks):
    status, seen = site(tmp_path)["locks in WORK_DIR"]
    assert status == "FAIL" and str(tmp_path) in seen and "mounted with flock" in seen and list(tmp_path.iterdir()) == []


def test_a_wrong_work_dir_is_not_looked_into(tmp_path):
    assert site(tmp_path / "no" / "work")["locks in WORK_DIR"] == ("ok", "WORK_DIR is wrong: not looked at")


@pytest.mark.parametrize(("free", "status"), [(63 << 20, "FAIL"), (40 << 30, "warn"), (60 << 30, "ok")])
def test_a_full_folder_for_temporary_files_is_named_with_the_cure(tmp_path, monkeypatch, free, status):
    usage = shutil.disk_usage
    # pytest's own folders have names that are too long for Ray.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as ray:
        monkeypatch.setattr(check.shutil, "disk_usage", lambda path: usage(path)._replace(
            total=1000 << 30, free=free if path == ray else 999 << 30))
        found = site(tmp_path, RAY_TMPDIR=ray)
    found_status, seen = found[f"room in {ray}"]
    assert found_status == status and ("RAY_TMPDIR=" in seen) == (status != "ok")
    assert found[f"room in {tempfile.gettempdir()}"] == ("ok", "999.0 of 1000.0 GiB free")


def test_a_ray_tmpdir_that_is_not_there_fails_and_is_not_measured(tmp_path):
    found = site(tmp_path, RAY_TMPDIR=f"{tmp_path}/gone")
    assert found["RAY_TMPDIR"][0] == "FAIL" and f"room in {tmp_path}/gone" not in found


@pytest.mark.parametrize(("check_name", "address", "off", "cure"), [
    ("hub", "HF_ENDPOINT", {"HF_HUB_OFFLINE": "1"}, "make data model"),
    ("W&B", "WANDB_BASE_URL", {"WANDB_MODE": "offline"}, "wandb sync")])
def test_a_server_that_does_not_answer_is_a_warning_and_no_failure(tmp_path, no_proxy, server, check_name, address, off, cure):
    # It takes the connection, and never answers.
    silent = {address: server(None).replace("//", "//ada:secret@")}
    status, seen = site(tmp_path, **silent, **dict.fromkeys(off, ""))[check_name]
    assert status == "warn" and "No failure on a node without internet" in seen and cure in seen and "secret" not in seen
    assert site(tmp_path, **silent, **off)[check_name] == ("ok", f"not asked: {next(iter(off))} is set")


def test_what_the_host_saw_is_in_the_report(tmp_path):
    some = settings.read({"WORK_DIR": str(tmp_path)})
    seen = {"BRIDGE_HOST_CHECKS": "ok\tuser namespaces\tthere\nwarn\thome\t/home/ada does not take 1 MiB\n"}
    assert list(check.host(some, seen)) == [check.Result("user namespaces", "ok", "there"),
                                            check.Result("home", "warn", "/home/ada does not take 1 MiB")]
    [alone] = check.host(some, {})
    assert alone.status == "ok" and alone.seen.startswith("not looked at")


def planned(env: dict[str, str], monkeypatch) -> list[str]:
    """What is said before a training on a GPU starts."""
    monkeypatch.setattr(hardware, "visible_gpus", lambda env: [hardware.Gpu("0", "a GPU", 80 * 10**9, 0)])
    return train.plan("sft", settings.read(env), env, [], dry_run=True).notes


def test_what_would_fail_late_is_said_before_a_training_starts(env, cards, monkeypatch, without_locks):
    monkeypatch.setattr(hardware, "driver_version", lambda: "470.223.02")
    notes = planned({**env, "PROFILE": "tuned", "GPUS": "1"}, monkeypatch)
    for said in ("driver 470.223.02 is too old", "uverbs0 cannot be opened here", "nothing keeps two runs apart"):
        assert [note for note in notes if note.startswith("warning: ") and said in note], notes


def test_on_a_good_site_a_training_starts_without_these_warnings(env, cards, monkeypatch):
    (cards / "dev/infiniband/uverbs0").touch()
    monkeypatch.setattr(hardware, "driver_version", lambda: "570.00")
    monkeypatch.setattr(hardware, "cpu_count", lambda: 16)
    notes = planned({**env, "PROFILE": "tuned", "GPUS": "1"}, monkeypatch)
    assert [note for note in notes if note.startswith("warning: ") and "made-up problems" not in note] == []


def test_a_driver_too_old_refuses_no_training(env, monkeypatch):
    monkeypatch.setattr(hardware, "driver_version", lambda: "470.223.02")
    try:
        planned({**env, "PROFILE": "tuned", "GPUS": "1"}, monkeypatch)
    except UsageError as error:
        pytest.fail(f"refused: {error}")
