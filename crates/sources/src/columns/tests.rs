use arrow::array::AsArray;
use arrow::array::types::{Float64Type, TimestampMicrosecondType};
use rakam_event::schema::Field;

use super::*;
use crate::decode::tests::{batch, texts};
use crate::decode::{Decoder, Route};
use crate::options::{Format, Shape};

pub(crate) const STAMP: EventStamp = EventStamp {
    received_at_us: 1_700_000_000_000_000,
    shift_us: 0,
    time_min_us: 0,
    time_max_us: 1_700_000_001_000_000,
    xid: i64::MAX,
};

/// A schema of user fields, which have the ids from 16 on.
pub(crate) fn schema(version: i32, fields: &[(&str, FieldType)]) -> Schema {
    let field = |(at, (name, ty)): (usize, &(&str, FieldType))| Field {
        id: 16 + at as i32,
        name: (*name).to_owned(),
        ty: *ty,
        added_version: 1,
        column_ready: true,
    };
    Schema::new(version, fields.iter().enumerate().map(field).collect())
}

fn decoder() -> Decoder {
    Decoder::new(Format::Json(Shape::Auto), Route::Topic, Limits::default())
}

#[test]
fn records_become_columns_and_what_is_none_is_told() {
    let schema = schema(1, &[("n", FieldType::Float8)]);
    let rules = Rules {
        schema: &schema,
        limits: Limits::default(),
        stamp: STAMP,
    };
    let values = texts(&[
        r#"{"n":1}"#,
        "{",
        r#"{"n":"x","_time":5}"#,
        r#"{"_extra":{}}"#,
        r#"{"_COLLECTION":"other","n":2}"#,
        r#"{"n":3,"n":null,"new":true}"#,
    ]);
    let batch = batch(&values);
    let mut decoded = decoder().decode(&batch);
    assert_eq!(decoded.dead, []);
    // The name is not spelled as usual, and not said twice.
    assert_eq!(decoded.events.len(), values.len());
    let all: Vec<usize> = (0..values.len()).collect();
    let columns = of_events(&decoded, &all, &rules).unwrap();
    let dead: Vec<_> = (columns.dead.iter())
        .map(|d| (d.record, d.error.sqlstate()))
        .collect();
    assert_eq!(dead, [(1, "22P02"), (3, "42939")]);
    assert_eq!(columns.elsewhere, [4]);
    assert!(columns.has_new_fields);
    let [part] = &columns.parts[..] else {
        panic!("{:?}", columns.parts);
    };
    assert_eq!(part.records, [0, 2, 5]);
    assert_eq!(part.rows.schema(), schema.arrow());
    let numbers = part.rows.column_by_name("n").unwrap();
    let numbers: Vec<_> = numbers.as_primitive::<Float64Type>().iter().collect();
    assert_eq!(numbers, [Some(1.0), None, None]);
    let times = part.rows.column_by_name("_time").unwrap();
    let times = times
        .as_primitive::<TimestampMicrosecondType>()
        .values()
        .to_vec();
    assert_eq!(times, [100_000, 5_000, 105_000]);
    let (samples, counts) = columns.invalid.clone().take();
    assert_eq!((samples.len(), counts[0].n), (1, 1));

    let fields = new_fields(&decoded, all.into_iter(), &rules);
    assert_eq!(fields, [("new".to_owned(), FieldType::Bool)]);

    decoded.check(4).unwrap();
    let event = &decoded.events[4];
    assert_eq!(
        decoded.collections.names()[event.collection].as_str(),
        "other"
    );
    assert_eq!(decoded.text(event), r#"{"n":2}"#);
    let columns = of_events(&decoded, &[4], &rules).unwrap();
    assert_eq!((columns.parts.len(), columns.elsewhere), (1, vec![]));
}

#[test]
fn parts_are_bounded() {
    let schema = schema(1, &[("text", FieldType::Text)]);
    let rules = Rules {
        schema: &schema,
        limits: Limits::default(),
        stamp: STAMP,
    };
    let event = format!(r#"{{"text":"{}"}}"#, "x".repeat(60_000));
    let values = vec![Some(event.as_bytes()); 400];
    let batch = batch(&values);
    let decoded = decoder().decode(&batch);
    let all: Vec<usize> = (0..400).collect();
    let columns = of_events(&decoded, &all, &rules).unwrap();
    let rows: Vec<usize> = columns.parts.iter().map(|p| p.rows.num_rows()).collect();
    assert_eq!(rows.iter().sum::<usize>(), 400);
    assert!(
        rows.iter().all(|&rows| rows * 60_000 < PART_BYTES + 60_001),
        "{rows:?}"
    );
    let records: Vec<usize> = columns.parts.into_iter().flat_map(|p| p.records).collect();
    assert_eq!(records, all);
}
