"""Run a trainer whose Ray keeps to this node:  python -m bridge.local_ray verl.trainer.main_ppo OVERRIDES...

Ray takes work from whoever reaches its ports, the dashboard's and its agent's among them, and does it as the owner of the
trainer: so they are closed, and the others listen on the loopback address only (other users of the node still reach that). And
ray.init() waits seconds for the dashboard. verl 0.5.0 has no settings for this; its module runs unchanged.
"""

import functools
import runpy
import sys

import ray
from ray._private import utils


def main() -> None:
    """Become the module (sys.argv[1]) with the rest of the arguments."""
    ray.init = functools.partial(ray.init, include_dashboard=False, _node_ip_address="127.0.0.1")
    # Or the dashboard's agent would start whole, with a port for jobs.
    utils.check_dashboard_dependencies_installed = lambda: False
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
