"""The table of stages, and one module a stage: its plan and its work."""
