"""What a Malaysian till receipt says: rows of pieces of text, with the fields marked that can be asked for.

`write(random)` returns a `Script`: rows in reading order and the answers. Knows nothing of fonts and pixels.
"""

from __future__ import annotations

import random as randomness
from dataclasses import dataclass, field

Random = randomness.Random

QUESTIONS: dict[str, tuple[str, ...]] = {  # the first of each is the wording of the real set
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
MAIN = ("company", "date", "address", "total")  # what the real set asks


@dataclass(frozen=True)
class Piece:
    """A text in a row. align: l, c or r about `at`, a share of the print width. size: factor. field: what it answers."""

    text: str
    align: str = "l"
    at: float = 0.0
    size: float = 1.0
    bold: bool = False
    field: str | None = None


@dataclass
class Script:
    """Rows of pieces (an empty row is a gap) and the answer of each field."""

    rows: list[list[Piece]] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)

    def add(self, *pieces: Piece) -> None:
        self.rows.append(list(pieces))


def write(random: Random) -> Script:
    """A receipt in words: header, sale, items, totals, footer."""
    script = Script()
    facts = _Facts(random)
    date_at = random.choice(("head", "head", "head", "foot", "both_sides"))
    _header(script, random)
    if date_at != "foot":
        _sale(script, random, facts, with_date=True)
    _rule(script, random)
    _items(script, random, facts)
    _rule(script, random)
    _totals(script, random, facts)
    if random.random() < 0.45:
        _tax_summary(script, random, facts)
    if date_at == "foot":
        _rule(script, random)
        _sale(script, random, facts, with_date=True)
    _footer(script, random)
    return script


def pick(random: Random, text: str) -> str:
    """One of the words of a string."""
    return random.choice(text.split())


