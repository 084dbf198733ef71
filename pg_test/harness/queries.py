"""Random rows over every type a field may have, and random queries over them that a heap table answers the same way.

What a query may contain is bounded by what PostgreSQL defines. The order in which it evaluates the members of an AND is
its own choice, so a condition that can fail stands alone; below OR, CASE and coalesce the order is defined, so it may
stand there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

COLUMNS = {
    "flag": "boolean",
    "small": "integer",
    "big": "bigint",
    "single": "real",
    "number": "double precision",
    "money": "numeric(12,3)",
    "wide": "numeric(38,10)",
    "words": "text",
    "day": "date",
    "moment": "timestamptz",
    "token": "uuid",
    "address": "inet",
    "document": "jsonb",
    "flags": "boolean[]",
    "numbers": "double precision[]",
    "tags": "text[]",
}
# Stands for the table in a query.
TABLE = "$table$"
SYSTEM = {"_time": "timestamptz", "_user": "text", "_id": "text"}

TEXTS = ["", " ", "a", "A", "b", "abc", "ABC", "Abc", "a%c", "a_c", "a\\c", "größe", "GRÖSSE", "ß", "ı", "İ", "zebra", "Zebra",
         "10", "9", "-1", "1e3", "日本語", "e\u0301", "é", "tab\there", "new\nline", "a'b", 'q"q', "x" * 300, "NaN", "true"]  # fmt: skip
INTEGERS = [0, 1, -1, 2, 3, 7, 10, 100, -100, 2**31 - 1, -(2**31), 12345]
BIGS = [*INTEGERS, 2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 10**15]
FLOATS = ["0", "-0", "1", "-1", "0.1", "0.5", "1.5", "-2.5", "1e10", "1e-10", "1e300", "-1e300", "123456.789", "NaN",
          "Infinity", "-Infinity", "3.5", "2"]  # fmt: skip
SINGLES = ["0", "-0", "1", "0.1", "1.5", "-2.5", "1e10", "1e-10", "1e30", "NaN", "Infinity", "-Infinity", "16777217"]
MONIES = ["0", "0.001", "-0.001", "1", "1.5", "1.250", "99.999", "-123456789.123", "123456789.999", "12.34"]
WIDES = [*MONIES, "12345678901234567890.0123456789", "-9999999999999999999999999999.9999999999", "0.0000000001"]
DAYS = ["2026-01-01", "2025-12-31", "2024-02-29", "1999-12-31", "2000-01-01", "1970-01-01", "1969-12-31", "0001-01-01",
        "9999-12-31", "2026-07-15"]  # fmt: skip
MOMENTS = ["2026-01-01 00:00:00Z", "2025-12-31 23:59:59.999999Z", "2024-02-29 12:00:00Z", "1969-12-31 23:59:59.5Z",
           "2026-03-29 00:59:59Z", "2026-03-29 01:00:00Z", "2026-10-25 01:30:00Z", "1999-01-01 05:00:00Z",
           "0001-01-01 00:00:00Z", "9999-12-31 00:00:00Z", "2026-07-15 12:34:56.123456Z"]  # fmt: skip
TOKENS = ["00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff",
          "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "80000000-0000-4000-8000-000000000000"]  # fmt: skip
ADDRESSES = [
    "0.0.0.0",
    "10.0.0.1",
    "10.0.0.1/8",
    "192.168.1.1/24",
    "192.168.1.77",
    "::1",
    "2001:db8::1/64",
    "255.255.255.255",
]
DOCUMENTS = [{}, {"a": 1}, {"a": "x", "b": [1, 2, None]}, {"a": {"b": {"c": True}}}, [1, "two", None], 1, 1.50, "text", True,
             {"größe": "ß"}, {"a": None}, [], [[1], [2]], {"n": 12345678901234567890}, None]  # fmt: skip
FLAG_ARRAYS = ["{}", "{t}", "{f,NULL}", "{NULL}", "{t,f,t}"]
NUMBER_ARRAYS = ["{}", "{1}", "{1.5,NULL,-2}", "{NULL}", "{0,-0}", "{NaN,Infinity}", "{1,2,3}"]
TAG_ARRAYS = ["{}", "{a}", "{a,b}", "{NULL}", '{"",NULL,"x y"}', '{größe,"q\\"q"}', "{b,a}", '{"NULL"}']
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Pacific/Apia"]


def quote(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def literal(kind: str, rng: random.Random) -> str:
    """A value of the type, as an SQL expression with its type written out."""
    choices: dict[str, Callable[[], str]] = {
        "boolean": lambda: rng.choice(["true", "false"]),
        "integer": lambda: str(rng.choice([*INTEGERS, rng.randint(-1000, 1000)])),
        "bigint": lambda: str(rng.choice([*BIGS, rng.randint(-1000, 1000)])),
        "real": lambda: rng.choice(SINGLES),
        "double precision": lambda: rng.choice([*FLOATS, str(rng.randint(-50, 50) / 4)]),
        "numeric(12,3)": lambda: rng.choice([*MONIES, str(rng.randint(-5000, 5000) / 8)]),
        "numeric(38,10)": lambda: rng.choice(WIDES),
        "text": lambda: rng.choice([*TEXTS, f"k{rng.randint(0, 99)}"]),
        "date": lambda: rng.choice(DAYS),
        "timestamptz": lambda: rng.choice(
            [*MOMENTS, f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02} {rng.randint(0, 23)}:00Z"]
        ),
        "uuid": lambda: rng.choice(TOKENS),
        "inet": lambda: rng.choice(ADDRESSES),
        "jsonb": lambda: json.dumps(rng.choice(DOCUMENTS)),
        "boolean[]": lambda: rng.choice(FLAG_ARRAYS),
        "double precision[]": lambda: rng.choice(NUMBER_ARRAYS),
        "text[]": lambda: rng.choice(TAG_ARRAYS),
    }
    return f"{quote(choices[kind]())}::{kind}"


def is_storable(value: str) -> bool:
    """Events are JSON: no NaN and no infinity, -0 is 0, null is no value. Queries may compare with all of them."""
    return not any(word in value for word in ("NaN'", "NaN,", "Infinity", "-0'", "-0}", "'null'::jsonb"))


def random_row(rng: random.Random, number: int) -> dict[str, str]:
    row = {
        "_time": f"'2026-01-01 00:00:00Z'::timestamptz + {rng.randint(0, 300 * 86_400)} * interval '1 second'",
        "_user": rng.choice(["NULL", *(quote(f"u{n}") for n in range(10))]),
        "_id": quote(f"id{number:06}"),
    }
    for name, kind in COLUMNS.items():
        value = "NULL" if rng.random() < 0.15 else literal(kind, rng)
        row[name] = value if kind == "text" or is_storable(value) else "NULL"
    return row


class QueryMaker:
    """Makes queries with TABLE in the place of the table. Each is valid SQL; some fail when they run."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def settings(self) -> list[str]:
        if self.rng.random() > 0.05:
            return []
        return [
            f"SET TimeZone = {quote(self.rng.choice(ZONES))}",
            f"SET extra_float_digits = {self.rng.choice([-3, 0, 1])}",
            f"SET DateStyle = {quote(self.rng.choice(['ISO, MDY', 'German', 'SQL, DMY']))}",
            f"SET rakam.enable_pushdown = {self.rng.choice(['on', 'on', 'on', 'off'])}",
        ]

    def query(self) -> str:
        rng = self.rng
        kind = rng.random()
        if rng.random() < 0.15:
            # Which of two errors comes first depends on the order of the rows: nothing else here can fail.
            return f"SELECT {self.columns()} FROM {TABLE} WHERE {self.fragile()}"
        where = "" if rng.random() < 0.1 else f" WHERE {self.condition(rng.randint(0, 2))}"
        if kind < 0.55:
            return f"SELECT {self.projection()} FROM {TABLE}{where}"
        if kind < 0.7:
            limit = f"LIMIT {rng.choice([0, 1, 5, 50])} OFFSET {rng.choice([0, 0, 3])}"
            return (
                f"SELECT _id, {self.projection()} FROM {TABLE}{where} ORDER BY _id {rng.choice(['', 'DESC'])} {limit}"
            )
        if kind < 0.8:
            name, _ = self.column()
            return f'SELECT "{name}"::text, count(*) FROM {TABLE}{where} GROUP BY "{name}"'
        if kind < 0.92:
            return f"SELECT {', '.join(self.aggregate() for _ in range(rng.randint(1, 3)))} FROM {TABLE}{where}"
        name, _ = self.column()
        return f'SELECT DISTINCT "{name}"::text FROM {TABLE}{where}'

    def columns(self) -> str:
        return ", ".join(f'"{self.column()[0]}"::text' for _ in range(self.rng.randint(1, 3)))

    def projection(self) -> str:
        parts = []
        for _ in range(self.rng.randint(1, 3)):
            if self.rng.random() < 0.5:
                name, _ = self.column()
                parts.append(f'"{name}"::text')
            else:
                parts.append(f"({self.value()})::text")
        return ", ".join(parts)

    def column(self, *kinds: str) -> tuple[str, str]:
        everything = {**COLUMNS, **SYSTEM}
        fitting = [(name, kind) for name, kind in everything.items() if not kinds or kind in kinds]
        return self.rng.choice(fitting)

    def aggregate(self) -> str:
        rng = self.rng
        choice = rng.randrange(6)
        if choice == 0:
            return "count(*)"
        if choice == 1:
            name, _ = self.column()
            return f'count("{name}")'
        if choice == 2:
            name, _ = self.column("integer", "bigint", "numeric(12,3)", "numeric(38,10)", "text", "date", "timestamptz")
            return f'{rng.choice(["min", "max"])}("{name}")::text'
        if choice == 3:
            name, _ = self.column("integer", "bigint", "numeric(12,3)", "numeric(38,10)")
            return f'{rng.choice(["sum", "avg"])}("{name}")::text'
        if choice == 4:
            name, _ = self.column("text", "integer", "uuid", "date")
            return f'count(DISTINCT "{name}")'
        name, _ = self.column("boolean")
        return f'{rng.choice(["bool_and", "bool_or"])}("{name}")'

    def condition(self, depth: int) -> str:
        rng = self.rng
        if depth == 0:
            return self.comparison()
        left, right = self.condition(depth - 1), self.condition(depth - 1)
        return rng.choice([f"({left} AND {right})", f"({left} OR {right})", f"NOT ({left})", f"({left} AND NOT {right})",
                           f"(({left}) IS {rng.choice(['TRUE', 'NOT TRUE', 'UNKNOWN', 'FALSE'])})",
                           f"CASE WHEN {left} THEN {right} ELSE {left} END"])  # fmt: skip

    def comparison(self) -> str:
        rng = self.rng
        name, kind = self.column()
        column = f'"{name}"'
        value, other = literal(kind, rng), literal(kind, rng)
        compare = rng.choice(["=", "<>", "<", "<=", ">", ">="])
        general = [
            f"{column} {compare} {value}",
            f"{value} {compare} {column}",
            f"{column} {rng.choice(['IS NULL', 'IS NOT NULL'])}",
            f"{column} IS {rng.choice(['', 'NOT '])}DISTINCT FROM {value}",
            f"{column} {rng.choice(['', 'NOT '])}IN ({value}, {other})",
            f"{column} {rng.choice(['', 'NOT '])}BETWEEN {value} AND {other}",
            f"coalesce({column}, {value}) {compare} {other}",
            f"nullif({column}, {value}) {compare} {other}",
        ]
        if not kind.endswith("[]"):
            general.append(f"{column} = ANY (ARRAY[{value}, {other}, NULL])")
            general.append(f"{column} {compare} ALL (ARRAY[{value}, {other}])")
        return rng.choice(general + self.special(column, kind, compare))

    def special(self, column: str, kind: str, compare: str) -> list[str]:
        """Conditions that only this type has."""
        rng = self.rng
        small = rng.randint(-5, 5)
        pattern = quote(rng.choice(["a%", "%c", "%b%", "a_c", "%", "", "a\\%c", "gr_ße", "K%", "k1%", "_"]))
        expression = quote(rng.choice(["^a", "c$", "b", "[A-Z]", "ö", "^k\\d+$", "."]))
        match kind:
            case "text":
                return [
                    f"{column} {rng.choice(['LIKE', 'NOT LIKE', 'ILIKE', 'NOT ILIKE'])} {pattern}",
                    f"{column} {rng.choice(['~', '!~', '~*', '!~*'])} {expression}",
                    f"length({column}) {compare} {rng.randint(0, 10)}",
                    f"{rng.choice(['lower', 'upper', 'initcap', 'trim', 'reverse'])}({column}) {compare} {literal('text', rng)}",
                    f"{column} || 'x' {compare} {literal('text', rng)}",
                    f"substr({column}, {rng.randint(-1, 3)}, {rng.randint(0, 3)}) {compare} {literal('text', rng)}",
                    f"position('b' in {column}) {compare} {rng.randint(0, 3)}",
                    f"starts_with({column}, 'a')",
                    f'{column} COLLATE "und-x-icu" {compare} {literal("text", rng)}',
                    f"md5({column}) {compare} '8'",
                ]
            case "integer" | "bigint":
                return [
                    f"{column} % 7 {compare} {small}",
                    f"{column} / 3 {compare} {small}",
                    f"{column}::numeric {compare} {literal('numeric(12,3)', rng)}",
                    f"{column}::double precision {compare} {literal('double precision', rng)}",
                    f"{column} {compare} {literal('double precision', rng)}",
                    f"{column} {compare} {literal('bigint', rng)}",
                    f"({column} & 6) {compare} {abs(small)}",
                    f"sign({column}) {compare} {rng.randint(-1, 1)}",
                ]
            case "real" | "double precision":
                return [
                    f"{column} * 2 {compare} {literal('real', rng)}"
                    if kind == "real"
                    else f"{column} / 4 {compare} {small}",
                    f"{column} {compare} {literal('integer', rng)}",
                    f"{column} {compare} {literal('numeric(12,3)', rng)}",
                    f"{rng.choice(['floor', 'ceil', 'round', 'trunc', 'abs'])}({column}) {compare} {small}",
                    f"{column} {compare} {literal('real', rng)}",
                    f"-{column} {compare} {small}",
                ]
            case "numeric(12,3)" | "numeric(38,10)":
                return [
                    f"{column} * 1.5 {compare} {literal('numeric(12,3)', rng)}",
                    f"{column} {compare} {literal('integer', rng)}",
                    f"{column} {compare} {literal('double precision', rng)}",
                    f"round({column}, 1) {compare} {literal('numeric(12,3)', rng)}",
                    f"{column} % 2 {compare} {small}",
                    f"trunc({column}) = {column}",
                ]
            case "date":
                return [
                    f"{column} + {rng.randint(-40, 40)} {compare} {literal('date', rng)}",
                    f"extract({rng.choice(['year', 'month', 'dow', 'doy', 'week'])} FROM {column}) {compare} {rng.randint(0, 60)}",
                    f"{column} {compare} {literal('timestamptz', rng)}",
                    f"{column}::timestamp {compare} '2026-01-01 12:00'",
                    f"date_trunc('month', {column}) {compare} {literal('timestamptz', rng)}",
                ]
            case "timestamptz":
                return [
                    f"{column}::date {compare} {literal('date', rng)}",
                    f"{column} {compare} {literal('date', rng)}",
                    f"date_trunc('{rng.choice(['hour', 'day', 'week', 'month', 'year'])}', {column}) {compare} {literal('timestamptz', rng)}",
                    f"extract({rng.choice(['hour', 'minute', 'dow', 'epoch', 'year'])} FROM {column}) {compare} {rng.randint(0, 60)}",
                    f"{column} - interval '1 month' {compare} {literal('timestamptz', rng)}",
                    f"({column} AT TIME ZONE 'Asia/Tokyo') {compare} '2026-01-01 09:00'",
                    f"{column} >= '2026-02-01Z' AND {column} < '2026-03-01Z'",
                ]
            case "inet":
                return [f"{column} << '10.0.0.0/8'::inet", f"family({column}) {compare} 5", f"host({column}) {compare} '10'",
                        f"masklen({column}) {compare} 24"]  # fmt: skip
            case "jsonb":
                return [
                    f"{column}->>'a' {compare} {literal('text', rng)}",
                    f"{column} @> '{{\"a\": 1}}'",
                    f"{column} ? 'a'",
                    f"jsonb_typeof({column}) {compare} 'n'",
                    f"{column}#>>'{{a,b,c}}' IS NOT NULL",
                    f"{column}->1 IS NOT DISTINCT FROM '\"two\"'",
                ]
            case "boolean":
                return [column, f"NOT {column}", f"{column} IS {rng.choice(['TRUE', 'NOT FALSE', 'UNKNOWN'])}"]
            case "uuid":
                return [f"{column}::text {compare} '8'"]
            case _:  # arrays
                item = literal(kind.removesuffix("[]"), rng)
                return [
                    f"{item} = ANY ({column})",
                    f"{item} {compare} ALL ({column})",
                    f"{column} @> ARRAY[{item}]",
                    f"{column} && ARRAY[{item}]",
                    f"cardinality({column}) {compare} {rng.randint(0, 3)}",
                    f"{column}[1] {compare} {item}",
                    f"array_length({column}, 1) IS NULL",
                ]

    def fragile(self) -> str:
        """A condition that fails for some rows, in a place where PostgreSQL defines whether those rows reach it."""
        rng = self.rng
        expression = rng.choice([
            f"1 / small {rng.choice(['=', '<'])} 0",
            "small + 2147483647 > 0",
            "big * 2 > 0",
            "-big < 0",
            "abs(small) >= 0",
            "number * 1e300 > 0",
            "sqrt(number) > 1",
            "ln(money) < 3",
            "words::integer > 0",
            "words::boolean",
            "big::integer = 1",
            "number::bigint = 1",
            "money::integer / 0 = 1",
            "single * 1e30::real > 0",
            "power(number, 2) > 4",
            "moment + interval '300000 years' > now()",
            "document::text::integer = 1",
            "(document->>'a')::integer = 1",
            "words ~ '('",
            "mod(10, small) = 0",
            "substr(words, 1, small) = 'a'",
        ])  # fmt: skip
        if rng.random() < 0.5:
            return expression
        guard = self.comparison()
        return rng.choice([
            f"({guard} OR {expression})",
            f"CASE WHEN {guard} THEN {expression} ELSE false END",
            f"coalesce({guard}, {expression})",
        ])  # fmt: skip

    def value(self) -> str:
        """An expression of some type for the select list."""
        rng = self.rng
        return rng.choice([
            lambda: self.comparison(),
            lambda: f"CASE WHEN {self.comparison()} THEN 1 ELSE 2 END",
            lambda: "number + 1",
            lambda: "big / 10",
            lambda: "money * wide",
            lambda: "words || coalesce(_user, '?')",
            lambda: "upper(words)",
            lambda: "date_trunc('day', moment)",
            lambda: "extract(year FROM day)",
            lambda: "document->'a'",
            lambda: "tags || flags::text[]",
            lambda: "to_jsonb(numbers)",
            lambda: "greatest(small, big)",
            lambda: "age(moment, '2000-01-01Z')",
            lambda: "to_char(moment, 'YYYY-MM-DD HH24:MI:SS.US TZ')",
            lambda: "single::double precision",
            lambda: "number::real",
        ])()  # fmt: skip
