"""The page in the dark: each colour of the light page with its counterpart, as CSS and for the plots' script.

Pages, drawings and figures are written in light colours only. Where the reader's system asks for dark, or the switch
on the page says so, CSS turns variables and the fills of drawings, and the script those of plots; paper is light.
"""

import re

# CSS variable -> (light, dark)
VARIABLES = {
    "page": ("#ffffff", "#15181b"),
    "ink": ("#23272b", "#e3e5e7"),
    "soft": ("#62686e", "#a2a9b0"),
    "faint": ("#666b70", "#959ca3"),
    "line": ("#dcdcd6", "#3a4046"),
    "rule": ("#ecece7", "#2a2f34"),
    "strong": ("#aaaaaa", "#6b7278"),
    "tint": ("#f6f6f2", "#1f2327"),
    "won": ("#eaf3fa", "#16303f"),
    "accent": ("#0069a5", "#6db8ee"),
    "warn": ("#e69f00", "#d69400"),
    "warned": ("#fdf7ea", "#2b2413"),
    "bad": ("#a63603", "#ff9d6b"),
    "good": ("#00704f", "#4fd0a4"),
    "hatch": ("#bbbbbb", "#5a6168"),
    "for-tint": ("#fbe3cf", "#5a351c"),
    "against-tint": ("#cfe4f4", "#1d4360"),
    "blank": ("#e9e9e4", "#32373c"),
}
# what drawings and figures are written in -> the same in the dark
DARK = {
    "#ffffff": "#15181b",
    "#111111": "#f4f4f0",  # full attention
    "#0072b2": "#4ba6e3",
    "#d55e00": "#f5822f",
    "#009e73": "#2fbf92",
    "#cc79a7": "#e39bc2",
    "#e69f00": "#eab038",
    "#56b4e9": "#a3d8f7",
    "#882255": "#d0649c",
    "#77770a": "#b3b340",
    "#23272b": "#e3e5e7",
    "#333333": "#dcdfe2",
    "#33373b": "#dcdfe2",
    "#555555": "#b4bac0",
    "#555b61": "#9aa1a8",
    "#62686e": "#a2a9b0",
    "#6a6f74": "#a2a9b0",
    "#777777": "#a2a9b0",
    "#8b8f93": "#959ca3",
    "#999999": "#7b828a",
    "#aaaaaa": "#777e85",
    "#b9b9b3": "#6e757c",
    "#bbbbb6": "#535a61",
    "#e9e9e6": "#2c3136",
    "#efefea": "#2a2f34",
    # parts of a circuit
    "#eef0f2": "#2a2f34",
    "#f7efd9": "#3a3118",
    "#e3eff8": "#17324a",
    # scales of colours, from the page's ground outwards
    "#0b5c97": "#8cc8f2",
    "#7fb4dc": "#2c6a9c",
    "#f0a56a": "#9c5420",
    "#b84a00": "#ffab75",
    "#dde7f0": "#1f2d3a",
    "#1f5f99": "#2468a8",
}
AUTO = "@media screen and (prefers-color-scheme: dark) {{ {} }}"
ASKED = "@media screen {{ {} }}"
SWITCH = '<fieldset class="shade"><legend>Colours</legend>{}</fieldset>'.format(
    "".join(
        f'<label><input type="radio" name="shade" value="{value}" autocomplete="off"'
        f"{' checked' if value == 'auto' else ''}>{value}</label>"
        for value in ("auto", "light", "dark")
    )
)


def shades() -> str:
    """The CSS of the light page's variables, then that of the dark page twice: where the system or the switch asks."""
    light = f":root {{ color-scheme: light; {variables(0)} }}"
    auto, asked = (
        media.format(dark_rules(f":root{which}"))
        for media, which in ((AUTO, ':not([data-shade="light"])'), (ASKED, '[data-shade="dark"]'))
    )
    return f"{light}\n{auto}\n{asked}\n"


def variables(side: int) -> str:
    return " ".join(f"--{name}: {both[side]};" for name, both in VARIABLES.items())


def dark_rules(root: str) -> str:
    """The variables of the dark page under `root`, and the fills and strokes of what is drawn there."""
    fills = "".join(
        f'[{part}="{light}"]{{{part}:{dark}}}' for light, dark in DARK.items() for part in ("fill", "stroke")
    )
    return f"{root} {{ color-scheme: dark; {variables(1)} {fills} }}"


def contrast(one: str, other: str) -> float:
    """How far two colours stand apart in lightness, as WCAG counts it: from 1 to 21; text asks for 4.5.

    >>> round(contrast("#ffffff", "#000000"), 1), contrast("#777777", "#777777")
    (21.0, 1.0)
    """
    low, high = sorted(map(lightness, (one, other)))
    return (high + 0.05) / (low + 0.05)


def lightness(colour: str) -> float:
    parts = [int(part, 16) / 255 for part in re.findall("[0-9a-f]{2}", colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
