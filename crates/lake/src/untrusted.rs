//! Parquet files that somebody else may have written, or changed: read with the same library, which is only shown
//! structures that have been walked before (see [`crate::thrift`]), and no page that is larger than any honest one.

use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Bytes;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{ChunkReader, Length};

use crate::thrift::{Fault, Struct, Type, walk};

/// A file ends with the length of its metadata and the magic.
const TAIL: u64 = 8;
/// No page is larger before its compression: writers aim at one megabyte, but do not divide a value.
const MAX_PAGE_BYTES: i64 = 256 << 20;
/// So much is read of a page to find its head, which is longer only if it has bounds of long texts.
const HEAD_BYTES: u64 = 1 << 10;
const MAX_HEAD_BYTES: u64 = 16 << 20;

/// Runs code of the library; its panic is an error like any other. What it panicked in is not to be used any more.
pub fn contained<T>(decode: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(decode)).map_err(|_| malformed("the decoder failed"))
}

/// A Parquet file whose structures are walked before the library reads them.
pub struct Checked<R> {
    file: R,
    len: u64,
    /// Where the metadata begins: pages are before it.
    metadata_at: u64,
}

impl<R: ChunkReader> Checked<R> {
    pub fn new(file: R) -> Result<Self> {
        let len = file.len();
        let end = len
            .checked_sub(TAIL)
            .ok_or_else(|| malformed("it is too short"))?;
        let tail = file.get_bytes(end, TAIL as usize)?;
        let metadata_at = match tail[..] {
            [a, b, c, d, b'P', b'A', b'R', b'1'] => {
                end.checked_sub(u64::from(u32::from_le_bytes([a, b, c, d])))
            }
            _ => None,
        };
        let metadata_at = metadata_at.ok_or_else(|| malformed("it does not end as one"))?;
        let metadata = file.get_bytes(metadata_at, (end - metadata_at) as usize)?;
        check_metadata(&metadata)?;
        Ok(Self {
            file,
            len,
            metadata_at,
        })
    }

    /// Reads from here on: where a page begins, with what its head says.
    pub fn page(&self, start: u64) -> Result<(Option<PageHead>, R::T)> {
        let head = match start < self.metadata_at {
            true => Some(self.page_head(start)?),
            false => None,
        };
        // Last: readers of a file may share one place in it.
        Ok((head, self.file.get_read(start)?))
    }

    fn page_head(&self, start: u64) -> Result<PageHead> {
        let mut wanted = HEAD_BYTES;
        loop {
            let mut head = Vec::new();
            self.file
                .get_read(start)?
                .take(wanted)
                .read_to_end(&mut head)?;
            let mut found = PageHead::default();
            return match walk(&head, PAGE_HEADER, |outer, id, value| {
                found.note(outer, id, value)
            }) {
                Ok(_) if found.is_impossible => Err(malformed("a page has an impossible size")),
                Ok(_) => Ok(found),
                Err(Fault::Truncated) if head.len() as u64 == wanted && wanted < MAX_HEAD_BYTES => {
                    wanted *= 4;
                    continue;
                }
                Err(_) => Err(malformed("the head of a page is malformed")),
            };
        }
    }
}

/// What the head of a page says of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageHead {
    pub is_dictionary: bool,
    /// Before compression.
    pub bytes: u64,
    pub values: u64,
    encoding: i64,
    /// Of the levels how they are encoded, of pages of the second version how many bytes they take.
    repetition: i64,
    definition: i64,
    is_plain: bool,
    /// The head for pages of its kind, which is one of the fields.
    kind: Option<i64>,
    /// The fields that were there, those of `kind` 16 bits further on.
    seen: u32,
    is_impossible: bool,
}

/// Where a page has its levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Levels {
    /// Before the values, compressed with them; how they are encoded.
    Within { repetition: i64, definition: i64 },
    /// Before what is compressed.
    Before { bytes: u64, is_compressed: bool },
}

