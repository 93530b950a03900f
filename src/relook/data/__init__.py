"""Data: items in the published format, made from boxes, checked, and collated for the model's forward.

    records     JSON on disk, lazily, with file and line
    items       the published item, typed                         dataset   a file of items as a map-style dataset
    questions   {image, question, answer, bboxs} lines            collator  items -> one padded batch
    sources     published sets and forms of file, as tables       check     faults in a file of items, by rule
    formats, viscot, boxed, members, hub   the forms themselves   images    the image sets, and finding their files
    builder     questions -> items with looks, by its options     remap     somebody else's image paths -> one's own
    variants    items of one model as those of another            splits    the paper's evaluation splits
    worlds/     synthetic pages, drawn from a seed

Nothing here imports torch or transformers until a batch is collated.
"""

from relook.data.builder import BuildOptions, BuildReport, build, build_item, build_items
from relook.data.check import CheckReport, Finding, check
from relook.data.collator import Collator
from relook.data.dataset import ItemsDataset
from relook.data.items import Item, Message, read_items, write_items
from relook.data.questions import Question, from_page, read_questions

__all__ = [
    "BuildOptions",
    "BuildReport",
    "CheckReport",
    "Collator",
    "Finding",
    "Item",
    "ItemsDataset",
    "Message",
    "Question",
    "build",
    "build_item",
    "build_items",
    "check",
    "from_page",
    "read_items",
    "read_questions",
    "write_items",
]
