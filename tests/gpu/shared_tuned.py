"""[image, GPU] shared_gpu for a training of the profile tuned without a critic (GRPO), which would load the profile's changes."""

from importlib import import_module

# Importing applies them; the profile's come first, as with a critic.
for name in ("bridge.trainers.speedups", "shared_gpu"):
    import_module(name)
