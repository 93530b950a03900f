"""Create the bundled fonts: ASCII subsets of fonts from Debian packages.

    apt-get download fonts-liberation2 fonts-courier-prime fonts-dotgothic16 fonts-3270 fonts-noto-mono fonts-ocr-b \
        fonts-spleen fonts-inconsolata
    for f in *.deb; do dpkg -x "$f" unpacked; done
    python zoo/tools/subset_fonts.py unpacked/usr/share/fonts FOLDER

Subsets are modified versions and carry their own names, as reserved font names require. Needs fontTools (dev extra).
"""

import sys
from pathlib import Path

from fontTools import subset

SOURCES = {
    "sans": "truetype/liberation2/LiberationSans-Regular.ttf",
    "sans-bold": "truetype/liberation2/LiberationSans-Bold.ttf",
    "serif": "truetype/liberation2/LiberationSerif-Regular.ttf",
    "mono": "truetype/liberation2/LiberationMono-Regular.ttf",
    "mono-bold": "truetype/liberation2/LiberationMono-Bold.ttf",
    "dot": "truetype/dotgothic16/DotGothic16-Regular.ttf",
    "terminal": "truetype/3270/3270-Regular.ttf",
    "terminal-condensed": "truetype/3270/3270Condensed-Regular.ttf",
    "noto-mono": "truetype/noto/NotoSansMono-Regular.ttf",
    "ocr-b": "opentype/ocr-b/OCRB.otf",
    "thermal": "opentype/spleen/spleen-12x24.otf",
    "courier": "opentype/courier-prime/Courier Prime.otf",
    "courier-bold": "opentype/courier-prime/Courier Prime Bold.otf",
    "courier-sans": "opentype/courier-prime/Courier Prime Sans.otf",
    "slab-mono": "truetype/inconsolata/Inconsolata.otf",
}
DROPPED = ["EBDT", "EBLC", "GSUB", "GPOS", "GDEF", "DSIG", "kern", "FFTM"]


def make(name: str, source: Path, target: Path) -> Path:
    """Write the printable-ASCII subset of one font, without hinting and layout tables."""
    options = subset.Options(hinting=False, layout_features=[], name_IDs=[0, 1, 2, 4, 6], notdef_outline=True)
    options.drop_tables += DROPPED
    font = subset.load_font(str(source), options)
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=range(32, 127))
    cutter.subset(font)
    for record in font["name"].names:
        if record.nameID in (1, 4, 6):
            record.string = f"Relook-{name}"
    out = target / f"{name}.{'otf' if 'CFF ' in font else 'ttf'}"
    subset.save_font(font, str(out), options)
    return out


if __name__ == "__main__":
    fonts, folder = Path(sys.argv[1]), Path(sys.argv[2])
    chosen = sys.argv[3:] or list(SOURCES)
    for each in chosen:
        print(make(each, fonts / SOURCES[each], folder))
