//! The pages of a Parquet file on their way to the library, which makes room for whatever their heads say: they are looked at
//! first, and what they take in memory is asked for.
//!
//! A footer says what a column takes in all. How that is parted is seen only as the pages come: one page may be nearly all of
//! its column, one list nearly all of a page. So memory is taken page by page, for as long as a batch needs them; a part of it
//! is free, for honest files need no more.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::basic::Type as PhysicalType;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{ChunkReader, Length};
use rakam_lake::cache::Memory;
use rakam_lake::untrusted::Checked;

use crate::parquet_file::{Bytewise, BytewiseRead};
use crate::parquet_rows;

/// What the pages of a file may take that nobody is asked for. Writers aim at a megabyte, but some look at the size of a page
/// once in a thousand rows only, however long these are.
const FREE_BYTES: u64 = 64 << 20;
/// A larger page of texts that are written out is counted with what they may become.
const WRITTEN_PAGE_BYTES: u64 = 2 << 20;
/// About an entry of a dictionary in memory, beside its text.
const ENTRY_BYTES: u64 = 16;
/// So much is read of a page to find its head, which is longer only if it has bounds of long texts.
const HEAD_BYTES: u64 = 1 << 10;
const MAX_HEAD_BYTES: u64 = 16 << 20;

/// A file whose pages are looked at. Clones share what is known of them.
#[derive(Clone)]
pub struct Pages {
    file: Arc<Checked<Bytewise>>,
    bytes: Bytewise,
    account: Account,
}

impl Pages {
    pub fn new(bytes: Bytewise, account: &Account) -> Result<Self> {
        Ok(Self {
            file: Arc::new(Checked::new(bytes.clone())?),
            bytes,
            account: account.clone(),
        })
    }

    /// Reads from here on, where a page begins once pages are expected.
    fn begin(&self, start: u64) -> Result<BytewiseRead> {
        if self.account.expects_pages() {
            self.account.announce(start, self.head(start)?)?;
        }
        // Last: all readers of a file share one place in it.
        self.file.get_read(start)
    }

    fn head(&self, start: u64) -> Result<Head> {
        let mut wanted = HEAD_BYTES;
        loop {
            let mut bytes = Vec::new();
            let mut read = self.bytes.get_read(start)?.take(wanted);
            read.read_to_end(&mut bytes)?;
            match Head::read(&bytes) {
                Some(head) => return Ok(head),
                None if bytes.len() as u64 == wanted && wanted < MAX_HEAD_BYTES => wanted *= 4,
                None => return Err(malformed("the head of a page is malformed")),
            }
        }
    }
}

impl Length for Pages {
    fn len(&self) -> u64 {
        self.file.len()
    }
}

impl ChunkReader for Pages {
    type T = PageRead;

    fn get_read(&self, start: u64) -> Result<PageRead> {
        Ok(PageRead {
            pages: self.clone(),
            start,
            read: None,
        })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        self.account.take_page(start)?;
        self.file.get_bytes(start, length)
    }
}

/// Reads from a place on. It is looked at when it is read: where the library has looked ahead it begins to read behind a head,
/// and then does not read.
pub struct PageRead {
    pages: Pages,
    start: u64,
    read: Option<BytewiseRead>,
}

impl Read for PageRead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.read {
            Some(read) => read,
            none => none.insert(self.pages.begin(self.start).map_err(io::Error::other)?),
        };
        read.read(buffer)
    }
}

fn malformed(reason: &str) -> ParquetError {
    ParquetError::General(reason.to_owned())
}

/// What the pages of a file take while it is read. Clones share it.
#[derive(Clone, Default)]
pub struct Account(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    memory: Option<Arc<dyn Memory>>,
    taken: usize,
    /// The memory was not to be had.
    is_refused: bool,
    /// Where the wanted columns begin, in this order, each with the number of its leaf.
    starts: Vec<(u64, usize)>,
    leaves: Vec<Leaf>,
    /// How many columns a page may be one of: more than one where they overlap.
    times: u64,
    /// Rows that are decoded at a time.
    rows: u64,
    /// What all pages take: of each leaf the last ones, and those before them since the batch began.
    total: u64,
    /// The part of the latter.
    past: u64,
}

/// A column of all row groups.
#[derive(Debug, Clone, Copy, Default)]
struct Leaf {
    is_text: bool,
    /// The footer says that there are texts which are written out.
    is_written_out: bool,
    /// What a value of a list takes; 0 where each row has one, which is counted by rows.
    value_bytes: u64,
    /// Of the page that comes next.
    head: Option<Head>,
    dictionary: u64,
    page: u64,
}

