//! What a single transaction can see of the main job, inside a server: `cargo pgrx test`.
//!
//! Each test is rolled back at its end, and workers see nothing of it. So nothing here is digested or flushed, and what
//! a task worker would register is registered by the same code in the test's own transaction. The rest of the road, and
//! everything with several sessions, is in `pg_test/`.

/// What pgrx asks of the crate whose tests it runs.
#[cfg(test)]
pub mod pg_test {
    /// Called before each test; there is nothing to prepare.
    pub fn setup(_options: Vec<&str>) {}

    /// Settings of the test server.
    pub fn postgresql_conf_options() -> Vec<&'static str> {
        vec!["shared_preload_libraries = 'rakam'", "timezone = 'UTC'"]
    }
}

#[pgrx::pg_schema]
#[allow(
    clippy::module_inception,
    reason = "pgrx looks for the functions in a schema of this name, and takes it from the module"
)]
mod tests {
    use pgrx::IntoDatum;
    use pgrx::datum::DatumWithOid;
    use pgrx::prelude::*;
    use rakam_event::types::FieldType;

    use crate::catalog::projects::{self, Right};
    use crate::catalog::registry;
    use crate::pg::error::OrRaise;
    use crate::pg::spi::View;
    use crate::tiers::ddl;

    // -- helpers ---------------------------------------------------------------------------------------------------

    fn run(statement: &str) {
        Spi::run(statement).unwrap_or_else(|e| panic!("{statement}: {e}"));
    }