/// As in parquet.thrift: a type of pages, the heads for pages of a kind, and encodings.
const DICTIONARY_PAGE: i64 = 2;
const FIRST_VERSION: i64 = 5;
const DICTIONARY: i64 = 7;
const SECOND_VERSION: i64 = 8;
const DELTA_LENGTH_BYTE_ARRAY: i64 = 6;
const DELTA_BYTE_ARRAY: i64 = 7;

impl PageHead {
    /// Its texts are made one by one, of the one before and a few bytes.
    pub fn is_written_out(&self) -> bool {
        self.encoding == DELTA_BYTE_ARRAY
    }

    /// The lengths of its texts are apart from them.
    pub fn has_lengths(&self) -> bool {
        self.is_written_out() || self.encoding == DELTA_LENGTH_BYTE_ARRAY
    }

    pub fn levels(&self) -> Levels {
        let (repetition, definition) = (self.repetition, self.definition);
        match self.kind {
            Some(SECOND_VERSION) => Levels::Before {
                bytes: repetition.unsigned_abs() + definition.unsigned_abs(),
                is_compressed: !self.is_plain,
            },
            _ => Levels::Within {
                repetition,
                definition,
            },
        }
    }

    fn note(&mut self, outer: Option<i64>, id: i64, value: i64) {
        self.is_impossible |= !self.is_new(outer, id);
        let size = u64::try_from(value).unwrap_or(0);
        match (outer, id) {
            (None, 1) => self.is_dictionary = value == DICTIONARY_PAGE,
            (None, 2 | 3) => {
                self.is_impossible |= !(0..=MAX_PAGE_BYTES).contains(&value);
                if id == 2 {
                    self.bytes = size;
                }
            }
            (Some(FIRST_VERSION | DICTIONARY | SECOND_VERSION), 1) => {
                self.is_impossible |= !(0..=i64::from(i32::MAX)).contains(&value);
                self.values = size;
            }
            (Some(FIRST_VERSION), 2) | (Some(SECOND_VERSION), 4) => self.encoding = value,
            (Some(FIRST_VERSION), 3) => self.definition = value,
            (Some(FIRST_VERSION), 4) => self.repetition = value,
            (Some(SECOND_VERSION), 5 | 6) => {
                self.is_impossible |= !(0..=MAX_PAGE_BYTES).contains(&value);
                match id {
                    5 => self.definition = value,
                    _ => self.repetition = value,
                }
            }
            (Some(SECOND_VERSION), 7) => self.is_plain = value == 0,
            _ => {}
        }
    }

    /// Whether nothing was said of this before: a writer says everything once, and has one head for pages of a kind.
    fn is_new(&mut self, outer: Option<i64>, id: i64) -> bool {
        let (inner, kind) = match outer {
            None => (0, self.kind),
            Some(FIRST_VERSION | DICTIONARY | SECOND_VERSION) => (16, outer),
            Some(_) => return true,
        };
        if !(0..16).contains(&id) {
            return true;
        }
        let bit = 1 << (inner + id);
        let is_new = self.seen & bit == 0 && self.kind.is_none_or(|known| kind == Some(known));
        self.kind = kind;
        self.seen |= bit;
        is_new
    }
}

#[cfg(test)]
impl PageHead {
    /// Of the numbers that a head has.
    fn of(fields: &[(Option<i64>, i64, i64)]) -> Self {
        let mut head = Self::default();
        for (outer, id, value) in fields {
            head.note(*outer, *id, *value);
        }
        head
    }
}

impl<R: ChunkReader> Length for Checked<R> {
    fn len(&self) -> u64 {
        self.len
    }
}

impl<R: ChunkReader> ChunkReader for Checked<R> {
    type T = R::T;

    fn get_read(&self, start: u64) -> Result<Self::T> {
        self.page(start).map(|(_, read)| read)
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        if start
            .checked_add(length as u64)
            .is_none_or(|end| end > self.len)
        {
            return Err(malformed("a part of it would be behind its end"));
        }
        self.file.get_bytes(start, length)
    }
}

fn malformed(reason: &str) -> ParquetError {
    ParquetError::General(reason.to_owned())
}

/// That bytes are the metadata of a file.
pub(crate) fn check_metadata(bytes: &[u8]) -> Result<()> {
    check(bytes, FILE_METADATA)
}

