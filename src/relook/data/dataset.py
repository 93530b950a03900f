"""A file of items as a map-style dataset: opened lazily, nothing held but where each record lies.

The index is 16 bytes a record plus its line, so 829,000 items take 16 MB whatever their length. The file is opened anew
for each record, which keeps the dataset picklable and safe in DataLoader workers. It needs no torch: anything with a
length and integer indices serves `DataLoader` and `transformers.Trainer`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

from relook.data.items import Item
from relook.data.records import place_of_record, read_records, read_span
from relook.errors import UserError


class ItemsDataset:
    """Items of a JSON array or JSON-lines file by number, image paths placed below a root.

    Args:
        path: the file.
        image_root: folder of the relative image paths; paths that leave it are refused. Without it, paths are
            relative to the file's folder (and may lead out of it: the file's own word is taken).
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        self.path = Path(path)
        self.image_root = None if image_root is None else Path(image_root)
        self._starts, self._ends, self._lines = array("Q"), array("Q"), array("L")
        for record in read_records(self.path):
            self._starts.append(record.start)
            self._ends.append(record.end)
            self._lines.append(record.line)
        if not self._starts:
            raise UserError(f"{self.path}: holds no items; build some with `relook data build`")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Item:
        """Item `index`; errors of its form or paths name file and line."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)} in {self.path}")
        index %= len(self)
        line = self._lines[index]
        entry = index + 1 if index and self._lines[index - 1] == line else 0  # an array on one line
        where = place_of_record(self.path, line, entry)
        item = Item.from_dict(read_span(self.path, self._starts[index], self._ends[index], line, entry), where)
        root = self.image_root if self.image_root is not None else self.path.parent
        try:
            return item.under(root, strict=self.image_root is not None)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))
