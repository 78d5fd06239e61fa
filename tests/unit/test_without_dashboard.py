"""A trainer's Ray without the dashboard, which any user of the node could reach."""

import os
import subprocess
import sys


def test_the_module_runs_with_its_arguments_and_its_ray_opens_no_dashboard(tmp_path):
    (tmp_path / "trainer.py").write_text("""
import sys, ray
assert __name__ == "__main__"
started = ray.init(num_cpus=1, log_to_driver=False)
print(sys.argv[1:], repr(started.dashboard_url), ray.get(ray.remote(lambda: "works").remote()))
""")
    result = subprocess.run([sys.executable, "-m", "bridge.without_dashboard", "trainer", "a=b c"], capture_output=True, text=True,
                            check=False, timeout=120, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.stdout.strip().endswith("['a=b c'] '' works"), result.stderr