    /// The first column of the first row, None for NULL and for no row.
    fn maybe<T: FromDatum + IntoDatum>(query: &str, values: &[DatumWithOid<'_>]) -> Option<T> {
        Spi::connect_mut(|client| {
            let rows = client.update(query, Some(1), values)?;
            if rows.is_empty() {
                return Ok(None);
            }
            rows.first().get_one()
        })
        .unwrap_or_else(|e: pgrx::spi::Error| panic!("{query}: {e}"))
    }

    fn one<T: FromDatum + IntoDatum>(query: &str) -> T {
        maybe(query, &[]).unwrap_or_else(|| panic!("{query}: no value"))
    }

    /// The statement must fail with this SQLSTATE; `told` is a text of its message or hint.
    fn assert_fails(statement: &str, sqlstate: &str, told: &str) {
        if one("SELECT to_regprocedure('pg_temp.outcome(text)') IS NULL") {
            run("CREATE FUNCTION pg_temp.outcome(statement text) RETURNS text LANGUAGE plpgsql AS $$
                 DECLARE state text; message text; hint text;
                 BEGIN
                   EXECUTE statement;
                   RETURN 'no error';
                 EXCEPTION WHEN OTHERS THEN
                   GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
                   RETURN format('%s: %s; %s', state, message, hint);
                 END $$");
        }
        let outcome: String =
            maybe("SELECT pg_temp.outcome($1)", &[statement.into()]).unwrap_or_default();
        assert!(
            outcome.starts_with(sqlstate) && outcome.contains(told),
            "{statement}\n  was to fail with {sqlstate} and tell {told:?}, but: {outcome}"
        );
    }

    fn as_role<T>(role: &str, work: impl FnOnce() -> T) -> T {
        run(&format!("SET LOCAL ROLE {role}"));
        let value = work();
        run("RESET ROLE");
        value
    }

    fn project(name: &str) {
        let made: String = maybe(
            "SELECT project FROM rakam.create_project($1)",
            &[name.into()],
        )
        .unwrap_or_default();
        assert_eq!(made, name);
    }

    /// A collection with its table and these fields, as a worker makes them.
    fn collection(project: &str, name: &str, fields: &[(&str, &str)]) {
        let project_id = projects::authorize(project, Right::Admin).or_raise().id;
        registry::add_collection(project_id, name).or_raise();
        let id = registry::collection_named(View::Current, project_id, name)
            .or_raise()
            .expect("a collection just registered")
            .id;
        let fields: Vec<(String, FieldType)> = fields
            .iter()
            .map(|(field, ty)| {
                let ty = FieldType::parse(ty).expect("a type that fields can have");
                ((*field).to_owned(), ty)
            })
            .collect();
        registry::add_fields(id, &fields, false).or_raise();
        ddl::sync(id).or_raise();
    }

    /// Project `acme` with collection `pageview`.
    fn acme() {
        project("acme");
        let fields = [
            ("page", "text"),
            ("load_ms", "double precision"),
            ("at", "timestamp with time zone"),
        ];
        collection("acme", "pageview", &fields);
    }

    fn collect(properties: &str) {
        let sent = [properties.into()];
        Spi::run_with_args("SELECT rakam.collect('acme', 'pageview', $1::jsonb)", &sent)
            .unwrap_or_else(|e| panic!("{properties}: {e}"));
    }

    /// `_id`s of what a query's rows are, in order, as one text.
    fn ids(condition: &str) -> String {
        one(&format!(
            "SELECT coalesce(string_agg(_id, ' ' ORDER BY _id), '') FROM acme.pageview WHERE {condition}"
        ))
    }

    // -- projects --------------------------------------------------------------------------------------------------

    #[pg_test]
    fn a_project_is_a_schema_with_roles_and_tables() {
        project("acme");
        let roles: i64 = one(
            "SELECT count(*) FROM pg_roles WHERE rolname ~ '^rakam_acme_(read|write|admin)$' AND NOT rolcanlogin",
        );
        assert_eq!(roles, 3);
        let tables: String = one(
            "SELECT string_agg(relname || ' ' || relkind::text, ', ' ORDER BY relname) FROM pg_class
             WHERE relnamespace = 'acme'::regnamespace AND relkind IN ('r', 'f')",
        );
        assert_eq!(tables, "_all f, users r");
        assert_eq!(one::<i64>("SELECT count(*) FROM acme._all"), 0);
        assert_eq!(one::<String>("SELECT project FROM rakam.projects"), "acme");
    }

    #[pg_test]
    fn names_of_projects_are_checked() {
        project("acme");
        assert_fails(
            "SELECT rakam.create_project('ACME')",
            "42710",
            "already exists",
        );
        assert_fails("SELECT rakam.create_project('1st')", "42602", "1st");
        assert_fails(
            "SELECT rakam.create_project('rakam_x')",
            "42939",
            "reserved",
        );
        assert_fails("SELECT rakam.create_project('public')", "42939", "reserved");
        assert_fails("SELECT rakam.create_project(NULL)", "22004", "name");
        assert_fails(
            "SELECT rakam.create_project('b', 'nowhere')",
            "42704",
            "nowhere",
        );
    }

    #[pg_test]
    fn a_project_is_dropped_only_when_that_is_allowed() {
        acme();
        collect("{}");
        assert_fails(
            "SELECT rakam.drop_project('acme')",
            "55000",
            "rakam.allow_project_drop",
        );
        run("SET LOCAL rakam.allow_project_drop = on");
        run("SELECT rakam.drop_project('acme')");
        assert_eq!(one::<i64>("SELECT count(*) FROM rakam.projects"), 0);
        assert_eq!(
            one::<i64>("SELECT count(*) FROM pg_roles WHERE rolname LIKE 'rakam_acme_%'"),
            0
        );
        assert_fails(
            "SELECT rakam.collect('acme', 'pageview', '{}')",
            "42501",
            "acme",
        );
    }

    // -- collect ---------------------------------------------------------------------------------------------------

    #[pg_test]
    fn an_event_is_visible_in_its_own_transaction() {
        acme();
        collect(
            r#"{"_id": "1", "_time": "2026-03-01T10:00:00+02:00", "_user": "ada", "page": "/", "loadMs": 12.5}"#,
        );
        let row: String = one(
            "SELECT concat_ws('|', _id, _time, _user, page, load_ms, _extra, _received_at >= now() - interval '1 minute')
             FROM acme.pageview",
        );
        assert_eq!(row, "1|2026-03-01 08:00:00+00|ada|/|12.5|t");
        let row: String = one(
            "SELECT concat_ws('|', _collection, _user, properties ->> 'load_ms') FROM acme._all",
        );
        assert_eq!(row, "pageview|ada|12.5");
    }

    #[pg_test]
    fn fields_that_are_no_columns_are_in_extra() {
        acme();
        collect(
            r#"{"_id": "1", "HTTPStatus": 404, "user.agent": {"os": "plan9"}, "loadMs": "slow"}"#,
        );
        let extra: String = one("SELECT _extra::text FROM acme.pageview");
        for part in [
            r#""http_status": 404"#,
            r#""os": "plan9""#,
            r#""load_ms": "slow""#,
        ] {
            assert!(extra.contains(part), "{part} is not in {extra}");
        }
        assert_eq!(
            one::<String>(
                "SELECT _extra ->> 'http_status' FROM acme.pageview WHERE load_ms IS NULL"
            ),
            "404"
        );
    }

    #[pg_test]
    fn a_batch_rejects_bad_items_alone() {
        acme();
        let events = r#"[{"collection": "pageview", "properties": {"_id": "1"}},
                         {"collection": "pageview", "properties": [1]},
                         {"properties": {"_id": "2"}, "collection": "PageView"},
                         {"collection": "users", "properties": {}},
                         7]"#;
        for form in ["text", "jsonb"] {
            let result: String = maybe(
                &format!(
                    "SELECT concat_ws('|', stored, rejected, rejected_indexes,
                              (SELECT string_agg(e ->> 'sqlstate', ',') FROM jsonb_array_elements(errors) e))
                     FROM rakam.collect_batch('acme', $1::{form})"
                ),
                &[events.into()],
            )
            .unwrap_or_default();
            assert_eq!(result, "2|3|{1,3,4}|22023,42939,22023", "{form}");
        }
        // The second form brought the same events once more, which count once.
        assert_eq!(ids("true"), "1 2");
    }

