"""Receipts on which what is asked for has neighbors that look like it, and questions about those neighbors.

`write(random)` is `receipts_text.write` with other rows: totals before tax and rounding and of the tax summary beside
the total; due and printing dates beside the date; fax, mobile and registration numbers beside the phone; names above
and below the company's. `ask(script, spots, random)` asks for them. The table SALES says in which rows a sale ends, the
table ROWS how they are labeled and which question each answers.
"""

from __future__ import annotations

import datetime
import random as randomness
from dataclasses import replace
from typing import TYPE_CHECKING

from relook.regions import union
from zoo.worlds import receipts_facts as made
from zoo.worlds import receipts_text as text
from zoo.worlds import receipts_words as words
from zoo.worlds.base import QA
from zoo.worlds.receipts_asked import Spots
from zoo.worlds.receipts_text import Entry, Piece, Place, Script

if TYPE_CHECKING:
    import numpy as np

Random = randomness.Random

WORDINGS: dict[str, tuple[str, ...]] = {  # each has one answer on a page, printed whole in its box
    "subtotal": ("What is the subtotal on this receipt?", "What is the subtotal?"),
    "net": ("What is the total before tax?", "What is the total without tax?"),
    "gross": ("What is the total before rounding?", "How much is it before rounding?"),
    "rounding": ("What is the rounding on this receipt?", "How much was it rounded by?"),
    "deposit": ("What is the deposit on this receipt?", "How much deposit was paid?"),
    "due": ("What is the balance due on this receipt?", "How much remains to be paid?"),
    "quantity": ("What is the total quantity on this receipt?", "What is the total quantity?"),
    "taxable": ("What is the amount in the tax summary?", "Which amount does the tax summary show?"),
    "due_date": ("What is the due date on this receipt?", "When is the payment due?"),
    "printed": ("When was this receipt printed?", "What is the date of printing?"),
    "time": ("What is the time on this receipt?", "At what time was this receipt issued?"),
    "fax": ("What is the fax number on this receipt?", "What is the fax number of the company?"),
    "mobile": ("What is the mobile number on this receipt?", "What is the mobile number?"),
    "registration": ("What is the registration number of the company?", "What is the company number?"),
    "gst": ("What is the GST number on this receipt?", "What is the tax number of the company?"),
    "customer": ("Who is the customer on this receipt?", "Which company was billed?"),
}

# The rows of a sale's end in order; a ? marks those that are printed three times in five.
SALES = (
    "items? quantity? subtotal discount? tax? rounding? total paid? change? summary?",
    "quantity? subtotal rounding total paid change included? summary?",
    "quantity net discount? tax rounding? inclusive paid? change? summary",
    "net? tax? gross rounding total paid? change? items? summary? saved?",
    "items? quantity? before rounding payable paid? change? summary?",
    "subtotal? before discount? rounding? payable paid? change? included? saved?",
    "zero net tax rated zero rounding? payable paid?",
    "subtotal? tax? total deposit due paid? change?",
    "total paid change subtotal? tax? summary?",
)

ROWS: dict[str, tuple[str | None, tuple[str, ...]]] = {  # role -> (question, labels)
    "items": ("count", ("Item Count", "No. of Items", "Item(s)", "ITEMS SOLD")),
    "quantity": ("quantity", ("Total Qty", "TOTAL QTY", "Total Quantity", "Qty(s)", "Quantity Count")),
    "subtotal": ("subtotal", ("SUBTOTAL", "Sub Total", "Sub-Total", "SUB TOTAL", "S/TOTAL")),
    "net": ("net", ("Total Sales (Excluding GST)", "Total (Excl. GST)", "TOTAL EXCL. GST", "Total Before GST")),
    "discount": (None, ("Discount", "Total Discount", "DISC", "Service Charge")),
    "tax": ("tax", ("GST 6%", "Total GST", "TOTAL TAX", "Add GST 6%", "GST @6%", "Total GST Amt")),
    "gross": ("gross", ("Total (Incl. GST)", "Total Sales (Incl. GST)", "TOTAL INCL. GST", "Total RM Incl. of GST")),
    "before": ("gross", ("Total", "TOTAL", "Total Sales", "Bill Total", "Total Amount", "TOTAL RM")),
    "rounding": ("rounding", ("Rounding", "ROUNDING", "Rounding Adj", "Rounding Adjustment", "Round. Adj.")),
    "total": ("total", ("TOTAL", "Total", "GRAND TOTAL", "Total RM", "Total (RM)", "TOTAL AMOUNT", "Total Sales")),
    "inclusive": ("total", ("Total Sales (Inclusive of GST)", "Total Inclusive GST", "TOTAL (INCL. GST)")),
    "payable": ("total", ("NET TOTAL", "Nett Total", "Total Payable", "Rounded Total (RM)", "Amount Due", "TOTAL DUE")),
    "deposit": ("deposit", ("Deposit", "LESS DEPOSIT", "Deposit Paid")),
    "due": ("due", ("Balance Due", "BALANCE DUE", "Balance To Pay", "BAL. DUE", "Outstanding")),
    "paid": ("paid", ("CASH", "Cash", "Cash Received", "CASH TENDERED", "RM CASH", "Amount Paid", "Payment")),
    "change": ("change", ("CHANGE", "Change", "CHANGE DUE", "Amount Change", "Balance", "Change Amt")),
    "included": (None, ("GST @6% Included In Total", "Incl. GST 6%", "Total Includes GST")),
    "saved": (None, ("Total Savings", "You Saved", "Member Savings")),
    "zero": (None, ("Total 0% Supplies", "Total Zero Rated", "Total (0%)")),
    "rated": (None, ("Total 6% Supplies (Incl. GST)", "Total Standard Rated", "Total (6% incl.)")),
}
CARDS = ("VISA", "MASTER CARD", "Credit Card", "DEBIT CARD")
PEOPLE = "TAN LIM LEE WONG CHONG NG AHMAD SITI NUR AZMAN FARID KUMAR RAVI DEVI MEI LING WAI KIT HONG YEE"


