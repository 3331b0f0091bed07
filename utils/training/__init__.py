"""Training: `loop` updates what a `task` defines, `report` tells how it goes, `resume` saves and restores a `run`."""
