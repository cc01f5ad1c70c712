"""A number format bit by bit: flip a bit, see the number that the code stands for and its neighbours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ipywidgets as W

from llmcourse.compress.formats import FORMATS, FloatFormat, Format, IntegerFormat
from llmcourse.errors import UnknownNameError
from llmcourse.widgets.explorable import Explorable, choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGN, EXPONENT, MANTISSA, PLAIN, GREY = "#D55E00", "#009E73", "#0072B2", "#CC79A7", "#BBBBBB"
AROUND = 4  # neighbours on either side
CAPTION = (
    "Click a bit, or move the code with the arrow keys: the next code is the next number. Change the format: "
    "the number moves to the nearest one that the new format has."
)


def format_named(name: str) -> Format:
    """One of FORMATS. Raises UnknownNameError."""
    if name not in FORMATS:
        raise UnknownNameError(
            f"there is no number format called {name!r}.",
            "Formats are known by these names.",
            f"one of {', '.join(FORMATS)}.",
        )
    return FORMATS[name]


def colours(form: Format) -> list[str]:
    """The colour of each bit, the highest first."""
    if isinstance(form, FloatFormat):
        return [SIGN] + [EXPONENT] * form.exponent + [MANTISSA] * form.mantissa
    return [SIGN] + [MANTISSA] * (form.bits - 1) if isinstance(form, IntegerFormat) else [PLAIN] * form.bits


def sentence(form: Format, code: int) -> str:
    """How the code is read: the formula with its numbers in it."""
    number = form.value(code)
    if isinstance(form, IntegerFormat):
        top = 1 << (form.bits - 1)
        return f"−{top}·{code // top} + {code % top} = {number:g}".replace("-", "−")
    if not isinstance(form, FloatFormat):
        return f"entry {code} of {1 << form.bits} in the table = {number:.6g}".replace("-", "−")
    sign, exponent, mantissa = (
        (code >> form.bits - 1) & 1,
        (code >> form.mantissa) & ((1 << form.exponent) - 1),
        code & ((1 << form.mantissa) - 1),
    )
    minus, parts = "−" if sign else "", 1 << form.mantissa
    if math.isnan(number):
        return "not a number: a code kept for results such as 0/0"
    if math.isinf(number):
        return f"{minus}∞: the exponent is all ones, the mantissa zero"
    if exponent == 0:
        kind = "subnormal" if mantissa else "zero"
        text = f"{minus}2^{1 - form.bias} · {mantissa}/{parts} = {number:.9g}  ({kind})"
    else:
        text = f"{minus}2^({exponent} − {form.bias}) · (1 + {mantissa}/{parts}) = {number:.9g}"
    return text.replace("-", "−")


def moved(form: Format, other: Format, code: int) -> int:
    """The code in `other` of the number nearest to what `code` is in `form`; of no number, 0."""
    import torch

    number = form.value(code)
    if math.isnan(number):
        return 0
    x = torch.tensor([number], dtype=torch.float64)
    how: dict[str, Any] = {} if not isinstance(other, FloatFormat | IntegerFormat) else {"saturate": True}
    return int(other.encode(x, **how))


def neighbours(form: Format, code: int) -> list[float]:
    """The finite numbers nearest to the code's, in ascending order; up to AROUND on either side."""
    number = form.value(code)
    if not math.isfinite(number):
        return []
    found = {number}
    for way in (1, -1):
        here, left = code, AROUND
        while left:
            here = _next(form, here, way)
            value = form.value(here) if here >= 0 else math.inf
            if not math.isfinite(value):
                break
            left -= value not in found  # zero has two codes
            found.add(value)
    return sorted(found)