fn check(bytes: &[u8], structure: Struct) -> Result<()> {
    match walk(bytes, structure, |_, _, _| ()) {
        Ok(_) => Ok(()),
        Err(_) => Err(malformed("its metadata is malformed")),
    }
}

/// Whether the page indexes of a file can be read; `tail` is its end, `size` its whole size.
pub(crate) fn check_page_indexes(metadata: &ParquetMetaData, tail: &[u8], size: u64) -> Result<()> {
    let start = size.saturating_sub(tail.len() as u64);
    let part = |offset: Option<i64>, length: Option<i32>, structure| {
        let (Some(offset), Some(length)) = (offset, length) else {
            return Ok(());
        };
        let from = u64::try_from(offset)
            .ok()
            .and_then(|at| at.checked_sub(start));
        from.and_then(|from| tail.get(usize::try_from(from).ok()?..))
            .and_then(|rest| rest.get(..usize::try_from(length).ok()?))
            .ok_or_else(|| malformed("its page index is elsewhere"))
            .and_then(|bytes| check(bytes, structure))
    };
    metadata
        .row_groups()
        .iter()
        .flat_map(|group| group.columns())
        .try_for_each(|column| {
            part(
                column.column_index_offset(),
                column.column_index_length(),
                COLUMN_INDEX,
            )?;
            part(
                column.offset_index_offset(),
                column.offset_index_length(),
                OFFSET_INDEX,
            )
        })
}

// -- parquet.thrift of the format, 2.12 --------------------------------------------------------------------------------

use Type::{Binary, Bool, Double, I8, I16, I32, I64, List};

const EMPTY: Type = Type::Struct(&[]);

const FILE_METADATA: Struct = &[
    (1, I32),
    (2, List(&Type::Struct(SCHEMA_ELEMENT))),
    (3, I64),
    (4, List(&Type::Struct(ROW_GROUP))),
    (5, List(&KEY_VALUE)),
    (6, Binary),
    (7, List(&Type::Struct(&[(1, EMPTY), (2, EMPTY)]))),
    (8, Type::Struct(&[(1, AES), (2, AES)])),
    (9, Binary),
];

const AES: Type = Type::Struct(&[(1, Binary), (2, Binary), (3, Bool)]);

const SCHEMA_ELEMENT: Struct = &[
    (1, I32),
    (2, I32),
    (3, I32),
    (4, Binary),
    (5, I32),
    (6, I32),
    (7, I32),
    (8, I32),
    (9, I32),
    (10, Type::Struct(LOGICAL_TYPE)),
];

const LOGICAL_TYPE: Struct = &[
    (1, EMPTY),
    (2, EMPTY),
    (3, EMPTY),
    (4, EMPTY),
    (5, Type::Struct(&[(1, I32), (2, I32)])),
    (6, EMPTY),
    (7, TIME),
    (8, TIME),
    (10, Type::Struct(&[(1, I8), (2, Bool)])),
    (11, EMPTY),
    (12, EMPTY),
    (13, EMPTY),
    (14, EMPTY),
    (15, EMPTY),
    (16, Type::Struct(&[(1, I8)])),
    (17, Type::Struct(&[(1, Binary)])),
    (18, Type::Struct(&[(1, Binary), (2, I32)])),
];

const TIME: Type = Type::Struct(&[
    (1, Bool),
    (2, Type::Struct(&[(1, EMPTY), (2, EMPTY), (3, EMPTY)])),
]);

const KEY_VALUE: Type = Type::Struct(&[(1, Binary), (2, Binary)]);

const ROW_GROUP: Struct = &[
    (1, List(&Type::Struct(COLUMN_CHUNK))),
    (2, I64),
    (3, I64),
    (4, List(&Type::Struct(&[(1, I32), (2, Bool), (3, Bool)]))),
    (5, I64),
    (6, I64),
    (7, I16),
];

