"""What takes definitions back: dropping and renaming collections and fields. The values of a field."""

from __future__ import annotations

import threading
import time

import pytest
from harness import manifest
from harness.database import collect, collect_batch, has_column, in_background, one, refused, wait_until

PROJECT = "acme"


# -- dropping a collection -----------------------------------------------------------------------------------------------


def everything_of(db, collection_id):
    """The internal tables that have rows of a collection, the inbox apart."""
    tables = [
        "hot_chunk",
        "data_file",
        "collection_stat",
        "field",
        "invalid_value",
        "invalid_count",
        "inbox_parked",
        "collection",
        "dropped_field",
        "manifest_log",
    ]
    count = "SELECT count(*) FROM rakam_internal.{} WHERE collection_id = %s"
    return {table for table in tables if one(db.admin, count.format(table), collection_id)}


def fill(db, project, collection, tag):
    """Events in every tier; one has a value that does not fit."""
    collect_batch(db.admin, project, [(collection, {"tag": tag, "n": n}) for n in range(3)])
    db.flush(project, collection)
    collect_batch(db.admin, project, [(collection, {"tag": tag, "n": n}) for n in (3, "four")])
    db.tick()
    collect(db.admin, project, collection, {"tag": tag, "n": 5})


@pytest.mark.parametrize("storage", ["local", "file"])
def test_dropped_collection_is_gone_from_every_tier(db, cluster, storage):
    project = f"drop_{storage}"
    if storage == "file":
        folder = cluster.make_folder("governance-lake")
        db.admin.execute(f"CREATE SERVER lake FOREIGN DATA WRAPPER rakam OPTIONS (url 'file://{folder}')")
        db.project(project, "lake")
    else:
        db.project(project)
    fill(db, project, "doomed", "old")
    fill(db, project, "other", "other")
    doomed = one(db.admin, "SELECT collection_id FROM rakam_internal.collection WHERE name = 'doomed' ORDER BY 1 DESC")
    assert len(everything_of(db, doomed)) >= 7
    objects = "SELECT count(*) FROM rakam_internal.local_object WHERE project_id = (SELECT project_id FROM rakam_internal.project WHERE name = %s)"
    before = one(db.admin, objects, project)
    project_admin = db.login(project, "admin")
    # The whole project is still being read, under an older snapshot.
    cursor = db.connect(autocommit=False)
    cursor.execute(f"DECLARE c CURSOR FOR SELECT properties->>'tag' FROM {project}._all")
    project_admin.execute("SELECT rakam.drop_collection(%s, 'Doomed')", (project,))
    assert one(db.admin, "SELECT to_regclass(%s)", f"{project}.doomed") is None
    assert one(db.admin, f"SELECT count(*) FROM {project}._all") == 6
    assert everything_of(db, doomed) == set()
    assert one(db.admin, objects, project) * 2 == before
    if storage == "file":
        assert (
            one(db.admin, "SELECT count(*) FROM rakam_internal.file_deferred WHERE reason = 'collection dropped'") == 1
        )
    tags = [tag for (tag,) in cursor.execute("FETCH ALL FROM c").fetchall()]
    assert sorted(tags) == ["old"] * 6 + ["other"] * 6
    cursor.close()
    db.tick()
    assert one(db.admin, "SELECT count(*) FROM rakam.collections WHERE project = %s", project) == 1
    # The name may be used again, by another collection.
    collect(db.admin, project, "doomed", {"tag": 1})
    db.tick()
    assert db.all(f"SELECT tag FROM {project}.doomed") == [(1.0,)]
    with refused("42704", message='"never"', hint="rakam.collections"):
        project_admin.execute("SELECT rakam.drop_collection(%s, 'never')", (project,))


