use std::io::Write;

use super::*;

/// The format's encoding, written down from its specification.
#[derive(Default, Clone)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn long(mut self, value: i64) -> Self {
        let mut rest = (value << 1 ^ value >> 63) as u64;
        while rest >= 0x80 {
            self.0.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        self.0.push(rest as u8);
        self
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn sized(self, bytes: &[u8]) -> Self {
        self.long(bytes.len() as i64).raw(bytes)
    }
}

const SYNC: [u8; 16] = *b"0123456789abcdef";

fn file(schema: &str, codec: &str, blocks: &[(i64, Bytes)]) -> Vec<u8> {
    let mut file = Bytes::default()
        .raw(MAGIC)
        .long(2)
        .sized(b"avro.schema")
        .sized(schema.as_bytes())
        .sized(b"avro.codec")
        .sized(codec.as_bytes())
        .long(0)
        .raw(&SYNC);
    for (count, plain) in blocks {
        let data = match codec {
            "deflate" => {
                let mut encoder =
                    flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(&plain.0).unwrap();
                encoder.finish().unwrap()
            }
            "zstandard" => zstd::encode_all(&plain.0[..], 1).unwrap(),
            "snappy" => {
                let mut data = snap::raw::Encoder::new().compress_vec(&plain.0).unwrap();
                let mut crc = flate2::Crc::new();
                crc.update(&plain.0);
                data.extend_from_slice(&crc.sum().to_be_bytes());
                data
            }
            _ => plain.0.clone(),
        };
        file = file.long(*count).sized(&data).raw(&SYNC);
    }
    file.0
}

/// The records as JSON, or the error.
fn read(content: &[u8], from: u64) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.avro");
    std::fs::write(&path, content).unwrap();
    let from = Position {
        row: from,
        ..Position::default()
    };
    let mut found = Vec::new();
    let mut source = match AvroSource::open(&Found::file(&path, "x.avro"), from, &Meter::default())
    {
        Ok(source) => source,
        Err(e) => return vec![format!("{} {e}", e.sqlstate())],
    };
    loop {
        match source.next() {
            Ok(Some(piece)) => {
                if let Rows::Events(events) = piece.rows {
                    found.extend(events.into_iter().map(|e| e.json));
                }
            }
            Ok(None) => return found,
            Err(e) => {
                found.push(format!("{} {e}", e.sqlstate()));
                return found;
            }
        }
    }
}

