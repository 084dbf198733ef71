use super::*;
use crate::source::TextEvent;
use arrow::array::{BinaryArray, Float64Array};
use arrow::datatypes::{Field as ArrowField, Schema as ArrowSchema};
use rakam_event::print;
use rakam_event::schema::Field;

const NOW: i64 = 1_715_932_800_000_000;

fn stamp() -> EventStamp {
    EventStamp {
        received_at_us: NOW,
        shift_us: 0,
        time_min_us: NOW - 1_000_000_000_000_000,
        time_max_us: NOW + 86_400_000_000,
        xid: 7,
    }
}

fn schema(fields: &[(&str, FieldType)]) -> Schema {
    let fields = fields.iter().zip(16..).map(|((name, ty), id)| Field {
        id,
        name: (*name).to_owned(),
        ty: *ty,
        added_version: 1,
        column_ready: true,
    });
    Schema::new(1, fields.collect())
}

fn rows(columns: &[(&str, ArrayRef)], untyped: bool) -> Rows {
    let fields: Vec<ArrowField> = columns
        .iter()
        .map(|(name, array)| ArrowField::new(*name, array.data_type().clone(), true))
        .collect();
    let arrays: Vec<ArrayRef> = columns.iter().map(|(_, array)| array.clone()).collect();
    let lines = (2..).take(arrays[0].len()).collect();
    Rows::Columns {
        batch: RecordBatch::try_new(Arc::new(ArrowSchema::new(fields)), arrays).unwrap(),
        lines,
        untyped,
    }
}

fn text(cells: &[Option<&str>]) -> ArrayRef {
    Arc::new(StringArray::from(cells.to_vec()))
}

/// The events without what the server sets, as JSON, then `!` and bad rows, then `?` and what was logged.
fn shown(converter: &mut Converter, rows: Rows) -> Vec<String> {
    let (batch, bad) = converter.convert(rows, "f.csv", &stamp()).unwrap();
    let mut out = Vec::new();
    for row in 0..batch.num_rows() {
        let mut event = ObjectWriter::default();
        for (field, column) in converter.schema.fields.iter().zip(batch.columns()) {
            let server = field.name == RECEIVED_AT
                || field.name == TIME
                    && column
                        .as_primitive::<arrow::datatypes::TimestampMicrosecondType>()
                        .value(row)
                        == NOW;
            if !server && column.is_valid(row) {
                print::to_json_text(column, field.ty, row, event.key(&field.name)).unwrap();
            }
        }
        out.push(event.finish().unwrap_or("{}").to_owned());
    }
    out.extend(bad.iter().map(|b| format!("! {}: {}", b.line, b.error)));
    let (samples, counts) = converter.take_log();
    out.extend(
        samples
            .iter()
            .map(|s| format!("? {} {} {}: {}", s.field, s.ty, s.value, s.error)),
    );
    assert_eq!(
        counts.iter().map(|c| c.n).sum::<u64>(),
        samples.len() as u64
    );
    out
}

#[test]
fn columns_become_events() {
    let schema = schema(&[("price", FieldType::Float8), ("url", FieldType::Text)]);
    let mut converter = Converter::new(&schema, Limits::default(), false);
    let file = rows(
        &[
            ("Price", text(&[Some("1.5"), Some("x"), None])),
            ("URL", text(&[Some("/"), None, Some("/a")])),
            (
                "_time",
                text(&[Some("2024-05-01"), Some("soon"), Some("1800-01-01")]),
            ),
            ("_user", text(&[Some("u1"), Some("u2"), None])),
            ("xmin", text(&[Some("5"), Some(""), Some("a")])),
            ("_extra", text(&[None, Some("{\"k\":[1]}"), Some("7")])),
        ],
        true,
    );
    assert_eq!(converter.new_fields(&file, &[]), []);
    assert_eq!(
        shown(&mut converter, file),
        [
            r#"{"_time":"2024-05-01T00:00:00+00:00","_user":"u1","_extra":{"xmin":5},"price":1.5,"url":"/"}"#,
            r#"{"_user":"u2","_extra":{"k":[1],"price":"x"}}"#,
            r#"{"_extra":{"xmin":"a"},"url":"/a"}"#,
            r#"? price double precision x: text is not a value of type double precision (file "f.csv", line 3)"#,
            r#"? _time timestamp with time zone soon: value is not a time (file "f.csv", line 3)"#,
            r#"? _time timestamp with time zone 1800-01-01: time is outside the bounds of the project (file "f.csv", line 4)"#,
            r#"? _extra jsonb 7: value is not a JSON object (file "f.csv", line 4)"#,
        ]
    );
}

#[test]
fn new_fields_have_the_types_of_the_file() {
    let converter = Converter::new(
        &schema(&[("known", FieldType::Text)]),
        Limits::default(),
        false,
    );
    let file = rows(
        &[
            ("known", text(&[Some("1")])),
            ("userName", text(&[Some("x")])),
            ("n", text(&[Some("1")])),
            ("none", text(&[None])),
            ("_id", text(&[Some("1")])),
            ("xmin", text(&[Some("1")])),
        ],
        true,
    );
    let expected = [("n", FieldType::Float8), ("user_name", FieldType::Text)];
    let named = |fields: Vec<(String, FieldType)>| -> Vec<(String, FieldType)> { fields };
    assert!(
        named(converter.new_fields(&file, &[]))
            .iter()
            .map(|(n, t)| (n.as_str(), *t))
            .eq(expected)
    );
    let declared = [
        ("N".to_owned(), FieldType::Int8),
        ("known".to_owned(), FieldType::Int4),
    ];
    let fields = converter.new_fields(&file, &declared);
    assert_eq!(fields[0], ("n".to_owned(), FieldType::Int8));
    let full = Limits {
        max_fields: 1,
        ..Limits::default()
    };
    let converter = Converter::new(&schema(&[("known", FieldType::Text)]), full, false);
    assert_eq!(converter.new_fields(&file, &declared), []);
    let events = Rows::Events(vec![TextEvent {
        line: 1,
        json: r#"{"a":[1],"b":null}"#.to_owned(),
    }]);
    let converter = Converter::new(&schema(&[]), Limits::default(), false);
    assert_eq!(
        converter.new_fields(&events, &[]),
        [("a".to_owned(), FieldType::Float8Array)]
    );
}

