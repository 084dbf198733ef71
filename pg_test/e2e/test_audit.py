"""The audit log, and the bounds of logs."""

from __future__ import annotations

import time

from harness.database import collect, collect_batch, notices_of, one, refused, wait_until

# -- the audit log -------------------------------------------------------------------------------------------------------


def log_of(db, project):
    return db.all("SELECT call, object, outcome, role FROM rakam.audit_log WHERE project = %s ORDER BY at", project)


def test_audit_log(db, fresh):
    project_admin, project_writer = db.login(fresh, "admin"), db.login(fresh, "write")
    admin_role, writer_role = (session.info.user for session in (project_admin, project_writer))
    assert log_of(db, fresh) == [("create_project", None, "ok", "postgres")]
    collect(project_writer, fresh, "hit", {"n": 1})
    project_admin.execute("SELECT rakam.create_collection(%s, 'hit')", (fresh,))
    project_admin.execute("SELECT rakam.add_field(%s, 'hit', 'm', 'text')", (fresh,))
    with refused("42501"):
        project_writer.execute("SELECT * FROM rakam.create_keys(%s)", (fresh,))
    with refused("42710"):
        project_admin.execute("SELECT rakam.add_field(%s, 'hit', 'm', 'bigint')", (fresh,))
    project_admin.execute("SELECT * FROM rakam.field_values(%s, 'hit', 'm')", (fresh,))
    session = db.connect(autocommit=False)
    session.execute("SELECT rakam.set_schema_mode(%s, 'fixed')", (fresh,))
    session.rollback()
    session.execute("SAVEPOINT s")
    session.execute("SELECT rakam.set_time_bounds(%s, '1 day', '1 day')", (fresh,))
    session.execute("ROLLBACK TO s")
    session.execute("SELECT rakam.set_schema_mode(%s, 'open')", (fresh,))
    session.commit()
    expected = [
        ("create_project", None, "ok", "postgres"),
        ("create_collection", "hit", "ok", admin_role),
        ("add_field", "hit.m", "ok", admin_role),
        ("create_keys", None, "error 42501", writer_role),
        ("add_field", "hit.m", "error 42710", admin_role),
        ("set_schema_mode", "fixed", "rolled back", "postgres"),
        ("set_time_bounds", None, "rolled back", "postgres"),
        ("set_schema_mode", "open", "ok", "postgres"),
    ]
    wait_until(lambda: len(log_of(db, fresh)) >= len(expected), "what was refused is noted, too")
    assert log_of(db, fresh) == expected
    # By whom, behind the role that it acted as.
    key = one(db.admin, "SELECT master_key FROM rakam.create_keys(%s)", fresh)
    db.make_login("login_pool")
    pool = db.connect("login_pool", autocommit=False)
    pool.execute("SELECT rakam.authenticate(%s)", (key,))
    pool.execute("SELECT rakam.flush(%s)", (fresh,))
    pool.commit()
    roles = "SELECT role, session_role FROM rakam_internal.audit_log WHERE project = %s AND call = 'flush'"
    assert db.all(roles, fresh) == [(f"rakam_{fresh}_admin", "login_pool")]
    # Members see the log of their projects, others none of it; nobody of them writes it.
    assert one(project_writer, "SELECT count(*) FROM rakam.audit_log") == len(expected) + 2
    assert one(db.connect("login_pool"), "SELECT count(*) FROM rakam.audit_log") == 0
    with refused("42501"):
        project_admin.execute("DELETE FROM rakam_internal.audit_log")