const COLUMN_CHUNK: Struct = &[
    (1, Binary),
    (2, I64),
    (3, Type::Struct(COLUMN_METADATA)),
    (4, I64),
    (5, I32),
    (6, I64),
    (7, I32),
    (
        8,
        Type::Struct(&[
            (1, EMPTY),
            (2, Type::Struct(&[(1, List(&Binary)), (2, Binary)])),
        ]),
    ),
    (9, Binary),
];

const COLUMN_METADATA: Struct = &[
    (1, I32),
    (2, List(&I32)),
    (3, List(&Binary)),
    (4, I32),
    (5, I64),
    (6, I64),
    (7, I64),
    (8, List(&KEY_VALUE)),
    (9, I64),
    (10, I64),
    (11, I64),
    (12, STATISTICS),
    (13, List(&Type::Struct(&[(1, I32), (2, I32), (3, I32)]))),
    (14, I64),
    (15, I32),
    (
        16,
        Type::Struct(&[(1, I64), (2, List(&I64)), (3, List(&I64))]),
    ),
    (17, Type::Struct(&[(1, Type::Struct(BOX)), (2, List(&I32))])),
];

/// The bounds of places.
const BOX: Struct = &[
    (1, Double),
    (2, Double),
    (3, Double),
    (4, Double),
    (5, Double),
    (6, Double),
    (7, Double),
    (8, Double),
];

const STATISTICS: Type = Type::Struct(&[
    (1, Binary),
    (2, Binary),
    (3, I64),
    (4, I64),
    (5, Binary),
    (6, Binary),
    (7, Bool),
    (8, Bool),
]);

const PAGE_HEADER: Struct = &[
    (1, I32),
    (2, I32),
    (3, I32),
    (4, I32),
    (
        5,
        Type::Struct(&[(1, I32), (2, I32), (3, I32), (4, I32), (5, STATISTICS)]),
    ),
    (6, EMPTY),
    (7, Type::Struct(&[(1, I32), (2, I32), (3, Bool)])),
    (
        8,
        Type::Struct(&[
            (1, I32),
            (2, I32),
            (3, I32),
            (4, I32),
            (5, I32),
            (6, I32),
            (7, Bool),
            (8, STATISTICS),
        ]),
    ),
];

const COLUMN_INDEX: Struct = &[
    (1, List(&Bool)),
    (2, List(&Binary)),
    (3, List(&Binary)),
    (4, I32),
    (5, List(&I64)),
    (6, List(&I64)),
    (7, List(&I64)),
];

const OFFSET_INDEX: Struct = &[
    (1, List(&Type::Struct(&[(1, I64), (2, I32), (3, I64)]))),
    (2, List(&I64)),
];

#[cfg(test)]
mod tests {
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    use super::*;
    use crate::testing;

    /// Reads all of a file.
    fn rows(file: Vec<u8>) -> Result<usize> {
        let file = Checked::new(Bytes::from(file))?;
        let reader = ParquetRecordBatchReaderBuilder::try_new(file)?.build()?;
        let mut rows = 0;
        for batch in reader {
            rows += batch.map_err(|e| malformed(&e.to_string()))?.num_rows();
        }
        Ok(rows)
    }

    #[test]
    fn honest_files_are_read() {
        for n in [1, 300] {
            assert_eq!(rows(testing::file(n, 1).sink).unwrap(), n);
        }
    }

