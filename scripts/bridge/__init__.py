"""The bridge: one door to the stages that post-train a language model. Start reading in door.py and stages/table.py."""

__version__ = "0.1.0"
