//! Foreign files: CSV with options, NDJSON, JSON arrays, Avro containers and Parquet, plain or compressed, read to the end
//! and converted for a collection.
use std::io::Write;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::{env, fs, process};

use crate::{seed, split};
use rakam_event::entry::Limits;
use rakam_event::roads::{self, STAMP};
use rakam_event::testing::Random;
use rakam_event::types::FieldType;
use rakam_files::convert::Converter;
use rakam_files::format::{Format, Options};
use rakam_files::locate::Found;
use rakam_files::source::{self, Meter, Position, Rows, Spec};
use rakam_lake::testing;

const FORMATS: [Format; 5] = [
    Format::Csv,
    Format::Ndjson,
    Format::Json,
    Format::Avro,
    Format::Parquet,
];

/// The file of this process; scripts/fuzz.sh has temporary files in memory.
static FILE: LazyLock<PathBuf> =
    LazyLock::new(|| env::temp_dir().join(format!("rakam-fuzz-file-{}", process::id())));

pub fn run(input: &[u8]) {
    if let Some((choice, rest)) = split(input) {
        load(choice, rest);
    }
}

/// What chooses: format, compression, an option of CSV by its number, and its character.
fn load([format, compression, option, character]: [u8; 4], bytes: &[u8]) {
    let format = FORMATS[usize::from(format) % FORMATS.len()];
    let (suffix, content) = match compression % 8 {
        1 => (".gz", gzip(bytes)),
        2 => (".zst", zstd::encode_all(bytes, 1).unwrap()),
        3 => (".gz", bytes.to_vec()),
        4 => (".zst", bytes.to_vec()),
        _ => ("", bytes.to_vec()),
    };
    let name = format!("file.{format}{suffix}");
    fs::write(&*FILE, content).unwrap();
    let Ok(options) = options(format, option, character) else {
        return;
    };
    let spec = Spec {
        format: Some(format),
        options,
        max_record_bytes: if option & 0x80 == 0 { 1 << 20 } else { 64 },
    };
    let meter = Meter::default();
    let file = Found::file(&*FILE, &name);
    let open = |from| source::open(&file, &spec, from, &meter);
    let Ok(mut source) = open(Position::default()) else {
        return;
    };
    let limits = Limits {
        max_event_bytes: 1 << 16,
        max_string_bytes: 1 << 10,
        max_fields: 40,
    };
    let known = [
        (
            "a".to_owned(),
            FieldType::Numeric {
                precision: 9,
                scale: 2,
            },
        ),
        ("n".to_owned(), FieldType::Int4),
        ("at".to_owned(), FieldType::Timestamptz),
        ("tags".to_owned(), FieldType::TextArray),
    ];
    let mut converter = Converter::new(&roads::schema(true, &known), limits, true);
    let mut after = Position::default();
    for _ in 0..PIECES {
        let Ok(Some(piece)) = source.next() else {
            return;
        };
        let rows = piece.rows.len();
        assert!(rows <= source::PIECE_ROWS);
        assert!(piece.after.row >= after.row + rows as u64);
        after = piece.after;
        let lines = match &piece.rows {
            Rows::Columns { lines, .. } => lines.len(),
            Rows::Events(events) => events.len(),
        };
        assert_eq!(lines, rows);
        let mut fields = known.to_vec();
        fields.extend(converter.new_fields(&piece.rows, source.declared()));
        assert!(fields.len() <= limits.max_fields);
        converter.set_schema(&roads::schema(true, &fields));
        for bad in &piece.bad {
            converter.log_bad(bad, &name, STAMP.received_at_us);
        }
        if let Ok((batch, bad)) = converter.convert(piece.rows, &name, &STAMP) {
            assert_eq!(batch.num_rows() + bad.len(), rows);
            assert_eq!(batch.schema(), converter.schema().arrow());
        }
        converter.take_log();
    }
    // Reading goes on where it ended.
    let _ = open(after).map(|mut rest| rest.next().map(drop));
}

