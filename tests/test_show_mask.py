"""regard show of a page that has a mask: the picture is the mask, in the terminal, as SVG and as PNG."""

import json
import struct
import zlib
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from regard import catalog
from regard.cli import app
from regard.cli.drawing import example, has_mask, picture_of
from regard.core.mask import window
from regard.core.spec import parse_spec
from regard.report.drawn import Box, Words, png, svg
from regard.report.mask_picture import EMPTY, SEEN, MaskPicture, layout, terminal_lines
from regard.report.pixels import GLYPHS, Canvas, text_width

MASKS = [name for name, page in catalog.every() if has_mask(page)]
HEADS = "s2_attention:heads=8,kv_heads=4,stride=4,local=1,block=2,offset=0"


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


def drawn(spec: str) -> MaskPicture:
    name, settings = parse_spec(spec)
    return picture_of(name, catalog.get(name), settings)


def test_the_terminal_shows_the_mask():
    result = invoke("show", "window:window=3,ahead=1")
    assert result.exit_code == 0, result.exception
    lines = result.stdout.splitlines()
    top = lines.index("┌" + "─" * 24 + "┐")
    assert lines[top + 1] == "│██▄" + " " * 21 + "│"
    assert lines[top + 2] == "│ ▀██▄" + " " * 19 + "│"
    assert lines[top + 12] == "│" + " " * 21 + "▀██│"
    assert "window:window=3,ahead=1; 24 tokens" in lines
    assert "row = query, column = key; filled = the query sees the key" in lines
    assert "  2 3 3 3" in result.stdout and "3 3 2" in result.stdout, "how many keys each query sees"


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_is_drawn_as_it_is(name):
    """From the lines of text back to who sees whom; only the causal mask looks causal, and none shows all."""
    page = catalog.get(name)
    picture = picture_of(name, page, {})
    lines = terminal_lines(picture)
    rows = [line for line in lines if line.startswith("│")]
    assert len(rows) * 2 == picture.tokens and max(map(len, lines)) <= 80
    cfg = page.configure(**parse_spec(picture.title)[1])
    seen, _ = example(page, cfg)
    for head, grid in enumerate(seen[:4].tolist()):
        boxes = [row.strip("│").split("│ │")[head] for row in rows]
        upper = [[letter in "▀█" for letter in box] for box in boxes]
        lower = [[letter in "▄█" for letter in box] for box in boxes]
        assert [row for pair in zip(upper, lower, strict=True) for row in pair] == grid
        assert f"  {' '.join(str(sum(row)) for row in grid)}" in lines
    causal = [[k <= q for k in range(picture.tokens)] for q in range(picture.tokens)]
    assert all(list(map(list, grid)) == causal for grid in picture.grids) == (name == "causal")
    assert not seen.all()


def test_heads_stand_side_by_side_and_the_rest_is_said():
    picture = drawn(HEADS)
    lines = terminal_lines(picture)
    assert " head 0             head 1             head 2             head 3" in lines
    assert "the first 4 of 8 heads" in lines
    assert len({str(grid) for grid in picture.grids}) == 2, "query heads of one KV head share a shard"


def test_labels_stand_above_their_columns():
    lines = terminal_lines(picture_of("document", catalog.get("document"), {}))
    top = lines.index("┌" + "─" * 24 + "┐")
    assert lines[top - 1] == " 000001111122222333334444"
    assert "above the columns, from the top: the labels of document" in lines


@pytest.mark.parametrize("name", MASKS)
def test_svg_has_a_square_for_each_pair_and_words(name):
    picture = picture_of(name, catalog.get(name), {})
    root = ElementTree.fromstring(svg(picture))
    space = "{http://www.w3.org/2000/svg}"
    fills = [rect.get("fill") for rect in root.iter(f"{space}rect")]
    seen = sum(sum(map(sum, grid)) for grid in picture.grids)
    assert fills.count(SEEN) == seen
    assert fills.count(SEEN) + fills.count(EMPTY) == len(picture.grids) * picture.tokens**2
    words = " ".join(text.text for text in root.iter(f"{space}text"))
    assert "row = query, column = key" in words and "how many keys its query sees" in words


