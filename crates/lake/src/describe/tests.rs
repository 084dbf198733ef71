use super::*;
use crate::period::{Period, object_path};
use crate::write::Replaces;

fn row(pairs: &[(&str, Value)]) -> Map<String, Value> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), value.clone()))
        .collect()
}

fn project(id: i32) -> Record {
    Record::Project {
        project_id: id,
        row: Some(row(&[("name", format!("p{id}").into())])),
    }
}

fn collection(id: i32, project_id: i32, name: &str) -> Record {
    Record::Collection {
        collection_id: id,
        project_id,
        row: Some(row(&[("name", name.into()), ("schema_version", 1.into())])),
        fields: vec![row(&[("field_id", 16.into()), ("name", "a".into())])],
        dropped_fields: vec![],
    }
}

fn file(path: &str, collection_id: i32, file: Option<File>) -> Record {
    Record::File {
        path: path.to_owned(),
        collection_id,
        file,
    }
}

fn plain() -> Option<File> {
    Some(File {
        n: 10,
        bytes: 1_000,
        level: 0,
        hidden: None,
    })
}

fn object(at_us: i64, next: i32, records: &[Record]) -> Bytes {
    let header = Header::new("i".to_owned(), at_us, (next, next));
    let mut writer = Writer::new(&header).unwrap();
    for record in records {
        writer.add(record).unwrap();
    }
    writer.finish().unwrap()
}

fn state(objects: &[Bytes]) -> State {
    let mut state = State::default();
    for object in objects {
        state.apply(object).unwrap();
    }
    state
}

/// A path begun so many milliseconds after the first.
fn path(ms: u64) -> String {
    let id = Uuid::new_v7(uuid::Timestamp::from_unix(
        uuid::NoContext,
        1_000_000 + ms / 1_000,
        (ms % 1_000) as u32 * 1_000_000,
    ));
    object_path("p1", "c", Period::Day, 5, id)
}

fn info(collection_id: i32, op: u128, replaces: Option<(&[&str], Option<u32>)>) -> FileInfo {
    FileInfo {
        project: "p1".to_owned(),
        project_id: Some(1),
        collection: "c".to_owned(),
        collection_id: Some(collection_id),
        flush_id: Uuid::from_u128(op),
        period: Period::Day,
        first_day: 5,
        schema_version: 2,
        fields: vec![],
        replaces: replaces.map(|(paths, outputs)| Replaces {
            ids: paths.iter().filter_map(|p| object_id(p)).collect(),
            outputs,
        }),
        n: 10,
        bytes: 1_000,
        min_time_us: 0,
        max_time_us: 0,
        min_xid: 3,
        max_xid: 3,
        max_received_us: 0,
        has_extra: false,
        stats: vec![],
        footer: Bytes::new(),
        footer_bytes: 0,
    }
}

/// What is live in the end, of described files and found ones, by the paths' names in `all`.
fn live(described: &[&str], found: &[(&str, FileInfo)], present: &[&str]) -> Vec<String> {
    let mut records = vec![project(1), collection(1, 1, "c")];
    records.extend(described.iter().map(|path| file(path, 1, plain())));
    let mut state = state(&[object(0, 10, &records)]);
    let found_paths: Vec<String> = found.iter().map(|(path, _)| (*path).to_owned()).collect();
    let found = found
        .iter()
        .map(|(path, info)| ((*path).to_owned(), info.clone()))
        .collect();
    let present = present.iter().map(|p| (*p).to_owned()).collect();
    state.settle(found, &present);
    let gone = state.out_of_use(&present);
    // Each of those found counts, or is known not to.
    for path in &found_paths {
        assert_ne!(
            gone.contains(path),
            state.files.contains_key(path),
            "{path}"
        );
    }
    let mut live: Vec<String> = state.files.into_keys().collect();
    live.sort();
    live
}

#[test]
fn names_say_what_they_are_of() {
    let id = Uuid::now_v7();
    for part in [None, Some(0), Some(LAST_PART)] {
        let name = Name {
            writer: "0000002a".to_owned(),
            number: 12,
            id,
            part,
        };
        assert_eq!(Name::parse(&name.path()), Some(name));
    }
    for other in [
        "",
        "_rakam/owner.json",
        "_rakam/description/x",
        &format!("{PREFIX}w/1.{id}.txt"),
    ] {
        assert_eq!(Name::parse(other), None, "{other}");
    }
}

