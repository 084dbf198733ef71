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
use rakam_lake::untrusted::{Checked, PageHead};

use crate::parquet_delta::{self, Column};
use crate::parquet_file::{Bytewise, BytewiseRead};
use crate::parquet_rows;

/// What the pages of a file may take that nobody is asked for. Writers aim at a megabyte, but some look at the size of a page
/// once in a thousand rows only, however long these are.
const FREE_BYTES: u64 = 64 << 20;
/// A larger page of texts that are written out is counted with what they may become.
const WRITTEN_PAGE_BYTES: u64 = 2 << 20;
/// About an entry of a dictionary in memory, beside its text.
const ENTRY_BYTES: u64 = 16;
/// Of a text whose length is apart: its length, and that of what it shares with the one before.
const LENGTHS_BYTES: u64 = 8;

/// A file whose pages are looked at. Clones share what is known of them.
#[derive(Clone)]
pub struct Pages {
    file: Arc<Checked<Bytewise>>,
    account: Account,
}

impl Pages {
    pub fn new(bytes: Bytewise, account: &Account) -> Result<Self> {
        Ok(Self {
            file: Arc::new(Checked::new(bytes)?),
            account: account.clone(),
        })
    }

    /// Reads from here on, where a page begins once pages are expected.
    fn begin(&self, start: u64) -> Result<BytewiseRead> {
        let (head, read) = self.file.page(start)?;
        if let Some(head) = head
            && self.account.expects_pages()
        {
            self.account.announce(start, head)?;
        }
        Ok(read)
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
        let taken = self.account.take_page(start)?;
        let bytes = self.file.get_bytes(start, length)?;
        if let Some((head, column)) = taken
            && head.has_lengths()
        {
            parquet_delta::check(&bytes, &head, column)?;
        }
        Ok(bytes)
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

pub fn malformed(reason: &str) -> ParquetError {
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
    /// Where the wanted columns begin, in this order.
    starts: Vec<Start>,
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

/// A column of one row group.
#[derive(Debug, Clone, Copy)]
struct Start {
    at: u64,
    leaf: usize,
    column: Column,
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
    head: Option<PageHead>,
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
                    let place = Start {
                        at: start,
                        leaf: number,
                        column: Column {
                            codec: column.compression(),
                            max_repetition: column.column_descr().max_rep_level(),
                            max_definition: column.column_descr().max_def_level(),
                        },
                    };
                    places.push((place, start.saturating_add(length)));
                }
            }
        }
        places.sort_unstable_by_key(|(place, end)| (place.at, *end, place.leaf));
        let overlap = places.windows(2).any(|pair| pair[1].0.at < pair[0].1);
        held.times = if overlap { held.leaves.len() as u64 } else { 1 };
        held.starts = places.into_iter().map(|(place, _)| place).collect();
        held.rows = rows as u64;
        held.memory = memory;
    }

    fn expects_pages(&self) -> bool {
        !self.held().starts.is_empty()
    }

    /// What the head that lies here says of its page. Pages may be passed over: nothing is taken yet.
    fn announce(&self, at: u64, head: PageHead) -> Result<()> {
        if head.is_dictionary && head.values > head.bytes {
            return Err(malformed("a dictionary has more values than bytes"));
        }
        let mut held = self.held();
        if let Some(start) = held.start(at) {
            held.leaves[start.leaf].head = Some(head);
        }
        Ok(())
    }

    /// Takes the memory of the page that was announced last in the column that lies here: now it is read. Answers what its head
    /// said, and its column.
    fn take_page(&self, at: u64) -> Result<Option<(PageHead, Column)>> {
        let mut held = self.held();
        let (rows, times) = (held.rows, held.times);
        let Some(Start { leaf, column, .. }) = held.start(at) else {
            return Ok(None);
        };
        let leaf = &mut held.leaves[leaf];
        let Some(head) = leaf.head.take() else {
            return Ok(None);
        };
        if head.has_lengths() && times > 1 {
            return Err(malformed("columns lie within each other"));
        }
        let bytes = leaf.bytes_of(head, rows).saturating_mul(times);
        let last = match head.is_dictionary {
            true => &mut leaf.dictionary,
            false => &mut leaf.page,
        };
        let before = std::mem::replace(last, bytes);
        held.past = held.past.saturating_add(before);
        held.total = held.total.saturating_add(bytes);
        held.settle()?;
        Ok(Some((head, column)))
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
    fn start(&self, at: u64) -> Option<Start> {
        let after = self.starts.partition_point(|start| start.at <= at);
        self.starts.get(after.checked_sub(1)?).copied()
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
    fn bytes_of(&self, head: PageHead, rows: u64) -> u64 {
        let value_bytes = match head.is_dictionary {
            true => ENTRY_BYTES,
            false => self.value_bytes,
        };
        let values = head.values.saturating_mul(value_bytes);
        let is_bounded = self.is_written_out && head.bytes <= WRITTEN_PAGE_BYTES;
        let written = match head.is_written_out() && self.is_text && !is_bounded {
            true if self.value_bytes > 0 => head.values,
            true => head.values.min(rows),
            false => 0,
        };
        let written = head.bytes.saturating_mul(written);
        // Decompressed for its lengths, and for itself.
        let lengths = match head.has_lengths() {
            true => (head.values.saturating_mul(LENGTHS_BYTES)).saturating_add(head.bytes),
            false => 0,
        };
        [values, written, lengths]
            .into_iter()
            .fold(head.bytes, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests;
