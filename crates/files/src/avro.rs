//! Avro's object container files: records become JSON text, typed by the file's schema.
//!
//! Own reader of the format (Avro 1.12, "Binary Encoding", "Object Container Files"): it writes JSON without a tree of
//! values, and what a hostile file claims is bounded before anything is allocated for it. [`schema`] reads the schema.

use std::io::{self, BufRead, BufReader, Read};

use rakam_event::types::FieldType;
use rakam_event::{json, print};

use crate::cell;
use crate::error::FilesError;
use crate::input::{self, Meter};
use crate::locate::Found;
use crate::source::{PIECE_BYTES, PIECE_ROWS, Piece, Position, Rows, Source, TextEvent};

pub mod records;
mod schema;

use schema::{Shape, Types};

const MAGIC: &[u8; 4] = b"Obj\x01";
const MICROS_PER_DAY: i64 = 86_400_000_000;
/// Snappy makes at most 64 bytes of three.
const SNAPPY_EXPANSION: usize = 22;
/// Records without any bytes, as those are that have only nulls: more of them in one block are a file that never ends.
const MAX_EMPTY_RECORDS: u64 = 1 << 15;
/// What a file may ask for.
const FILE_LIMITS: Limits = Limits {
    part_bytes: 256 << 20,
    record_bytes: 64 << 20,
};
/// Nesting of values; the schema of a record may contain itself.
const MAX_DEPTH: usize = 64;

pub struct AvroSource {
    input: BufReader<Box<dyn Read + Send>>,
    name: String,
    types: Types,
    codec: Codec,
    sync: [u8; 16],
    block: Vec<u8>,
    /// Where in the block the next record begins, and how many there still are.
    at: usize,
    left: u64,
    declared: Vec<(String, FieldType)>,
    row: u64,
    limits: Limits,
    /// Rows of a piece.
    most: usize,
}

/// What a file may ask for.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Of its head, and of a block before and after decompression.
    part_bytes: u64,
    /// Of the JSON that a record becomes.
    record_bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Codec {
    Null,
    Deflate,
    Snappy,
    Zstandard,
}

/// Why a file cannot be read any further: I/O, or what is wrong with it.
enum Fault {
    Io(io::Error),
    Wrong(String),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return wrong("it ends too early");
        }
        Self::Io(error)
    }
}

fn wrong(reason: impl ToString) -> Fault {
    Fault::Wrong(reason.to_string())
}

impl AvroSource {
    pub fn open(file: &Found, from: Position, meter: &Meter) -> Result<Self, FilesError> {
        let input = input::open(file, 0, meter)?;
        let mut source = Self::new(input, &file.name, FILE_LIMITS);
        source.read_head().map_err(|fault| source.failed(fault))?;
        // A container has no index: blocks are counted off by their heads, then records.
        let mut json = String::new();
        while source.row < from.row {
            json.clear();
            let found = source.record(&mut json, from.row - source.row);
            if !found.map_err(|fault| source.failed(fault))? {
                break;
            }
        }
        Ok(source)
    }

    fn new(input: Box<dyn Read + Send>, name: &str, limits: Limits) -> Self {
        Self {
            input: BufReader::new(input),
            name: name.to_owned(),
            types: Types::default(),
            codec: Codec::Null,
            sync: [0; 16],
            block: Vec::new(),
            at: 0,
            left: 0,
            declared: Vec::new(),
            row: 0,
            limits,
            most: PIECE_ROWS,
        }
    }

    fn failed(&self, fault: Fault) -> FilesError {
        match fault {
            Fault::Io(error) => FilesError::io("read", &self.name, &error),
            Fault::Wrong(reason) => FilesError::malformed(
                &self.name,
                "avro",
                format!("record {}: {reason}", self.row + 1),
            ),
        }
    }

