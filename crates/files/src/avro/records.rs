//! Avro records that come one by one, not in a file: as JSON text, by the schema they were written with; and container files
//! that are in memory.

use std::io::Cursor;

use rakam_event::types::FieldType;

use super::schema::Types;
use super::{AvroSource, Decoder, Fault, Limits, declared};
use crate::source::Source;

/// The schema that records were written with.
#[derive(Debug)]
pub struct RecordSchema {
    types: Types,
    declared: Vec<(String, FieldType)>,
}

impl RecordSchema {
    /// Reads the JSON of a schema. Error: why it is not the schema of a record.
    pub fn parse(schema: &[u8]) -> Result<Self, String> {
        let types = Types::parse(schema)?;
        let declared = declared(&types).ok_or("it is not the schema of a record")?;
        Ok(Self { types, declared })
    }

    /// The fields whose type the schema declares.
    pub fn declared(&self) -> &[(String, FieldType)] {
        &self.declared
    }

    /// Appends the record that `body` is, whole, as JSON of at most `most` bytes. Error: why it is none; `out` is as before.
    pub fn write_json(&self, body: &[u8], most: usize, out: &mut String) -> Result<(), String> {
        let start = out.len();
        let mut decoder = Decoder {
            types: &self.types,
            bytes: body,
            at: 0,
            most: start + most,
            limit: most,
        };
        let result = match decoder.value(self.types.root(), 0, out) {
            Ok(()) if decoder.at == body.len() => Ok(()),
            Ok(()) => Err("bytes after its end".to_owned()),
            Err(fault) => Err(reason(fault)),
        };
        if result.is_err() {
            out.truncate(start);
        }
        result
    }
}

/// Calls `f` with each record of a container file as JSON, and the fields whose type the file declares. `most` bounds the file's head, each block, decompressed, and the
/// JSON of each record. Error: why it is none, or that of `f`; records before it have been shown.
pub fn container(
    bytes: &[u8],
    most: usize,
    mut f: impl FnMut(&str, &[(String, FieldType)]) -> Result<(), String>,
) -> Result<(), String> {
    let limits = Limits {
        part_bytes: most as u64,
        record_bytes: most,
    };
    let input = Box::new(Cursor::new(bytes.to_vec()));
    let mut source = AvroSource::new(input, "", limits);
    source.read_head().map_err(reason)?;
    let declared = source.declared().to_vec();
    let mut json = String::new();
    loop {
        json.clear();
        match source.record(&mut json, 0) {
            Ok(true) => f(&json, &declared)?,
            Ok(false) => return Ok(()),
            Err(fault) => return Err(reason(fault)),
        }
    }
}

fn reason(fault: Fault) -> String {
    match fault {
        Fault::Io(error) => error.to_string(),
        Fault::Wrong(reason) => reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEMA: &str = r#"{"type":"record","name":"e","fields":[{"name":"a","type":"long"},{"name":"b","type":["null","string"]}]}"#;

    #[test]
    fn one_record() {
        let schema = RecordSchema::parse(SCHEMA.as_bytes()).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(
            schema.declared(),
            [
                ("a".to_owned(), FieldType::Int8),
                ("b".to_owned(), FieldType::Text)
            ]
        );
        let of = |body: &[u8]| {
            let mut out = "x".to_owned();
            let result = schema.write_json(body, 40, &mut out);
            (result.is_ok(), out)
        };
        let good = (true, r#"x{"a":-1,"b":"hi"}"#.to_owned());
        assert_eq!(of(&[1, 2, 4, b'h', b'i']), good);
        assert_eq!(of(&[1, 0]), (true, r#"x{"a":-1,"b":null}"#.to_owned()));
        for wrong in [
            &[][..],
            &[1],
            &[1, 4],
            &[1, 0, 0],
            &[1, 2, 4, b'h'],
            &[1, 2, 2, 0xff],
            &[0xff; 12],
        ] {
            assert_eq!(of(wrong), (false, "x".to_owned()), "{wrong:?}");
        }
        assert!(RecordSchema::parse(b"\"long\"").is_err());
        assert!(RecordSchema::parse(b"{").is_err());
    }

    #[test]
    fn a_container() {
        let mut file = b"Obj\x01\x02\x16avro.schema".to_vec();
        // The length of the schema, as a zigzag number of two bytes.
        let length = SCHEMA.len() * 2;
        file.extend([((length & 0x7f) | 0x80) as u8, (length >> 7) as u8]);
        file.extend(SCHEMA.as_bytes());
        file.push(0);
        file.extend([7; 16]);
        // Two records in eight bytes.
        file.extend([4, 14, 1, 0, 2, 2, 4, b'h', b'i']);
        file.extend([7; 16]);
        let read = |bytes: &[u8], most| {
            let mut all = Vec::new();
            let result = container(bytes, most, |json, declared| {
                assert_eq!(declared.len(), 2);
                all.push(json.to_owned());
                Ok(())
            });
            (result, all)
        };
        let both = vec![
            r#"{"a":-1,"b":null}"#.to_owned(),
            r#"{"a":1,"b":"hi"}"#.to_owned(),
        ];
        assert_eq!(read(&file, 1000), (Ok(()), both));
        assert!(read(&file, 100).0.is_err());
        assert!(read(&file[..file.len() - 1], 1000).0.is_err());
        assert!(read(b"Obj", 1000).0.is_err());
    }
}
