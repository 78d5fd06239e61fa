"""Parts of bridge check that must be able to fail. That the whole passes is in tests/rehearsal and tests/image."""

import dataclasses
import json
import os
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import test_attention
import torch

from bridge import hardware, settings
from bridge.errors import sha256
from bridge.image import manifest
from bridge.tools import check


def statuses(results) -> dict[str, tuple[str, str]]:
    return {result.check: (result.status, result.seen) for result in results}


@pytest.fixture
def some_settings(tmp_path):
    return dataclasses.replace(settings.read({"WORK_DIR": str(tmp_path)}))


@pytest.fixture
def in_an_image(monkeypatch):
    made = {"recipe_commit": "abc", "requirements_lock_sha256": sha256(settings.ROOT / "requirements.lock"),
            "debian": {"tini": "0.19.0"}, "python": {}}
    monkeypatch.setattr(manifest, "read", lambda: made)
    return made


def test_missing_infiniband_libraries_fail_in_the_image_and_are_a_warning_outside(monkeypatch, some_settings, in_an_image):
    monkeypatch.setattr(check, "INFINIBAND", ("libnone.so.1",))
    status, seen = statuses(check.infiniband(some_settings, {}))["InfiniBand libraries"]
    assert status == "FAIL" and "libnone.so.1" in seen
    monkeypatch.setattr(manifest, "read", lambda: None)
    assert statuses(check.infiniband(some_settings, {}))["InfiniBand libraries"][0] == "warn"


def test_an_image_with_another_lock_than_it_was_built_from_fails(some_settings, in_an_image):
    assert statuses(check.image(some_settings, {}))["image"] == ("ok", "recipe abc, 1 Debian packages")
    in_an_image["requirements_lock_sha256"] = "0" * 64
    assert statuses(check.image(some_settings, {}))["image"][0] == "FAIL"


@pytest.mark.parametrize("failed", [0, 1])
def test_what_is_a_warning_is_counted_as_one_and_not_as_passed(monkeypatch, capsys, some_settings, failed):
    found = [check.Result("a", "ok", "1"), check.Result("b", "ok", "2"), check.Result("c", "warn", "3"),
             *[check.Result("d", "FAIL", "4")] * failed]
    monkeypatch.setattr(check, "CHECKS", [lambda settings, env: iter(found)])
    monkeypatch.setattr(check.os, "environ", dict(os.environ))
    assert check.run(some_settings, {}, []) == failed
    assert capsys.readouterr().out.splitlines()[-1] == f"2 ok, 1 warning, {failed} failed"
    assert check.run(some_settings, {}, ["--json"]) == failed
    report = json.loads(capsys.readouterr().out)
    assert (report["passed"], report["ok"], report["warnings"], report["failed"]) == (not failed, 2, 1, failed)


