use arrow::array::{Array, AsArray};
use arrow::datatypes::{Float64Type, Int64Type, TimestampMicrosecondType};

use super::*;
use crate::discovery::Discovery;
use crate::entry::check_event;
use crate::print::to_json_text;
use crate::roads::{self, STAMP, build, column, parsed, schema};
use crate::testing::Random;

const NOW: i64 = 1_700_000_000_000_000;
const TABLE: Layout = Layout::Table { projection: None };

fn named(fields: &[(&str, FieldType)]) -> Vec<(String, FieldType)> {
    fields.iter().map(|(n, t)| ((*n).to_owned(), *t)).collect()
}

fn texts<'a>(built: &'a Built, name: &str) -> Vec<Option<&'a str>> {
    column(built, name).as_string::<i32>().iter().collect()
}

#[test]
fn stored_layout_is_the_schemas() {
    let fields = named(&[
        ("n", FieldType::Float8),
        ("tags", FieldType::TextArray),
        ("u", FieldType::Uuid),
        (
            "amount",
            FieldType::Numeric {
                precision: 6,
                scale: 2,
            },
        ),
    ]);
    let schema = schema(false, &fields);
    let built = build(
        &schema,
        Layout::Stored,
        &Limits::default(),
        &[
            r#"{"n":1,"Tags":["a"],"_user":7,"_time":1699999999000,"odd key":[ 1 ],"xmin":{"a": 1}}"#,
            r#"{"n":"x","amount":12.345,"_id":"i1","empty":[]}"#,
            r#"{"n":null,"u":"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11","N":2,"n":3}"#,
            "{}",
        ],
    );
    assert_eq!(built.batch.schema(), schema.arrow());
    let n: Vec<_> = column(&built, "n")
        .as_primitive::<Float64Type>()
        .iter()
        .collect();
    assert_eq!(n, [Some(1.0), None, Some(3.0), None]);
    assert_eq!(texts(&built, "_user"), [Some("7"), None, None, None]);
    assert_eq!(
        texts(&built, "_extra"),
        [
            Some(r#"{"odd_key":[1],"xmin":{"a":1}}"#),
            Some(r#"{"n":"x","empty":[]}"#),
            None,
            None
        ]
    );
    let times = column(&built, "_time").as_primitive::<TimestampMicrosecondType>();
    assert_eq!(times.values().as_ref(), [NOW - 1_000_000, NOW, NOW, NOW]);
    let xids = column(&built, "_xid").as_primitive::<Int64Type>();
    assert_eq!(xids.values().as_ref(), [42; 4]);
    let mut amount = String::new();
    to_json_text(
        column(&built, "amount"),
        FieldType::Numeric {
            precision: 6,
            scale: 2,
        },
        1,
        &mut amount,
    )
    .expect("a numeric");
    assert_eq!(amount, "12.35");
    assert_eq!(built.invalid.len(), 1);
    assert_eq!(
        built.invalid[0],
        InvalidValue {
            field: "n".to_owned(),
            ty: "double precision".to_owned(),
            value: "x".to_owned(),
            error: "text is not a value of type double precision".to_owned(),
            event_id: Some("i1".to_owned()),
            received_at_us: NOW,
        }
    );
}

#[test]
fn times_are_shifted_bounded_and_logged() {
    let mut builder = BatchBuilder::new(&schema(true, &[]), Layout::Stored, &Limits::default())
        .expect("a builder");
    let stamp = EventStamp {
        shift_us: 5_000_000,
        ..STAMP
    };
    for event in [
        "{}",
        r#"{"_time":null}"#,
        r#"{"_time":1699999999000}"#,
        r#"{"_time":"soon"}"#,
        r#"{"_time":0}"#,
        r#"{"_Time":"1700001000000"}"#,
        r#"{"_time":9223372036854775807}"#,
    ] {
        assert_eq!(builder.push(event, &stamp), Ok(()));
    }
    let built = builder.finish().expect("a batch");
    let times = column(&built, "_time").as_primitive::<TimestampMicrosecondType>();
    assert_eq!(
        times.values().as_ref(),
        [
            NOW,
            NOW,
            NOW + 4_000_000,
            NOW,
            NOW,
            NOW + 1_005_000_000,
            NOW
        ]
    );
    assert_eq!(column(&built, "_extra").null_count(), 7);
    let errors: Vec<_> = built
        .invalid
        .iter()
        .map(|i| (i.value.as_str(), i.error.as_str()))
        .collect();
    assert_eq!(
        errors,
        [
            ("soon", "value is not a time"),
            ("0", "time is outside the bounds of the project"),
            ("9223372036854775807", "value is not a time"),
        ]
    );
    let count = InvalidCount {
        field: "_time".to_owned(),
        day: 19_675,
        n: 3,
    };
    assert_eq!(built.invalid_counts, [count]);
}

#[test]
fn a_refused_event_leaves_nothing_behind() {
    let fields = named(&[("a", FieldType::Text)]);
    let mut builder = BatchBuilder::new(&schema(true, &fields), Layout::Stored, &Limits::default())
        .expect("a builder");
    let long_id = format!(r#"{{"a":"x","_id":"{}"}}"#, "i".repeat(257));
    let deep = format!(r#"{{"a":"x","b":{}{}}}"#, "[".repeat(70), "]".repeat(70));
    for (event, state) in [
        ("", "22P02"),
        ("[]", "22023"),
        (r#"{"a":"x","b":}"#, "22P02"),
        (r#"{"a":"x","b":"\u0000"}"#, "22P05"),
        (r#"{"a":"x","_extra":1}"#, "42939"),
        (long_id.as_str(), "54000"),
        (deep.as_str(), "54000"),
    ] {
        let refused = builder.push(event, &STAMP).map_err(|e| e.sqlstate());
        assert_eq!(refused, Err(state), "{event:.40}");
    }
    assert_eq!((builder.rows(), builder.bytes()), (0, 0));
    assert_eq!(builder.push(r#"{"b":"y"}"#, &STAMP), Ok(()));
    let built = builder.finish().expect("a batch");
    assert_eq!(texts(&built, "a"), [None]);
    assert_eq!(texts(&built, "_extra"), [Some(r#"{"b":"y"}"#)]);
}

#[test]
fn long_strings_are_cut_and_logged() {
    let fields = named(&[("a", FieldType::Text), ("j", FieldType::Jsonb)]);
    let limits = Limits {
        max_string_bytes: 4,
        ..Limits::default()
    };
    let event = r#"{"a":"ééé","j":["abcdef"],"new":"ghijkl","xmin":"mnopqr"}"#;
    let built = build(&schema(true, &fields), Layout::Stored, &limits, &[event]);
    assert_eq!(texts(&built, "a"), [Some("éé")]);
    assert_eq!(texts(&built, "j"), [Some(r#"["abcd"]"#)]);
    assert_eq!(
        texts(&built, "_extra"),
        [Some(r#"{"new":"ghij","xmin":"mnop"}"#)]
    );
    let logged: Vec<_> = built
        .invalid
        .iter()
        .map(|i| (i.field.as_str(), i.error.as_str()))
        .collect();
    let message = "string of 6 bytes was cut to 4 bytes";
    assert_eq!(
        logged,
        [
            ("a", message),
            ("j", message),
            ("_extra", message),
            ("_extra", message)
        ]
    );
}

#[test]
fn a_flood_of_invalid_values_is_sampled_and_counted() {
    let fields = named(&[("n", FieldType::Int4)]);
    let events = vec![r#"{"n":1.5}"#; 500];
    let built = build(
        &schema(true, &fields),
        Layout::Stored,
        &Limits::default(),
        &events,
    );
    assert_eq!(built.invalid.len() as u64, SAMPLES_PER_FIELD);
    assert_eq!(built.invalid_counts.len(), 1);
    assert_eq!(built.invalid_counts[0].n, 500);
}

#[test]
fn table_layout_shows_pending_and_unknown_fields_in_extra() {
    let mut schema = schema(
        false,
        &named(&[("at", FieldType::Timestamptz), ("n", FieldType::Int8)]),
    );
    schema.fields[11].column_ready = true;
    let events = [
        r#"{"at":"2020-01-02 03:04","n":1.0,"new":"2020-01-02 03:04Z"}"#,
        r#"{"at":"soon","n":"x","new":"later","xmin":"2020-01-02 03:04Z"}"#,
    ];
    let built = build(&schema, TABLE, &Limits::default(), &events);
    assert_eq!(built.batch.num_columns(), 11);
    assert_eq!(
        texts(&built, "_extra"),
        [
            Some(r#"{"at":"2020-01-02T03:04:00+00:00","new":"2020-01-02T03:04:00+00:00"}"#),
            Some(r#"{"at":"soon","n":"x","new":"later","xmin":"2020-01-02 03:04Z"}"#),
        ]
    );
    assert!(built.invalid.is_empty() && built.invalid_counts.is_empty());
    // A collection that may get no more fields leaves the value as it is.
    let full = Limits {
        max_fields: 2,
        ..Limits::default()
    };
    let built = build(&schema, TABLE, &full, &events[..1]);
    assert_eq!(
        texts(&built, "_extra"),
        [Some(
            r#"{"at":"2020-01-02T03:04:00+00:00","new":"2020-01-02 03:04Z"}"#
        )]
    );
}

#[test]
fn projection_builds_what_is_asked_for() {
    let schema = schema(
        true,
        &named(&[("a", FieldType::Text), ("n", FieldType::Int8)]),
    );
    let events = [r#"{"a":"x","n":"bad","_time":1699999999000}"#];
    let project = |ids: &[i32]| {
        let layout = Layout::Table {
            projection: Some(ids.to_vec()),
        };
        build(&schema, layout, &Limits::default(), &events)
    };
    let built = project(&[16, schema::XID_FIELD_ID, 1]);
    let names: Vec<_> = built
        .batch
        .schema()
        .fields()
        .iter()
        .map(|f| f.name().clone())
        .collect();
    assert_eq!(names, ["a", "_xid", "_time"]);
    // The misfit of a column that is not asked for is still in `_extra`.
    let built = project(&[10]);
    assert_eq!(texts(&built, "_extra"), [Some(r#"{"n":"bad"}"#)]);
    let none = project(&[]);
    assert_eq!((none.batch.num_columns(), none.batch.num_rows()), (0, 1));
    let layout = Layout::Table {
        projection: Some(vec![99]),
    };
    assert!(BatchBuilder::new(&schema, layout, &Limits::default()).is_err());
}

#[test]
fn a_row_reads_the_same_whenever_its_fields_came() {
    let limits = Limits {
        max_string_bytes: 40,
        max_fields: 8,
        ..Limits::default()
    };
    let declared = [
        (
            "a",
            FieldType::Numeric {
                precision: 9,
                scale: 3,
            },
        ),
        ("n", FieldType::Int4),
        ("at", FieldType::Uuid),
        ("b", FieldType::Inet),
        ("tags", FieldType::Float4),
        ("user_name", FieldType::Jsonb),
    ];
    for seed in 0..400 {
        let mut random = Random(seed);
        let texts: Vec<String> = (0..12).map(|_| random.object(0, 8)).collect();
        let events: Vec<&str> = texts.iter().map(String::as_str).collect();
        let declared = named(&declared[..(seed % 3) as usize * 3]);
        roads::columns(&declared, &events, &limits);
    }
}

#[test]
fn garbage_is_refused_without_panic() {
    let schema = schema(true, &named(&[("a", FieldType::Float8Array)]));
    for seed in 0..3_000 {
        let mut random = Random(seed);
        let mut bytes = random.object(0, 8).into_bytes();
        for _ in 0..random.next() % 4 {
            let at = (random.next() % bytes.len() as u64) as usize;
            match random.next() % 3 {
                0 => bytes[at] = b"{}[]\",:\\u0e-+.\n \x7f"[(random.next() % 17) as usize],
                1 => bytes.truncate(at + 1),
                _ => {
                    let tail = bytes.split_off(at);
                    bytes.extend_from_slice(&tail[tail.len() / 2..]);
                    bytes.extend_from_slice(&tail);
                }
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        let limits = Limits::default();
        let accepted = check_event(&text, &limits);
        let _ = crate::entry::split_batch(&format!("[{text}]"), &limits);
        let mut discovery = Discovery::new(&schema, 10);
        discovery.observe(&text, 100, 0);
        let _ = discovery.new_fields();
        for layout in [Layout::Stored, TABLE] {
            let mut builder = BatchBuilder::new(&schema, layout, &limits).expect("a builder");
            let pushed = builder.push(&text, &STAMP);
            assert_eq!(pushed.is_ok(), accepted.is_ok(), "seed {seed}: {text}");
            let built = builder.finish().expect("a batch");
            for extra in texts(&built, "_extra") {
                parsed(extra);
            }
        }
    }
}

#[test]
fn what_an_insert_wrote_into_extra_stays_there() {
    let schema = schema(true, &named(&[("known", FieldType::Float8)]));
    let event = r#"{"known":1,"_extra":{"free":[1,{"a":null}],"known":"x"}}"#;
    for layout in [Layout::Stored, TABLE] {
        let built = build(&schema, layout, &Limits::default(), &[event]);
        let expected = r#"{"free":[1,{"a":null}],"known":"x"}"#;
        assert_eq!(texts(&built, "_extra"), [Some(expected)]);
    }
}

#[test]
fn an_event_from_before_a_drop_has_no_value_of_the_field() {
    let dropped = ["color", "shade"].map(|name| schema::DroppedField {
        name: name.to_owned(),
        xid: STAMP.xid + 1,
        at_us: NOW,
        own_since_us: i64::MIN,
    });
    // Dropped here, when the event's transaction was one of another server.
    let restored = |own_since_us| {
        dropped.clone().map(|field| schema::DroppedField {
            xid: STAMP.xid - 1,
            own_since_us,
            ..field
        })
    };
    // Dropped here before the event was sent, which is given an older time of receipt.
    let given = dropped.clone().map(|field| schema::DroppedField {
        xid: STAMP.xid - 1,
        at_us: NOW + 2,
        own_since_us: NOW + 1,
        ..field
    });
    let event = r#"{"color":"red","n":1,"_extra":{"shade":"blue","m":2}}"#;
    let gone = Some(r#"{"n":1,"m":2}"#);
    let there = Some(r#"{"color":"red","n":1,"shade":"blue","m":2}"#);
    for (drop, expected) in [
        (dropped.to_vec(), gone),
        (restored(NOW + 1).to_vec(), gone),
        (restored(NOW).to_vec(), there),
        (given.to_vec(), there),
        (Vec::new(), there),
    ] {
        let schema = schema(true, &[]).with_dropped(drop);
        for layout in [Layout::Stored, TABLE] {
            let built = build(&schema, layout, &Limits::default(), &[event]);
            let extra = texts(&built, schema::EXTRA)[0].map(str::to_owned);
            assert_eq!(extra.as_deref().map(sorted), expected.map(sorted));
        }
    }
}

/// The members of an object in one order.
fn sorted(object: &str) -> Vec<String> {
    let mut members = Vec::new();
    json::object_entries(object, |key, raw| members.push(format!("{key}={raw}")))
        .expect("an object");
    members.sort();
    members
}

#[test]
fn unchecked_events_are_refused_as_checked_ones_are() {
    let schema = schema(false, &named(&[("a", FieldType::Float8)]));
    let limits = Limits::default();
    let mut unchecked = BatchBuilder::of_unchecked(&schema, &limits).unwrap();
    let long = format!(r#"{{"_id":"{}"}}"#, "x".repeat(257));
    let mut texts: Vec<String> = [
        "",
        "[1]",
        r#"{"_extra":{"a":1}}"#,
        r#"{"_Extra":1}"#,
        r#"{"_collection":"x"}"#,
        r#"{"a":"\u0000"}"#,
        &long,
    ]
    .map(str::to_owned)
    .into();
    let deep = |levels: usize| format!(r#"{{"a":{}{}}}"#, "[".repeat(levels), "]".repeat(levels));
    texts.extend([deep(63), deep(64)]);
    let mut random = Random(0x5eed);
    texts.extend((0..5_000).map(|round| {
        let text = random.object(0, 8);
        match round % 2 {
            0 => random.mangled(&text),
            _ => text,
        }
    }));
    let mut taken = 0;
    for text in &texts {
        let checked = check_event(text, &limits).map(drop);
        assert_eq!(unchecked.push(text, &STAMP), checked, "{text}");
        taken += usize::from(checked.is_ok());
        assert_eq!(unchecked.rows(), taken);
    }
    assert!(taken > 2_000, "{taken}");
}

#[test]
fn a_record_gives_its_time_to_an_event_without_one() {
    let schema = schema(false, &[]);
    let mut builder = BatchBuilder::of_unchecked(&schema, &Limits::default()).unwrap();
    let (written, early) = (Some(1_700_000_000_123), Some(-5));
    for (event, at) in [
        ("{}", written),
        (r#"{"_time":null}"#, written),
        (r#"{"_time":1700000001000}"#, written),
        (r#"{"_time":"x"}"#, written),
        ("{}", early),
        ("{}", None),
    ] {
        builder.push_record(event, &STAMP, at).unwrap();
    }
    let built = builder.finish().unwrap();
    let times: Vec<i64> = column(&built, "_time")
        .as_primitive::<TimestampMicrosecondType>()
        .values()
        .to_vec();
    let received = STAMP.received_at_us;
    let sent = 1_700_000_000_123_000;
    assert_eq!(
        times,
        [
            sent,
            sent,
            1_700_000_001_000_000,
            received,
            received,
            received
        ]
    );
    let logged: Vec<_> = built.invalid.iter().map(|v| v.value.as_str()).collect();
    assert_eq!(logged, ["x", "-5"]);
}

#[test]
fn a_builder_says_whether_there_is_something_new() {
    let schema = schema(false, &named(&[("a", FieldType::Float8)]));
    let mut max_fields = 500;
    let mut is_new = |event: &str| {
        let limits = Limits {
            max_fields,
            ..Limits::default()
        };
        let mut builder = BatchBuilder::of_unchecked(&schema, &limits).unwrap();
        builder.push(event, &STAMP).unwrap();
        if event == "{}" {
            max_fields = 1;
        }
        builder.has_new_fields()
    };
    for old in [
        r#"{"a":1,"A":"x","_user":"u"}"#,
        r#"{"b":null,"c":[],"xmin":1}"#,
    ] {
        assert!(!is_new(old), "{old}");
    }
    assert!(is_new(r#"{"xmin":1,"c":[],"b":1}"#));
    assert!(!is_new("{}"));
    // There is no room any more.
    assert!(!is_new(r#"{"b":1}"#));
}
