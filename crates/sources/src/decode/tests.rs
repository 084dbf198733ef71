use super::*;
use crate::batch::{NewRecord, Offset};
use crate::position::Position;

fn name(text: &str) -> CollectionName {
    CollectionName::parse(text).unwrap_or_else(|e| panic!("{e}"))
}

/// A batch of records of the topics `page` and `Order.v1`, in turn, written at the milliseconds 100, 101 …
pub(crate) fn batch(values: &[Option<&[u8]>]) -> Batch {
    let mut batch = Batch::default();
    for (at, value) in values.iter().enumerate() {
        let split = ["page/3", "Order.v1/0"][at % 2];
        let moved = batch.moved(split, &Position::Beginning);
        batch.push(
            moved,
            NewRecord {
                offset: &Offset::Number(at as i64),
                timestamp_ms: Some(100 + at as i64),
                value: *value,
                collection: None,
                mark: None,
            },
        );
    }
    batch
}

pub(crate) fn texts<'a>(values: &[&'a str]) -> Vec<Option<&'a [u8]>> {
    values.iter().map(|v| Some(v.as_bytes())).collect()
}

/// Events as `collection text`, and the numbers of dead records with their SQLSTATE.
fn shown(mut decoded: Decoded<'_>) -> (Vec<String>, Vec<(usize, &'static str)>) {
    let mut dead: Vec<_> = (decoded.dead.iter())
        .map(|d| (d.record, d.error.sqlstate()))
        .collect();
    let mut lines = Vec::new();
    for at in 0..decoded.events.len() {
        match decoded.check(at) {
            Ok(()) => {
                let event = &decoded.events[at];
                let mut line = String::new();
                decoded.write_line(event, &mut line);
                assert!(!line.contains('\n'));
                lines.push((event.collection, line));
            }
            Err(error) => dead.push((decoded.events[at].record, error.sqlstate())),
        }
    }
    dead.sort_unstable();
    let names = decoded.collections.into_names();
    let shown = |(collection, line): (usize, String)| format!("{} {line}", names[collection]);
    (lines.into_iter().map(shown).collect(), dead)
}

fn json(shape: Shape, route: Route) -> Decoder {
    Decoder::new(Format::Json(shape), route, Limits::default())
}

#[test]
fn flat_events_have_a_collection_and_a_time() {
    let values = texts(&[
        r#"{"a":1}"#,
        "{}",
        " { } ",
        r#"{"_time":5}"#,
        r#"{"_time":null}"#,
        r#"{"_collection":"x","a":2}"#,
        r#"{"collection":"y","properties":{}}"#,
    ]);
    let all = batch(&values);
    let decoded = json(Shape::Flat, Route::Topic).decode(&all);
    let (events, dead) = shown(decoded);
    assert_eq!(dead, []);
    assert_eq!(
        events,
        [
            r#"page {"a":1,"_time":100}"#,
            r#"order.v1 {"_time":101}"#,
            r#"page { "_time":102}"#,
            r#"order.v1 {"_time":5}"#,
            r#"page {"_time":null,"_time":104}"#,
            r#"x {"a":2,"_time":105}"#,
            r#"page {"collection":"y","properties":{},"_time":106}"#,
        ]
    );
    let two = batch(&values[..2]);
    let fixed = json(Shape::Flat, Route::To(name("all"))).decode(&two);
    assert_eq!(fixed.events[1].record, 1);
    assert_eq!(fixed.collections.into_names(), [name("all")]);
}