#[test]
fn rows_that_are_no_events() {
    let schema = schema(&[("a", FieldType::Text)]);
    let limits = Limits {
        max_event_bytes: 400,
        max_string_bytes: 300,
        ..Limits::default()
    };
    let mut converter = Converter::new(&schema, limits, false);
    let (long, longer) = ("x".repeat(257), "y".repeat(500));
    let file = rows(
        &[
            (
                "a",
                text(&[Some("ok"), Some("n\0ul"), Some(&longer), Some("b")]),
            ),
            ("_id", text(&[Some("1"), Some("2"), Some("3"), Some(&long)])),
        ],
        false,
    );
    assert_eq!(
        shown(&mut converter, file),
        [
            r#"{"_id":"1","a":"ok"}"#,
            "! 3: unsupported Unicode escape sequence: \\u0000 cannot be converted to text",
            "! 4: event of 501 bytes is over the limit of 400 bytes",
            "! 5: \"_id\" of 257 bytes is over the limit of 256 bytes",
        ]
    );
    let events = Rows::Events(
        ["{\"a\":1}", "{\"a\":", "[1]", "{\"_received_at\":1}"]
            .iter()
            .zip(1..)
            .map(|(json, line)| TextEvent {
                line,
                json: (*json).to_owned(),
            })
            .collect(),
    );
    let found = shown(&mut converter, events);
    assert_eq!(found[0], r#"{"a":"1"}"#);
    assert_eq!(found.len(), 4);
    assert!(
        found[1].starts_with("! 2: invalid input syntax"),
        "{found:?}"
    );
    assert_eq!(
        found[2],
        "! 3: event properties must be a JSON object, not an array"
    );
    assert_eq!(
        found[3],
        "! 4: field \"_received_at\" is reserved for the server"
    );
}

#[test]
fn the_admin_sets_when_an_event_was_received() {
    let schema = schema(&[("a", FieldType::Text)]);
    let texts = [
        "{\"a\":1,\"_receivedAt\":\"2024-01-01\"}",
        "{\"_received_at\":\"then\"}",
        "{\"a\":2,\"_\\u0072eceived_at\":1704067200001}",
        "{\"a\":\"received\"}",
        "{\"_received_at\":1",
    ];
    let events = texts.iter().zip(1..).map(|(json, line)| TextEvent {
        line,
        json: (*json).to_owned(),
    });
    let events = Rows::Events(events.collect());
    let mut admin = Converter::new(&schema, Limits::default(), true);
    let (batch, bad) = admin.convert(events, "f", &stamp()).unwrap();
    let received = batch.column_by_name(RECEIVED_AT).unwrap();
    let received = received.as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
    let new_year = 1_704_067_200_000_000;
    assert_eq!(received.values(), &[new_year, NOW, new_year + 1_000, NOW]);
    assert_eq!(bad.len(), 1);
    let (samples, _) = admin.take_log();
    assert_eq!(samples.len(), 1);
    assert_eq!(
        (samples[0].field.as_str(), samples[0].value.as_str()),
        (RECEIVED_AT, "then")
    );
}

#[test]
fn columns_of_the_server() {
    let schema = schema(&[]);
    let file = |name: &str| rows(&[(name, text(&[Some("2024-01-01")]))], true);
    let mut converter = Converter::new(&schema, Limits::default(), false);
    let code = |converter: &mut Converter, name: &str| {
        converter
            .convert(file(name), "f", &stamp())
            .map(drop)
            .map_err(|e| e.sqlstate())
    };
    assert_eq!(code(&mut converter, "_received_at"), Err("42501"));
    assert_eq!(code(&mut converter, "_collection"), Err("42939"));
    assert_eq!(code(&mut converter, "$server_time"), Err("42939"));
    let mut admin = Converter::new(&schema, Limits::default(), true);
    let (batch, _) = admin.convert(file("_receivedAt"), "f", &stamp()).unwrap();
    let received = batch.column_by_name(RECEIVED_AT).unwrap();
    let received = received.as_primitive::<arrow::datatypes::TimestampMicrosecondType>();
    assert_eq!(received.value(0), 1_704_067_200_000_000);
}

#[test]
fn typed_files_keep_what_is_no_field() {
    let mut converter = Converter::new(
        &schema(&[("a", FieldType::Int8)]),
        Limits {
            max_fields: 1,
            ..Limits::default()
        },
        false,
    );
    let bytes: ArrayRef = Arc::new(BinaryArray::from_vec(vec![b"\xff\x01", b"text"]));
    let file = rows(
        &[
            ("a", Arc::new(Float64Array::from(vec![1.0, 1.5]))),
            ("b", bytes),
            ("A", Arc::new(Int64Array::from(vec![Some(3), None]))),
        ],
        false,
    );
    // Of columns of one name the last wins, also where it has no value.
    assert_eq!(
        shown(&mut converter, file),
        [
            r#"{"_extra":{"b":"\\xff01"},"a":3}"#,
            r#"{"_extra":{"b":"text"}}"#
        ]
    );
}