def test_events_on_their_way_go_with_the_collection(db, fresh):
    """Transactions that have sent an event before the drop and commit after it: by id, and by name."""
    by_name = db.connect(autocommit=False)
    collect(by_name, fresh, "doomed", {"tag": "by name, before"})
    collect(db.admin, fresh, "doomed", {"tag": "committed"})
    db.tick()
    by_id = db.connect(autocommit=False)
    collect(by_id, fresh, "doomed", {"tag": "by id, before"})
    db.admin.execute("SELECT rakam.drop_collection(%s, 'doomed')", (fresh,))
    # The same transactions go on: what they send now is for a new collection.
    collect(by_name, fresh, "doomed", {"tag": "by name, after"})
    by_name.commit()
    by_id.commit()
    read = f"SELECT properties->>'tag' FROM {fresh}._all"
    for move in (lambda: None, db.tick, lambda: db.flush(fresh)):
        move()
        assert db.all(read) == [("by name, after",)]
    collect(by_id, fresh, "doomed", {"tag": "later"})
    by_id.commit()
    db.tick()
    assert sorted(db.all(f"SELECT tag FROM {fresh}.doomed")) == [("by name, after",), ("later",)]
    assert one(db.admin, "SELECT count(*) FROM rakam_internal.former_name") == 0


def test_a_dropped_collection_does_not_come_back_by_itself(db, fresh):
    holder = db.connect(autocommit=False)
    collect(holder, fresh, "doomed", {"n": 1})
    collect(db.admin, fresh, "doomed", {"n": 2})
    db.tick()
    db.admin.execute("SELECT rakam.drop_collection(%s, 'doomed')", (fresh,))
    holder.commit()
    db.tick()
    time.sleep(1)
    assert db.all("SELECT collection FROM rakam.collections WHERE project = %s", fresh) == []
    assert one(db.admin, f"SELECT count(*) FROM {fresh}._all") == 0


def test_dependent_views_restrict(db, fresh):
    collect(db.admin, fresh, "seen", {"n": 1, "m": 1})
    db.tick()
    db.admin.execute(f"CREATE VIEW {fresh}.of_n AS SELECT n FROM {fresh}.seen")
    for call, arguments in (("drop_collection", ("seen",)), ("drop_field", ("seen", "n"))):
        places = ", ".join(["%s"] * (1 + len(arguments)))
        with refused("2BP01", hint="depend on it"):
            db.admin.execute(f"SELECT rakam.{call}({places})", (fresh, *arguments))
    db.admin.execute("SELECT rakam.drop_field(%s, 'seen', 'm')", (fresh,))
    assert db.all(f"SELECT n FROM {fresh}.of_n") == [(1.0,)]
    db.admin.execute(f"DROP VIEW {fresh}.of_n")
    db.admin.execute("SELECT rakam.drop_collection(%s, 'seen')", (fresh,))


def test_a_field_of_a_collection_that_was_just_sent(db, fresh):
    """The call covers what was committed before it."""
    collect(db.admin, fresh, "just_sent", {"n": 1})
    db.admin.execute("SELECT rakam.add_field(%s, 'just_sent', 'm', 'bigint')", (fresh,))
    assert has_column(db.admin, f"{fresh}.just_sent", "m")
    with refused("42704"):
        db.admin.execute("SELECT rakam.add_field(%s, 'never_sent', 'm', 'bigint')", (fresh,))


def test_a_reader_is_waited_for(db, fresh):
    collect(db.admin, fresh, "busy", {"n": 1})
    db.tick()
    holder = db.connect(autocommit=False)
    holder.execute(f"SELECT * FROM {fresh}.busy")
    impatient = db.connect()
    impatient.execute("SET lock_timeout = '300ms'")
    with refused("55P03", hint="raise lock_timeout"):
        impatient.execute("SELECT rakam.drop_collection(%s, 'busy')", (fresh,))
    # The caller itself stands in the way.
    with refused("55P03", hint="transaction of its own"):
        holder.execute("SELECT rakam.drop_field(%s, 'busy', 'n')", (fresh,))
    holder.rollback()
    # Others read and send meanwhile, and it happens once the reader is gone.
    holder.execute(f"SELECT * FROM {fresh}.busy")
    done = threading.Event()

    def drop():
        with db.cluster.connect(db.name) as session:
            session.execute("SELECT rakam.drop_collection(%s, 'busy')", (fresh,))
        done.set()

    thread = threading.Thread(target=drop)
    thread.start()
    for _ in range(5):
        collect(db.admin, fresh, "other", {"n": 1})
        assert one(db.admin, f"SELECT count(*) FROM {fresh}.busy") == 1
        time.sleep(0.1)
    assert not done.is_set()
    holder.rollback()
    thread.join(timeout=60)
    assert done.is_set()


