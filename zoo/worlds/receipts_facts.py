"""Contents of a receipt before layout: company, address, date, and the amounts of one sale.

Every function samples from the given random generator.
"""

from __future__ import annotations

import random as randomness

from zoo.worlds import receipts_words as words

Random = randomness.Random


def pick(random: Random, text: str) -> str:
    """Choose one of the words of a string."""
    return random.choice(text.split())


def company(random: Random) -> str:
    """Generate a company name in capitals."""
    parts = [pick(random, words.FIRST) for _ in range(random.choice((1, 1, 2, 2, 3)))]
    if random.random() < 0.08:
        parts.insert(1, "&")
        parts.append(pick(random, words.FIRST))
    if random.random() < 0.75:
        parts.append(pick(random, words.SECOND))
    if random.random() < 0.1:
        parts.append(f"({random.choice(words.TOWNS)})")
    return " ".join([*parts, random.choice(words.LEGAL)]).strip()


def code(random: Random, pattern: str) -> str:
    """Replace 9 by a random digit and A by a random letter."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    made = {"9": lambda: str(random.randrange(10)), "A": lambda: random.choice(letters)}
    return "".join(made[c]() if c in made else c for c in pattern)


def address(random: Random) -> list[str]:
    """Generate address lines; joined by spaces they are the answer."""
    number = random.choice(
        ("NO {}", "NO.{}", "NO. {}", "{}", "{}", "LOT {}", "LOT {}-A", "{}-G", "UNIT {}", "NO {} & {}")
    )
    n = random.randint(1, 300)
    parts = [number.format(n, n + 2)]
    road = pick(random, words.ROADS)
    road_style = random.choice(
        ("JALAN {r}", "JALAN {r} {a}", "JALAN {r} {a}/{b}", "JLN {r} {a}/{b}A", "LORONG {r} {a}")
    )
    parts.append(road_style.format(r=road, a=random.randint(1, 60), b=random.randint(1, 30)))
    if random.random() < 0.7:
        kind = random.choice(("TAMAN", "TAMAN", "BANDAR", "KAWASAN PERINDUSTRIAN", "DESA", "PUSAT DAGANGAN"))
        parts.append(f"{kind} {pick(random, words.ROADS)}")
    area = f"{random.randint(10, 98)}{random.choice(('000', '100', '200', '300', '400', '500'))}"
    parts.append(f"{area} {random.choice(words.TOWNS)}")
    state = random.choice(words.STATES)
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


FORMS = (30, 10, 7, 5, 4, 3, 2, 2, 2, 2, 1, 1)  # how often each of `dated` is printed


def dated(d: int, m: int, y: int) -> tuple[str, ...]:
    """The ways a till prints a day, in the order of FORMS."""
    name = words.MONTHS[m - 1]
    return (
        f"{d:02}/{m:02}/{y}",
        f"{d:02}-{m:02}-{y}",
        f"{d:02}/{m:02}/{y % 100}",
        f"{d:02}-{m:02}-{y % 100:02}",
        f"{d:02} {name} {y}",
        f"{d:02}-{name}-{y}",
        f"{d:02}.{m:02}.{y}",
        f"{y}-{m:02}-{d:02}",
        f"{d:02}/{name}/{y}",
        f"{d}/{m}/{y}",
        f"{d} {name} {y % 100}",
        f"{d:02}{name}{y}",
    )


def day(random: Random) -> tuple[int, int, int]:
    """A day, month and year."""
    return random.randint(1, 28), random.randint(1, 12), random.choice((2016, 2017, 2017, 2018, 2018, 2018, 2019))


def date(random: Random) -> str:
    return random.choices(dated(*day(random)), FORMS)[0]


def time(random: Random) -> str:
    h, m, s = random.randint(7, 22), random.randrange(60), random.randrange(60)
    half = "AM" if h < 12 else "PM"
    return random.choice((f"{h:02}:{m:02}", f"{h:02}:{m:02}:{s:02}", f"{(h - 1) % 12 + 1:02}:{m:02}:{s:02} {half}"))


def money(value: int, sep: bool = True) -> str:
    """Format cents as a till prints them."""
    text = f"{abs(value) // 100:,}" if sep else str(abs(value) // 100)
    return f"{'-' if value < 0 else ''}{text}.{abs(value) % 100:02}"


class Facts:
    """The amounts of one sale in cents."""

    def __init__(self, random: Random) -> None:
        count = random.choice((1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 11))
        self.items = []
        for _ in range(count):
            quantity = random.choice((1, 1, 1, 1, 2, 3, 5, 10))
            price = random.choice((random.randint(20, 999), random.randint(100, 3000), random.randint(100, 20000)))
            if random.random() < 0.4:
                price = price // 10 * 10 or 10
            name = " ".join(
                [
                    pick(random, words.GOODS),
                    *[pick(random, words.GOODS + " " + words.KINDS) for _ in range(random.randint(0, 3))],
                ]
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