#[test]
fn every_type() {
    let schema = r#"{"type": "record", "name": "e", "namespace": "n", "fields": [
        {"name": "b", "type": "boolean"}, {"name": "i", "type": "int"}, {"name": "l", "type": ["null", "long"]},
        {"name": "f", "type": "float"}, {"name": "d", "type": "double"}, {"name": "s", "type": "string"},
        {"name": "y", "type": "bytes"}, {"name": "x", "type": {"type": "fixed", "name": "two", "size": 2}},
        {"name": "x2", "type": "two"}, {"name": "e", "type": {"type": "enum", "name": "c", "symbols": ["RED", "BLUE"]}},
        {"name": "a", "type": {"type": "array", "items": "double"}}, {"name": "m", "type": {"type": "map", "values": "int"}},
        {"name": "r", "type": ["null", "n.e"]},
        {"name": "day", "type": {"type": "int", "logicalType": "date"}},
        {"name": "ms", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "us", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "t", "type": {"type": "int", "logicalType": "time-millis"}},
        {"name": "dec", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
        {"name": "u", "type": {"type": "fixed", "name": "id", "size": 16, "logicalType": "uuid"}}]}"#;
    let record = Bytes::default()
        .raw(&[1])
        .long(-5)
        .long(1)
        .long(1 << 40)
        .raw(&1.5f32.to_le_bytes())
        .raw(&f64::NAN.to_le_bytes())
        .sized("ä\"".as_bytes())
        .sized(&[0xff])
        .raw(b"ab")
        .raw(b"cd")
        .long(1)
        // Two blocks, of which the second tells its size.
        .long(1)
        .raw(&1f64.to_le_bytes())
        .long(-1)
        .long(8)
        .raw(&2f64.to_le_bytes())
        .long(0)
        .long(1)
        .sized(b"k")
        .long(7)
        .long(0)
        .long(0)
        .long(19_000)
        .long(1_500_000_000_123)
        .long(1_500_000_000_123_456)
        .long(3_661_000)
        .sized(&[0xff, 0x85])
        .raw(&[0x11; 16]);
    let expected = concat!(
        r#"{"b":true,"i":-5,"l":1099511627776,"f":1.5,"d":"NaN","s":"ä\"","y":"\\xff","x":"ab","x2":"cd","e":"BLUE","#,
        r#""a":[1,2],"m":{"k":7},"r":null,"day":"2022-01-08","ms":"2017-07-14T02:40:00.123+00:00","#,
        r#""us":"2017-07-14T02:40:00.123456+00:00","t":"01:01:01","dec":-1.23,"u":"11111111-1111-1111-1111-111111111111"}"#
    );
    for codec in ["null", "deflate", "snappy", "zstandard"] {
        let content = file(schema, codec, &[(1, record.clone())]);
        assert_eq!(read(&content, 0), [expected], "{codec}");
        // However it is cut or changed, it is an error or another record, never a crash.
        for end in (0..content.len()).step_by(7) {
            read(&content[..end], 0);
            let mut changed = content.clone();
            changed[end] ^= 0x55;
            read(&changed, 0);
        }
    }
    let types = Types::parse(schema.as_bytes()).unwrap();
    let Shape::Record(fields) = types.root() else {
        panic!("a record")
    };
    let found: Vec<String> = fields
        .iter()
        .filter_map(|(name, shape)| Some(format!("{name} {}", types.field_type(shape)?)))
        .collect();
    assert_eq!(
        found.join(", "),
        "b boolean, i integer, l bigint, f real, d double precision, s text, y text, x text, x2 text, e text, \
         a double precision[], m jsonb, r jsonb, day date, ms timestamp with time zone, us timestamp with time zone, \
         t text, dec numeric(38,2), u uuid"
    );
}

#[test]
fn reading_continues_at_a_record() {
    let schema = r#"{"type": "record", "name": "e", "fields": [{"name": "n", "type": "long"}]}"#;
    let blocks: Vec<(i64, Bytes)> = (0..10)
        .map(|b| {
            (
                10,
                (0..10).fold(Bytes::default(), |bytes, i| bytes.long(b * 10 + i)),
            )
        })
        .collect();
    let content = file(schema, "deflate", &blocks);
    for from in [0, 1, 9, 10, 11, 55, 99, 100] {
        let found = read(&content, from);
        let expected: Vec<String> = (from..100).map(|n| format!("{{\"n\":{n}}}")).collect();
        assert_eq!(found, expected, "from {from}");
    }
    assert_eq!(read(&content, 101), [""; 0]);
}

#[test]
fn hostile_files_are_errors() {
    let malformed = |content: &[u8]| {
        read(content, 0)
            .last()
            .is_some_and(|m| m.starts_with("22P04"))
    };
    assert!(malformed(b""));
    assert!(malformed(b"PAR1"));
    let number = r#"{"type": "record", "name": "e", "fields": [{"name": "n", "type": "long"}]}"#;
    assert!(malformed(&file("\"long\"", "null", &[])));
    assert!(malformed(&file("{", "null", &[])));
    assert!(malformed(&file(number, "lzma", &[])));
    assert!(malformed(&file(&"[".repeat(500), "null", &[])));
    assert!(malformed(&file(
        number,
        "null",
        &[(2, Bytes::default().long(1))]
    )));
    assert!(malformed(
        &file(number, "snappy", &[(1, Bytes::default().long(1))])[..150]
    ));
    // Claims of sizes and counts that nothing stands behind.
    let mut huge = file(number, "null", &[]);
    huge.extend(Bytes::default().long(1).long(i64::MAX).0);
    assert!(malformed(&huge));
    let nulls = r#"{"type": "record", "name": "e", "fields": [{"name": "a", "type": {"type": "array", "items": "null"}}]}"#;
    assert!(malformed(&file(
        nulls,
        "null",
        &[(1, Bytes::default().long(1 << 60))]
    )));
    let itself = r#"{"type": "record", "name": "e", "fields": [{"name": "e", "type": "e"}]}"#;
    assert!(malformed(&file(itself, "null", &[(1, Bytes::default())])));
}