#[test]
fn an_object_is_read_whole_or_not_at_all() {
    let whole = object(7, 3, &[project(1), file("f", 1, plain())]);
    let (header, records) = read(&whole).unwrap();
    assert_eq!((header.at_us, header.next_project_id), (7, 3));
    assert_eq!(records, [project(1), file("f", 1, plain())]);
    for end in 0..whole.len() {
        assert_eq!(read(&whole[..end]).unwrap_err().sqlstate(), "XX001");
    }
    let mut other = whole.to_vec();
    other[30] ^= 1;
    assert!(read(&other).is_err());
}

#[test]
fn the_newest_whole_state_and_what_came_after_it() {
    let name = |writer: &str, number: u64, part: Option<u32>, id: u128| Name {
        writer: writer.to_owned(),
        number,
        id: Uuid::from_u128(id),
        part,
    };
    let names = [
        name("a", 1, None, 1),
        name("a", 1, Some(0), 2),
        name("a", 1, Some(LAST_PART), 2),
        name("a", 2, None, 3),
        name("a", 2, Some(0), 4),
        name("a", 2, Some(1), 4),
        name("a", 2, Some(LAST_PART), 4),
        // Cut off, and with a part missing.
        name("a", 3, Some(0), 5),
        name("a", 4, Some(1), 6),
        name("a", 4, Some(LAST_PART), 6),
        name("a", 4, None, 9),
        name("a", 3, None, 8),
        name("a", 4, None, 7),
        name("b", 9, None, 1),
    ];
    let found = chain(&names, "a").unwrap();
    let shown: Vec<_> = found
        .iter()
        .map(|n| (n.number, n.part, n.id.as_u128()))
        .collect();
    assert_eq!(
        shown,
        [
            (2, Some(0), 4),
            (2, Some(1), 4),
            (2, Some(LAST_PART), 4),
            (3, None, 8),
            (4, None, 7),
            (4, None, 9)
        ]
    );
    assert!(!has_gap(&found));
    assert!(has_gap(&[&names[0], &names[12]]));
    assert!(chain(&names, "b").is_none() && chain(&names, "c").is_none());
}

#[test]
fn logs_change_a_state_and_may_come_twice() {
    let hidden = Some(File {
        n: 10,
        bytes: 1_000,
        level: 0,
        hidden: Some("ff".to_owned()),
    });
    let first = object(
        1,
        4,
        &[
            project(1),
            project(2),
            collection(1, 1, "a"),
            collection(2, 1, "b"),
            collection(3, 2, "x"),
        ],
    );
    let second = object(
        2,
        5,
        &[
            file("f1", 1, plain()),
            file("f2", 2, plain()),
            file("f3", 3, plain()),
        ],
    );
    let third = object(
        3,
        6,
        &[
            file("f1", 1, hidden.clone()),
            file("f2", 2, None),
            collection(2, 1, "renamed"),
            Record::Project {
                project_id: 2,
                row: None,
            },
        ],
    );
    let mut state = state(&[first, second.clone(), third.clone(), second, third]);
    state.tidy();
    assert_eq!(state.header.as_ref().unwrap().next_collection_id, 6);
    assert_eq!(state.projects.keys().collect::<Vec<_>>(), [&1]);
    assert_eq!(state.collections[&2].row["name"], "renamed");
    assert_eq!(state.files.len(), 1);
    assert_eq!(state.files["f1"].described, hidden);
    assert!(
        state.files["f1"]
            .described
            .as_ref()
            .unwrap()
            .hidden()
            .is_err()
    );
    let (old, new) = (path(0), path(90_000_000));
    let late = State {
        header: Some(Header::new(String::new(), begun(&new), (1, 1))),
        ..State::default()
    };
    assert_eq!(
        late.undescribed([old.as_str(), new.as_str(), "f2", "_rakam/x"].into_iter()),
        [&new]
    );
    assert!(state.undescribed(["f1", "f2"].into_iter()).is_empty());
}

fn begun(path: &str) -> i64 {
    let (seconds, nanos) = object_id(path).unwrap().get_timestamp().unwrap().to_unix();
    seconds as i64 * 1_000_000 + i64::from(nanos / 1_000)
}

#[test]
fn hidden_rows_are_those_that_were_written() {
    let set = RowSet::decode(Bytes::from(RowSet::default().encode()), 5).unwrap();
    let hexadecimal: String = set.encode().iter().map(|b| format!("{b:02x}")).collect();
    let file = File {
        n: 5,
        bytes: 1,
        level: 0,
        hidden: Some(hexadecimal),
    };
    assert_eq!(file.hidden().unwrap(), Some(set));
}