    fn read_head(&mut self) -> Result<(), Fault> {
        let mut magic = [0; 4];
        self.input.read_exact(&mut magic)?;
        if &magic != MAGIC {
            return Err(wrong("it does not begin as one"));
        }
        let mut schema = None;
        loop {
            let count = self.read_long()?;
            if count == 0 {
                break;
            }
            if count < 0 {
                // A negative count is followed by the size in bytes.
                self.read_long()?;
            }
            for _ in 0..count.unsigned_abs() {
                let key = self.read_bytes()?;
                let value = self.read_bytes()?;
                match key.as_slice() {
                    b"avro.schema" => schema = Some(value),
                    b"avro.codec" => {
                        self.codec = match value.as_slice() {
                            b"" | b"null" => Codec::Null,
                            b"deflate" => Codec::Deflate,
                            b"snappy" => Codec::Snappy,
                            b"zstandard" => Codec::Zstandard,
                            other => {
                                let name = String::from_utf8_lossy(other);
                                return Err(wrong(format!(
                                    "codec \"{name:.40}\" is not supported"
                                )));
                            }
                        };
                    }
                    _ => {}
                }
            }
        }
        self.input.read_exact(&mut self.sync)?;
        let schema = schema.ok_or_else(|| wrong("it has no schema"))?;
        self.types = Types::parse(&schema).map_err(wrong)?;
        self.declared = declared(&self.types).ok_or_else(|| wrong("its values are no records"))?;
        Ok(())
    }

    fn read_long(&mut self) -> Result<i64, Fault> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let mut byte = [0];
            self.input.read_exact(&mut byte)?;
            value |= u64::from(byte[0] & 0x7f) << shift;
            if byte[0] < 0x80 {
                return Ok(zigzag(value));
            }
        }
        Err(wrong("a number has no end"))
    }

    fn read_bytes(&mut self) -> Result<Vec<u8>, Fault> {
        let length = self.read_long()?;
        self.read_exactly(length)
    }

    /// So many bytes, allocated as they come.
    fn read_exactly(&mut self, length: i64) -> Result<Vec<u8>, Fault> {
        let length = u64::try_from(length)
            .ok()
            .filter(|&n| n <= self.limits.part_bytes)
            .ok_or_else(|| wrong(format!("a part of {length} bytes is not possible")))?;
        let mut bytes = Vec::new();
        self.input.by_ref().take(length).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != length {
            return Err(wrong("it ends too early"));
        }
        Ok(bytes)
    }

    /// Reads the next block; false at the end. One of at most `skip` records is only counted.
    fn read_block(&mut self, skip: u64) -> Result<bool, Fault> {
        if self.input.fill_buf()?.is_empty() {
            return Ok(false);
        }
        let count = self.read_long()?;
        let count = u64::try_from(count).map_err(|_| wrong("a block has a negative count"))?;
        let size = self.read_long()?;
        let data = self.read_exactly(size)?;
        let mut sync = [0; 16];
        self.input.read_exact(&mut sync)?;
        if sync != self.sync {
            return Err(wrong("a block does not end where it should"));
        }
        if count <= skip {
            self.row += count;
            self.left = 0;
            return Ok(true);
        }
        self.block = decompress(self.codec, data, self.limits.part_bytes)?;
        if count > (self.block.len() as u64).max(MAX_EMPTY_RECORDS) {
            return Err(wrong(format!(
                "a block of {} bytes cannot hold {count} records",
                self.block.len()
            )));
        }
        self.at = 0;
        self.left = count;
        Ok(true)
    }

    /// Appends the next record as JSON; false at the end. Whole blocks within the next `skip` records are passed over.
    fn record(&mut self, json: &mut String, skip: u64) -> Result<bool, Fault> {
        let before = self.row;
        while self.left == 0 {
            if !self.read_block(skip - (self.row - before))? {
                return Ok(self.row > before);
            }
            if self.row - before == skip && skip > 0 {
                return Ok(true);
            }
        }
        let mut decoder = Decoder {
            types: &self.types,
            bytes: &self.block,
            at: self.at,
            most: json.len() + self.limits.record_bytes,
            limit: self.limits.record_bytes,
        };
        decoder.value(self.types.root(), 0, json)?;
        self.at = decoder.at;
        self.left -= 1;
        self.row += 1;
        Ok(true)
    }
}

/// The fields of a record and the types that they get; None if the root is none.
fn declared(types: &Types) -> Option<Vec<(String, FieldType)>> {
    let Shape::Record(fields) = types.root() else {
        return None;
    };
    let declared = |(name, shape): &(String, Shape)| Some((name.clone(), types.field_type(shape)?));
    Some(fields.iter().filter_map(declared).collect())
}

fn zigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