def test_a_flash_attn_that_does_not_import_fails_in_one_line_with_the_cure(monkeypatch, some_settings, tmp_path):
    # As an extension that is none for this Python: the loader refuses it.
    (tmp_path / f"flash_attn{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("cut short")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(manifest, "packages", lambda: {"flash-attn": "2.7.4"})
    [(status, seen)] = statuses(check.flash_attention(some_settings, {})).values()
    assert status == "FAIL" and seen.startswith("2.7.4 does not import: ") and "file too short" in seen
    assert "build the image anew" in seen and "\n" not in seen


@pytest.mark.parametrize(("cores", "gpus", "status"), [(1, 8, "warn"), (16, 8, "ok"), (1, 0, "ok")])
def test_too_few_cores_for_the_gpus_are_a_warning_that_says_why(monkeypatch, some_settings, cores, gpus, status):
    monkeypatch.setattr(hardware, "visible_gpus", lambda env: [hardware.Gpu(str(n), "a GPU", 1, 0) for n in range(gpus)])
    monkeypatch.setattr(hardware, "cpu_count", lambda: cores)
    found, seen = statuses(check.machine(some_settings, {}))["CPU cores"]
    assert found == status and (seen == hardware.core_problem(cores, gpus) if status == "warn" else seen == str(cores))


@pytest.mark.parametrize(("there", "asked", "profile", "status", "said"), [
    (0, "8", "tuned", "FAIL", "GPUS=8, but none"), (2, "8", "tuned", "FAIL", "GPUS=8, but a GPU"),
    (8, "8", "tuned", "ok", "a GPU"), (0, "", "tuned", "warn", "none"), (0, "2", "tiny", "warn", "none")])
def test_gpus_that_were_asked_for_and_are_not_there_fail(monkeypatch, tmp_path, there, asked, profile, status, said):
    monkeypatch.setattr(hardware, "visible_gpus", lambda env: [hardware.Gpu(str(n), "a GPU", 1, 0) for n in range(there)])
    found = statuses(check.machine(settings.read({"WORK_DIR": str(tmp_path), "GPUS": asked, "PROFILE": profile}), {}))
    assert found["GPUs visible"][0] == status and found["GPUs visible"][1].startswith(said)


def test_a_work_dir_that_is_wrong_is_not_made_by_looking_at_its_caches(tmp_path):
    mistyped = settings.read({"WORK_DIR": str(tmp_path / "typo" / "work")})
    assert statuses(check.machine(mistyped, {}))["WORK_DIR"][0] == "FAIL"
    env = {"HF_HOME": str(mistyped.work_dir / "cache" / "huggingface")}
    assert statuses(check.caches(mistyped, env))["caches"] == ("FAIL", "not looked at, since WORK_DIR is wrong")
    assert not (tmp_path / "typo").exists()


def test_a_cache_that_cannot_be_written_to_is_named(some_settings, tmp_path):
    folder = tmp_path / "cache" / "triton"
    folder.parent.mkdir()
    folder.write_text("a file where the folder should be")
    status, seen = statuses(check.caches(some_settings, {"TRITON_CACHE_DIR": str(folder)}))["caches"]
    assert status == "FAIL" and str(folder) in seen


def test_a_module_from_outside_the_environment_is_named(monkeypatch, some_settings):
    monkeypatch.setattr(check, "IMPORTS", ())
    monkeypatch.setitem(check.sys.modules, "stranger", types.SimpleNamespace(__file__="/home/somebody/stranger.py"))
    status, seen = statuses(check.imports(some_settings, {}))["modules from outside"]
    assert status == "FAIL" and "stranger (/home/somebody/stranger.py)" in seen


def flash_attn(monkeypatch, kernel):
    """A flash-attn of our own, on a machine with a GPU of our own."""
    module = types.SimpleNamespace(flash_attn_func=kernel, flash_attn_varlen_func=kernel)
    monkeypatch.setitem(check.sys.modules, "flash_attn", module)
    monkeypatch.setattr(manifest, "packages", lambda: {"flash-attn": "2.7.4.post1"})
    monkeypatch.setattr(hardware, "visible_gpus", lambda env: [hardware.Gpu("0", "a GPU", 1, 0)])


def test_kernels_that_do_not_run_on_the_gpu_fail_with_torchs_own_words(monkeypatch, some_settings):
    def kernel(*arguments, **options):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    flash_attn(monkeypatch, kernel)
    on_gpu = check.flash_attention_kernels
    monkeypatch.setattr(check, "flash_attention_kernels", lambda: on_gpu("cpu"))
    status, seen = statuses(check.flash_attention(some_settings, dict(os.environ)))["flash-attn kernels"]
    assert status == "FAIL" and "no kernel image is available" in seen and "more" not in seen


def no_value(q, k, v, causal):
    return test_attention.sdpa(q, k, v, causal) * float("nan")


@pytest.mark.parametrize(("batch", "packed", "status"), [
    (test_attention.sdpa, test_attention.sdpa_packed, "ok"),
    (lambda q, k, v, causal: test_attention.sdpa(q, k, v, False), test_attention.sdpa_packed, "FAIL"),
    (test_attention.sdpa, lambda *arguments, causal: test_attention.sdpa_packed(*arguments, causal=False), "FAIL"),
    (no_value, test_attention.sdpa_packed, "FAIL")])
def test_kernels_that_compute_something_else_fail(monkeypatch, batch, packed, status):
    monkeypatch.setitem(check.sys.modules, "flash_attn", types.SimpleNamespace(
        flash_attn_func=batch, flash_attn_varlen_func=packed))
    assert check.flash_attention_kernels("cpu").status == status


@pytest.fixture
def loaded_nccl(monkeypatch, tmp_path):
    """Libraries with a version of our own: torch's in this process's memory map, and the one that vLLM would open."""
    versions = {"torch": 22203, "vllm": 22203}
    files = {owner: tmp_path / owner / "libnccl.so.2" for owner in versions}
    maps = tmp_path / "maps"
    maps.write_text(f"7f00-7f01 r-xp 0 fe:00 1    {files['torch']}\n")

    class Library:
        def __init__(self, path):
            self.version = versions[Path(path).parent.name]

        def ncclGetVersion(self, number):
            number._obj.value = self.version

    monkeypatch.setattr(check.ctypes, "CDLL", Library)
    monkeypatch.setattr(check, "Path", lambda path: maps if path == "/proc/self/maps" else Path(path))
    monkeypatch.setitem(check.sys.modules, "vllm.utils", types.SimpleNamespace(find_nccl_library=lambda: str(files["vllm"])))
    return versions, maps


def test_another_cuda_than_the_lock_has_fails(loaded_nccl, some_settings, monkeypatch):
    assert statuses(check.nccl(some_settings, {}))["cuda of torch"] == ("ok", "12.4")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert statuses(check.nccl(some_settings, {}))["cuda of torch"] == ("FAIL", "12.6")


@pytest.mark.parametrize("owner", ["torch", "vllm"])
def test_another_nccl_than_the_lock_has_fails_whoever_loads_it(loaded_nccl, some_settings, owner):
    versions, _ = loaded_nccl
    names = {f"nccl of {name}" for name in versions}
    assert {name: status for name, (status, _) in statuses(check.nccl(some_settings, {})).items() if name in names} \
        == dict.fromkeys(names, "ok")
    # What torch 2.6.0 itself would bring.
    versions[owner] = 22105
    found = statuses(check.nccl(some_settings, {}))
    assert found[f"nccl of {owner}"][0] == "FAIL" and found[f"nccl of {owner}"][1].startswith("2.21.5 (")
    assert [found[name][0] for name in names - {f"nccl of {owner}"}] == ["ok"]


def test_a_torch_that_has_loaded_no_nccl_fails(loaded_nccl, some_settings):
    loaded_nccl[1].write_text("7f00-7f01 r-xp 0 fe:00 1    /usr/lib/libc.so.6\n")
    assert statuses(check.nccl(some_settings, {}))["nccl of torch"] == ("FAIL", "torch has loaded no libnccl")


@pytest.mark.parametrize(("size", "status"), [(64 << 20, "warn"), (1 << 30, "ok")])
def test_little_shared_memory_is_a_warning(monkeypatch, some_settings, size, status):
    usage = check.shutil.disk_usage
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: (
        usage(path)._replace(total=size) if path == "/dev/shm" else usage(path)))
    found, seen = statuses(check.machine(some_settings, {}))["/dev/shm"]
    assert found == status and seen.startswith(f"{size / 2**30:.1f} GiB") and ("--ipc=host" in seen) == (status == "warn")