impl Account {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what is going to be read: these columns of these row groups, so many rows at a time. What is not free is taken of
    /// `memory`; without it nothing is.
    pub fn expect(
        &self,
        metadata: &ParquetMetaData,
        groups: &[usize],
        mask: &ProjectionMask,
        rows: usize,
        memory: Option<Arc<dyn Memory>>,
    ) {
        let mut held = self.held();
        let mut places = Vec::new();
        for &group in groups {
            let columns = metadata.row_group(group).columns().iter().enumerate();
            for (number, column) in columns.filter(|(leaf, _)| mask.leaf_included(*leaf)) {
                if held.leaves.len() <= number {
                    held.leaves.resize(number + 1, Leaf::default());
                }
                let leaf = &mut held.leaves[number];
                leaf.is_text = column.column_type() == PhysicalType::BYTE_ARRAY;
                leaf.is_written_out |= parquet_rows::is_written_out(column);
                if column.column_descr().max_rep_level() > 0 {
                    leaf.value_bytes = parquet_rows::value_bytes(column.column_descr());
                }
                let start = column.dictionary_page_offset();
                let start = u64::try_from(start.unwrap_or(column.data_page_offset()));
                let length = u64::try_from(column.compressed_size()).unwrap_or(0);
                if let Ok(start) = start
                    && length > 0
                {
                    places.push((start, start.saturating_add(length), number));
                }
            }
        }
        places.sort_unstable();
        let overlap = places.windows(2).any(|pair| pair[1].0 < pair[0].1);
        held.times = if overlap { held.leaves.len() as u64 } else { 1 };
        held.starts = places.iter().map(|place| (place.0, place.2)).collect();
        held.rows = rows as u64;
        held.memory = memory;
    }

    fn expects_pages(&self) -> bool {
        !self.held().starts.is_empty()
    }

    /// What the head that lies here says of its page. Pages may be passed over: nothing is taken yet.
    fn announce(&self, at: u64, head: Head) -> Result<()> {
        if head.is_dictionary && head.values > head.bytes {
            return Err(malformed("a dictionary has more values than bytes"));
        }
        if let Some(leaf) = self.held().leaf(at) {
            leaf.head = Some(head);
        }
        Ok(())
    }

    /// Takes the memory of the page that was announced last in the column that lies here: now it is read.
    fn take_page(&self, at: u64) -> Result<()> {
        let mut held = self.held();
        let (rows, times) = (held.rows, held.times);
        let Some(leaf) = held.leaf(at) else {
            return Ok(());
        };
        let Some(head) = leaf.head.take() else {
            return Ok(());
        };
        let bytes = leaf.bytes_of(head, rows).saturating_mul(times);
        let last = match head.is_dictionary {
            true => &mut leaf.dictionary,
            false => &mut leaf.page,
        };
        let before = std::mem::replace(last, bytes);
        held.past = held.past.saturating_add(before);
        held.total = held.total.saturating_add(bytes);
        held.settle()
    }

    /// A batch begins: of what the one before it has read only the last pages are needed any more.
    pub fn next_batch(&self) {
        let mut held = self.held();
        held.total = held.total.saturating_sub(held.past);
        held.past = 0;
        // It is no more than before: what is given back cannot be refused.
        let _settled = held.settle();
    }

    /// Whether a page was not read because there was no memory for it.
    pub fn is_refused(&self) -> bool {
        self.held().is_refused
    }
}

impl Held {
    /// The column that lies here.
    fn leaf(&mut self, at: u64) -> Option<&mut Leaf> {
        let after = self.starts.partition_point(|(start, _)| *start <= at);
        let (_, number) = *self.starts.get(after.checked_sub(1)?)?;
        self.leaves.get_mut(number)
    }

    /// Takes what is missing of the memory, or gives back what is too much.
    fn settle(&mut self) -> Result<()> {
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        let wanted = self.total.saturating_sub(FREE_BYTES);
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        if wanted <= self.taken {
            memory.give_back(self.taken - wanted);
        } else if !memory.try_take(wanted - self.taken) {
            self.is_refused = true;
            return Err(malformed("there is not enough memory for a page"));
        }
        self.taken = wanted;
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(memory) = &self.memory {
            memory.give_back(self.taken);
        }
    }
}

impl Leaf {
    /// About what a page takes, with what is made of it at a time.
    fn bytes_of(&self, head: Head, rows: u64) -> u64 {
        let value_bytes = match head.is_dictionary {
            true => ENTRY_BYTES,
            false => self.value_bytes,
        };
        let values = head.values.saturating_mul(value_bytes);
        let is_bounded = self.is_written_out && head.bytes <= WRITTEN_PAGE_BYTES;
        let written = match head.is_written_out && self.is_text && !is_bounded {
            true if self.value_bytes > 0 => head.values,
            true => head.values.min(rows),
            false => 0,
        };
        let written = head.bytes.saturating_mul(written);
        (head.bytes.saturating_add(values)).saturating_add(written)
    }
}