fn decompress(codec: Codec, data: Vec<u8>, most: u64) -> Result<Vec<u8>, Fault> {
    let bounded = |input: &mut dyn Read| {
        let mut bytes = Vec::new();
        input
            .take(most + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| wrong(format!("a block cannot be decompressed: {e}")))?;
        if bytes.len() as u64 > most {
            return Err(wrong(format!("a block is larger than {most} bytes")));
        }
        Ok(bytes)
    };
    match codec {
        Codec::Null => Ok(data),
        Codec::Deflate => bounded(&mut flate2::read::DeflateDecoder::new(data.as_slice())),
        Codec::Zstandard => {
            let mut decoder = zstd::stream::read::Decoder::new(data.as_slice())?;
            bounded(&mut decoder)
        }
        Codec::Snappy => {
            // The checksum of the plain bytes follows the compressed ones.
            let (data, checksum) = data
                .split_last_chunk::<4>()
                .ok_or_else(|| wrong("a block is too short"))?;
            let length = snap::raw::decompress_len(data).map_err(wrong)?;
            if length as u64 > most {
                return Err(wrong(format!("a block is larger than {most} bytes")));
            }
            if length / SNAPPY_EXPANSION > data.len() {
                return Err(wrong("a block does not have its length"));
            }
            let bytes = snap::raw::Decoder::new()
                .decompress_vec(data)
                .map_err(wrong)?;
            let mut crc = flate2::Crc::new();
            crc.update(&bytes);
            if crc.sum() != u32::from_be_bytes(*checksum) {
                return Err(wrong("a block has a wrong checksum"));
            }
            Ok(bytes)
        }
    }
}

/// Reads values from a block.
struct Decoder<'a> {
    types: &'a Types,
    bytes: &'a [u8],
    at: usize,
    /// The JSON must not become longer than this,
    most: usize,
    /// because a record may have so many bytes.
    limit: usize,
}