#[test]
fn envelopes() {
    let values = texts(&[
        r#"{"collection":"Y","properties":{"a":1}}"#,
        r#"{"a":"properties"}"#,
        r#"{"collection":"y","properties":{"_collection":"z"}}"#,
        r#"{"collection":"users","properties":{}}"#,
        r#"{"collection":"y","properties":1}"#,
        r#"{"collection":"y","properties":{}"#,
        "[1]",
    ]);
    let batch = batch(&values);
    let (events, dead) = shown(json(Shape::Auto, Route::Topic).decode(&batch));
    assert_eq!(
        events,
        [
            r#"y {"a":1,"_time":100}"#,
            r#"order.v1 {"a":"properties","_time":101}"#,
            r#"z {"_time":102}"#,
            r#"page {"collection":"y","properties":1,"_time":104}"#,
        ]
    );
    assert_eq!(dead, [(3, "42939"), (5, "22P02"), (6, "22023")]);
    let decoded = json(Shape::Envelope, Route::Topic).decode(&batch);
    let (events, dead) = shown(decoded);
    assert_eq!(events.len(), 2);
    let all = [
        (1, "22023"),
        (3, "42939"),
        (4, "22023"),
        (5, "22P02"),
        (6, "22023"),
    ];
    assert_eq!(dead, all);
}