def test_files_leave_the_manifest_after_the_drop(db, fresh):
    """Of very many files, while nobody is locked out any more; by the background, if the call ends before."""
    collect(db.admin, fresh, "vast", {"n": 1})
    db.flush(fresh, "vast")
    manifest.fill(db, fresh, "vast", 2500)
    vast = one(db.admin, "SELECT max(collection_id) FROM rakam_internal.collection WHERE name = 'vast'")
    files = "SELECT count(*) FROM rakam_internal.data_file WHERE collection_id = %s"
    db.configure(failpoint="drop.before_clear=sleep(60000)")
    drop = "SELECT rakam.drop_collection(%s, 'vast')"
    _, thread, outcome = in_background(db, lambda session: session.execute(drop, (fresh,)))
    wait_until(lambda: one(db.admin, "SELECT to_regclass(%s)", f"{fresh}.vast") is None, "the drop")
    # All goes on, and another collection may have the name.
    collect(db.admin, fresh, "vast", {"n": 2})
    db.tick()
    assert db.all(f"SELECT n FROM {fresh}.vast") == [(2.0,)]
    assert one(db.admin, "SELECT count(*) FROM rakam.data_files WHERE project = %s", fresh) == 0
    assert one(db.admin, files, vast) == 2501
    assert outcome == []
    db.admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE backend_type = 'rakam task' AND datname = current_database()"
    )
    thread.join()
    assert [error.sqlstate for error in outcome] == ["57P01"]
    db.configure(failpoint=None)
    wait_until(lambda: everything_of(db, vast) == set(), "the end of its files", 60)
    wait_until(lambda: one(db.admin, "SELECT count(*) FROM rakam_internal.collection_dropped") == 0, "all is done")
    # Its objects go with the next drop, if not before.
    db.admin.execute(drop, (fresh,))
    deferred = (
        "SELECT count(*) FROM rakam_internal.file_deferred JOIN rakam_internal.project USING (project_id)"
        " WHERE reason = 'collection dropped' AND name = %s"
    )
    assert one(db.admin, deferred, fresh) == 0


# -- renaming a collection -----------------------------------------------------------------------------------------------


def test_renamed_collection_keeps_its_events(db, fresh):
    by_name = db.connect(autocommit=False)
    collect(by_name, fresh, "old", {"tag": "by name"})
    fill(db, fresh, "old", "filled")
    by_id = db.connect(autocommit=False)
    collect(by_id, fresh, "old", {"tag": "by id"})
    db.admin.execute(f"CREATE VIEW {fresh}.v AS SELECT tag FROM {fresh}.old")
    snapshot = db.connect(autocommit=False)
    snapshot.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    snapshot.execute(f"SELECT count(*) FROM {fresh}.users")
    db.admin.execute("SELECT rakam.rename_collection(%s, 'old', 'New')", (fresh,))
    # An older snapshot reads the same events under the new name.
    assert one(snapshot, f"SELECT count(*) FROM {fresh}.new") == 6
    snapshot.rollback()
    collect(by_name, fresh, "old", {"tag": "another"})
    by_name.commit()
    by_id.commit()
    for move in (lambda: None, db.tick, lambda: db.flush(fresh)):
        move()
        assert one(db.admin, f"SELECT count(*) FROM {fresh}.new WHERE tag = 'filled'") == 6
        assert sorted(db.all(f"SELECT tag FROM {fresh}.new WHERE tag <> 'filled'")) == [("by id",), ("by name",)]
        assert one(db.admin, f"SELECT count(*) FROM {fresh}.v") == 8
        whole = "SELECT _collection, count(*) FROM {}._all GROUP BY 1 ORDER BY 1"
        assert db.all(whole.format(fresh)) == [("new", 8), ("old", 1)]
    assert db.all(f"SELECT tag FROM {fresh}.old") == [("another",)]
    with refused("42710", message='"new" already exists'):
        db.admin.execute("SELECT rakam.rename_collection(%s, 'old', 'new')", (fresh,))
    with refused("42939"):
        db.admin.execute("SELECT rakam.rename_collection(%s, 'old', '_new')", (fresh,))
    with refused("42704"):
        db.admin.execute("SELECT rakam.rename_collection(%s, 'never', 'x')", (fresh,))
    # Names can change places.
    for old, new in (("old", "third"), ("new", "old"), ("third", "new")):
        db.admin.execute("SELECT rakam.rename_collection(%s, %s, %s)", (fresh, old, new))
    assert db.all(f"SELECT tag FROM {fresh}.new") == [("another",)]
    writer = db.login(fresh, "write")
    writer.execute(f"INSERT INTO {fresh}.old (tag) VALUES ('inserted')")
    assert one(db.admin, f"SELECT count(*) FROM {fresh}.old") == 9


