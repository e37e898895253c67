"""The garbage collector of a process of the tests passes over imported libraries, which stay to the end: `pass_over_imports()`.

Searching them for garbage was a third of a small training (1.2 of 3.4 CPU seconds) and a fifth of importing Unsloth (1.5 of
7.3; one of 2 shared CPU cores, 2026-11-30, e694428).
"""

import gc
import sys

MANY = 500
"""Modules that are worth a search of their own; Unsloth brings about 5,000."""
gc.set_threshold(50_000, 20, 20)  # from here on it seldom searches: the default is 700, 10, 10
passed_over = 0
"""How many modules were imported at the last call that did something."""


def pass_over_imports() -> None:
    """Leave alone whatever is there now, where many modules were imported since the last call."""
    global passed_over
    if len(sys.modules) > passed_over + MANY:
        passed_over = len(sys.modules)
        gc.collect()
        gc.freeze()