def pixels_of(data: bytes) -> list[bytes]:
    """The rows of a PNG as this package writes it."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0] and b"IEND" in chunks
    raw = zlib.decompress(chunks[b"IDAT"])
    rows = [raw[i : i + 1 + 3 * width] for i in range(0, len(raw), 1 + 3 * width)]
    assert len(rows) == height and all(row[0] == 0 and len(row) == 1 + 3 * width for row in rows)
    return [row[1:] for row in rows]


@pytest.mark.parametrize("spec", ["window:window=5", "document", HEADS])
def test_png_has_the_squares_of_the_layout(spec):
    picture = drawn(spec)
    rows, (width, height, parts) = pixels_of(png(picture)), layout(picture)
    assert (len(rows), len(rows[0])) == (height, 3 * width)
    boxes = [part for part in parts if isinstance(part, Box)]
    assert len(boxes) == len(picture.grids) * picture.tokens**2
    for box in boxes:
        x, y = round(box.x + box.width / 2), round(box.y + box.height / 2)
        assert rows[y][3 * x : 3 * x + 3].hex() == box.colour[1:]


@pytest.mark.parametrize("name", MASKS)
def test_what_is_drawn_lies_in_the_picture_and_words_on_no_square(name):
    width, height, parts = layout(picture_of(name, catalog.get(name), {}))
    boxes = [part for part in parts if isinstance(part, Box)]
    for part in (part for part in parts if isinstance(part, Words)):
        left = part.x - text_width(part.text) * part.end
        right, top = left + text_width(part.text), part.y - 0.7 * part.size
        assert left >= 0 and right <= width and top >= 0 and part.y <= height, part
        for box in boxes:
            apart = (
                right <= box.x or box.x + box.width <= left or part.y <= box.y or box.y + box.height <= top
            )
            assert apart, (part, box)


def test_letters_have_dots_of_their_own():
    assert len(GLYPHS) == 5 * len(range(ord("!"), ord("~") + 1))
    assert len({GLYPHS[i : i + 5] for i in range(0, len(GLYPHS), 5)}) == len(GLYPHS) // 5
    canvas = Canvas(12, 16)
    canvas.text(0, 14, "T", "#000000")
    dots = ["".join(".#"[row[3 * 2 * i] == 0] for i in range(5)) for row in pixels_of(canvas.png())[:14:2]]
    assert dots == ["#####"] + ["..#.."] * 6


def test_a_file_is_written(tmp_path):
    for kind, start in (("svg", b"<svg"), ("png", b"\x89PNG")):
        path = tmp_path / "new" / f"mask.{kind}"
        result = invoke("show", "window:window=5", "--picture", str(path))
        assert result.exit_code == 0 and path.read_bytes().startswith(start)
        assert str(path) in result.stdout.replace("\n", "")


def test_as_data():
    mask = json.loads(invoke("show", "window:window=2", "--json").stdout)["mask"]
    wanted = window(2).dense(24)[0, 0]
    assert mask["sees"] == [["".join(str(int(x)) for x in row) for row in wanted.tolist()]]
    assert mask["keys_seen"] == [wanted.sum(-1).tolist()]
    assert "mask" not in json.loads(invoke("show", "softmax", "--json").stdout)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["softmax", "--picture", "a.png"], "a page that has a mask"),
        (["softmax:scale=2"], "a page that has a mask"),
        (["window", "--picture", "a.jpg"], ".svg or a .png"),
        (["window:windw=2"], "window"),
    ],
)
def test_what_cannot_be_drawn_is_said(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in str(invoke("show", *words).exception)
    assert not list(tmp_path.iterdir())
