//! Framed Avro records of arbitrary versions: the schemas' text, the framing, the bodies, and the columns they become.
use crate::{seed, split};
use rakam_event::avro::{self, Decoder, Encoder, MAGIC};
use rakam_event::batch::Layout;
use rakam_event::entry::Limits;
use rakam_event::roads;
use rakam_event::schema::Schema;
use rakam_event::types::FieldType;

pub fn run(input: &[u8]) {
    if let Some(([choice, high, low], rest)) = split(input) {
        let length = usize::from(u16::from_be_bytes([high, low]));
        let (schema, records) = rest.split_at(length.min(rest.len()));
        records_of(choice, schema, records);
    }
}

/// Every record has its length before it, in one byte. The version that the input describes is 1, 2 is known.
fn records_of(choice: u8, schema: &[u8], mut rest: &[u8]) {
    let target = target();
    let mut decoder = Decoder::new(&target);
    if let Ok(schema) = serde_json::from_slice(schema)
        && let Ok(fields) = avro::parse_schema(&schema)
    {
        let _ = decoder.add_version(1, fields);
    }
    let known = avro::avro_schema("acme", "pageview", &target);
    decoder
        .add_version(2, avro::parse_schema(&known).unwrap())
        .unwrap();
    let mut good = 0;
    while let Some((&length, after)) = rest.split_first() {
        let (record, after) = after.split_at(usize::from(length).min(after.len()));
        rest = after;
        let pushed = if choice % 4 == 3 {
            let _ = avro::unframe(record);
            decoder.push(record)
        } else {
            let header = [MAGIC, 0, 0, 0, 1 + choice % 2];
            decoder.push(&[&header, record].concat())
        };
        good += usize::from(pushed.is_ok());
    }
    let batch = decoder.finish().unwrap();
    assert_eq!(batch.num_rows(), good);
    if good == 0 {
        return;
    }
    // What was read can be written, and reads the same.
    let records = Encoder::new(&target).unwrap().encode(&batch).unwrap();
    assert_eq!(records.len(), good);
    for record in &records {
        decoder.push(record).unwrap();
    }
    assert_eq!(decoder.finish().unwrap(), batch);
}

fn target() -> Schema {
    let types = rakam_event::testing::every_type(&[(20, 4)]);
    let fields: Vec<(String, FieldType)> = (0..).map(|n| format!("a{n}")).zip(types).collect();
    let mut schema = roads::schema(true, &fields);
    schema.version = 2;
    schema
}

pub fn seeds() -> Vec<Vec<u8>> {
    let events = [
        r#"{"_time":"2024-02-29T12:00:00.000001Z","_user":"ö","a0":true,"a1":-7,"a2":9007199254740993,"a3":1.5,"a4":-0.1}"#,
        r#"{"a5":-12345678901234.5678,"a6":"line\nbreak","a7":"0001-01-01","a8":"9999-12-31T23:59:59.999999Z"}"#,
        r#"{"a9":"6f2b0b3e-9d2c-4c8e-8f4e-111111111111","a10":"10.0.0.0/8","a11":{"k":[1,{"x":null}]}}"#,
        r#"{"a12":[true,null,false],"a13":[1,null,2.5],"a14":["",null,"z"],"unknown":1}"#,
    ];
    let target = target();
    let built = roads::build(&target, Layout::Stored, &Limits::default(), &events);
    let records = Encoder::new(&target).unwrap().encode(&built.batch).unwrap();
    let schema = avro::avro_schema("acme", "pageview", &target).to_string();
    let length = (schema.len() as u16).to_be_bytes();
    let one = |record: &[u8]| [&[record.len() as u8], record].concat();
    let bodies: Vec<u8> = records
        .iter()
        .flat_map(|record| one(&record[5..]))
        .collect();
    let framed: Vec<u8> = records.iter().flat_map(|record| one(record)).collect();
    let small = r#"{"fields":[{"field-id":1,"rakam-type":"timestamp with time zone"},{"field-id":17,"rakam-type":"bigint"}]}"#;
    vec![
        seed(
            &[0, length[0], length[1]],
            &[schema.as_bytes(), &bodies].concat(),
        ),
        seed(&[1, 0, 0], &bodies),
        seed(&[3, 0, 0], &framed),
        seed(
            &[0, 0, small.len() as u8],
            &[small.as_bytes(), b"\x05\x02\x02\x02\x04\x02\x02\0\0"].concat(),
        ),
    ]
}
