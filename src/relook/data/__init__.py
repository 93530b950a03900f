"""Data: items in the published format, made from boxes, checked, and collated for the model's forward.

    sources     published sets and forms of file, as tables; `read` yields questions and items from any of them
    formats, viscot, boxed, members, hub   the forms themselves
    questions   a question with its answers and boxes             items     the published item, typed
    builder     questions -> items with looks, by its options     variants  items of one model as those of another
    splits      the paper's evaluation splits                     options   every choice of a build
    images      the image sets, and finding their files           remap     somebody else's image paths -> one's own
    check       faults in items, found and mended; the table of them is `faults`, on `crops`, `imagefacts`, `seen`
    preview     a page to look at items                           stats     what a set holds, in numbers
    records     JSON on disk, lazily, with file and line          convert   items as Parquet
    dataset     items of a file by number                         stream    items in a shuffled order, never all held
    collator    items -> one padded batch                         scans     pages with their lines, for tiny models
    worlds/     synthetic pages, drawn from a seed

Nothing here imports torch or transformers until a batch is collated.
"""

from relook.data.builder import BuildOptions, BuildReport, build, build_item, build_items
from relook.data.check import CheckReport, Finding, check
from relook.data.collator import Collator
from relook.data.convert import convert
from relook.data.dataset import ItemsDataset
from relook.data.images import check_copy
from relook.data.items import Item, Message, read_items, write_items
from relook.data.preview import preview
from relook.data.questions import Question, from_page, read_questions
from relook.data.remap import RemapReport, remap
from relook.data.sources import read
from relook.data.splits import build_splits
from relook.data.stats import Stats, stats
from relook.data.stream import ItemStream

__all__ = [
    "BuildOptions",
    "BuildReport",
    "CheckReport",
    "Collator",
    "Finding",
    "Item",
    "ItemStream",
    "ItemsDataset",
    "Message",
    "Question",
    "RemapReport",
    "Stats",
    "build",
    "build_item",
    "build_items",
    "build_splits",
    "check",
    "check_copy",
    "convert",
    "from_page",
    "preview",
    "read",
    "read_items",
    "read_questions",
    "remap",
    "stats",
    "write_items",
]