#[test]
fn an_operation_counts_whole_or_not() {
    let [a, b, c, d, e] = [1, 2, 3, 4, 5].map(path);
    let [a, b, c, d, e] = [&a, &b, &c, &d, &e].map(String::as_str);
    // Straight from the database.
    assert_eq!(live(&[a], &[(b, info(1, 1, None))], &[a, b]), [a, b]);
    // A rewrite, with the old file still there or not.
    let rewrite = || info(1, 1, Some((&[a], Some(1))));
    assert_eq!(live(&[a], &[(b, rewrite())], &[a, b]), [b]);
    assert_eq!(live(&[a], &[(b, rewrite())], &[b]), [b]);
    // Another has replaced it, and is described.
    assert_eq!(live(&[c], &[(b, rewrite())], &[a, b, c]), [c]);
    // Two files for two: one is missing, and the old ones are all there; or one of those is gone as well.
    let two = || info(1, 1, Some((&[a, b], Some(2))));
    assert_eq!(live(&[a, b], &[(c, two())], &[a, b, c]), [a, b]);
    assert_eq!(
        live(&[a, b], &[(c, two()), (d, two())], &[a, b, c, d]),
        [c, d]
    );
    assert_eq!(live(&[a, b], &[(c, two())], &[b, c]), [c]);
    // How many there were to be is not known: the old ones, if they are there.
    let some = || info(1, 1, Some((&[a, b], None)));
    assert_eq!(live(&[a, b], &[(c, some())], &[a, b, c]), [a, b]);
    assert_eq!(live(&[a, b], &[(c, some())], &[a, c]), [c]);
    // Twice, after a crash; and one after the other.
    let again = info(1, 2, Some((&[a], Some(1))));
    assert_eq!(live(&[a], &[(b, rewrite()), (c, again)], &[a, b, c]), [c]);
    let next = info(1, 2, Some((&[b], Some(1))));
    assert_eq!(live(&[a], &[(b, rewrite()), (c, next)], &[a, b, c]), [c]);
    let wide = info(1, 3, Some((&[b, d], Some(1))));
    let flushed = info(1, 2, None);
    let found = [(b, rewrite()), (d, flushed), (e, wide)];
    assert_eq!(live(&[a], &found, &[a, b, d, e]), [e]);
}

#[test]
fn files_bring_what_is_not_described() {
    use rakam_event::types::FieldType;
    let described = object(
        0,
        10,
        &[project(1), collection(1, 1, "c"), collection(2, 1, "gone")],
    );
    let dropped = object(
        1,
        10,
        &[Record::Collection {
            collection_id: 2,
            project_id: 1,
            row: None,
            fields: vec![],
            dropped_fields: vec![],
        }],
    );
    let mut state = state(&[described, dropped]);
    let with = |collection_id: i32, name: &str, version: i32, fields: &[(i32, &str)]| FileInfo {
        collection: name.to_owned(),
        schema_version: version,
        fields: (fields.iter())
            .map(|(id, name)| FileField {
                id: *id,
                name: (*name).to_owned(),
                ty: FieldType::Int8,
            })
            .collect(),
        ..info(collection_id, u128::from(version.unsigned_abs()), None)
    };
    use crate::file_info::FileField;
    let dropped_path = path(2);
    let found = vec![
        (path(1), with(1, "c", 3, &[(16, "a"), (17, "b"), (18, "a")])),
        (dropped_path.clone(), with(2, "gone", 1, &[])),
        (path(3), with(11, "new", 4, &[(16, "x")])),
        (path(4), with(11, "c", 5, &[(16, "x"), (17, "y")])),
        (
            path(5),
            FileInfo {
                project: "p3".to_owned(),
                project_id: Some(3),
                ..with(12, "c", 6, &[])
            },
        ),
    ];
    let refused = state.settle(found, &HashSet::new());
    assert_eq!(refused, [dropped_path]);
    assert_eq!(state.files.len(), 4);
    assert_eq!(state.projects[&3]["name"], "p3");
    let shown = |id: i32| {
        let c = &state.collections[&id];
        let names = |rows: &[Map<String, Value>]| {
            rows.iter()
                .map(|r| r["field_id"].to_string())
                .collect::<Vec<_>>()
                .join(" ")
        };
        format!(
            "{} {} | {} | {}",
            c.row["name"].as_str().unwrap(),
            c.row["schema_version"],
            names(&c.fields),
            names(&c.dropped_fields)
        )
    };
    // The name that was there before is another's now: the one of the higher id keeps it.
    assert_eq!(shown(1), "c_1 3 | 18 17 | 16");
    assert_eq!(shown(11), "c 5 | 16 17 | ");
    assert_eq!(shown(12), "c 6 |  | ");
    assert_eq!(state.collections[&1].fields[1]["type"], "bigint");
}
