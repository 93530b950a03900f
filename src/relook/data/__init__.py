"""Data: items in the published format, built from boxes, checked, sampled, and collated for the model's `forward`.

    items       Item, Question: the types                   forms/      input formats, a row each; `read`
    rules       the options of a build and of a recipe      build       questions -> items with looks
    reader      JSON and Parquet, with file and line        records     records by number, of any file format
    dataset     items by position in the order of a seed    collate     items -> encoded rows -> one padded batch
    check       faults found and mended; the table of them is `faults`, on `crops`
    images      paths, sizes and facts of images            published   what others have published, as tables
    remap       sets written again: other paths, Parquet    preview, stats   a page to look at items; a set in numbers

Nothing here imports torch or transformers until a sample is encoded.
"""

from relook.data.build import BuildOptions, BuildReport, build, build_item, build_items
from relook.data.check import CheckReport, Finding, check
from relook.data.collate import Collator, EncodedDataset
from relook.data.dataset import ItemsDataset, ItemStream, open_items
from relook.data.forms import read, read_questions
from relook.data.images import check_copy
from relook.data.items import Item, Message, Question, from_page, read_items, write_items
from relook.data.paper_splits import build_splits
from relook.data.preview import preview
from relook.data.remap import RemapReport, convert, remap
from relook.data.stats import Stats, stats

__all__ = [
    "BuildOptions",
    "BuildReport",
    "CheckReport",
    "Collator",
    "EncodedDataset",
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
    "open_items",
    "preview",
    "read",
    "read_items",
    "read_questions",
    "remap",
    "stats",
    "write_items",
]