/// What the head of a page says of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Head {
    is_dictionary: bool,
    /// Before compression.
    bytes: u64,
    values: u64,
    /// Its texts are made one by one, of the one before and a few bytes: DELTA_BYTE_ARRAY.
    is_written_out: bool,
}

/// As in parquet.thrift.
const DICTIONARY_PAGE: i32 = 2;
const DELTA_BYTE_ARRAY: i32 = 7;

impl Head {
    /// None: it is not whole, or the library might read it in another way. Of what is said twice the larger counts.
    fn read(bytes: &[u8]) -> Option<Self> {
        let mut head = Self::default();
        let size = |value: i32| u64::from(value.max(0).unsigned_abs());
        let mut number = |outer: Option<i64>, id: i64, value: i32| match (outer, id) {
            (None, 1) => head.is_dictionary = value == DICTIONARY_PAGE,
            (None, 2) => head.bytes = head.bytes.max(size(value)),
            (Some(5 | 7 | 8), 1) => head.values = head.values.max(size(value)),
            (Some(5), 2) | (Some(8), 4) => head.is_written_out |= value == DELTA_BYTE_ARRAY,
            _ => {}
        };
        Numbers { rest: bytes }.structure(None, 0, &mut number)?;
        Some(head)
    }
}

/// The whole numbers of a structure in Thrift's compact protocol. Whether it is what the library takes it for is looked at by
/// [`Checked`].
struct Numbers<'a> {
    rest: &'a [u8],
}

/// Wire types.
const STOP: u8 = 0;
const TRUE: u8 = 1;
const FALSE: u8 = 2;
const I8: u8 = 3;
const I16: u8 = 4;
const I32: u8 = 5;
const I64: u8 = 6;
const DOUBLE: u8 = 7;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const SET: u8 = 10;
const MAP: u8 = 11;
const STRUCT: u8 = 12;
const UUID: u8 = 13;

/// Nesting of fields that nobody knows.
const MAX_DEPTH: usize = 32;

impl Numbers<'_> {
    fn byte(&mut self) -> Option<u8> {
        self.rest.split_off_first().copied()
    }

    fn skip(&mut self, bytes: usize) -> Option<()> {
        self.rest.split_off(..bytes).map(drop)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn zigzag(&mut self) -> Option<i64> {
        let folded = self.varint()?;
        Some((folded >> 1) as i64 ^ -((folded & 1) as i64))
    }

    /// Calls `number` with the id and value of each number of a structure, and of the structures in it with their own id.
    fn structure(
        &mut self,
        outer: Option<i64>,
        depth: usize,
        number: &mut dyn FnMut(Option<i64>, i64, i32),
    ) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        let mut id = 0_i64;
        loop {
            let head = self.byte()?;
            let wire = head & 0x0f;
            if wire == STOP {
                return Some(());
            }
            id = match head >> 4 {
                0 => self.zigzag()?,
                delta => id + i64::from(delta),
            };
            // Of others the library takes 16 bits, which may be those of a known one.
            if !(0..=i64::from(i16::MAX)).contains(&id) {
                return None;
            }
            match wire {
                TRUE | FALSE => {}
                I16 | I32 | I64 => {
                    let value = self.zigzag()?;
                    if depth < 2 {
                        // As much of it as the library takes.
                        number(outer, id, value as i32);
                    }
                }
                STRUCT => self.structure(Some(id), depth + 1, number)?,
                _ => self.value(wire, depth)?,
            }
        }
    }

    /// Passes over a value.
    fn value(&mut self, wire: u8, depth: usize) -> Option<()> {
        match wire {
            TRUE | FALSE | I8 => self.skip(1),
            I16 | I32 | I64 => self.varint().map(drop),
            DOUBLE => self.skip(8),
            UUID => self.skip(16),
            BINARY => {
                let length = self.varint()?;
                self.skip(usize::try_from(length).ok()?)
            }
            LIST | SET => {
                let head = self.byte()?;
                let size = match head >> 4 {
                    15 => self.varint()?,
                    size => u64::from(size),
                };
                self.elements(size, &[head & 0x0f], depth)
            }
            MAP => match self.varint()? {
                0 => Some(()),
                size => {
                    let types = self.byte()?;
                    self.elements(size, &[types >> 4, types & 0x0f], depth)
                }
            },
            STRUCT => self.structure(None, depth + 1, &mut |_, _, _| ()),
            _ => None,
        }
    }

    fn elements(&mut self, size: u64, wires: &[u8], depth: usize) -> Option<()> {
        // Each takes a byte at least.
        if depth > MAX_DEPTH || size > self.rest.len() as u64 {
            return None;
        }
        for _ in 0..size {
            for &wire in wires {
                self.value(wire, depth + 1)?;
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests;
