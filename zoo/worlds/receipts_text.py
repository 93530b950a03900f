"""Text of a Malaysian till receipt: rows of text pieces, with the fields that questions ask for marked.

`write(random)` returns a `Script`: rows in reading order and the answers. Words come from receipts_words, the contents
of the sale from receipts_facts.
"""

from __future__ import annotations

import random as randomness
from collections.abc import Callable
from dataclasses import dataclass, field

from zoo.worlds import receipts_facts as made
from zoo.worlds import receipts_words as words

Random = randomness.Random

QUESTIONS: dict[str, tuple[str, ...]] = {  # first: the wording of the real set
    "company": (
        "What is the name of the company on this receipt?",
        "Which company issued this receipt?",
        "What is the name of the shop?",
    ),
    "date": (
        "What is the date on this receipt?",
        "When was this receipt issued?",
        "What is the date of purchase?",
    ),
    "address": (
        "What is the address of the company on this receipt?",
        "What is the address of the shop?",
        "Where is the company located?",
    ),
    "total": (
        "What is the total amount on this receipt?",
        "What is the total?",
        "How much was paid in total?",
    ),
    "tax": ("What is the tax amount on this receipt?", "How much is the tax?"),
    "change": ("What is the change on this receipt?", "How much change was given?"),
    "paid": ("What is the amount paid on this receipt?", "How much cash was given?"),
    "invoice": ("What is the invoice number on this receipt?", "What is the receipt number?"),
    "phone": ("What is the phone number on this receipt?", "What is the telephone number of the company?"),
}
MAIN = ("company", "date", "address", "total")  # fields of the real set


Part = tuple[str, int]
Place = tuple[str, float]  # align and at of a Piece
Entry = tuple[str, str, str | None]  # label, value, the question it answers


@dataclass(frozen=True)
class Piece:
    """A text in a row.

    Attributes:
        align: l, c or r, relative to `at`.
        at: position as a share of the print width.
        size: factor on the font size.
        field: the field it answers.
        part: role in the questions of receipts_asked: "name", "amount" or "rest" with the number of the item; "count",
            "method" and "payment" have number 0.
    """

    text: str
    align: str = "l"
    at: float = 0.0
    size: float = 1.0
    bold: bool = False
    field: str | None = None
    part: Part | None = None


def marked(
    text: str, align: str = "l", at: float = 0.0, size: float = 1.0, bold: bool = False, mark: str | None = None
) -> Piece:
    """A piece that answers the question `mark`: one of QUESTIONS, or one of another module's (then its part)."""
    known = mark in QUESTIONS
    return Piece(text, align, at, size, bold, mark if known else None, (mark, 0) if mark and not known else None)


@dataclass
class Script:
    """Rows of pieces (an empty row is a gap) and the answer of each field.

    Attributes:
        prices: item number -> (printed name, printed amount), for items with an unambiguous price.
    """

    rows: list[list[Piece]] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    prices: dict[int, tuple[str, str]] = field(default_factory=dict)

    def add(self, *pieces: Piece) -> None:
        self.rows.append(list(pieces))


def write(random: Random) -> Script:
    """Generate the text of a receipt: header, sale, items, totals, footer."""
    script = Script()
    facts = made.Facts(random)
    date_at = random.choice(("head", "head", "head", "foot", "both_sides"))
    _contacts(script, random, heading(script, random))
    title(script, random)
    if date_at != "foot":
        _sale(script, random, facts, with_date=True)
    rule(script, random)
    items(script, random, facts)
    rule(script, random)
    _totals(script, random, facts)
    if random.random() < 0.45:
        _tax_summary(script, random, facts)
    if date_at == "foot":
        rule(script, random)
        _sale(script, random, facts, with_date=True)
    footer(script, random)
    return script


def cased(random: Random, text: str, style: int) -> str:
    """Print in capitals mostly, else in title case."""
    return text.title() if style == 1 else text