    #[test]
    fn heads_of_pages() {
        // Of 1000 and 10 bytes, with 5 values: a page of the first version, a dictionary, a page of the second version.
        let first = b"\x15\x00\x15\xd0\x0f\x15\x14\x2c\x15\x0a\x15\x0e\x15\x06\x15\x06\x00\x00";
        let dictionary = b"\x15\x04\x15\xd0\x0f\x15\x14\x4c\x15\x0a\x15\x00\x00\x00";
        let second = b"\x15\x06\x15\xd0\x0f\x15\x14\x5c\x15\x0a\x15\x00\x15\x0a\x15\x00\x15\x0e\x15\x04\x12\x00\x00";
        let read = |bytes: &[u8]| {
            let mut head = PageHead::default();
            walk(bytes, PAGE_HEADER, |outer, id, value| {
                head.note(outer, id, value)
            })
            .map(|_| head)
        };
        let within = Levels::Within {
            repetition: 3,
            definition: 3,
        };
        let nowhere = Levels::Within {
            repetition: 0,
            definition: 0,
        };
        let before = Levels::Before {
            bytes: 9,
            is_compressed: false,
        };
        for (bytes, is_dictionary, is_written_out, levels) in [
            (&first[..], false, true, within),
            (dictionary, true, false, nowhere),
            (second, false, false, before),
        ] {
            let head = read(bytes).unwrap();
            assert!(!head.is_impossible);
            assert_eq!((head.bytes, head.values, head.levels()), (1000, 5, levels));
            assert_eq!(head.is_dictionary, is_dictionary);
            assert_eq!(head.is_written_out(), is_written_out);
            assert_eq!(head.has_lengths(), is_written_out);
            for end in 0..bytes.len() {
                assert_eq!(read(&bytes[..end]), Err(Fault::Truncated));
            }
        }
        // Field 65538, which is field 2 in 16 bits; and what nobody knows.
        assert_eq!(
            read(b"\x15\x00\x05\x84\x80\x08\x02\x00"),
            Err(Fault::Malformed)
        );
        let unknown =
            b"\x15\x00\x15\xd0\x0f\xf9\x25\x02\x04\x1b\x01\x8c\x01a\x15\x02\x00\x18\x01b\x11\x00";
        let head = read(unknown).unwrap();
        assert_eq!(
            (head.bytes, head.values, head.is_impossible),
            (1000, 0, false)
        );
    }

    #[test]
    fn a_head_says_everything_once() {
        let honest = [
            (None, 1, 0),
            (None, 2, 10),
            (None, 3, 10),
            (Some(5), 1, 4),
            (Some(5), 2, 6),
        ];
        assert!(!PageHead::of(&honest).is_impossible);
        assert!(PageHead::of(&honest).has_lengths());
        for more in [
            (None, 2, 10),
            (Some(5), 2, 0),
            (Some(8), 4, 0),
            (Some(7), 2, 0),
        ] {
            let mut twice = honest.to_vec();
            twice.push(more);
            assert!(PageHead::of(&twice).is_impossible, "{more:?}");
        }
    }

    #[test]
    fn impossible_claims_are_refused_before_anything_is_allocated() {
        let end = |metadata: &[u8]| {
            let length = (metadata.len() as u32).to_le_bytes();
            [b"PAR1", metadata, &length, b"PAR1"].concat()
        };
        // A schema of 2^31 elements, and row groups as many, each of 200 bytes or more in memory.
        for metadata in [
            &b"\x15\x02\x19\xfc\xff\xff\xff\xff\x07\x00"[..],
            b"\x15\x02\x19\x1c\x48\x01a\x15\x00\x00\x16\x02\x19\xfc\xff\xff\xff\xff\x07\x00",
        ] {
            assert!(rows(end(metadata)).is_err());
        }
        assert!(rows(b"PAR1".to_vec()).is_err());
        assert!(rows(b"\xff\xff\xff\xffPAR1".to_vec()).is_err());

        // A page that would be of two gigabytes: the first of the file, behind its magic.
        let mut file = testing::file(1, 1).sink;
        let page = &file[4..];
        let mut sizes = Vec::new();
        walk(page, PAGE_HEADER, |outer, id, value| {
            if outer.is_none() {
                sizes.push((id, value));
            }
        })
        .unwrap();
        assert_eq!(sizes[1].0, 2, "{sizes:?}");
        // The kind of page, then its size, each behind a byte that announces it.
        let after = 7 + page[3..].iter().position(|b| *b == 0x15).unwrap();
        let mut head = file[..7].to_vec();
        head.extend(b"\xfe\xff\xff\xff\x0f");
        head.extend(&file[after..]);
        let checked = Checked {
            len: head.len() as u64,
            metadata_at: head.len() as u64,
            file: Bytes::from(head),
        };
        assert!(checked.get_read(4).is_err());
        assert!(checked.get_bytes(4, usize::MAX).is_err());
        file.truncate(4);
        assert!(rows(file).is_err());
    }
}