    #[pg_test]
    fn upload_time_and_checksum_of_a_batch() {
        acme();
        run("SELECT rakam.collect_batch('acme',
               jsonb_build_array(jsonb_build_object('collection', 'pageview', 'properties',
                 jsonb_build_object('_id', 'late', '_time', now() - interval '1 hour')))::text,
               jsonb_build_object('upload_time', now() - interval '1 hour'))");
        let seconds: f64 =
            one("SELECT abs(extract(epoch FROM _received_at - _time))::float8 FROM acme.pageview");
        assert!(seconds < 60.0, "{seconds}");
        run(
            "SELECT rakam.collect_batch('acme', '[]'::text, jsonb_build_object('checksum', md5('[]')))",
        );
        assert_fails(
            r#"SELECT rakam.collect_batch('acme', '[]'::text, '{"checksum": "0"}')"#,
            "22023",
            "MD5",
        );
    }

    #[pg_test]
    fn a_savepoint_takes_its_events_along() {
        acme();
        collect(r#"{"_id": "before"}"#);
        run("DO $$ BEGIN
               PERFORM rakam.collect('acme', 'pageview', '{\"_id\": \"inside\"}');
               IF (SELECT count(*) FROM acme.pageview) <> 2 THEN RAISE 'not its own reader'; END IF;
               RAISE division_by_zero;
             EXCEPTION WHEN division_by_zero THEN NULL;
             END $$");
        collect(r#"{"_id": "after"}"#);
        assert_eq!(ids("true"), "after before");
    }

    #[pg_test]
    fn what_is_wrong_with_an_event_is_said() {
        acme();
        let send =
            |properties: &str| format!("SELECT rakam.collect('acme', 'pageview', '{properties}')");
        assert_fails(&send("[1]"), "22023", "object");
        assert_fails(&send("{"), "22P02", "json");
        assert_fails(&send(r#"{"_received_at": 1}"#), "42939", "_received_at");
        let long_id = format!(r#"{{"_id": "{}"}}"#, "x".repeat(257));
        assert_fails(&send(&long_id), "54000", "_id");
        let deep = format!(r#"{{"a": {}{}}}"#, "[".repeat(70), "]".repeat(70));
        assert_fails(&send(&deep), "54000", "64");
        let large = format!(r#"{{"a": "{}"}}"#, "x".repeat(2 << 20));
        assert_fails(&send(&large), "54000", "rakam.max_event_bytes");
        assert_fails(
            "SELECT rakam.collect('acme', 'users', '{}')",
            "42939",
            "users",
        );
        assert_fails("SELECT rakam.collect('acme', '', '{}')", "42602", "");
        for call in [
            "rakam.collect(NULL, 'pageview', '{}')",
            "rakam.collect('acme', NULL, '{}')",
            "rakam.collect('acme', 'pageview', NULL)",
            "rakam.collect_batch('acme', NULL::text)",
        ] {
            assert_fails(&format!("SELECT {call}"), "22004", "must not be null");
        }
        assert_fails(
            "SELECT rakam.collect_batch('acme', '{}'::text)",
            "22023",
            "array",
        );
        assert_fails("SELECT rakam.collect_batch('acme', '[')", "22P02", "");
        assert_fails(
            r#"SELECT rakam.collect_batch('acme', '[]'::text, '{"colour": 1}')"#,
            "22023",
            "upload_time and checksum",
        );
        assert_eq!(one::<i64>("SELECT count(*) FROM acme.pageview"), 0);
        run("SET LOCAL transaction_read_only = on");
        assert_fails(&send("{}"), "25006", "read-only");
    }

    // -- the foreign table -----------------------------------------------------------------------------------------

    #[pg_test]
    fn insert_and_returning() {
        acme();
        let told: String = one(
            "WITH stored AS (
               INSERT INTO acme.pageview (_id, _user, load_ms, at) VALUES ('1', 'ada', 1.5, '2026-01-01'), ('2', 'bob', NULL, NULL)
               ON CONFLICT DO NOTHING
               RETURNING _id, load_ms, _time = _received_at AS now)
             SELECT string_agg(concat_ws(' ', _id, load_ms, now), ', ' ORDER BY _id) FROM stored",
        );
        assert_eq!(told, "1 1.5 t, 2 t");
        run("INSERT INTO acme.pageview (_id) SELECT (2 + g)::text FROM generate_series(1, 8) g");
        assert_eq!(one::<i64>("SELECT count(*) FROM acme.pageview"), 10);
        assert_fails(
            "INSERT INTO acme.pageview (load_ms) VALUES ('slow')",
            "22P02",
            "",
        );
        for (statement, hint) in [
            ("UPDATE acme.pageview SET page = ''", ""),
            ("DELETE FROM acme.pageview", ""),
            ("TRUNCATE acme.pageview", ""),
        ] {
            assert_fails(statement, "0A000", hint);
        }
    }

    #[pg_test]
    fn conditions_mean_the_same_as_in_postgres() {
        acme();
        for (n, page) in ["/", "/a", "/A", "/é", "", "%"].iter().enumerate() {
            let value = ["-0.0", "0", "-5.5", "1e15", "1e300", "7"][n];
            let stored = [(n as i64).into(), (*page).into(), value.into()];
            Spi::run_with_args(
                "INSERT INTO acme.pageview (_id, page, load_ms, at)
                 VALUES ($1::text, $2, $3::float8, timestamptz '2026-01-01' + $1 * interval '1 day')",
                &stored,
            )
            .expect("an INSERT");
        }
        run(r#"SELECT rakam.collect('acme', 'pageview', '{"_id": "6"}')"#);
        run("CREATE TEMP TABLE heap AS SELECT * FROM acme.pageview");
        for condition in [
            "load_ms = 0",
            "load_ms > 1e10",
            "load_ms = 'NaN' OR load_ms = '-Infinity'",
            "load_ms < 'NaN' AND load_ms >= 0",
            "load_ms IS NULL",
            "NOT (load_ms > 5)",
            "page > '/A'",
            "page LIKE '/_'",
            "page NOT LIKE '%A'",
            "page LIKE '\\%'",
            "page IN ('/a', '/é', NULL)",
            "page NOT IN ('/a', '/é')",
            "upper(page) = '/A'",
            "at >= '2026-01-03' AND at < '2026-01-05'",
            "at IS DISTINCT FROM '2026-01-01'",
            "page = '' OR load_ms = 7",
            "_time <= now() AND _received_at IS NOT NULL",
            "(page = '/') IS NOT TRUE",
        ] {
            let expected: String = one(&format!(
                "SELECT coalesce(string_agg(_id, ' ' ORDER BY _id), '') FROM heap WHERE {condition}"
            ));
            assert_eq!(ids(condition), expected, "{condition}");
        }
    }

    #[pg_test]
    fn a_scan_can_be_left_and_begun_again() {
        acme();
        run(
            "INSERT INTO acme.pageview (_id, load_ms) SELECT g::text, g FROM generate_series(1, 500) g",
        );
        run("DO $$
             DECLARE row record; seen int := 0;
             BEGIN
               FOR row IN SELECT * FROM acme.pageview LOOP
                 seen := seen + 1;
                 EXIT WHEN seen = 3;
               END LOOP;
               IF seen <> 3 THEN RAISE 'only % rows', seen; END IF;
             END $$");
        let sum: f64 = one("SELECT sum(n) FROM generate_series(1, 500, 50) g,
             LATERAL (SELECT max(load_ms) AS n FROM acme.pageview WHERE load_ms <= g) m");
        assert_eq!(sum, (0..10).map(|i| f64::from(1 + 50 * i)).sum::<f64>());
        assert_eq!(
            one::<i64>("SELECT count(*) FROM (SELECT 1 FROM acme.pageview LIMIT 7) l"),
            7
        );
        run("PREPARE upto(float8) AS SELECT count(*) FROM acme.pageview WHERE load_ms <= $1");
        for n in [3, 0, 500] {
            assert_eq!(one::<i64>(&format!("EXECUTE upto({n})")), n);
        }
        run("DEALLOCATE upto");
    }

    #[pg_test]
    fn what_is_seen_is_what_was_there_when_the_query_began() {
        acme();
        collect("{}");
        // Each row read stores another event: a reader of the latest state would never end.
        let read: i64 = one(
            "SELECT count(*) FROM (SELECT rakam.collect('acme', 'pageview', '{}') FROM acme.pageview OFFSET 0) s",
        );
        assert_eq!(read, 1);
        assert_eq!(one::<i64>("SELECT count(*) FROM acme.pageview"), 2);
    }

    #[pg_test]
    fn explain_tells_what_was_not_pushed_down() {
        acme();
        let plan: String = Spi::connect_mut(|client| {
            let rows = client.update(
                "EXPLAIN (VERBOSE, COSTS OFF) SELECT _id FROM acme.pageview WHERE _user = 'ada' AND page ~ '^/'",
                None,
                &[],
            )?;
            let lines: Vec<String> = rows.filter_map(|row| row.get(1).ok().flatten()).collect();
            Ok::<_, pgrx::spi::Error>(lines.join("\n"))
        })
        .expect("a plan");
        assert!(
            plan.contains("Engine Filter: (pageview._user = 'ada'::text)"),
            "{plan}"
        );
        assert!(plan.contains("Not Pushed Down"), "{plan}");
    }

    // -- roles and keys --------------------------------------------------------------------------------------------

    #[pg_test]
    fn roles_do_what_they_are_for() {
        acme();
        let send = "SELECT rakam.collect('acme', 'pageview', '{}')";
        let read = "SELECT count(*) FROM acme.pageview";
        as_role("rakam_acme_write", || {
            run(send);
            assert_fails(read, "42501", "permission denied");
            assert_fails("SELECT * FROM acme._all", "42501", "permission denied");
            assert_fails("SELECT rakam.create_keys('acme')", "42501", "acme");
            run("INSERT INTO acme.pageview (_user) VALUES ('writer')");
            assert_fails(
                "INSERT INTO acme.pageview (_received_at) VALUES (now())",
                "42501",
                "_received_at",
            );
        });
        as_role("rakam_acme_read", || {
            assert_eq!(one::<i64>(read), 2);
            assert_fails(send, "42501", "acme");
            assert_fails(
                "INSERT INTO acme.pageview (_user) VALUES ('x')",
                "42501",
                "",
            );
        });
        as_role("rakam_acme_admin", || {
            run(send);
            assert_eq!(one::<i64>(read), 3);
            assert_eq!(
                one::<i64>("SELECT count(*) FROM rakam.create_keys('acme')"),
                1
            );
            assert_fails(
                "SELECT rakam.create_project('other')",
                "42501",
                "create a project",
            );
            run("INSERT INTO acme.pageview (_id, _received_at) VALUES ('restored', '2026-01-01')");
            assert_eq!(ids("_received_at = '2026-01-01'"), "restored");
        });
        assert_fails(
            "SELECT rakam.collect('nowhere', 'c', '{}')",
            "42501",
            "nowhere",
        );
    }

    #[pg_test]
    fn projects_do_not_see_each_other() {
        acme();
        collect(r#"{"page": "secret"}"#);
        project("evil");
        run("GRANT USAGE ON FOREIGN SERVER rakam TO rakam_evil_admin");
        as_role("rakam_evil_admin", || {
            assert_fails("SELECT * FROM acme.pageview", "42501", "permission denied");
            // The same words for a project of others and for one that is not there.
            for name in ["acme", "nowhere"] {
                let told = format!("permission denied for project \"{name}\"");
                assert_fails(
                    &format!("SELECT rakam.collect('{name}', 'c', '{{}}')"),
                    "42501",
                    &told,
                );
                assert_fails(
                    &format!("SELECT rakam.create_keys('{name}')"),
                    "42501",
                    &told,
                );
            }
            run(
                "CREATE FOREIGN TABLE evil.forged (_id text, page text) SERVER rakam
                 OPTIONS (project 'acme', collection 'pageview')",
            );
            assert_eq!(one::<i64>("SELECT count(*) FROM evil.forged"), 0);
            assert_fails("INSERT INTO evil.forged (page) VALUES ('x')", "42501", "");
            for view in [
                "projects",
                "collections",
                "fields",
                "keys",
                "stat_collection",
            ] {
                let foreign = format!("SELECT count(*) FROM rakam.{view} WHERE project = 'acme'");
                assert_eq!(one::<i64>(&foreign), 0, "{view}");
            }
            for table in [
                "project",
                "collection",
                "field",
                "id_run",
                "inbox_0",
                "inbox_1",
                "inbox_2",
            ] {
                let foreign = format!(
                    "SELECT count(*) FROM rakam_internal.{table} WHERE project_id NOT IN
                       (SELECT project_id FROM rakam_internal.project WHERE name = 'evil')"
                );
                let seen = maybe::<String>(
                    "SELECT has_table_privilege($1, 'SELECT')::text",
                    &[format!("rakam_internal.{table}").into()],
                );
                if seen.as_deref() == Some("true") {
                    assert_eq!(one::<i64>(&foreign), 0, "{table}");
                }
            }
        });
        assert_eq!(
            one::<i64>("SELECT count(*) FROM evil.forged"),
            1,
            "a superuser sees all"
        );
    }

    #[pg_test]
    fn keys_stand_for_roles() {
        acme();
        run("CREATE TEMP TABLE made AS SELECT * FROM rakam.create_keys('acme')");
        run("CREATE ROLE pooled; GRANT SELECT ON made TO PUBLIC");
        let key = |kind: &str| one::<String>(&format!("SELECT {kind}_key FROM made"));
        let (read, write, master) = (key("read"), key("write"), key("master"));
        assert!(
            read.starts_with("rk_r_") && write.starts_with("rk_w_") && master.starts_with("rk_m_")
        );
        let stored: i64 = one(
            "SELECT count(*) FROM rakam_internal.api_key k, made m
             WHERE position(m.write_key::bytea IN k.hash) > 0 OR k::text LIKE '%' || m.write_key || '%'",
        );
        assert_eq!(stored, 0, "keys are not kept in clear");

        let send =
            |key: &str| format!("SELECT rakam.collect_with_key('{key}', 'pageview', '{{}}')");
        as_role("pooled", || {
            run(&send(&write));
            run(&send(&master));
            run(&format!(
                "SELECT rakam.collect_batch_with_key('{write}', '[]')"
            ));
            assert_fails(&send(&read), "42501", "write key");
            assert_fails(&send("rk_w_unknown"), "28000", "");
            assert_fails("SELECT count(*) FROM acme.pageview", "42501", "");
            for (key, role) in [(&read, "read"), (&write, "write"), (&master, "admin")] {
                run(&format!("SELECT rakam.authenticate('{key}')"));
                assert_eq!(
                    one::<String>("SELECT current_user::text"),
                    format!("rakam_acme_{role}")
                );
            }
            assert_eq!(one::<i64>("SELECT count(*) FROM acme.pageview"), 2);
        });
        run("SELECT rakam.revoke_keys('acme', key_id) FROM made");
        as_role("pooled", || {
            assert_fails(&send(&write), "28000", "");
            assert_fails(&format!("SELECT rakam.authenticate('{read}')"), "28000", "");
        });
        assert_fails(
            "SELECT rakam.revoke_keys('acme', '00000000-0000-4000-8000-000000000000')",
            "42704",
            "rakam.keys",
        );
    }

    // -- schema and operation --------------------------------------------------------------------------------------

    #[pg_test]
    fn a_field_becomes_a_column_for_the_events_before() {
        acme();
        collect(r#"{"_id": "1", "plan": "team", "seats": "12"}"#);
        assert_eq!(ids("_extra ->> 'plan' = 'team'"), "1");
        collection(
            "acme",
            "pageview",
            &[("plan", "text"), ("seats", "double precision")],
        );
        assert_eq!(ids("plan = 'team' AND seats = 12 AND _extra IS NULL"), "1");
        let fields: String = one(
            "SELECT string_agg(field || ' ' || type, ', ' ORDER BY field_id) FROM rakam.fields WHERE project = 'acme'",
        );
        assert_eq!(
            fields,
            "page text, load_ms double precision, at timestamp with time zone, plan text, seats double precision"
        );
    }

    #[pg_test]
    fn calls_that_need_workers_say_what_is_wrong_before() {
        acme();
        let field = |name: &str, ty: &str| {
            format!("SELECT rakam.add_field('acme', 'pageview', '{name}', '{ty}')")
        };
        assert_fails(&field("n", "money"), "22023", "money");
        assert_fails(&field("n", "numeric"), "22023", "numeric(p,s)");
        assert_fails(&field("xmin", "text"), "42602", "xmin");
        assert_fails("SELECT rakam.create_collection('acme', '_x')", "42939", "");
        assert_fails("SELECT rakam.flush('nowhere')", "42501", "nowhere");
        run("CREATE ROLE nobody");
        as_role("nobody", || {
            assert_fails("SELECT rakam.tick()", "42501", "member");
            assert_fails(
                "SELECT rakam.create_collection('acme', 'x')",
                "42501",
                "acme",
            );
        });
    }

    #[pg_test]
    fn views_and_settings_are_there_for_everybody() {
        acme();
        run("CREATE ROLE nobody");
        as_role("nobody", || {
            for view in [
                "projects",
                "keys",
                "collections",
                "fields",
                "data_files",
                "invalid_value",
                "dead_letter",
                "stat_collection",
            ] {
                assert_eq!(
                    one::<i64>(&format!("SELECT count(*) FROM rakam.{view}")),
                    0,
                    "{view}"
                );
            }
            let checks: i64 =
                one(r#"SELECT count(*) FROM rakam.health() WHERE "check" = 'engine memory'"#);
            assert_eq!(
                checks, 0,
                "what concerns the server is for its administrators"
            );
            assert_fails("SET rakam.memory_limit = '1GB'", "42501", "");
            assert_fails("SET rakam.failpoint = 'x'", "42501", "");
        });
        let memory: String =
            one(r#"SELECT detail FROM rakam.health() WHERE "check" = 'engine memory'"#);
        assert_eq!(memory, "0 of 1024 MB in use by the server");
        assert_eq!(
            one::<String>("SELECT current_setting('rakam.max_fields')"),
            "500"
        );
    }
}
