use super::*;
use crate::batch::{BatchBuilder, EventStamp, Layout};
use crate::entry::Limits;
use crate::schema::{FIRST_USER_FIELD_ID, Field};
use apache_avro::types::Value as Avro;

fn field(position: i32, name: &str, ty: FieldType, version: i32) -> Field {
    Field {
        id: FIRST_USER_FIELD_ID + position,
        name: name.to_owned(),
        ty,
        added_version: version,
        column_ready: true,
    }
}

fn every_type() -> Schema {
    let types = crate::testing::every_type(&[(20, 4)]);
    let fields = types
        .iter()
        .enumerate()
        .map(|(i, &ty)| field(i as i32, &format!("a{i}"), ty, 3))
        .collect();
    Schema::new(3, fields)
}

const EVENTS: [&str; 4] = [
    r#"{"_time":"2024-02-29T12:00:00.000001Z","_user":"ö","a0":true,"a1":-7,"a2":9007199254740993,"a3":1.5,"a4":-0.1,
        "a5":-12345678901234.5678,"a6":"line\nbreak","a7":"0001-01-01","a8":"9999-12-31T23:59:59.999999Z",
        "a9":"6f2b0b3e-9d2c-4c8e-8f4e-111111111111","a10":"10.0.0.0/8","a11":{"k":[1,{"x":null}]},
        "a12":[true,null,false],"a13":[1,null,2.5],"a14":["",null,"z"],"unknown":1}"#,
    r#"{"_time":0}"#,
    r#"{"_time":-1,"a5":0.0001,"a1":2147483647,"a12":[],"a14":["a"]}"#,
    r#"{"_time":1e12,"a5":-9999999999999999.9999,"a0":false,"a4":1e308}"#,
];

fn rows(schema: &Schema) -> RecordBatch {
    let limits = Limits {
        max_event_bytes: 1 << 20,
        max_string_bytes: 1 << 16,
        max_fields: 500,
    };
    let stamp = EventStamp {
        received_at_us: 1_700_000_000_000_000,
        shift_us: 0,
        time_min_us: i64::MIN,
        time_max_us: i64::MAX,
        xid: 5,
    };
    let mut builder = BatchBuilder::new(schema, Layout::Stored, &limits).unwrap();
    for event in EVENTS {
        builder.push(event, &stamp).unwrap();
    }
    builder.finish().unwrap().batch
}

fn fields_only(schema: &Schema, batch: &RecordBatch) -> RecordBatch {
    let columns = batch.columns()[..schema.fields.len()].to_vec();
    RecordBatch::try_new(target_arrow(schema), columns).unwrap()
}

fn versions(schema: &Schema) -> Vec<AvroField> {
    parse_schema(&avro_schema("acme", "pageview", schema)).unwrap()
}

#[test]
fn what_is_encoded_is_decoded() {
    let schema = every_type();
    let batch = rows(&schema);
    let records = Encoder::new(&schema).unwrap().encode(&batch).unwrap();
    assert_eq!(records.len(), EVENTS.len());
    assert_eq!(records[0][..5], [0xA7, 0, 0, 0, 3]);
    let mut decoder = Decoder::new(&schema);
    decoder.add_version(3, versions(&schema)).unwrap();
    for record in &records {
        decoder.push(record).unwrap();
    }
    assert_eq!(decoder.finish().unwrap(), fields_only(&schema, &batch));
    assert_eq!(decoder.finish().unwrap().num_rows(), 0);
}

/// The schema that users see is one that another library reads our records with, and writes records that we read.
#[test]
fn another_library_agrees() {
    let schema = every_type();
    let batch = rows(&schema);
    let json = avro_schema("acme", "pageview", &schema);
    let theirs = apache_avro::Schema::parse(&json).unwrap();
    let records = Encoder::new(&schema).unwrap().encode(&batch).unwrap();
    let mut decoder = Decoder::new(&schema);
    decoder.add_version(3, versions(&schema)).unwrap();
    for (row, record) in records.iter().enumerate() {
        let (_, mut body) = unframe(record).unwrap();
        let value = apache_avro::from_avro_datum(&theirs, &mut body, None).unwrap();
        let Avro::Record(values) = &value else {
            panic!("not a record: {value:?}")
        };
        assert_eq!(values.len(), schema.fields.len());
        for ((name, value), (field, column)) in
            values.iter().zip(schema.fields.iter().zip(batch.columns()))
        {
            assert_eq!(name, &field.name);
            let Avro::Union(_, value) = value else {
                panic!("{name} is no union")
            };
            assert_eq!(
                **value == Avro::Null,
                column.is_null(row),
                "{name} of row {row}"
            );
        }
        if row == 0 {
            let of = |name: &str| {
                let (_, value) = values.iter().find(|(n, _)| n == name).unwrap();
                match value {
                    Avro::Union(_, value) => (**value).clone(),
                    other => other.clone(),
                }
            };
            assert_eq!(of("_user"), Avro::String("ö".to_owned()));
            assert_eq!(of("a2"), Avro::Long(9_007_199_254_740_993));
            assert_eq!(of("a7"), Avro::Date(-719_162));
            assert_eq!(of("_time"), Avro::TimestampMicros(1_709_208_000_000_001));
            let text = |s: &str| Avro::Union(1, Box::new(Avro::String(s.to_owned())));
            let null = Avro::Union(0, Box::new(Avro::Null));
            assert_eq!(of("a14"), Avro::Array(vec![text(""), null, text("z")]));
        }
        let mut again = vec![MAGIC, 0, 0, 0, 3];
        again.extend(apache_avro::to_avro_datum(&theirs, value).unwrap());
        decoder.push(&again).unwrap();
    }
    assert_eq!(decoder.finish().unwrap(), fields_only(&schema, &batch));
}

