"""What a person sees: `shown(outside)` is all that was written to a pseudo-terminal until its other side was closed."""

import os


def shown(outside: int) -> str:
    """Read the outer end of a pseudo-terminal to its end, while the program is still writing or after; closes it."""
    parts = []
    try:
        while part := os.read(outside, 1 << 16):
            parts.append(part)
    except OSError:  # so Linux says that the other side is closed
        pass
    os.close(outside)
    return b"".join(parts).decode("utf-8", "replace")