def phrases() -> tuple[str, ...]:
    """The question wordings."""
    return tuple(wording for wordings in WORDINGS.values() for wording in wordings)


def ask(script: Script, spots: Spots, random: np.random.Generator) -> list[QA]:
    """A question for each row of WORDINGS whose answer is printed whole."""
    return [
        QA(wordings[int(random.integers(len(wordings)))], script.answers[name], (union(spots[name, 0]),), field=name)
        for name, wordings in WORDINGS.items()
        if name in script.answers and (name, 0) in spots
    ]


def write(random: Random) -> Script:
    """Generate the text of a receipt with look-alike rows."""
    script, facts = Script(), made.Facts(random)
    if random.random() < 0.3:
        above(script, random)
    at = text.heading(script, random)
    numbers(script, random, at)
    text.title(script, random)
    sale_at_foot = random.random() < 0.2
    if not sale_at_foot:
        sale(script, random)
    text.rule(script, random)
    text.items(script, random, facts)
    text.rule(script, random)
    totals(script, random, facts)
    if sale_at_foot:
        text.rule(script, random)
        sale(script, random)
    text.footer(script, random)
    if random.random() < 0.5:
        foot(script, random)
    return script


def above(script: Script, random: Random) -> None:
    """A name or number in large print over the company's, as somebody files the paper under."""
    name = " ".join(random.sample(PEOPLE.split(), random.choice((2, 3))))
    shown = random.choice(
        (name, name.title(), name.lower(), made.code(random, "9-9999999"), made.code(random, "A99999"))
    )
    script.add(Piece(shown, *random.choice((("c", 0.5), ("l", 0.0), ("r", 1.0))), size=random.choice((1.0, 1.3, 1.7))))
    if random.random() < 0.5:
        script.add()


def numbers(script: Script, random: Random, at: Place) -> None:
    """Branch, phone, fax, mobile and tax numbers, one or two a row, in random order."""
    known = {
        "phone": (0.85, ("TEL : ", "TEL: ", "Tel: ", "TEL NO. : ", "Phone : ", "T: "), random.choice(words.PHONES)),
        "fax": (0.5, ("FAX : ", "FAX: ", "Fax: ", "F: "), random.choice(("03-9999 9999", "03-99999999", "07-9999999"))),
        "mobile": (0.3, ("H/P: ", "H/P : ", "HP NO: ", "Mobile: "), random.choice(("019-9999999", "012-999 9999"))),
        "gst": (0.7, ("GST ID : ", "GST NO: ", "GST REG NO : ", "GST ID No :"), "009999999999"),
    }
    pieces = []
    for name, (chance, labels, pattern) in known.items():
        if random.random() < chance:
            script.answers[name] = made.code(random, pattern)
            shown = random.choice(labels) + script.answers[name]
            pieces.append(text.marked(shown, *at, mark=name))
    if random.random() < 0.4:
        branch = random.choice(("", "BRANCH: ", "OUTLET : ", "(FORMERLY "))
        name = random.choice((random.choice(words.TOWNS), made.company(random)))
        pieces.insert(0, Piece(branch + name + (")" if branch[:1] == "(" else ""), *at))
    if random.random() < 0.3:
        random.shuffle(pieces)
    while pieces:
        first = pieces.pop(0)
        if pieces and len(first.text + pieces[0].text) < 34 and random.random() < 0.6:
            second = pieces.pop(0)
            script.add(replace(first, align="l", at=0.0), replace(second, align="l", at=0.52))
        else:
            script.add(first)


