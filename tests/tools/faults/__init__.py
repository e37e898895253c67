"""A fault campaign: kills, signals, full disks, damaged files, two of everything; see `python -m tests.tools.faults --help`."""
