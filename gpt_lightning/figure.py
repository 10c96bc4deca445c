"""Figure that a notebook shows. The module imports matplotlib, so functions import it when they draw."""

import io
from typing import final

import matplotlib.figure


@final
class Figure(matplotlib.figure.Figure):
    """Matplotlib's figure, which a notebook also shows without ``%matplotlib inline``."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=100)
        return file.getvalue()