def sale(script: Script, random: Random) -> None:
    """Invoice number and date among other numbers, dates and times; sometimes the customer."""
    form = random.choices(range(len(made.FORMS)), made.FORMS)[0]
    d, m, y = made.day(random)
    day = datetime.date(y, m, d)

    def shown(later: int) -> str:
        other = day + datetime.timedelta(days=later)
        return made.dated(other.day, other.month, other.year)[form]

    date, time = shown(0), made.time(random)
    invoice = made.code(random, random.choice(words.INVOICE_NUMBERS))
    script.answers |= {"date": date.upper()}
    label = random.choice(("DATE", "Date", "DATE", "Date", "Invoice Date", "INV DATE", "Bill Date", "Date Issued", ""))
    joined = random.random() < 0.4
    entries: list[Entry] = [(label, f"{date} {time}" if joined else date, "date")]
    if not joined and random.random() < 0.8:
        entries.append((random.choice(("TIME", "Time", "Time", "")), time, "time"))
        script.answers["time"] = time
    if random.random() < 0.8:
        entries.append((random.choice(words.INVOICE_LABELS), invoice, "invoice"))
        script.answers["invoice"] = invoice
    if random.random() < 0.35:
        entries.append(
            (random.choice(("Due Date", "DUE DATE", "Payment Due")), shown(random.choice((7, 14, 30))), "due_date")
        )
        script.answers["due_date"] = entries[-1][1].upper()
    others = (
        ("Order Time|Pickup Time|Time In", made.time(random)),
        ("Delivery Date|D/O Date|Order Date", shown(random.choice((-2, -1, 1, 2, 3)))),
        ("Order No|Trans No|PO No.|Ref|Slip No", made.code(random, random.choice(words.INVOICE_NUMBERS))),
        ("Cashier|USER|Served By|Salesperson", made.pick(random, PEOPLE)),
        ("Counter|POS No|Table|Terminal", made.code(random, random.choice(("9", "99", "A9")))),
    )
    entries += [(random.choice(labels.split("|")), value, None) for labels, value in others if random.random() < 0.3]
    text.entry_rows(script, random, entries, random.choice((": ", " : ", ":", " :", ": ")))
    if random.random() < 0.35:
        name = made.company(random)
        script.add(Piece(random.choice(("BILL TO", "Customer", "To", "SOLD TO")) + ":"))
        script.add(Piece(name, part=("customer", 0)))
        script.answers["customer"] = name.upper()
        for line in made.address(random)[: random.choice((0, 1, 2))]:
            script.add(Piece(line))
    if random.random() < 0.5:  # printed by `foot`
        script.answers["printed"] = shown(random.choice((0, 0, 1, 2))).upper()


def totals(script: Script, random: Random, facts: made.Facts) -> None:
    """The rows of one of SALES."""
    roles = [role.rstrip("?") for role in random.choice(SALES).split() if role[-1] != "?" or random.random() < 0.6]
    if "paid" not in roles:
        roles = [role for role in roles if role != "change"]
    values = amounts(random, facts, roles)
    currency, colon = random.choice(("", "", "", "RM ", "RM", "$")), random.choice(("", ":", " :", ""))
    end = random.choice((1.0, 1.0, 1.0, 0.8))
    label_at = random.choice((("l", 0.0), ("l", 0.0), ("r", end - 0.3), ("l", 0.25)))
    big, bold = random.choice((1.0, 1.0, 1.0, 1.25, 1.5, 1.8)), random.random() < 0.4
    for role in roles:
        if role == "summary":
            summary(script, random, facts)
            continue
        mark, labels = ROWS[role]
        label = random.choice(labels)
        if role == "paid":
            label = payment(script, random, label)
        size = big if mark == "total" and len(label) < 14 else 1.0  # long labels have no room in large print
        value, heavy = values[role], bold and mark == "total"
        method = ("method", 0) if role == "paid" else None
        if role in ("items", "quantity"):
            amount = role == "quantity" and random.random() < 0.5  # the sum of the items stands beside their quantity
            count = text.marked(value, "r", end - 0.3 if amount else end, mark=mark)
            script.add(Piece(label + colon), count, *([Piece(values["gross"], "r", end)] if amount else []))
        else:
            figure = text.marked(currency + value, "r", end, size, heavy, mark)
            figure = replace(figure, part=("payment", 0)) if role == "paid" else figure
            script.add(Piece(label + colon, *label_at, size, heavy, part=method), figure)
        if mark and role != "items":
            script.answers[mark] = value
        if role in ("rounding", "total", "payable") and random.random() < 0.12:
            text.rule(script, random)