def test_what_takes_effect_at_once_survives_a_rollback_and_the_log_says_so(db, fresh):
    """Calls that work in a worker commit there: also inside a transaction block, where those that take away say it."""
    for n in range(4):
        collect(db.admin, fresh, "hit", {"n": n, "odd": bool(n % 2)})
    db.tick()
    session = db.connect(autocommit=False)
    calls = [
        (f"create_collection('{fresh}', 'made')", "made", False),
        (f"add_field('{fresh}', 'made', 'f', 'inet')", "made.f", False),
        (f"rename_collection('{fresh}', 'made', 'renamed')", "made", False),
        (f"delete_events('{fresh}', 'hit', 'odd')", "hit", True),
        (f"set_retention('{fresh}', 'hit', '10 years')", "hit", True),
        (f"drop_field('{fresh}', 'hit', 'odd')", "hit.odd", True),
        (f"drop_collection('{fresh}', 'renamed')", "renamed", True),
    ]
    for call, _, takes_away in calls:
        told = notices_of(session, f"SELECT rakam.{call}")
        session.rollback()
        assert any("ROLLBACK does not undo" in n.message for n in told) == takes_away, (call, told)
    assert db.all(f"SELECT n FROM {fresh}.hit ORDER BY n") == [(0,), (2,)]
    assert db.one("SELECT retention FROM rakam.collections WHERE project = %s", fresh) is not None
    assert db.all("SELECT collection, field FROM rakam.fields WHERE project = %s", fresh) == [("hit", "n")]
    expected = [("create_project", None, "ok", "postgres")]
    expected += [(call.split("(")[0], what, "ok", "postgres") for call, what, _ in calls]
    # What a worker of the background notes comes behind this, if anything does.
    with refused("42501"):
        db.login(fresh, "read").execute("SELECT rakam.drop_collection(%s, 'hit')", (fresh,))
    wait_until(lambda: log_of(db, fresh)[-1][2] == "error 42501", "what was refused is noted")
    assert log_of(db, fresh)[:-1] == expected
    # In a transaction of its own there is nothing to be said.
    assert not notices_of(db.admin, f"SELECT rakam.delete_events('{fresh}', 'hit', 'true')")
    assert db.one(f"SELECT count(*) FROM {fresh}.hit") == 0


def test_audit_of_everything_and_of_nothing(db, fresh):
    session = db.connect()
    session.execute("SET rakam.audit = 'all'")
    collect(session, fresh, "hit", {"n": 1})
    session.execute("SELECT rakam.create_collection(%s, 'hit')", (fresh,))
    session.execute("SELECT * FROM rakam.field_values(%s, 'hit', '_user')", (fresh,))
    session.execute("BEGIN READ ONLY")
    session.execute("SELECT * FROM rakam.field_values(%s, 'hit', '_id')", (fresh,))
    session.execute("COMMIT")
    session.execute("SET rakam.audit = 'off'")
    session.execute("SELECT rakam.set_schema_mode(%s, 'open')", (fresh,))
    with refused("22023"):
        session.execute("SELECT rakam.set_schema_mode(%s, 'no')", (fresh,))
    expected = [("create_project", "ok"), ("create_collection", "ok"), ("field_values", "ok"), ("field_values", "ok")]
    wait_until(lambda: len(log_of(db, fresh)) >= len(expected), "the entries")
    time.sleep(0.3)
    assert [(call, outcome) for call, _, outcome, _ in log_of(db, fresh)] == expected
    tenant = db.login(fresh, "admin")
    with refused("42501"):
        tenant.execute("SET rakam.audit = 'off'")


def test_a_flood_of_refused_calls_waits_for_nobody(db, fresh):
    """More than the queue holds: the rest is in the server's log."""
    mark = db.cluster.log_mark()
    stranger_name = "login_stranger"
    db.make_login(stranger_name)
    stranger = db.connect(stranger_name)
    calls = 1500
    stranger.execute(
        f"""DO $$ BEGIN FOR i IN 1..{calls} LOOP
              BEGIN PERFORM rakam.create_keys('{fresh}'); EXCEPTION WHEN insufficient_privilege THEN NULL; END;
            END LOOP; END $$"""
    )
    noted = "SELECT count(*) FROM rakam.audit_log WHERE project = %s AND call = 'create_keys'"

    def all_noted():
        logged = db.cluster.log_since(mark).count("called create_keys for project")
        return one(db.admin, noted, fresh) + logged == calls

    wait_until(all_noted, "each call in the table or in the server's log")
    assert one(db.admin, noted, fresh) >= 256


# -- logs do not grow without bound --------------------------------------------------------------------------------------