def _next(form: Format, code: int, way: int) -> int:
    """The code of the next number upwards (way 1) or downwards (−1); −1 where there is none."""
    count = 1 << form.bits
    if isinstance(form, IntegerFormat):
        half = count // 2
        place = (code + half) % count + way  # −2^(b−1) is place 0
        return (place - half) % count if 0 <= place < count else -1
    if not isinstance(form, FloatFormat):
        return code + way if 0 <= code + way < count else -1
    half = count // 2
    size = (code % half) + (way if code < half else -way)  # with its sign, codes count away from zero
    if size >= half:
        return -1
    return size + (code // half) * half if size >= 0 else 1 + (half if way < 0 else 0)


def number_format(name: str = "fp8_e4m3", number: float = 0.3) -> Explorable:
    """An explorable of FORMATS, which begins with the number nearest to `number` in the format `name`.

    Raises UnknownNameError for a format that is not there.
    """
    return NumberFormat(name, number)


class NumberFormat(Explorable):
    """Two sliders (format, code), and a row of bits to click that follows the code."""

    def __init__(self, name: str, number: float) -> None:
        form = format_named(name)
        self.form = form
        wide: dict[str, Any] = {"layout": W.Layout(width="560px"), "style": {"description_width": "90px"}}
        start = moved(FORMATS["fp32"], form, int(FORMATS["fp32"].encode(_tensor(number))))
        pick = choice([(f.name, key) for key, f in FORMATS.items()], name, "format", **wide)
        code = W.IntSlider(start, min=0, max=(1 << form.bits) - 1, description="code", **wide)
        self.bits = [W.Button(layout=W.Layout(width="22px", padding="0", margin="1px")) for _ in range(32)]
        for place, button in enumerate(self.bits):
            button.on_click(lambda _, place=place: self._flip(31 - place))
        pick.observe(self._change_format, "value")  # before the redrawing of Explorable
        super().__init__(draw, CAPTION, format=pick, code=code)
        code.observe(lambda _: self._show_bits(), "value")
        row = W.HBox(self.bits, layout=W.Layout(flex_flow="row wrap"))
        self.box.children = (pick, code, row, *self.box.children[2:])
        self._show_bits()

    def _flip(self, bit: int) -> None:
        self.controls["code"].value ^= 1 << bit

    def _change_format(self, change: dict[str, Any]) -> None:
        old, self.form = self.form, FORMATS[change["new"]]
        slider, code = self.controls["code"], moved(old, self.form, self.controls["code"].value)
        with self._held():
            slider.value = 0
            slider.max = (1 << self.form.bits) - 1
            slider.value = code
        self._show_bits()

    def _held(self) -> Any:
        """The code moves without a redrawing: the format's own follows."""
        from contextlib import contextmanager

        @contextmanager
        def held() -> Any:
            slider = self.controls["code"]
            slider.unobserve(self._redraw, "value")
            try:
                yield
            finally:
                slider.observe(self._redraw, "value")

        return held()

    def _show_bits(self) -> None:
        code, shades = self.controls["code"].value, colours(self.form)
        for place, button in enumerate(self.bits):
            bit = 31 - place
            button.layout.display = "" if bit < self.form.bits else "none"
            if bit < self.form.bits:
                on = code >> bit & 1
                button.description = str(on)
                button.tooltip = f"bit {bit}"
                button.style.button_color = shades[self.form.bits - 1 - bit] if on else "#EEEEEE"
                button.style.text_color = "white" if on else "black"


def draw(format: str, code: int) -> Figure:
    """The code's bits with their fields, the numbers next to it, and the range of every format."""
    from matplotlib.figure import Figure

    form = format_named(format)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, height_ratios=[0.9, 0.8, 2.4])
    _draw_bits(top, form, code)
    _draw_neighbours(middle, form, code)
    _draw_ranges(bottom, form, code)
    return figure


def _draw_bits(ax: Axes, form: Format, code: int) -> None:
    from matplotlib.patches import Rectangle

    for place, shade in enumerate(colours(form)):
        on = code >> (form.bits - 1 - place) & 1
        ax.add_patch(
            Rectangle((place, 0), 0.9, 1, facecolor=shade if on else "white", edgecolor=shade, linewidth=1.5)
        )
        ax.text(
            place + 0.45,
            0.45,
            str(on),
            ha="center",
            va="center",
            color="white" if on else "black",
            fontsize=10,
        )
    ax.set(xlim=(-0.1, max(form.bits, 16)), ylim=(-0.1, 1.1))
    ax.axis("off")
    ax.set_title(f"{form.name}   code {code}   {sentence(form, code)}", fontsize=11, loc="left")


def _draw_neighbours(ax: Axes, form: Format, code: int) -> None:
    ax.set_yticks([])
    ax.spines[["top", "left", "right"]].set_visible(False)
    values = neighbours(form, code)
    if not values:
        ax.set_xticks([])
        ax.text(0.5, 0.5, "no neighbours", ha="center", transform=ax.transAxes)
        return
    ax.vlines(values, 0, 1, color=GREY, linewidth=2)
    ax.vlines([form.value(code)], 0, 1, color="black", linewidth=3)
    pad = (values[-1] - values[0]) * 0.06
    ax.set(xlim=(values[0] - pad, values[-1] + pad), ylim=(0, 1.2))
    ax.set_xticks(values, _labels(values), fontsize=8)
    ax.set_title("this number and the next ones in its format", fontsize=9, loc="left")


def _labels(values: list[float]) -> list[str]:
    """The numbers with as many digits as tell them apart."""
    for digits in (4, 6, 9):
        texts = [f"{v:.{digits}g}".replace("-", "−") for v in values]
        if len(set(texts)) == len(texts):
            break
    return texts


def span(form: Format) -> tuple[float, float, float]:
    """The smallest positive number, the smallest that has all its digits, and the largest."""
    if isinstance(form, FloatFormat):
        return form.smallest, form.smallest_normal, form.largest
    if isinstance(form, IntegerFormat):
        return 1.0, 1.0, float(form.largest)
    least = min(v for v in form.values if v > 0)
    return least, least, form.largest


def _draw_ranges(ax: Axes, form: Format, code: int) -> None:
    for y, other in enumerate(FORMATS.values()):
        least, normal, largest = (math.log2(v) for v in span(other))
        shade = MANTISSA if other is form else GREY
        ax.barh(y, largest - normal, left=normal, color=shade, height=0.6)
        ax.barh(y, normal - least, left=least, color=shade, alpha=0.35, height=0.6)
    size = abs(form.value(code))
    if 0 < size < math.inf:
        ax.axvline(math.log2(size), color="black", linewidth=1)
    ax.set_yticks(range(len(FORMATS)), [f.name for f in FORMATS.values()], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(-155, 132)
    ax.set_xlabel(
        "log₂ of a number's size: the range of each format (pale: subnormal, with fewer digits)", fontsize=9
    )
    ax.spines[["top", "right"]].set_visible(False)


def _tensor(number: float) -> Any:
    import torch

    return torch.tensor([number], dtype=torch.float64)
