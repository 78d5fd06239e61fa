"""What runs inside verl's processes, and what a plan must know of it."""
