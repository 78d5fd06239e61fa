"""Run a trainer whose Ray opens no dashboard:  python -m bridge.without_dashboard verl.trainer.main_ppo OVERRIDES...

The dashboard takes jobs from whoever reaches its port: on a node that others share, they would run as the trainer's owner. And
ray.init() waits seconds for it. verl 0.5.0 has no setting for it, and Ray no variable; verl's module runs unchanged.
"""

import functools
import runpy
import sys

import ray


def main() -> None:
    """Become the module (sys.argv[1]) with the rest of the arguments."""
    ray.init = functools.partial(ray.init, include_dashboard=False)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
