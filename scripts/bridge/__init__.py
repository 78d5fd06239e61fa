"""The bridge: one door to the stages that post-train a language model. Start reading in main.py and stages.py."""

__version__ = "0.1.0"
