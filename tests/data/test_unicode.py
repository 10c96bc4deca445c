"""Control characters in texts for a terminal."""

from gpt_lightning.data.unicode import printable


def test_control_characters_are_escaped_for_a_terminal() -> None:
    assert printable("a\tb\n\x1b[31mred\x07\r\x7f\x9b\udce9ü🦜") == (
        "a\tb\n\\x1b[31mred\\x07\\r\\x7f\\x9b\\udce9ü🦜"
    )