impl<'a> Decoder<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], Fault> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = rest
            .get(..n)
            .ok_or_else(|| wrong("a value ends too early"))?;
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let taken = self.take(N)?;
        taken
            .first_chunk::<N>()
            .copied()
            .ok_or_else(|| wrong("a value ends too early"))
    }

    fn long(&mut self) -> Result<i64, Fault> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array::<1>()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(zigzag(value));
            }
        }
        Err(wrong("a number has no end"))
    }

    fn sized(&mut self) -> Result<&'a [u8], Fault> {
        let length = self.long()?;
        self.take(usize::try_from(length).map_err(|_| wrong("a negative length"))?)
    }

    fn text(&mut self) -> Result<&'a str, Fault> {
        std::str::from_utf8(self.sized()?).map_err(|_| wrong("text is not UTF-8"))
    }

    /// Appends a value as JSON.
    fn value(&mut self, shape: &'a Shape, depth: usize, out: &mut String) -> Result<(), Fault> {
        if depth > MAX_DEPTH {
            return Err(wrong(format!(
                "values are nested deeper than {MAX_DEPTH} levels"
            )));
        }
        if out.len() > self.most {
            return Err(wrong(format!(
                "a record is larger than {} bytes",
                self.limit
            )));
        }
        match shape {
            Shape::Named(index) => {
                let shape = self
                    .types
                    .named(*index)
                    .ok_or_else(|| wrong("a type is missing"))?;
                // Names do not nest values by themselves, but a record that contains itself does.
                return self.value(shape, depth + 1, out);
            }
            Shape::Null => out.push_str("null"),
            Shape::Bool => print::write_bool(self.array::<1>()? != [0], out),
            Shape::Int | Shape::Long => print::write_int(self.long()?, out),
            Shape::Float => {
                let value = f32::from_le_bytes(self.array()?);
                cell::write_float(f64::from(value), out, |_, out| {
                    print::write_float4(value, out)
                });
            }
            Shape::Double => {
                let value = f64::from_le_bytes(self.array()?);
                cell::write_float(value, out, print::write_float8);
            }
            Shape::Text => json::write_string(self.text()?, out),
            Shape::Bytes => cell::write_bytes(self.sized()?, out),
            Shape::Fixed(size) => cell::write_bytes(self.take(*size)?, out),
            Shape::Uuid => print::write_uuid(&self.array::<16>()?, out),
            Shape::Decimal { size, scale } => {
                let bytes = match size {
                    Some(size) => self.take(*size)?,
                    None => self.sized()?,
                };
                match unscaled(bytes) {
                    Some(value) => print::write_numeric(value, *scale, out),
                    None => cell::write_bytes(bytes, out),
                }
            }
            Shape::Date => {
                let micros = self.long()?.saturating_mul(MICROS_PER_DAY);
                cell::write_timestamp_text(micros, true, out);
            }
            Shape::Time { per_second } => {
                let value = self.long()?;
                cell::write_time(value.saturating_mul(1_000_000 / per_second), out);
            }
            Shape::Timestamp { per_second } => {
                let value = self.long()?;
                let micros = if *per_second > 1_000_000 {
                    value.div_euclid(per_second / 1_000_000)
                } else {
                    value.saturating_mul(1_000_000 / per_second)
                };
                cell::write_timestamp_text(micros, false, out);
            }
            Shape::Enum(symbols) => {
                let symbol = usize::try_from(self.long()?)
                    .ok()
                    .and_then(|i| symbols.get(i));
                json::write_string(symbol.ok_or_else(|| wrong("an unknown symbol"))?, out);
            }
            Shape::Union(branches) => {
                let branch = usize::try_from(self.long()?)
                    .ok()
                    .and_then(|i| branches.get(i));
                let branch = branch.ok_or_else(|| wrong("an unknown branch of a union"))?;
                return self.value(branch, depth + 1, out);
            }
            Shape::Record(fields) => {
                out.push('{');
                for (i, (name, shape)) in fields.iter().enumerate() {
                    if i > 0 {
                        out.push(',');
                    }
                    json::write_string(name, out);
                    out.push(':');
                    self.value(shape, depth + 1, out)?;
                }
                out.push('}');
            }
            Shape::Array(item) => {
                out.push('[');
                self.blocks(out, |decoder, out| decoder.value(item, depth + 1, out))?;
                out.push(']');
            }
            Shape::Map(value) => {
                out.push('{');
                self.blocks(out, |decoder, out| {
                    json::write_string(decoder.text()?, out);
                    out.push(':');
                    decoder.value(value, depth + 1, out)
                })?;
                out.push('}');
            }
        }
        Ok(())
    }

    /// The items of an array or a map, with commas between them.
    fn blocks(
        &mut self,
        out: &mut String,
        mut item: impl FnMut(&mut Self, &mut String) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let mut first = true;
        loop {
            let count = self.long()?;
            if count == 0 {
                return Ok(());
            }
            if count < 0 {
                // A negative count is followed by the size in bytes.
                self.long()?;
            }
            for _ in 0..count.unsigned_abs() {
                if !std::mem::take(&mut first) {
                    out.push(',');
                }
                item(self, out)?;
            }
        }
    }
}

/// A two's complement number, most significant byte first; None beyond 128 bits.
fn unscaled(bytes: &[u8]) -> Option<i128> {
    let negative = bytes.first().is_some_and(|&b| b >= 0x80);
    let filler = if negative { 0xff } else { 0 };
    let mut wide = [filler; 16];
    let extra = bytes.len().saturating_sub(16);
    if bytes[..extra].iter().any(|&b| b != filler) {
        return None;
    }
    let bytes = &bytes[extra..];
    wide[16 - bytes.len()..].copy_from_slice(bytes);
    let value = i128::from_be_bytes(wide);
    ((value < 0) == negative).then_some(value)
}

impl Source for AvroSource {
    fn next(&mut self) -> Result<Option<Piece>, FilesError> {
        let mut events = Vec::new();
        let mut bytes = 0;
        while events.len() < self.most && bytes < PIECE_BYTES {
            let mut json = String::with_capacity(256);
            let found = self.record(&mut json, 0);
            if !found.map_err(|fault| self.failed(fault))? {
                break;
            }
            bytes += json.len();
            events.push(TextEvent {
                line: self.row,
                json,
            });
        }
        if events.is_empty() {
            return Ok(None);
        }
        Ok(Some(Piece {
            rows: Rows::Events(events),
            bad: Vec::new(),
            bytes: bytes as u64,
            after: Position {
                row: self.row,
                ..Position::default()
            },
        }))
    }

    fn bound(&mut self, rows: usize) {
        self.most = rows.clamp(1, PIECE_ROWS);
    }

    fn declared(&self) -> &[(String, FieldType)] {
        &self.declared
    }
}

#[cfg(test)]
mod tests;
