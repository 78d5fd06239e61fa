"""A trainer's Ray that keeps to this node: who reaches its ports runs what he likes as the owner of the trainer."""

import os
import subprocess
import sys

TRAINER = """
import sys, psutil, ray
assert __name__ == "__main__"
started = ray.init(num_cpus=1, log_to_driver=False, runtime_env={"env_vars": {"SAID": "works"}})
said = ray.get(ray.remote(lambda: __import__("os").environ["SAID"]).remote())
me = psutil.Process()
pids = {me.pid, *(child.pid for child in me.children(recursive=True))}
# Of all processes at once: psutil passes over those that end meanwhile, as Ray's short-lived ones do.
ports = {connection.laddr for connection in psutil.net_connections()
         if connection.pid in pids and connection.status == psutil.CONN_LISTEN}
addresses = {port.ip.removeprefix("::ffff:") for port in ports}
print(sys.argv[1:], said, repr(started.dashboard_url), addresses, 52365 in {port.port for port in ports})
"""


def test_the_module_runs_with_its_arguments_and_its_ray_listens_on_the_loopback_address_only(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    result = subprocess.run([sys.executable, "-m", "bridge.local_ray", "trainer", "a=b c"], capture_output=True, text=True,
                            check=False, timeout=120, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    # 52365: where the dashboard's agent takes jobs.
    assert result.stdout.strip().endswith("['a=b c'] works '' {'127.0.0.1'} False"), result.stdout + result.stderr