def heading(script: Script, random: Random) -> Place:
    """Company, its registration, and address; returns where the lines stand."""
    at = random.choice((("c", 0.5), ("c", 0.5), ("c", 0.5), ("c", 0.5), ("l", 0.0)))
    case = random.choice((0, 0, 0, 1))
    company = made.company(random)
    script.answers["company"] = company.upper()
    big = random.choice((1.0, 1.0, 1.15, 1.4, 1.8))
    bold = random.random() < 0.4
    for line in wrapped(company, int(34 / big)):
        script.add(Piece(cased(random, line, case), *at, size=big, bold=bold, field="company"))
    if random.random() < 0.7:
        form = random.choice(words.REGISTRATIONS)
        shown = made.code(random, form).replace("99", str(random.randint(10, 99)))
        script.add(Piece(shown, *at, part=("registration", 0)))
        script.answers["registration"] = shown.strip("()").split(" ")[-1].upper()
    address = made.address(random)
    script.answers["address"] = " ".join(address).upper()
    for line in address:
        script.add(Piece(cased(random, line, case), *at, field="address"))
    return at


def _contacts(script: Script, random: Random, at: Place) -> None:
    """Phone, fax and tax number."""
    rows = []
    if random.random() < 0.75:
        phone = made.code(random, random.choice(words.PHONES))
        label = random.choice(("TEL : ", "TEL: ", "Tel: ", "TEL NO. : ", "H/P: ", "TEL ", "Phone : ", ""))
        fax = "" if random.random() < 0.7 else random.choice((" FAX: ", " Fax : ")) + made.code(random, "03-99999999")
        rows.append([Piece(label + phone + fax, *at, field="phone")])
        script.answers["phone"] = phone
    if random.random() < 0.6:
        label = random.choice(("GST ID : ", "GST NO: ", "(GST Reg. No : ", "GST REG: ", "GST ID No :"))
        rows.append([Piece(label + made.code(random, "009999999999") + (")" if label[0] == "(" else ""), *at)])
    random.shuffle(rows)
    script.rows.extend(rows)


def title(script: Script, random: Random) -> None:
    """What the paper is called."""
    if random.random() < 0.7:
        if random.random() < 0.4:
            script.add()
        script.add(
            Piece(
                random.choice(words.TITLES), "c", 0.5, size=random.choice((1.0, 1.0, 1.3)), bold=random.random() < 0.3
            )
        )
    if random.random() < 0.3:
        script.add()


