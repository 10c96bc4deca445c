"""Palette of all figures. Color-blind readers can tell its colors apart, also in gray print.

It is at the top of the package because training and reports both draw, and neither imports the other.
"""

# Okabe and Ito's colors (https://jfly.uni-koeln.de/color/). The first two differ most in gray.
SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
INK = "#222222"
PAPER = "#ffffff"
SEQUENTIAL = "cividis"  # matplotlib's map from dark blue to yellow, whose gray rises evenly


def ink_on(red: float, green: float, blue: float) -> str:
    """The text color that is easier to read on a color (sRGB from 0 to 1): dark or white, by WCAG's contrast."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (red, green, blue)
    ]
    luminance = sum(
        share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )
    return INK if luminance > 0.18 else PAPER