def amounts(random: Random, facts: made.Facts, roles: list[str]) -> dict[str, str]:
    """What each role's row says. Cents: zero + net + tax = gross, gross + rounding = total, total - deposit = due."""
    zero = facts.items[0][1] * facts.items[0][2] if "zero" in roles and len(facts.items) > 1 else 0
    rated = facts.subtotal - zero
    tax = round(rated * 6 / 106) if facts.taxed or "zero" in roles else 0
    rounding = facts.rounding if "rounding" in roles else 0
    total = facts.subtotal + rounding
    deposit = total // 20 * 10 if "deposit" in roles else 0
    due = total - deposit
    paid = random.choice((due, -(-due // 1000) * 1000, -(-due // 5000) * 5000)) or due
    quantity = sum(count for _, count, _ in facts.items)
    inclusive = "tax" not in roles or random.random() < 0.25
    cents = {
        "subtotal": facts.subtotal if inclusive else facts.subtotal - tax,
        "net": rated - tax,
        "discount": 0,
        "tax": tax,
        "gross": facts.subtotal,
        "before": facts.subtotal,
        "rounding": rounding,
        "total": total,
        "inclusive": total,
        "payable": total,
        "deposit": deposit,
        "due": due,
        "paid": paid,
        "change": paid - due,
        "included": tax,
        "saved": random.choice((0, random.randint(5, 500))),
        "zero": zero,
        "rated": rated,
    }
    return {role: made.money(value) for role, value in cents.items()} | {
        "items": str(len(facts.items)),
        "quantity": str(quantity),
    }


def payment(script: Script, random: Random, label: str) -> str:
    """Label of the row of payment, a card in one case of four; the answer to whether it was cash."""
    if random.random() < 0.25:
        label = random.choice(CARDS)
    if "CASH" in label.upper() or label in CARDS:
        script.answers["cash"] = "NO" if label in CARDS else "YES"
    return label


def summary(script: Script, random: Random, facts: made.Facts) -> None:
    """The table of taxes, with a total of its own."""
    tax = made.money(round(facts.subtotal * 6 / 106) if facts.taxed else 0)
    net = made.money(facts.subtotal - round(facts.subtotal * 6 / 106) if facts.taxed else facts.subtotal)
    if random.random() < 0.5:
        script.add()
    script.add(
        Piece(random.choice(("GST Summary", "GST SUMMARY", "Tax Code", "TAX SUMMARY"))),
        Piece(random.choice(("Amount(RM)", "Amt (RM)", "AMOUNT", "Net Amt")), "r", 0.7),
        Piece(random.choice(("Tax(RM)", "TAX", "GST(RM)")), "r", 1.0),
    )
    field = None if "tax" in script.answers else "tax"  # asked for here where no other row says it
    code = random.choice(("SR @ 6%", "SR (6%)", "SR 6", "S = 6%", "SR") if facts.taxed else ("ZR @ 0%", "ZR (0%)"))
    script.add(Piece(code), Piece(net, "r", 0.7, part=("taxable", 0)), Piece(tax, "r", 1.0, field=field))
    script.answers |= {"taxable": net, "tax": tax}
    if facts.taxed and random.random() < 0.35:
        script.add(Piece("ZR (0%)"), Piece("0.00", "r", 0.7), Piece("0.00", "r", 1.0))
    if random.random() < 0.5:
        script.add(Piece(random.choice(("Total :", "TOTAL", "Total"))), Piece(net, "r", 0.7), Piece(tax, "r", 1.0))


def foot(script: Script, random: Random) -> None:
    """When it was printed, points, another company."""
    if "printed" in script.answers:
        label = random.choice(("Printed: ", "Print Date: ", "PRINTED ON ", "Reprinted: "))
        shown = script.answers["printed"] + random.choice(("", " " + made.time(random)))
        script.add(Piece(label + shown, *random.choice((("l", 0.0), ("c", 0.5))), part=("printed", 0)))
    for chance, line in (
        (
            0.4,
            random.choice(("Points Balance: ", "Prev Balance : ", "Member Points : ")) + str(random.randint(0, 9999)),
        ),
        (0.3, random.choice(("OWNED BY ", "A MEMBER OF ", "Powered by ")) + made.company(random)),
        (0.3, random.choice(("Hotline: ", "Customer Service ", "Careline : ")) + made.code(random, "1-999-99-9999")),
    ):
        if random.random() < chance:
            script.add(Piece(line, *random.choice((("l", 0.0), ("c", 0.5)))))
