"""A generated web shop: sessions of users whose activity follows Zipf's law, as (collection, properties) in the order
in which a collector would receive them.

What makes it like the real thing, and a test of a lake: a few users make most events; one event in fifty arrives late,
some by days; fields appear as the product grows (a new release every week); prices are numbers, tags are arrays, the
campaign is an object; some clients send a number as text.

The same seed gives the same events, whatever the machine. Run as a program it writes NDJSON.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import json
import random
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

START = datetime(2026, 3, 2, tzinfo=UTC)
DAYS = 28
USERS = 5_000
COUNTRIES = ["US", "DE", "TR", "GB", "FR", "JP", "BR", "IN", "NL", "SE"]
DEVICES = ["mobile", "desktop", "tablet"]
AGENTS = [
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_3 like Mac OS X) AppleWebKit/605.1.15 Mobile/15E148 Safari/604.1",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/133.0.0.0 Safari/537.36",
    "Mozilla/5.0 (X11; Linux x86_64; rv:135.0) Gecko/20100101 Firefox/135.0",
]
REFERRERS = [None, "https://www.google.com/", "https://news.ycombinator.com/", "https://duckduckgo.com/?q=shoes"]
TAGS = ["new", "sale", "gift", "eco", "local", "last-one"]
PAGES = [f"/product/{n}" for n in range(200)] + ["/", "/search", "/cart", "/checkout", "/help"]
LATE_SHARE = 0.02


class Zipf:
    """Ranks 0..n-1 with weight 1 / (rank + 1) ** exponent."""

    def __init__(self, n: int, exponent: float = 1.1):
        self.totals = list(itertools.accumulate(1 / (rank + 1) ** exponent for rank in range(n)))

    def draw(self, rng: random.Random) -> int:
        return bisect.bisect_left(self.totals, rng.random() * self.totals[-1])


def events(count: int, seed: int = 20260302) -> Iterator[tuple[str, dict]]:
    """`count` events in the order of their arrival."""
    rng = random.Random(seed)
    # Late events wait here until the stream has come to the time of their arrival.
    late: list[tuple[datetime, int, tuple[str, dict]]] = []
    for made, (collection, properties, at) in enumerate(_sessions(rng, count)):
        while late and late[0][0] <= at:
            yield heapq.heappop(late)[2]
        if rng.random() < LATE_SHARE:
            arrival = at + timedelta(seconds=rng.expovariate(1 / (6 * 3600)))
            heapq.heappush(late, (arrival, made, (collection, properties)))
        else:
            yield collection, properties
    for _, _, event in sorted(late):
        yield event


def _sessions(rng: random.Random, count: int) -> Iterator[tuple[str, dict, datetime]]:
    users, pages = Zipf(USERS), Zipf(len(PAGES))
    clock = START
    step = timedelta(days=DAYS) / max(count / 6, 1)
    number = 0
    made = 0
    while made < count:
        clock += step * rng.expovariate(1)
        user = users.draw(rng)
        # A user keeps country, device and browser: they follow from the user's number alone.
        fixed = {
            "_user": f"u{user:05}",
            "_session_id": f"s{number:07}",
            "_user_agent": AGENTS[user % len(AGENTS)],
            "country": COUNTRIES[user * 7 % len(COUNTRIES)],
            "device": DEVICES[user % len(DEVICES)],
        }
        referrer = rng.choice(REFERRERS)
        at = clock
        for position in range(min(rng.randint(1, 11), count - made)):
            at += timedelta(seconds=rng.expovariate(1 / 25))
            page = PAGES[pages.draw(rng)]
            first = referrer if position == 0 else None
            collection, properties = _event(rng, page, position, first, (at - START).days // 7)
            properties.update(fixed, _id=f"{number:07}-{position}", _time=at.isoformat(timespec="milliseconds"))
            yield collection, properties, at
            made += 1
        number += 1


def _event(rng: random.Random, page: str, position: int, referrer: str | None, release: int) -> tuple[str, dict]:
    """One event as the shop's release of that week sends it."""
    kind = rng.random()
    if kind < 0.72 or not page.startswith("/product/"):
        properties = {"page": page, "loadMs": round(rng.lognormvariate(5.5, 0.6), 1), "position": position}
        if referrer:
            properties["_referrer"] = referrer
            properties["campaign"] = {"source": referrer.split("/")[2], "cost": rng.randint(1, 90) / 100}
        if release >= 1:
            properties["scrollDepth"] = rng.randint(0, 100)
        if release >= 2:
            properties["experiment"] = rng.choice(["control", "big-button"])
        return "pageview", properties
    product = int(page.rsplit("/", 1)[1])
    price = 5 + product * 1.25
    if kind < 0.95:
        properties = {"product": product, "tags": rng.sample(TAGS, rng.randint(1, 3)), "inStock": rng.random() < 0.9}
        if release >= 3:
            properties["variantColor"] = rng.choice(["red", "blue", "black"])
        return "add_to_cart", {**properties, "price": price}
    # Old mobile clients send the amount as text.
    amount = price * rng.randint(1, 3)
    properties = {"product": product, "amount": str(amount) if rng.random() < 0.05 else amount, "currency": "EUR"}
    if release >= 2:
        properties["giftWrap"] = rng.random() < 0.1
    return "purchase", properties


if __name__ == "__main__":
    for name, values in events(int(sys.argv[1]) if len(sys.argv) > 1 else 120_000):
        print(json.dumps({"collection": name, "properties": values}, separators=(",", ":")))