def wrapped(text: str, columns: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > columns:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _sale(script: Script, random: Random, facts: made.Facts, with_date: bool) -> None:
    """Invoice number, date, time and cashier as rows of label and value, in one or two columns, or without labels."""
    date, time = made.date(random), made.time(random)
    script.answers["date"] = date.upper()
    shown = cased(random, date, random.choice((0, 0, 1)))
    invoice = made.code(random, random.choice(words.INVOICE_NUMBERS))
    colon = random.choice((": ", " : ", ":", " :", ": "))
    entries: list[Entry] = []
    if random.random() < 0.7:
        entries.append((random.choice(words.INVOICE_LABELS), invoice, "invoice"))
        script.answers["invoice"] = invoice
    joined = random.random() < 0.45
    label = random.choice(("DATE", "Date", "DATE", "Date", "Invoice Date", "Bill Date", "Dt", "Tarikh", ""))
    entries.append((label, f"{shown} {time}" if joined else shown, "date"))
    if not joined and random.random() < 0.7:
        entries.append((random.choice(("TIME", "Time", "Time")), time, None))
    for names, values in (
        ("CASHIER Cashier Served_By USER Operator", "USER MANIS ADMIN NUR KIM LEE SITI 01"),
        ("TABLE Counter POS TERMINAL Member", "1 12 A1 T3 5 001"),
    ):
        if random.random() < 0.55:
            entries.append((made.pick(random, names).replace("_", " "), made.pick(random, values), None))
    entry_rows(script, random, entries, colon)


def entry_rows(script: Script, random: Random, entries: list[Entry], colon: str) -> None:
    """Rows of label and value in random order: one or two columns, or a value alone where it has no label."""
    random.shuffle(entries)
    shape = random.choice(("list", "list", "tabbed", "two", "right"))
    middle = random.uniform(0.25, 0.45)
    while entries:
        name, value, mark = entries.pop(0)
        if not name:
            script.add(marked(value, *random.choice((("l", 0.0), ("c", 0.5), ("r", 1.0))), mark=mark))
        elif shape == "right":
            script.add(Piece(name + colon, "l", 0.0), marked(value, "r", 1.0, mark=mark))
        elif shape == "tabbed":
            script.add(Piece(name, "l", 0.0), marked(colon.strip() + " " + value, "l", middle, mark=mark))
        elif shape == "two" and entries and len(name + value) < 16 and len(entries[0][0] + entries[0][1]) < 16:
            other, its, its_mark = entries.pop(0)
            script.add(
                marked(name + colon + value, "l", 0.0, mark=mark), marked(other + colon + its, "l", 0.55, mark=its_mark)
            )
        else:
            script.add(marked(name + colon + value, "l", 0.0, mark=mark))


def rule(script: Script, random: Random) -> None:
    kind = random.random()
    if kind < 0.45:
        script.add(Piece(random.choice("---=*_") * 60, "l", 0.0))
    elif kind < 0.7:
        script.add()


_ROOM = {"columns": 18, "quantity_first": 22, "two_rows": 36}  # maximum letters of an item's name, by layout


def items(script: Script, random: Random, facts: made.Facts) -> None:
    shape = random.choice(("two_rows", "two_rows", "columns", "quantity_first"))
    if random.random() < 0.7:
        heads = {
            "columns": (("Item", "l", 0.0), ("Qty", "r", 0.55), ("Price", "r", 0.75), ("Amount", "r", 1.0)),
            "two_rows": (("CODE/DESC", "l", 0.0), ("PRICE", "r", 0.6), ("AMOUNT", "r", 1.0)),
            "quantity_first": (
                ("Qty", "l", 0.0),
                ("Description", "l", 0.15),
                (random.choice(("Total", "RM", "Amt(RM)")), "r", 1.0),
            ),
        }
        script.add(*[Piece(*head) for head in heads[shape]])
        rule(script, random)
    code = random.choice(("", " SR", " S", "", " *", " Z"))
    for number, (name, quantity, price) in enumerate(facts.items):
        shown, total = name[: _ROOM[shape]], made.money(quantity * price)
        title, rest, amount = ("name", number), ("rest", number), ("amount", number)
        if shape == "columns":
            script.add(
                Piece(shown, "l", 0.0, part=title),
                Piece(str(quantity), "r", 0.55, part=rest),
                Piece(made.money(price), "r", 0.75, part=rest),
                Piece(total + code, "r", 1.0, part=amount),
            )
        elif shape == "quantity_first":
            script.add(
                Piece(str(quantity), "l", 0.0, part=rest),
                Piece(shown, "l", 0.15, part=title),
                Piece(total + code, "r", 1.0, part=amount),
            )
        else:
            script.add(Piece(shown, "l", 0.0, part=title))
            article = made.code(random, random.choice(("9999999", "9559999999999", "99999")))
            script.add(
                Piece(article, "l", 0.0, part=rest),
                Piece(f"{quantity} X {made.money(price)}", "r", 0.7, part=rest),
                Piece(total + code, "r", 1.0, part=amount),
            )
        discounted = random.random() < 0.08
        if discounted:
            script.add(
                Piece(f"DISC {random.randint(5, 50)}%", "l", 0.1), Piece(made.money(-random.randint(10, 300)), "r", 1.0)
            )
        # with several units, unit price and amount would be ambiguous
        if not discounted and (quantity == 1 or shape == "quantity_first"):
            script.prices[number] = shown.strip().upper(), total
    names = [name[: _ROOM[shape]].upper() for name, _, _ in facts.items]
    script.prices = {n: sold for n, sold in script.prices.items() if sum(sold[0] in name for name in names) == 1}
    script.answers["items"] = str(len(facts.items))


def _totals(script: Script, random: Random, facts: made.Facts) -> None:
    """The totals block: rows before the total, the total, payment and change."""
    currency = random.choice(("", "", "", "RM ", "RM", "$"))
    end = random.choice((1.0, 1.0, 1.0, 0.8))
    label_at = random.choice((("l", 0.0), ("l", 0.0), ("r", end - 0.3), ("l", 0.25)))
    colon = random.choice(("", ":", " :", ""))

    def row(label: str, value: str, mark: str | None = None, size: float = 1.0, bold: bool = False) -> None:
        parts = (("method", 0), ("payment", 0)) if mark == "paid" else (None, None)
        script.add(
            Piece(label + colon, *label_at, size=size, bold=bold, part=parts[0]),
            Piece(value, "r", end, size=size, bold=bold, field=mark, part=parts[1]),
        )

    if random.random() < 0.3:
        label = random.choice(("Item(s)", "No. Items", "Total Qty", "ITEM"))
        script.add(Piece(f"{label}: {len(facts.items)}", part=("count", 0)))
    if random.random() < 0.6:
        row(random.choice(words.SUBTOTALS), made.money(facts.subtotal - facts.tax))
    if random.random() < 0.25:
        row(random.choice(("Discount", "DISC", "Serv. Charge (0%)")), made.money(0))
    if facts.taxed and random.random() < 0.7:
        row(random.choice(("GST 6%", "Total GST", "GST payable (6%)", "TAX", "GST @6%")), made.money(facts.tax), "tax")
        script.answers["tax"] = made.money(facts.tax)
    if random.random() < 0.25:
        row(random.choice(("Total (Inclusive of GST)", "Total Sales (Incl. GST)")), made.money(facts.subtotal))
    if random.random() < 0.5:
        row(
            random.choice(("Rounding", "ROUNDING ADJ", "Rounding Adjustment", "Rounding Adj")),
            made.money(facts.rounding),
        )
    if random.random() < 0.2:
        rule(script, random)
    size, bold = random.choice((1.0, 1.0, 1.0, 1.25, 1.5, 1.8)), random.random() < 0.4
    label = random.choice(words.TOTALS)
    if size > 1.2:
        label = label.split(" (")[0][:11]
    separated = random.random() < 0.85
    row(label, currency + made.money(facts.total, separated), "total", size, bold)
    script.answers["total"] = made.money(facts.total, separated)
    if random.random() < 0.15:
        script.add()
    if random.random() < 0.75:
        _payment(script, random, facts, currency, row)


def _payment(
    script: Script, random: Random, facts: made.Facts, currency: str, row: Callable[[str, str, str], None]
) -> None:
    cash = random.random() < 0.75
    paid = facts.paid if cash else facts.total
    label = random.choice(
        ("CASH", "Cash", "PAID", "CASH RM") if cash else ("VISA", "MASTER CARD", "Credit Card", "DEBIT")
    )
    row(label, currency + made.money(paid), "paid")
    script.answers["paid"] = made.money(paid)
    if label != "PAID":  # the means of payment is not printed
        script.answers["cash"] = "YES" if cash else "NO"
    if random.random() < 0.85:
        change = made.money(paid - facts.total)
        row(random.choice(("CHANGE", "Change", "CHANGE DUE", "Balance")), currency + change, "change")
        script.answers["change"] = change


def _tax_summary(script: Script, random: Random, facts: made.Facts) -> None:
    if random.random() < 0.5:
        script.add()
    script.add(Piece("GST Summary", "l", 0.0), Piece("Amount(RM)", "r", 0.7), Piece("Tax(RM)", "r", 1.0))
    script.add(
        Piece(random.choice(("SR @ 6%", "S(6%)", "SR 6", "S = 6%")), "l", 0.0),
        Piece(made.money(facts.subtotal - facts.tax), "r", 0.7),
        Piece(made.money(facts.tax), "r", 1.0),
    )
    if random.random() < 0.3:
        script.add(
            Piece("Total :", "l", 0.0),
            Piece(made.money(facts.subtotal - facts.tax), "r", 0.7),
            Piece(made.money(facts.tax), "r", 1.0),
        )


def footer(script: Script, random: Random) -> None:
    if random.random() < 0.6:
        rule(script, random)
    for _ in range(random.choice((0, 1, 2, 2, 3, 4))):
        script.add(Piece(random.choice(words.THANKS), "c", 0.5))