_FIRST = (
    "GARDENIA PERMATA SYARIKAT KEDAI UNIHAKKA LIGHTROOM SANYU OJC AEON POPULAR MR. GUARDIAN WATSON HON HWA SWC TEO HENG "
    "YONGFATT INDAH KING MYDIN BILLION GOLDEN SUPER ECO ASIA PACIFIC DELI RIANG SINAR CAHAYA MUTIARA BINTANG SRI SERI "
    "WANG FOOK LEE TAN LIM ONG WONG CHUAN SENG HUAT KIM SIN MAJU JAYA BARU UTAMA TIMUR PERDANA NIRVANA ORIENT CROWN "
    "ROYAL NEW STAR SUN MOON OCEAN GREEN BLUE RED WHITE BIG SMALL HAPPY LUCKY FAMILY TOP ONE FIRST CITY URBAN DE LA"
)
_SECOND = (
    "GIFT DECO STATIONERY MARKETING TRADING HARDWARE PHARMACY BAKERIES RESTAURANT RESTORAN CAFE KOPITIAM MINIMARKET "
    "SUPERMARKET BOOK STORE HOME LIVING HANDICRAFT TAILORING PETROLEUM SERVICE STATION ELECTRICAL MOTOR AUTO PARTS "
    "FOOD CATERING SEAFOOD NOODLE PIZZA BURGER FASHION OPTICAL CLINIC DENTAL MOBILE PHONE COMPUTER SYSTEM PRINTING "
    "PERNIAGAAN PEMBORONG KLINIK FARMASI GROCER MART EXPRESS VENTURES HOLDINGS INDUSTRIES LOGISTICS INTERNATIONAL"
)
_LEGAL = (
    "SDN BHD",
    "SDN BHD",
    "SDN BHD",
    "SDN. BHD.",
    "SDN.BHD.",
    "ENTERPRISE",
    "TRADING",
    "(M) SDN BHD",
    "& CO",
    "",
    "",
)
_ROADS = (
    "SAGU DEDAP PERMAS MAHAGONI PUTERI WANGSA TEMASYA BUNGA ANGSA TAMPOI SETIA GENTING IPOH KEPONG KUCHAI PUDU AMPANG "
    "BUKIT RAJA TUN RAZAK SULTAN ISMAIL MERDEKA KENANGA MELATI ANGGERIK CEMPAKA DAMAI BAKTI USAHA INDUSTRI PELABUR PERUBATAN"
)
_TOWNS = (
    "KUALA LUMPUR|PETALING JAYA|SHAH ALAM|JOHOR BAHRU|KLANG|SUBANG JAYA|PUCHONG|KAJANG|SERI KEMBANGAN|BATU CAVES|IPOH|"
    "SEREMBAN|MELAKA|KUANTAN|KUCHING|SKUDAI|CHERAS|RAWANG|SEPANG|BALAKONG|AMPANG|SETAPAK|MASAI|GEORGE TOWN|BANGI|DENGKIL"
).split("|")
_STATES = (
    "SELANGOR",
    "SELANGOR",
    "JOHOR",
    "SELANGOR DARUL EHSAN",
    "MALAYSIA",
    "W.P.",
    "PERAK",
    "PAHANG",
    "SARAWAK",
    "",
    "",
)
_GOODS = (
    "SOCKS BELT BAG PEN BOOK PAPER CLAY GLUE TAPE SCREW NAIL BASIN PIPE LAMP BULB FAN CABLE PLUG SOAP SHAMPOO CREAM MILK "
    "BREAD RICE OIL SUGAR SALT EGG CHICKEN FISH BEEF MUTTON NOODLE SOUP TEA COFFEE KOPI TEH AIS LIMAU NASI MEE GORENG AYAM "
    "ROTI CANAI KARI SATAY JUICE WATER COLA BEER TOWER CUP PLATE SPOON TRAY BOX FILE CLIP RULER ERASER SHIRT PANTS SHOE "
    "TOY BALL KEY LOCK BRUSH PAINT WIRE HOSE VALVE SWITCH BATTERY CHARGER DIESEL RON95 PRIMAX V-POWER WHOLEMEAL JUMBO"
)
_KINDS = (
    "RED BLUE BLACK WHITE SMALL LARGE (S) (M) (L) 12X13 2S 3PCS 500ML 1KG 250G KIDDY EXTRA HOT COLD SPECIAL ORI A4 NO.5"
)
_MONTHS = "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC".split()


def _cased(random: Random, text: str, style: int) -> str:
    """As printed: all capitals mostly, else title case."""
    return text.title() if style == 1 else text


def _company(random: Random) -> str:
    words = [pick(random, _FIRST) for _ in range(random.choice((1, 1, 2, 2, 3)))]
    if random.random() < 0.08:
        words.insert(1, "&")
        words.append(pick(random, _FIRST))
    if random.random() < 0.75:
        words.append(pick(random, _SECOND))
    if random.random() < 0.1:
        words.append(f"({random.choice(_TOWNS)})")
    return " ".join([*words, random.choice(_LEGAL)]).strip()


