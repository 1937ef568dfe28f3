"""Is the machine fast, and what does a step cost here: ceilings and calibration, kept per machine."""
