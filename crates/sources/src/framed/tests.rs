use arrow::array::types::Float64Type;
use rakam_event::avro::{Encoder, avro_schema, parse_schema};
use rakam_event::entry::Limits;
use rakam_event::types::FieldType;

use super::*;
use crate::columns::tests::{STAMP, schema};
use crate::decode::tests::batch;

/// Events as records that were written with a schema.
fn encode(schema: &Schema, events: &[&str]) -> Vec<Vec<u8>> {
    let mut rows = BatchBuilder::new(schema, Layout::Stored, &Limits::default()).unwrap();
    for event in events {
        rows.push(event, &STAMP).unwrap();
    }
    let rows = rows.finish().unwrap().batch;
    Encoder::new(schema).unwrap().encode(&rows).unwrap()
}

fn versions(schemas: &[&Schema]) -> Versions {
    let of = |schema: &&Schema| {
        let fields = parse_schema(&avro_schema("p", "c", schema)).unwrap();
        (schema.version as u32, fields)
    };
    schemas.iter().map(of).collect()
}

fn framed(batch: &Batch) -> Vec<Framed> {
    let version = |value: &[u8]| avro::unframe(value).map_or(0, |(version, _)| version);
    (batch.records().iter().enumerate())
        .map(|(record, r)| Framed {
            collection: 0,
            version: version(batch.value(r).unwrap()),
            record,
        })
        .collect()
}

#[test]
fn any_version_becomes_rows_of_the_present_one() {
    let old = schema(2, &[("n", FieldType::Float8)]);
    let new = schema(
        5,
        &[("n", FieldType::Float8), ("tags", FieldType::TextArray)],
    );
    let mut records = encode(&old, &[r#"{"n":1,"_time":7000}"#]);
    records.extend(encode(&new, &[r#"{"n":2,"tags":["a",null],"_id":"i"}"#]));
    records.extend(encode(&schema(9, &[]), &["{}"]));
    let cut = records[0][..9].to_vec();
    records.extend([cut, b"x".to_vec()]);
    records.extend(encode(&old, &[r#"{"n":3}"#]));
    let values: Vec<_> = records.iter().map(|r| Some(r.as_slice())).collect();
    let batch = batch(&values);
    let rules = Rules {
        schema: &new,
        limits: Limits::default(),
        stamp: STAMP,
    };
    let all = versions(&[&old, &new]);
    let rows = decode(&framed(&batch), &batch, "c", &new, &all).unwrap();
    let dead: Vec<_> = (rows.dead.iter())
        .map(|d| (d.record, d.error.sqlstate()))
        .collect();
    assert_eq!(dead, [(2, "42704"), (3, "22P03"), (4, "22P03")]);
    assert_eq!(rows.records, [0, 1, 5]);
    let columns = rows.columns(&rules, &batch).unwrap();
    let [part] = &columns.parts[..] else {
        panic!("{:?}", columns.parts);
    };
    assert_eq!(part.rows.schema(), new.arrow());
    let numbers = part.rows.column_by_name("n").unwrap();
    let numbers: Vec<_> = numbers.as_primitive::<Float64Type>().iter().collect();
    assert_eq!(numbers, [Some(1.0), Some(2.0), Some(3.0)]);
    // The encoder has written the time of receipt for a `_time`.
    let times = time_column(&part.rows).unwrap().values().to_vec();
    assert_eq!(
        times,
        [7_000_000, STAMP.received_at_us, STAMP.received_at_us]
    );

    let rows = decode(&framed(&batch), &batch, "c", &new, &all).unwrap();
    let Lines { lines, dead } = rows.lines(&rules, &batch).unwrap();
    assert_eq!(dead.len(), 3);
    assert_eq!(
        lines[0],
        (
            0,
            r#"{"_time":"1970-01-01T00:00:07+00:00","n":1}"#.to_owned()
        )
    );
    assert!(lines[1].1.contains(r#""_id":"i""#) && lines[1].1.contains(r#""tags":["a",null]"#));
}

#[test]
fn what_collect_looks_at_goes_the_way_of_text() {
    let schema = schema(
        1,
        &[("tags", FieldType::TextArray), ("j", FieldType::Jsonb)],
    );
    let long = "x".repeat(50);
    let events = [
        r#"{"_user":"plain"}"#.to_owned(),
        format!(r#"{{"_user":"{long}"}}"#),
        format!(r#"{{"tags":["a","{long}"]}}"#),
        format!(r#"{{"j":{{"a":"{long}"}}}}"#),
        r#"{"_time":1700000000500}"#.to_owned(),
        format!(r#"{{"_id":"{}"}}"#, "i".repeat(257)),
    ];
    let mut records = Vec::new();
    for event in &events {
        // Not what collect takes: written by somebody else.
        let mut rows = BatchBuilder::new(&schema, Layout::Stored, &Limits::default()).unwrap();
        let fits = rows.push(event, &STAMP).is_ok();
        let rows = match fits {
            true => rows.finish().unwrap().batch,
            false => {
                rows.push(r#"{"_user":"u"}"#, &STAMP).unwrap();
                let rows = rows.finish().unwrap().batch;
                let id: ArrayRef = Arc::new(arrow::array::StringArray::from(vec!["i".repeat(257)]));
                let mut columns = rows.columns().to_vec();
                columns[2] = id;
                RecordBatch::try_new(rows.schema(), columns).unwrap()
            }
        };
        records.extend(Encoder::new(&schema).unwrap().encode(&rows).unwrap());
    }
    let values: Vec<_> = records.iter().map(|r| Some(r.as_slice())).collect();
    let batch = batch(&values);
    let rules = Rules {
        schema: &schema,
        limits: Limits {
            max_string_bytes: 40,
            ..Limits::default()
        },
        // The fifth is too late.
        stamp: EventStamp {
            time_max_us: STAMP.received_at_us,
            ..STAMP
        },
    };
    let all = versions(&[&schema]);
    let rows = decode(&framed(&batch), &batch, "c", &schema, &all).unwrap();
    let columns = rows.columns(&rules, &batch).unwrap();
    let records: Vec<_> = columns.parts.iter().map(|p| p.records.clone()).collect();
    assert_eq!(records, [vec![0], vec![1, 2, 3, 4]]);
    let dead: Vec<_> = (columns.dead.iter())
        .map(|d| (d.record, d.error.sqlstate()))
        .collect();
    assert_eq!(dead, [(5, "54000")]);
    let mut told: Vec<_> = columns.invalid.clone().take().1;
    told.sort();
    let told: Vec<_> = told.iter().map(|c| (c.field.as_str(), c.n)).collect();
    assert_eq!(told, [("_time", 1), ("_user", 1), ("j", 1), ("tags", 1)]);
}
