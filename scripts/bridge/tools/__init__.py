"""Programs that use the stages as a person would, and what they share."""