#[test]
fn every_older_version_decodes() {
    let old = Schema::new(
        1,
        vec![
            field(0, "kept", FieldType::Float8, 1),
            field(1, "x", FieldType::Text, 1),
        ],
    );
    // `x` was dropped and came back as another field, with another type.
    let new = Schema::new(
        4,
        vec![
            field(0, "kept", FieldType::Float8, 1),
            field(2, "added", FieldType::Bool, 3),
            field(3, "x", FieldType::Float8, 4),
        ],
    );
    let limits = Limits {
        max_event_bytes: 1 << 20,
        max_string_bytes: 1 << 16,
        max_fields: 500,
    };
    let stamp = EventStamp {
        received_at_us: 0,
        shift_us: 0,
        time_min_us: i64::MIN,
        time_max_us: i64::MAX,
        xid: 5,
    };
    let encoded = |schema: &Schema, event: &str| {
        let mut builder = BatchBuilder::new(schema, Layout::Stored, &limits).unwrap();
        builder.push(event, &stamp).unwrap();
        let batch = builder.finish().unwrap().batch;
        Encoder::new(schema)
            .unwrap()
            .encode(&batch)
            .unwrap()
            .remove(0)
    };
    let mut decoder = Decoder::new(&new);
    decoder.add_version(1, versions(&old)).unwrap();
    decoder.add_version(4, versions(&new)).unwrap();
    decoder
        .push(&encoded(&old, r#"{"kept":1,"x":"old"}"#))
        .unwrap();
    decoder
        .push(&encoded(&new, r#"{"kept":2,"x":5,"added":true}"#))
        .unwrap();
    decoder
        .push(&encoded(&old, r#"{"kept":3,"x":"old"}"#))
        .unwrap();
    let batch = decoder.finish().unwrap();
    use arrow::array::AsArray;
    use arrow::datatypes::Float64Type;
    let numbers = |name: &str| -> Vec<Option<f64>> {
        let column = batch.column_by_name(name).unwrap();
        column.as_primitive::<Float64Type>().iter().collect()
    };
    assert_eq!(numbers("kept"), [Some(1.0), Some(2.0), Some(3.0)]);
    assert_eq!(numbers("x"), [None, Some(5.0), None]);
}

#[test]
fn a_version_of_other_types_is_refused() {
    let target = Schema::new(2, vec![field(0, "x", FieldType::Text, 1)]);
    let other = Schema::new(1, vec![field(0, "x", FieldType::Uuid, 1)]);
    let mut decoder = Decoder::new(&target);
    let refused = decoder.add_version(1, versions(&other)).unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("\"x\" is of type text, not uuid")
    );
    assert!(!decoder.has_version(1));
    decoder.add_version(2, versions(&target)).unwrap();
}

#[test]
fn names_are_spelled_in_avros_characters() {
    let schema = Schema::new(
        1,
        vec![
            field(0, "größe", FieldType::Text, 1),
            field(1, "1st", FieldType::Text, 1),
            field(2, "_1st", FieldType::Text, 1),
            field(3, "a-b", FieldType::Text, 1),
        ],
    );
    let json = avro_schema("acme", "sign up", &schema);
    apache_avro::Schema::parse(&json).unwrap();
    let fields = json["fields"].as_array().unwrap();
    let names: Vec<&str> = fields[10..]
        .iter()
        .map(|f| f["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["gr_uf6__udf_e", "_1st", "_1st_f18", "a_u2d_b"]);
    assert_eq!(fields[10]["rakam-name"], "größe");
    assert_eq!(parse_schema(&json).unwrap(), fields_of(&schema));
}

/// Whatever the bytes, they are an error of their own or an event; those before and after them are kept.
#[test]
fn malformed_records_are_refused_alone() {
    let schema = every_type();
    let batch = rows(&schema);
    let records = Encoder::new(&schema).unwrap().encode(&batch).unwrap();
    let mut decoder = Decoder::new(&schema);
    decoder.add_version(3, versions(&schema)).unwrap();
    let good = &records[0];
    let mut accepted = 1;
    decoder.push(good).unwrap();
    for end in 0..good.len() {
        assert!(decoder.push(&good[..end]).is_err(), "{end}");
    }
    let mut longer = good.clone();
    longer.push(0);
    assert!(decoder.push(&longer).is_err());
    let mut seed = 42u64;
    for _ in 0..20_000 {
        let mut record = records[(seed % 4) as usize].clone();
        for _ in 0..1 + seed % 3 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = 5 + (seed >> 33) as usize % (record.len() - 5);
            record[at] = (seed >> 17) as u8;
        }
        accepted += usize::from(decoder.push(&record).is_ok());
    }
    let mut huge = vec![MAGIC, 0, 0, 0, 3, 0, 2];
    huge.extend([0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F]);
    assert!(decoder.push(&huge).is_err());
    assert!(matches!(
        decoder.push(&[MAGIC, 0, 0, 0, 9]),
        Err(AvroError::UnknownVersion(9))
    ));
    decoder.push(good).unwrap();
    let rows = decoder.finish().unwrap();
    assert_eq!(rows.num_rows(), accepted + 1);
    let first = fields_only(&schema, &batch).slice(0, 1);
    assert_eq!(rows.slice(0, 1), first);
    assert_eq!(rows.slice(accepted, 1), first);
}
