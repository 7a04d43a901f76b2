"""A PNG from nothing: boxes and words on a white ground.

Letters are five columns of seven dots, a byte for each column with its lowest bit at the top, and each dot is two
pixels wide and high.
"""

import struct
import zlib

DOT = 2
ADVANCE = 6 * DOT
# after the space, in the order of ASCII from "!" to "~"
GLYPHS = bytes.fromhex(
    "00005f0000 0007000700 147f147f14 242a7f2a12 2313086462 3649552250 0005030000 001c224100 0041221c00"
    "14083e0814 08083e0808 0050300000 0808080808 0060600000 2010080402 3e5149453e 00427f4000 4261514946"
    "2141454b31 1814127f10 2745454539 3c4a494930 0171090503 3649494936 064949291e 0036360000 0056360000"
    "0814224100 1414141414 0041221408 0201510906 324979413e 7e1111117e 7f49494936 3e41414122 7f4141221c"
    "7f49494941 7f09090901 3e4149497a 7f0808087f 00417f4100 2040413f01 7f08142241 7f40404040 7f020c027f"
    "7f0408107f 3e4141413e 7f09090906 3e4151215e 7f09192946 4649494931 01017f0101 3f4040403f 1f2040201f"
    "3f4038403f 6314081463 0708700807 6151494543 007f414100 0204081020 0041417f00 0402010204 4040404040"
    "0001020400 2054545478 7f48444438 3844444420 384444487f 3854545418 087e090102 0c5252523e 7f08040478"
    "00447d4000 2040443d00 7f10284400 00417f4000 7c04180478 7c08040478 3844444438 7c14141408 081414187c"
    "7c08040408 4854545420 043f444020 3c4040207c 1c2040201c 3c4030403c 4428102844 0c5050503c 4464544c44"
    "0008364100 00007f0000 0041360800 0804081008"
)


def text_width(text: str) -> int:
    return ADVANCE * len(text)


class Canvas:
    """Pixels in three bytes; what lies outside is not drawn."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows = [bytearray(b"\xff" * 3 * width) for _ in range(height)]

    def box(self, x: int, y: int, width: int, height: int, colour: str) -> None:
        """(x, y) is the upper left corner; the colour is written #rrggbb."""
        left, right = max(x, 0), min(x + width, self.width)
        for row in self.rows[max(y, 0) : max(y + height, 0)]:
            row[3 * left : 3 * right] = bytes.fromhex(colour[1:]) * max(right - left, 0)

    def text(self, x: int, y: int, text: str, colour: str) -> None:
        """y is the line that letters stand on; a letter that has no dots here is a box."""
        for at, letter in enumerate(text):
            place = 5 * (ord(letter) - 33)
            columns = GLYPHS[place : place + 5] if "!" <= letter <= "~" else b"\x7f\x41\x41\x41\x7f"
            for i, column in enumerate(b"" if letter == " " else columns):
                for j in range(7):
                    if column >> j & 1:
                        self.box(x + at * ADVANCE + i * DOT, y + (j - 7) * DOT, DOT, DOT, colour)

    def png(self) -> bytes:
        """8 bits of red, green and blue, no filter."""
        size = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        data = zlib.compress(b"".join(b"\0" + row for row in self.rows), 9)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