# -- dropping a field ----------------------------------------------------------------------------------------------------


def test_dropped_field_is_read_nowhere(db, fresh):
    db.admin.execute("SELECT rakam.create_collection(%s, 'c')", (fresh,))
    # In a file's _extra before the field exists, in columns, as misfits, and in the inbox.
    db.admin.execute(f"INSERT INTO {fresh}.c (_id, _extra) VALUES ('member', '{{\"x\": 7, \"keep\": 1}}')")
    db.flush(fresh)
    collect_batch(db.admin, fresh, [("c", {"_id": "file", "x": 1}), ("c", {"_id": "misfit", "x": "no number"})])
    db.flush(fresh)
    collect_batch(db.admin, fresh, [("c", {"_id": "chunk", "x": 2}), ("c", {"_id": "misfit 2", "x": {"a": 1}})])
    db.tick()
    open_before = db.connect(autocommit=False)
    collect(open_before, fresh, "c", {"_id": "open", "x": 3})
    collect(db.admin, fresh, "c", {"_id": "inbox", "x": 4})
    assert one(db.admin, f"SELECT count(x) FROM {fresh}.c") == 4
    assert one(db.admin, "SELECT count(*) FROM rakam.invalid_value WHERE project = %s", fresh) == 2
    db.admin.execute("SELECT rakam.drop_field(%s, 'c', 'X')", (fresh,))
    collect(open_before, fresh, "c", {"_id": "after the drop", "x": "red"})
    open_before.commit()

    def found():
        return dict(
            db.all(f"SELECT t._id, coalesce(to_jsonb(t)->'x', t._extra->'x') FROM {fresh}.c t WHERE t._id <> '-'")
        )

    gone = dict.fromkeys(("member", "file", "misfit", "chunk", "misfit 2", "open", "inbox"))
    everywhere = f"SELECT properties->'x' FROM {fresh}._all WHERE properties ? 'x'"
    assert not has_column(db.admin, f"{fresh}.c", "x")
    for move in (lambda: None, db.tick, lambda: db.flush(fresh)):
        move()
        assert found() == gone | {"after the drop": "red"}
        assert db.all(everywhere) == [("red",)]
        assert one(db.admin, f"SELECT _extra FROM {fresh}.c WHERE _id = 'member'") == {"keep": 1}
    # It is another field now, of another type, with another id; for older rows it is NULL, also to a filter.
    assert has_column(db.admin, f"{fresh}.c", "x")
    field = db.all("SELECT field_id, type FROM rakam.fields WHERE project = %s AND field = 'x'", fresh)
    assert field == [(17, "text")]
    assert db.all(f"SELECT _id FROM {fresh}.c WHERE x IS NOT NULL") == [("after the drop",)]
    assert one(db.admin, f"SELECT count(*) FROM {fresh}.c WHERE x = '7'") == 0
    assert one(db.admin, "SELECT count(*) FROM rakam.invalid_value WHERE project = %s AND field = 'x'", fresh) == 0
    # A second drop, and a number again: no value of any earlier field shows.
    db.admin.execute("SELECT rakam.drop_field(%s, 'c', 'x')", (fresh,))
    collect(db.admin, fresh, "c", {"_id": "third", "x": 9})
    db.tick()
    assert found() == gone | {"after the drop": None, "third": 9}
    assert db.all("SELECT field_id, type FROM rakam.fields WHERE project = %s AND field = 'x'", fresh) == [
        (18, "double precision")
    ]
    # Whatever time of receipt a new event is given, and where it goes first.
    db.wait_column(f"{fresh}.c", "x")
    old = "timestamptz '2001-01-01 00:00:00+00'"
    db.admin.execute(f"INSERT INTO {fresh}.c (_id, x, _received_at) VALUES ('old', 10, {old})")
    db.admin.execute(
        f"INSERT INTO {fresh}.c (_id, x, _received_at) SELECT 'old' || n, n, {old} FROM generate_series(1, 2000) n"
    )
    db.tick()
    assert one(db.admin, f"SELECT x FROM {fresh}.c WHERE _id = 'old'") == 10
    assert one(db.admin, f"SELECT count(x) FROM {fresh}.c WHERE _id LIKE 'old%%'") == 2001


