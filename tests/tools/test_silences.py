"""A silence is measured in what a person sees: the same lines drawn again, or a spinner, are no sign of life."""

import os

from tests.tools.silences import drawing, last_line, measure


def seen(*frames: str) -> list[str | None]:
    reader, writer = os.openpty()
    found = []
    for frame in frames:
        os.write(writer, frame.encode())
        found.append(drawing(reader))
    os.close(writer)
    return [*found, drawing(reader)]


def test_a_frame_drawn_again_with_a_turned_spinner_is_no_change():
    first, again, moved, end = seen(
        "\x1b[32m⠋\x1b[0m training ━━ 3/10", "\r\x1b[2K⠙ training ━━ 3/10", "\r\x1b[2K⠙ training ━━ 4/10"
    )
    assert first == again == "training ━━ 3/10"
    assert moved == "training ━━ 4/10"
    assert end is None


def test_a_verb_is_watched_to_its_end():
    found = measure(["list"])
    assert found.code == 0
    assert 0 < found.seconds <= found.whole


def test_the_line_that_stood_there_is_named():
    assert last_line("one\ntwo") == "two"
