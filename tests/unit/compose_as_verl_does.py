"""Compose a configuration with the same decorator as verl's trainers, without their imports.

    python compose_as_verl_does.py VERL_CONFIG_DIR CONFIG_NAME --cfg job --resolve [--config-dir ...] OVERRIDES...
"""

import sys

import hydra

config_path, config_name = sys.argv.pop(1), sys.argv.pop(1)
hydra.main(config_path=config_path, config_name=config_name, version_base=None)(print)()