def test_what_cannot_be_dropped(db, keys, writer, reader, admin):
    collect(db.admin, PROJECT, "undroppable", {"n": 1})
    db.tick()
    with refused("42703", hint="rakam.fields"):
        admin.execute("SELECT rakam.drop_field('acme', 'undroppable', 'm')")
    with refused("42939", hint="Every collection"):
        admin.execute("SELECT rakam.drop_field('acme', 'undroppable', '_user')")
    with refused("22004"):
        admin.execute("SELECT rakam.drop_field('acme', 'undroppable', NULL)")
    for session in (writer, reader):
        for call in ("drop_collection('acme', 'undroppable')", "rename_collection('acme', 'undroppable', 'x')",
                     "drop_field('acme', 'undroppable', 'n')"):  # fmt: skip
            with refused("42501", message='project "acme"'):
                session.execute(f"SELECT rakam.{call}")


# -- the values of a field -----------------------------------------------------------------------------------------------


def test_field_values(db, keys, reader, writer):
    events = [("valued", {"page": page, "n": n, "tags": ["a", page], "ok": True})
              for n, page in enumerate(["/", "/a", "/a", "/b%", "/b%", "/b_", None, "x"])]  # fmt: skip
    collect_batch(db.admin, PROJECT, events[:3])
    db.flush(PROJECT, "valued")
    collect_batch(db.admin, PROJECT, events[3:5])
    db.tick()
    collect_batch(db.admin, PROJECT, events[5:])
    call = "SELECT * FROM rakam.field_values('acme', 'valued', {})"

    def found(arguments):
        return reader.execute(call.format(arguments)).fetchall()

    assert found("'page'") == [("/a", 2), ("/b%", 2), ("/", 1), ("/b_", 1), ("x", 1)]
    assert found("'page', max_rows => 2") == [("/a", 2), ("/b%", 2)]
    assert found("'page', '/b%'") == [("/b%", 2)]
    assert found("'Page', prefix => '/b'") == [("/b%", 2), ("/b_", 1)]
    assert found("'page', max_rows => 0") == []
    assert found("'ok'") == [("true", 8)]
    assert found("'n', '7'") == [("7", 1)]
    assert found("'tags', '{a,x'") == [("{a,x}", 1)]
    assert found("'_user'") == []
    session = db.connect(autocommit=False)
    collect(session, PROJECT, "valued", {"page": "mine"})
    assert session.execute(call.format("'page', 'm'")).fetchall() == [("mine", 1)]
    session.rollback()
    with refused("42703", hint="rakam.fields"):
        found("'nothing'")
    with refused("22023"):
        found("'page', max_rows => -1")
    with refused("22004"):
        found("'page', max_rows => NULL")
    with refused("42704"):
        reader.execute("SELECT * FROM rakam.field_values('acme', 'nowhere', 'page')")
    with refused("42501", message='project "acme"'):
        writer.execute(call.format("'page'"))
