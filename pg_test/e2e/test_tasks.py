"""Calls that run in a task worker, given up by their caller at any moment: before the worker has started, while it works."""

from __future__ import annotations

import psycopg
from harness.database import collect, one

CALLS = 60


def test_calls_given_up_early_leave_the_server_alone(db, seed):
    db.project("acme")
    session = db.connect()
    outcomes: dict[str | None, int] = {}
    for n in range(CALLS):
        collect(db.admin, "acme", "page", {"n": n})
        # A worker needs some milliseconds to start: most calls end before theirs has looked for its request.
        session.execute(f"SET statement_timeout = '{1 + n % 12}ms'")
        try:
            session.execute("SELECT rakam.tick()")
            outcome = None
        except psycopg.Error as error:
            outcome = error.sqlstate
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    session.execute("RESET statement_timeout")
    assert set(outcomes) <= {None, "57014", "53000"}, outcomes
    assert outcomes.get("57014", 0) > CALLS // 4, outcomes
    db.tick()
    assert one(session, "SELECT count(*) FROM acme.page") == CALLS