def test_a_flood_of_invalid_values_is_counted_and_sampled(db, fresh):
    collect(db.admin, fresh, "hit", {"n": 1})
    db.tick()
    for part in range(4):
        collect_batch(db.admin, fresh, [("hit", {"n": f"bad {n}", "_id": f"{part} {n}"}) for n in range(500)])
        db.tick()
    found = db.all("SELECT count(*), min(count), max(count) FROM rakam.invalid_value WHERE project = %s", fresh)
    samples = found[0][0]
    assert 20 <= samples <= 100
    assert found[0][1:] == (2000, 2000)
    collections = "SELECT invalid_values FROM rakam.stat_collection WHERE project = %s AND collection = 'hit'"
    assert one(db.admin, collections, fresh) == 2000
    assert one(db.admin, f"SELECT count(*) FROM {fresh}.hit WHERE _extra->>'n' LIKE 'bad %%'") == 2000


def test_retention_of_logs(db, fresh):
    collect(db.admin, fresh, "hit", {"n": 1})
    db.tick()
    collect(db.admin, fresh, "hit", {"n": "bad"})
    db.tick()
    project = one(db.admin, "SELECT project_id FROM rakam_internal.project WHERE name = %s", fresh)
    db.admin.execute(
        "INSERT INTO rakam_internal.dead_letter (project_id, payload, error) VALUES (%s, '{}', 'why')", (project,)
    )
    for table in ("invalid_value", "dead_letter", "audit_log"):
        db.admin.execute(
            f"UPDATE rakam_internal.{table} SET at = now() - interval '2 days' WHERE project_id = %s", (project,)
        )
    left = "SELECT " + ", ".join(
        f"(SELECT count(*) FROM rakam.{view} WHERE project = %s)"
        for view in ("invalid_value", "dead_letter", "audit_log")
    )
    db.tick()
    assert db.admin.execute(left, (fresh,) * 3).fetchone() == (1, 1, 1)
    settings = ("invalid_retention", "dead_letter_retention", "audit_retention")
    db.configure(**dict.fromkeys(settings, "1d"))
    try:
        db.tick()
        assert db.admin.execute(left, (fresh,) * 3).fetchone() == (0, 0, 0)
        # The exact counts stay.
        assert one(db.admin, "SELECT invalid_values FROM rakam.stat_collection WHERE project = %s", fresh) == 1
    finally:
        db.configure(**dict.fromkeys(settings))


def test_upkeep_waits_for_nobody(db, fresh):
    """For no dead letter that is being replayed, and no project that is being changed, while everybody's digest waits for it."""
    project = one(db.admin, "SELECT project_id FROM rakam_internal.project WHERE name = %s", fresh)
    db.admin.execute(
        "INSERT INTO rakam_internal.dead_letter (project_id, collection, payload, error, at)"
        " SELECT %s, 'hit', '{\"n\": 1}', 'why', now() - interval '2 days' FROM generate_series(1, 2)",
        (project,),
    )
    replaying, changing = db.connect(autocommit=False), db.connect(autocommit=False)
    ticking = db.connect()
    ticking.execute("SET statement_timeout = '20s'")
    try:
        ids = replaying.execute(
            "SELECT id FROM rakam_internal.dead_letter WHERE project_id = %s ORDER BY id LIMIT 1 FOR UPDATE", (project,)
        ).fetchall()
        changing.execute("SELECT rakam.set_time_bounds(%s, '1 year', '1 day')", (fresh,))
        db.admin.execute(f"ALTER ROLE rakam_{fresh}_read RENAME TO rakam_{fresh}_renamed_read")
        db.configure(dead_letter_retention="1d")
        ticking.execute("SELECT rakam.tick()")
        # What nobody is at is done.
        left = "SELECT id FROM rakam_internal.dead_letter WHERE project_id = %s"
        wait_until(lambda: db.all(left, project) == ids, "the other letter is dropped")
        changing.rollback()
        replaying.rollback()
        name = "SELECT read_role_name FROM rakam_internal.project WHERE name = %s"
        wait_until(lambda: one(db.admin, name, fresh) == f"rakam_{fresh}_renamed_read", "the new name", 30)
        wait_until(lambda: db.all(left, project) == [], "the last letter is dropped", 30)
    finally:
        replaying.close()
        changing.close()
        ticking.close()
        db.configure(dead_letter_retention=None)