def _code(random: Random, pattern: str) -> str:
    """9 -> a digit, A -> a letter, the rest as it is."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    made = {"9": lambda: str(random.randrange(10)), "A": lambda: random.choice(letters)}
    return "".join(made[c]() if c in made else c for c in pattern)


def _address(random: Random) -> list[str]:
    """Lines; joined by spaces they are the answer."""
    number = random.choice(
        ("NO {}", "NO.{}", "NO. {}", "{}", "{}", "LOT {}", "LOT {}-A", "{}-G", "UNIT {}", "NO {} & {}")
    )
    n = random.randint(1, 300)
    parts = [number.format(n, n + 2)]
    road = pick(random, _ROADS)
    road_style = random.choice(
        ("JALAN {r}", "JALAN {r} {a}", "JALAN {r} {a}/{b}", "JLN {r} {a}/{b}A", "LORONG {r} {a}")
    )
    parts.append(road_style.format(r=road, a=random.randint(1, 60), b=random.randint(1, 30)))
    if random.random() < 0.7:
        kind = random.choice(("TAMAN", "TAMAN", "BANDAR", "KAWASAN PERINDUSTRIAN", "DESA", "PUSAT DAGANGAN"))
        parts.append(f"{kind} {pick(random, _ROADS)}")
    parts.append(
        f"{random.randint(10, 98)}{random.choice(('000', '100', '200', '300', '400', '500'))} {random.choice(_TOWNS)}"
    )
    state = random.choice(_STATES)
    if state:
        parts.append(state)
    lines, separators = [parts[0]], random.choice((", ", ", ", ",", " "))
    for part in parts[1:]:
        if len(lines[-1]) + len(part) < random.choice((20, 26, 34)):
            lines[-1] += separators + part
        else:
            lines[-1] += separators.strip()
            lines.append(part)
    lines[-1] += random.choice(("", "", "."))
    return lines


def _date(random: Random) -> str:
    d, m, y = random.randint(1, 28), random.randint(1, 12), random.choice((2016, 2017, 2017, 2018, 2018, 2018, 2019))
    name = _MONTHS[m - 1]
    forms = [
        (30, f"{d:02}/{m:02}/{y}"),
        (10, f"{d:02}-{m:02}-{y}"),
        (7, f"{d:02}/{m:02}/{y % 100}"),
        (5, f"{d:02}-{m:02}-{y % 100:02}"),
        (4, f"{d:02} {name} {y}"),
        (3, f"{d:02}-{name}-{y}"),
        (2, f"{d:02}.{m:02}.{y}"),
        (2, f"{y}-{m:02}-{d:02}"),
        (2, f"{d:02}/{name}/{y}"),
        (2, f"{d}/{m}/{y}"),
        (1, f"{d} {name} {y % 100}"),
        (1, f"{d:02}{name}{y}"),
    ]
    return random.choices([f for _, f in forms], [w for w, _ in forms])[0]


def _time(random: Random) -> str:
    h, m, s = random.randint(7, 22), random.randrange(60), random.randrange(60)
    half = "AM" if h < 12 else "PM"
    return random.choice((f"{h:02}:{m:02}", f"{h:02}:{m:02}:{s:02}", f"{(h - 1) % 12 + 1:02}:{m:02}:{s:02} {half}"))


def _money(value: int, sep: bool = True) -> str:
    """Cents in the way a till prints them."""
    text = f"{abs(value) // 100:,}" if sep else str(abs(value) // 100)
    return f"{'-' if value < 0 else ''}{text}.{abs(value) % 100:02}"


class _Facts:
    """The numbers of one sale, in cents."""

    def __init__(self, random: Random) -> None:
        count = random.choice((1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 11))
        self.items = []
        for _ in range(count):
            quantity = random.choice((1, 1, 1, 1, 2, 3, 5, 10))
            price = random.choice((random.randint(20, 999), random.randint(100, 3000), random.randint(100, 20000)))
            if random.random() < 0.4:
                price = price // 10 * 10 or 10
            name = " ".join(
                [pick(random, _GOODS), *[pick(random, _GOODS + " " + _KINDS) for _ in range(random.randint(0, 3))]]
            )
            self.items.append((name, quantity, price))
        self.subtotal = sum(q * p for _, q, p in self.items)
        self.taxed = random.random() < 0.7
        self.tax = round(self.subtotal * 6 / 106) if self.taxed else 0
        whole = round(self.subtotal / 5) * 5
        self.rounding = whole - self.subtotal if random.random() < 0.7 else 0
        self.total = self.subtotal + self.rounding
        self.paid = random.choice((self.total, -(-self.total // 1000) * 1000, -(-self.total // 5000) * 5000))
        self.paid = max(self.paid, self.total)


def _header(script: Script, random: Random) -> None:
    at = random.choice((("c", 0.5), ("c", 0.5), ("c", 0.5), ("c", 0.5), ("l", 0.0)))
    case = random.choice((0, 0, 0, 1))
    company = _company(random)
    script.answers["company"] = company.upper()
    big = random.choice((1.0, 1.0, 1.15, 1.4, 1.8))
    bold = random.random() < 0.4
    for line in _wrapped(company, int(34 / big)):
        script.add(Piece(_cased(random, line, case), *at, size=big, bold=bold, field="company"))
    if random.random() < 0.7:
        form = random.choice(
            (
                "(999999-A)",
                "(CO. REG NO: 999999-A)",
                "CO NO.: 999999A",
                "(9999999-A)",
                "ROC NO. 999999-A",
                "(AA9999999-A)",
            )
        )
        script.add(Piece(_code(random, form).replace("99", str(random.randint(10, 99))), *at))
    address = _address(random)
    script.answers["address"] = " ".join(address).upper()
    for line in address:
        script.add(Piece(_cased(random, line, case), *at, field="address"))
    rows = []
    if random.random() < 0.75:
        phone = _code(
            random,
            random.choice(
                (
                    "03-9999 9999",
                    "03-99999999",
                    "07-9999999",
                    "019-9999999",
                    "+603-99999999",
                    "03 9999 9999",
                    "04-9999999",
                )
            ),
        )
        label = random.choice(("TEL : ", "TEL: ", "Tel: ", "TEL NO. : ", "H/P: ", "TEL ", "Phone : ", ""))
        fax = "" if random.random() < 0.7 else random.choice((" FAX: ", " Fax : ")) + _code(random, "03-99999999")
        rows.append([Piece(label + phone + fax, *at, field="phone")])
        script.answers["phone"] = phone
    if random.random() < 0.6:
        label = random.choice(("GST ID : ", "GST NO: ", "(GST Reg. No : ", "GST REG: ", "GST ID No :"))
        rows.append([Piece(label + _code(random, "009999999999") + (")" if label[0] == "(" else ""), *at)])
    random.shuffle(rows)
    script.rows.extend(rows)
    if random.random() < 0.7:
        if random.random() < 0.4:
            script.add()
        title = random.choice(
            (
                "TAX INVOICE",
                "TAX INVOICE",
                "SIMPLIFIED TAX INVOICE",
                "INVOICE",
                "CASH BILL",
                "-TAX INVOICE-",
                "RECEIPT",
                "Tax Invoice",
                "GUEST CHECK",
            )
        )
        script.add(Piece(title, "c", 0.5, size=random.choice((1.0, 1.0, 1.3)), bold=random.random() < 0.3))
    if random.random() < 0.3:
        script.add()


def _wrapped(text: str, columns: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > columns:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _sale(script: Script, random: Random, facts: _Facts, with_date: bool) -> None:
    """Invoice number, date, time, cashier: as rows of label and value, in one or two columns, or bare."""
    date, time = _date(random), _time(random)
    script.answers["date"] = date.upper()
    shown = _cased(random, date, random.choice((0, 0, 1)))
    invoice = _code(
        random,
        random.choice(("99999", "AA99999999", "A999999999", "9999999-9", "AA-99999", "999999999999", "99/999999")),
    )
    colon = random.choice((": ", " : ", ":", " :", ": "))
    entries: list[tuple[str, str, str | None]] = []
    if random.random() < 0.7:
        entries.append(
            (
                random.choice(
                    (
                        "INVOICE NO",
                        "Invoice No",
                        "Inv No.",
                        "DOC NO",
                        "Bill No",
                        "RECEIPT #",
                        "Receipt No",
                        "DOCUMENT NO",
                    )
                ),
                invoice,
                "invoice",
            )
        )
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
            entries.append((pick(random, names).replace("_", " "), pick(random, values), None))
    random.shuffle(entries)
    shape = random.choice(("list", "list", "tabbed", "two", "right"))
    middle = random.uniform(0.25, 0.45)
    while entries:
        name, value, mark = entries.pop(0)
        if not name:
            script.add(Piece(value, *random.choice((("l", 0.0), ("c", 0.5), ("r", 1.0))), field=mark))
        elif shape == "right":
            script.add(Piece(name + colon, "l", 0.0), Piece(value, "r", 1.0, field=mark))
        elif shape == "tabbed":
            script.add(Piece(name, "l", 0.0), Piece(colon.strip() + " " + value, "l", middle, field=mark))
        elif shape == "two" and entries and len(name + value) < 16 and len(entries[0][0] + entries[0][1]) < 16:
            other, its, its_mark = entries.pop(0)
            script.add(
                Piece(name + colon + value, "l", 0.0, field=mark), Piece(other + colon + its, "l", 0.55, field=its_mark)
            )
        else:
            script.add(Piece(name + colon + value, "l", 0.0, field=mark))


def _rule(script: Script, random: Random) -> None:
    kind = random.random()
    if kind < 0.45:
        script.add(Piece(random.choice("---=*_") * 60, "l", 0.0))
    elif kind < 0.7:
        script.add()


def _items(script: Script, random: Random, facts: _Facts) -> None:
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
        _rule(script, random)
    code = random.choice(("", " SR", " S", "", " *", " Z"))
    for name, quantity, price in facts.items:
        amount = _money(quantity * price) + code
        if shape == "columns":
            script.add(
                Piece(name[:18], "l", 0.0),
                Piece(str(quantity), "r", 0.55),
                Piece(_money(price), "r", 0.75),
                Piece(amount, "r", 1.0),
            )
        elif shape == "quantity_first":
            script.add(Piece(str(quantity), "l", 0.0), Piece(name[:22], "l", 0.15), Piece(amount, "r", 1.0))
        else:
            script.add(Piece(name[:36], "l", 0.0))
            number = _code(random, random.choice(("9999999", "9559999999999", "99999")))
            script.add(
                Piece(number, "l", 0.0), Piece(f"{quantity} X {_money(price)}", "r", 0.7), Piece(amount, "r", 1.0)
            )
        if random.random() < 0.08:
            script.add(
                Piece(f"DISC {random.randint(5, 50)}%", "l", 0.1), Piece(_money(-random.randint(10, 300)), "r", 1.0)
            )


def _totals(script: Script, random: Random, facts: _Facts) -> None:
    """The block that matters: rows before the total, the total, what was paid and given back."""
    currency = random.choice(("", "", "", "RM ", "RM", "$"))
    end = random.choice((1.0, 1.0, 1.0, 0.8))
    label_at = random.choice((("l", 0.0), ("l", 0.0), ("r", end - 0.3), ("l", 0.25)))
    colon = random.choice(("", ":", " :", ""))

    def row(label: str, value: str, mark: str | None = None, size: float = 1.0, bold: bool = False) -> None:
        script.add(
            Piece(label + colon, *label_at, size=size, bold=bold),
            Piece(value, "r", end, size=size, bold=bold, field=mark),
        )

    if random.random() < 0.3:
        script.add(
            Piece(f"{random.choice(('Item(s)', 'No. Items', 'Total Qty', 'ITEM'))}: {len(facts.items)}", "l", 0.0)
        )
    if random.random() < 0.6:
        row(
            random.choice(
                (
                    "SUBTOTAL",
                    "Sub Total",
                    "Sub-Total",
                    "TOTAL SALES (EXCL. GST)",
                    "Total (Excluding GST)",
                    "Gross Amount",
                )
            ),
            _money(facts.subtotal - facts.tax),
        )
    if random.random() < 0.25:
        row(random.choice(("Discount", "DISC", "Serv. Charge (0%)")), _money(0))
    if facts.taxed and random.random() < 0.7:
        row(random.choice(("GST 6%", "Total GST", "GST payable (6%)", "TAX", "GST @6%")), _money(facts.tax), "tax")
        script.answers["tax"] = _money(facts.tax)
    if random.random() < 0.25:
        row(random.choice(("Total (Inclusive of GST)", "Total Sales (Incl. GST)")), _money(facts.subtotal))
    if random.random() < 0.5:
        row(random.choice(("Rounding", "ROUNDING ADJ", "Rounding Adjustment", "Rounding Adj")), _money(facts.rounding))
    if random.random() < 0.2:
        _rule(script, random)
    size, bold = random.choice((1.0, 1.0, 1.0, 1.25, 1.5, 1.8)), random.random() < 0.4
    label = random.choice(
        (
            "TOTAL",
            "Total",
            "TOTAL",
            "GRAND TOTAL",
            "Grand Total",
            "Rounded Total (RM)",
            "NET TOTAL",
            "TOTAL AMOUNT",
            "Total Incl. GST@6%",
            "NETT TOTAL",
            "TOTAL RM",
            "Amount Due",
            "Total Sales (Inclusive of GST)",
        )
    )
    if size > 1.2:
        label = label.split(" (")[0][:11]
    separated = random.random() < 0.85
    row(label, currency + _money(facts.total, separated), "total", size, bold)
    script.answers["total"] = _money(facts.total, separated)
    if random.random() < 0.15:
        script.add()
    if random.random() < 0.75:
        cash = random.random() < 0.75
        paid = facts.paid if cash else facts.total
        row(
            random.choice(
                ("CASH", "Cash", "PAID", "CASH RM") if cash else ("VISA", "MASTER CARD", "Credit Card", "DEBIT")
            ),
            currency + _money(paid),
            "paid",
        )
        script.answers["paid"] = _money(paid)
        if random.random() < 0.85:
            row(
                random.choice(("CHANGE", "Change", "CHANGE DUE", "Balance")),
                currency + _money(paid - facts.total),
                "change",
            )
            script.answers["change"] = _money(paid - facts.total)


def _tax_summary(script: Script, random: Random, facts: _Facts) -> None:
    if random.random() < 0.5:
        script.add()
    script.add(Piece("GST Summary", "l", 0.0), Piece("Amount(RM)", "r", 0.7), Piece("Tax(RM)", "r", 1.0))
    script.add(
        Piece(random.choice(("SR @ 6%", "S(6%)", "SR 6", "S = 6%")), "l", 0.0),
        Piece(_money(facts.subtotal - facts.tax), "r", 0.7),
        Piece(_money(facts.tax), "r", 1.0),
    )
    if random.random() < 0.3:
        script.add(
            Piece("Total :", "l", 0.0),
            Piece(_money(facts.subtotal - facts.tax), "r", 0.7),
            Piece(_money(facts.tax), "r", 1.0),
        )


_THANKS = (
    "THANK YOU|PLEASE COME AGAIN|THANK YOU PLEASE COME AGAIN !|GOODS SOLD ARE NOT RETURNABLE|GOODS SOLD ARE NOT REFUNDABLE|"
    "EXCHANGEABLE WITHIN 3 DAYS|Thank You. Please come again.|EXCHANGE ARE ALLOWED WITHIN|7 DAY WITH RECEIPT.|"
    "STRICTLY NO CASH REFUND.|Like us @ Facebook|THIS IS A COMPUTER GENERATED INVOICE|CUSTOMER COPY|** THANK YOU **|"
    "Terima kasih|Sila datang lagi|Goods sold are non refundable|Powered by XILNEX|www.example.com.my|Hotline: 1-300-88-2525"
).split("|")


def _footer(script: Script, random: Random) -> None:
    if random.random() < 0.6:
        _rule(script, random)
    for _ in range(random.choice((0, 1, 2, 2, 3, 4))):
        script.add(Piece(random.choice(_THANKS), "c", 0.5))
