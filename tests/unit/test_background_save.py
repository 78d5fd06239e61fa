"""Saving in the background: what is copied, and when a file is there. With verl's trainers: tests/rehearsal and tests/faults."""

from door import run_python

COPIES = """
import collections, io, torch
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from bridge.trainers import background_save
from bridge.trainers.background_save import HostCopy, torch_save

init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
tied = torch.randn(7, 3)
wide = torch.arange(12.0, dtype=torch.bfloat16).view(3, 4)
model = collections.OrderedDict(embedding=tied, head=tied, none=torch.empty(0, 5), turned=wide.t(),
                                part=distribute_tensor(torch.randn(4, 2), init_device_mesh("cpu", (1,))))
model._metadata = {"": {"version": 1}}
tree = {"model": model, "rng": (torch.tensor(3, dtype=torch.uint8), [1, "two", None]), "rate": 0.5}

def saved(tree):
    stream = io.BytesIO()
    torch_save(tree, stream)
    return stream.getvalue()

def loaded(data):
    return torch.load(io.BytesIO(data), weights_only=False)
"""


def test_a_copy_is_saved_as_what_it_is_a_copy_of():
    assert run_python(COPIES + """
wanted, found = loaded(saved(tree)), loaded(saved(HostCopy().of(tree, 1)))
assert found["model"]._metadata == wanted["model"]._metadata and type(found["model"]) is type(wanted["model"])
assert found["rng"][1] == wanted["rng"][1] and found["rate"] == wanted["rate"]
for name in model:
    one, other = found["model"][name], wanted["model"][name]
    assert type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape, name
    assert torch.equal(getattr(one, "_local_tensor", one), getattr(other, "_local_tensor", other)), name
assert found["model"]["part"]._spec == wanted["model"]["part"]._spec
print(torch.equal(found["rng"][0], wanted["rng"][0]))
""") == "True"


def test_tied_weights_are_copied_once_and_a_copy_stays_until_the_next_takes_its_memory():
    assert run_python(COPIES + """
memory = HostCopy()
first = memory.of(tree, 1)
assert first["model"]["embedding"].data_ptr() == first["model"]["head"].data_ptr()
# No file has what another tensor has.
assert first["model"]["turned"].untyped_storage().nbytes() == wide.nbytes
before = saved(first)
tied.zero_()
assert saved(first) == before
second = memory.of(tree, 1)
assert not second["model"]["head"].any()
print(second["model"]["head"].data_ptr() == first["model"]["head"].data_ptr())
""") == "True"


def test_where_memory_is_short_the_training_waits_and_that_is_said(tmp_path):
    said = run_python(COPIES + f"""
import contextlib, sys
background_save.free_memory = lambda _env: 4000
writer = background_save.Writer(ranks=8)
with contextlib.redirect_stderr(io.StringIO()) as stderr:
    writer.save(torch.zeros(100), "{tmp_path}/large.pt")
    writer.save(torch.zeros(10), "{tmp_path}/small.pt")
assert torch.load("{tmp_path}/large.pt").numel() == 100 and len(writer.writing) == 1
print(stderr.getvalue().strip())
""")
    assert said == (f"bridge: {tmp_path}/large.pt: too little memory is free for a copy, so that the training waits until it is "
                    "written")
    assert (tmp_path / "small.pt").is_file()


def test_a_file_has_its_name_once_it_is_whole(tmp_path):
    assert run_python(COPIES + f"""
import os, threading
begun, go_on = threading.Event(), threading.Event()

def slow_save(tree, file):
    begun.set()
    go_on.wait()
    torch_save(tree, file)

background_save.torch_save = slow_save
writer = background_save.Writer(ranks=1)
writer.save(torch.zeros(1000), "{tmp_path}/one.pt")
begun.wait()
waiting = threading.Thread(target=writer.wait)
waiting.start()
waiting.join(0.5)
assert waiting.is_alive() and not os.path.exists("{tmp_path}/one.pt")
writer.check()
go_on.set()
waiting.join()
print(sorted(os.listdir("{tmp_path}")), writer.writing)
""") == "['one.pt'] []"


def test_a_file_whose_end_is_not_on_the_disk_is_an_error(tmp_path):
    # torch.save says nothing when its last bytes are not taken: here by a limit for files.
    assert run_python(COPIES + f"""
import os, resource, signal, zipfile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
background_save.Writer.write(torch.zeros(1000), "{tmp_path}/one.pt")
length, silent = os.path.getsize("{tmp_path}/one.pt"), 0
os.unlink("{tmp_path}/one.pt")
for short in range(1, 60):
    resource.setrlimit(resource.RLIMIT_FSIZE, (length - short, -1))
    try:
        background_save.Writer.write(torch.zeros(1000), "{tmp_path}/one.pt")
        silent += 1
    except (RuntimeError, zipfile.BadZipFile):
        pass
print(silent, sorted(os.listdir("{tmp_path}")))
""") == "0 ['one.pt.partial']"


def test_all_copies_of_a_process_are_counted(tmp_path):
    assert run_python(COPIES + """
background_save.free_memory = lambda _env: 10_000 - HostCopy.taken
print([HostCopy().of(torch.zeros(size, dtype=torch.uint8), 1) is not None for size in (2048, 2048, 2048, 1024, 64)])
""") == "[True, True, False, False, True]"


def test_what_could_not_be_written_ends_the_next_step_of_the_optimizer(tmp_path):
    assert run_python(COPIES + f"""
import errno, os, types
from concurrent.futures import wait
from bridge.trainers.background_save import save_checkpoint as save
parameter = torch.nn.Parameter(torch.zeros(3))
manager = types.SimpleNamespace(optimizer=torch.optim.AdamW([parameter]), world_size=1)
background_save.verls_save = lambda manager, path: torch.save(manager.optimizer.state_dict(), path)
save(manager, "{tmp_path}/there.pt")
save(manager, "{tmp_path}/not/there.pt")
assert torch.save is torch_save
wait(manager.writer.writing)
for again in (manager.optimizer.step, lambda: save(manager, "{tmp_path}/there.pt"), lambda: save(manager, None)):
    try:
        again()
        raise SystemExit("nothing was said")
    except RuntimeError as error:
        assert "{tmp_path}/not" in str(error), error
print(os.listdir("{tmp_path}"))
""") == "['there.pt']"