/// More pieces than an input of the largest size can honestly have.
const PIECES: usize = 8;

fn options(format: Format, option: u8, character: u8) -> Result<Options, rakam_files::FilesError> {
    if format != Format::Csv {
        return Ok(Options::default());
    }
    let key = ["delimiter", "quote", "escape", "null"][usize::from(option % 4)];
    let value = serde_json::Value::from(char::from(character).to_string());
    let header = option & 0x40 == 0;
    Options::parse(&format!(r#"{{"header": {header}, "{key}": {value}}}"#))
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn seeds() -> Vec<Vec<u8>> {
    let csv = "a,n,\"at\",_time,_extra\r\n1.5,x,\"2020-01-02 03:04\",1,\"{\"\"k\"\":1}\"\n,\"\",\"a\nb\",,\n";
    let mut seeds = vec![
        seed(&[0, 0, 0, b','], csv.as_bytes()),
        seed(&[0, 1, 0x41, b'\''], csv.as_bytes()),
        seed(&[0, 2, 3, b'N'], csv.as_bytes()),
        seed(&[0, 3, 0, b','], &gzip(csv.as_bytes())),
        seed(
            &[0, 4, 0, b','],
            &zstd::encode_all(csv.as_bytes(), 1).unwrap(),
        ),
    ];
    for n in 0..20 {
        let mut random = Random(n);
        let events: Vec<String> = (0..3).map(|_| random.object(0, 6)).collect();
        seeds.push(seed(&[1, n as u8 % 3, 0, 0], events.join("\n").as_bytes()));
        seeds.push(seed(
            &[2, 0, 0, 0],
            format!("[{}]", events.join(",\n")).as_bytes(),
        ));
    }
    for codec in ["null", "deflate", "zstandard", "snappy"] {
        seeds.push(seed(&[3, 0, 0, 0], &container(codec)));
    }
    for n in [1, 30] {
        seeds.push(seed(&[4, 0, 0, 0], &testing::file(n, n as u64).sink));
    }
    seeds
}

/// An Avro container with a value of every kind of type; with a codec its block cannot be read, but its head can.
fn container(codec: &str) -> Vec<u8> {
    let schema = r#"{"type":"record","name":"r","fields":[
        {"name":"a","type":["null","string"]},{"name":"n","type":"int"},{"name":"f","type":"double"},
        {"name":"m","type":{"type":"map","values":"long"}},{"name":"tags","type":{"type":"array","items":"string"}},
        {"name":"e","type":{"type":"enum","name":"e","symbols":["x","y"]}},
        {"name":"d","type":{"type":"bytes","logicalType":"decimal","precision":9,"scale":2}},
        {"name":"at","type":{"type":"long","logicalType":"timestamp-micros"}},{"name":"r","type":["null","r"]}]}"#;
    let mut record = b"\x02\x04hi\x07".to_vec();
    record.extend(1.5_f64.to_le_bytes());
    record.extend(b"\x02\x02k\x09\0\x02\x02t\0\x02\x04\x01\x02\x80\x80\x02\0");
    let block = match codec {
        "zstandard" => zstd::encode_all(&record[..], 1).unwrap(),
        "deflate" => {
            let level = flate2::Compression::fast();
            let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), level);
            encoder.write_all(&record).unwrap();
            encoder.finish().unwrap()
        }
        _ => record,
    };
    let long = |value: usize| {
        let mut out = Vec::new();
        let mut rest = value << 1;
        while rest >= 0x80 {
            out.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        out.push(rest as u8);
        out
    };
    let sized = |bytes: &[u8]| [long(bytes.len()), bytes.to_vec()].concat();
    let sync = [7; 16];
    [
        b"Obj\x01\x04".to_vec(),
        sized(b"avro.schema"),
        sized(schema.as_bytes()),
        sized(b"avro.codec"),
        sized(codec.as_bytes()),
        vec![0],
        sync.to_vec(),
        long(1),
        sized(&block),
        sync.to_vec(),
    ]
    .concat()
}