#[test]
fn poison_is_a_dead_letter_alone() {
    let deep = "[".repeat(900_000);
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(2 << 20));
    let values = [
        Some(&b"\xff\xfe"[..]),
        Some(deep.as_bytes()),
        None,
        Some(large.as_bytes()),
        Some(br#"{"_received_at":1}"#),
        Some(b""),
        Some(br#"{"a":1}"#),
    ];
    let batch = batch(&values);
    let decoded = json(Shape::Auto, Route::Topic).decode(&batch);
    assert_eq!(batch.moves[0].tombstones, 1);
    let (events, dead) = shown(decoded);
    assert_eq!(events, [r#"page {"a":1,"_time":106}"#]);
    assert_eq!(
        dead,
        [
            (0, "22021"),
            (1, "54000"),
            (3, "54000"),
            (4, "42939"),
            (5, "22P02")
        ]
    );
    // The topic's name is no collection: each of its records is one.
    let mut batch = Batch::default();
    let moved = batch.moved("users/0", &Position::Beginning);
    for value in [r#"{"a":1}"#, r#"{"_collection":"b"}"#] {
        batch.push(
            moved,
            NewRecord {
                offset: &Offset::Number(0),
                timestamp_ms: None,
                value: Some(value.as_bytes()),
                collection: None,
                mark: None,
            },
        );
    }
    let decoded = json(Shape::Auto, Route::Topic).decode(&batch);
    assert_eq!(
        shown(decoded),
        (vec!["b {}".to_owned()], vec![(0, "42939")])
    );
}

const SCHEMA: &str = r#"{"type":"record","name":"e","fields":[
    {"name":"n","type":"long"},{"name":"_collection","type":["null","string"]}]}"#;

#[test]
fn confluent_records_need_their_schema() {
    let record = |id: u8, body: &[u8]| [&[0, 0, 0, 0, id], body].concat();
    let records = [
        record(7, &[2, 0]),
        record(7, &[4, 2, 2, b'c']),
        record(8, &[2, 0]),
        record(7, &[2]),
        record(7, &[2, 0, 0]),
        vec![1, 0, 0, 0, 7, 2, 0],
        vec![0, 0],
        vec![],
    ];
    let values: Vec<_> = records.iter().map(|r| Some(r.as_slice())).collect();
    let batch = batch(&values);
    let mut decoder = Decoder::new(
        Format::Avro(Framing::Confluent),
        Route::Topic,
        Limits::default(),
    );
    assert_eq!(decoder.missing_schemas(&batch), [7, 8]);
    let schema = RecordSchema::parse(SCHEMA.as_bytes()).unwrap_or_else(|e| panic!("{e}"));
    decoder.register(7, schema);
    assert_eq!(decoder.missing_schemas(&batch), [8]);
    let decoded = decoder.decode(&batch);
    let (events, dead) = shown(decoded);
    // A `_collection` of null names none.
    let all = [r#"page {"n":1,"_time":100}"#, r#"c {"n":2,"_time":101}"#];
    assert_eq!(events, all);
    assert_eq!(
        dead,
        [
            (2, "42704"),
            (3, "22P03"),
            (4, "22P03"),
            (5, "22P03"),
            (6, "22P03"),
            (7, "22P03")
        ]
    );
}

#[test]
fn our_framing_names_a_version_and_perhaps_a_collection() {
    let record = [rakam_event::avro::MAGIC, 0, 0, 0, 3, 0];
    let mut batch = Batch::default();
    let moved = batch.moved("out/0", &Position::Beginning);
    for (value, collection) in [
        (&record[..], Some(&b"Page"[..])),
        (&record, None),
        (b"x", None),
        (&record, Some(b"users")),
    ] {
        batch.push(
            moved,
            NewRecord {
                offset: &Offset::Number(0),
                timestamp_ms: None,
                value: Some(value),
                collection,
                mark: None,
            },
        );
    }
    let format = Format::Avro(Framing::Rakam);
    let decoded = Decoder::new(format, Route::Topic, Limits::default()).decode(&batch);
    let names = decoded.collections.names();
    let framed: Vec<_> = (decoded.framed.iter())
        .map(|f| (names[f.collection].as_str(), f.version, f.record))
        .collect();
    assert_eq!(framed, [("page", 3, 0), ("out", 3, 1)]);
    assert_eq!(shown(decoded), (vec![], vec![(2, "22P03"), (3, "42939")]));
}

#[test]
fn few_bytes_that_say_too_much_are_dead_letters() {
    // An array of nulls takes no bytes but its count.
    let schema = r#"{"type":"record","name":"e","fields":[{"name":"a","type":{"type":"array","items":"null"}}]}"#;
    let schema = RecordSchema::parse(schema.as_bytes()).unwrap_or_else(|e| panic!("{e}"));
    let format = Format::Avro(Framing::Confluent);
    let mut decoder = Decoder::new(format, Route::Topic, Limits::default());
    decoder.register(1, schema);
    // 200,000 nulls: a megabyte of text.
    let record = [0, 0, 0, 0, 1, 0x80, 0xb5, 0x18, 0];
    let values = vec![Some(&record[..]); 300];
    let batch = batch(&values);
    let decoded = decoder.decode(&batch);
    assert!(decoded.own.len() <= TEXT_BYTES);
    assert!(decoded.events.len() > 200);
    assert_eq!(decoded.events.len() + decoded.dead.len(), 300);
    assert!(
        decoded
            .dead
            .iter()
            .all(|d| d.error == DecodeError::TooMuch(TEXT_BYTES))
    );
}

#[test]
fn a_container_is_taken_whole_or_not() {
    let container = |numbers: &[u8]| {
        let mut file = b"Obj\x01\x02\x16avro.schema".to_vec();
        let schema = r#"{"type":"record","name":"e","fields":[{"name":"_id","type":"string"}]}"#;
        file.extend([
            (((schema.len() * 2) & 0x7f) | 0x80) as u8,
            (schema.len() >> 6) as u8,
        ]);
        file.extend(schema.as_bytes());
        file.push(0);
        file.extend([7; 16]);
        for &length in numbers {
            // A block of one record: a string of so many bytes.
            let long = |n: usize| vec![(((n * 2) & 0x7f) | 0x80) as u8, (n >> 6) as u8];
            let record = [long(length as usize), vec![b'x'; length as usize]].concat();
            file.push(2);
            file.extend(long(record.len()));
            file.extend(record);
            file.extend([7; 16]);
        }
        file
    };
    // An `_id` of more than 256 bytes cannot be written here; one that is cut off can.
    let good = container(&[1, 2]);
    let cut = &container(&[1, 2])[..good.len() - 20];
    let decoder = Decoder::new(
        Format::Avro(Framing::Container),
        Route::To(name("c")),
        Limits::default(),
    );
    let batch = batch(&[Some(&good), Some(cut), Some(b"{}"), Some(&good)]);
    let decoded = decoder.decode(&batch);
    let (events, dead) = shown(decoded);
    assert_eq!(
        events,
        [
            r#"c {"_id":"x","_time":100}"#,
            r#"c {"_id":"xx","_time":100}"#,
            r#"c {"_id":"x","_time":103}"#,
            r#"c {"_id":"xx","_time":103}"#,
        ]
    );
    assert_eq!(dead, [(1, "22P03"), (2, "22P03")]);
}
