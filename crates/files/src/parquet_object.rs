//! A Parquet file in a bucket, as the library reads files: the end first, then of each row group the wanted columns, in
//! windows that are bounded together.

use std::io::{self, Read};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use parquet::arrow::ProjectionMask;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use parquet::file::reader::{ChunkReader, Length};

use crate::error::FilesError;
use crate::object::{Coming, Lane, Opened};

/// So much of its end is fetched at once: most have their metadata in it.
const TAIL_BYTES: u64 = 64 << 10;
/// The windows of a row group's columns together, and the least of one. As much again is on its way.
pub const GROUP_BYTES: u64 = 8 << 20;
const WINDOW_BYTES_MIN: u64 = 64 << 10;
/// What is read outside of any column.
const OTHER_BYTES: u64 = 64 << 10;

/// The file; clones share what was fetched of it.
#[derive(Clone)]
pub struct ParquetObject {
    object: Opened,
    parts: Arc<Mutex<Parts>>,
}

struct Parts {
    tail: (u64, Bytes),
    groups: Vec<Group>,
    /// The first windows of the group after the newest one.
    ahead: Option<(usize, Coming)>,
    other: (u64, Bytes),
    /// What the library only keeps the text of.
    failure: Option<FilesError>,
}

/// The wanted columns of a row group, in the order of their places.
struct Group {
    columns: Vec<Range<u64>>,
    lanes: Option<Vec<Lane>>,
}

impl Group {
    fn window(&self) -> u64 {
        (GROUP_BYTES / self.columns.len().max(1) as u64).max(WINDOW_BYTES_MIN)
    }

    fn new_lanes(&self) -> Vec<Lane> {
        let window = self.window();
        let lane = |range: &Range<u64>| Lane::new(range.clone(), window, window);
        self.columns.iter().map(lane).collect()
    }

    fn first_windows(&self) -> Vec<Range<u64>> {
        let lanes = self.new_lanes();
        lanes
            .iter()
            .map(|lane| lane.window_at(lane.range.start))
            .collect()
    }
}

impl ParquetObject {
    pub fn open(object: Opened) -> std::result::Result<Self, FilesError> {
        let start = object.bytes.saturating_sub(TAIL_BYTES);
        let tail = match object.bytes {
            0 => Bytes::new(),
            end => object.read_one(start..end)?,
        };
        Ok(Self {
            object,
            parts: Arc::new(Mutex::new(Parts {
                tail: (start, tail),
                groups: Vec::new(),
                ahead: None,
                other: (0, Bytes::new()),
                failure: None,
            })),
        })
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The error that a failure of the library comes from, if it was one of fetching.
    pub fn failure(&self) -> Option<FilesError> {
        self.parts().failure.take()
    }

    /// Says what is going to be read: these columns of these row groups.
    pub fn expect(&self, metadata: &ParquetMetaData, groups: &[usize], mask: &ProjectionMask) {
        let group = |&index: &usize| {
            let mut columns = columns(metadata.row_groups().get(index)?, mask, self.object.bytes);
            columns.sort_unstable_by_key(|range| range.start);
            Some(Group {
                columns,
                lanes: None,
            })
        };
        let mut parts = self.parts();
        parts.groups = groups.iter().filter_map(group).collect();
        parts.ahead = None;
    }

    /// What there is from `at` on, as much as there happens to be; empty at the end only.
    fn get(&self, at: u64) -> Result<Bytes> {
        if at >= self.object.bytes {
            return Ok(Bytes::new());
        }
        let mut parts = self.parts();
        let found = parts.get(&self.object, at);
        found.map_err(|error| {
            let text = error.to_string();
            parts.failure = Some(error);
            ParquetError::General(text)
        })
    }
}

/// Where a row group's wanted columns lie. Those of which the metadata says nothing sensible are left out, and read as
/// anything else is.
fn columns(group: &RowGroupMetaData, mask: &ProjectionMask, bytes: u64) -> Vec<Range<u64>> {
    let place = |column: &parquet::file::metadata::ColumnChunkMetaData| {
        let data = u64::try_from(column.data_page_offset()).ok()?;
        let dictionary = column
            .dictionary_page_offset()
            .and_then(|at| u64::try_from(at).ok());
        let start = dictionary
            .filter(|&at| at > 0)
            .map_or(data, |at| at.min(data));
        let length = u64::try_from(column.compressed_size()).ok()?;
        let end = start.checked_add(length)?;
        (start < end && end <= bytes).then_some(start..end)
    };
    let wanted = group.columns().iter().enumerate();
    wanted
        .filter(|(leaf, _)| mask.leaf_included(*leaf))
        .filter_map(|(_, column)| place(column))
        .collect()
}

impl Parts {
    fn get(&mut self, object: &Opened, at: u64) -> std::result::Result<Bytes, FilesError> {
        for (start, bytes) in [&self.tail, &self.other] {
            if let Some(part) = at.checked_sub(*start)
                && part < bytes.len() as u64
            {
                return Ok(bytes.slice(part as usize..));
            }
        }
        let Some((group, lane)) = self.place(at) else {
            let end = at.saturating_add(OTHER_BYTES).min(object.bytes);
            let bytes = object.read_one(at..end)?;
            self.other = (at, bytes.clone());
            return Ok(bytes);
        };
        if self.groups[group].lanes.is_none() {
            self.begin(object, group)?;
        }
        match &mut self.groups[group].lanes {
            Some(lanes) => lanes[lane].get(object, at),
            None => Err(FilesError::Arrow("a row group is not there".to_owned())),
        }
    }

    /// The column that lies here.
    fn place(&self, at: u64) -> Option<(usize, usize)> {
        self.groups.iter().enumerate().find_map(|(number, group)| {
            let after = group.columns.partition_point(|range| range.start <= at);
            let lane = after.checked_sub(1)?;
            group.columns[lane].contains(&at).then_some((number, lane))
        })
    }

    /// Fetches the beginnings of all columns of a row group, together; and begins with those of the next one.
    fn begin(&mut self, object: &Opened, group: usize) -> std::result::Result<(), FilesError> {
        let mut lanes = self.groups[group].new_lanes();
        let windows = match self.ahead.take() {
            Some((ahead, coming)) if ahead == group => object.finish(coming)?,
            _ => object.read(self.groups[group].first_windows())?,
        };
        for (lane, bytes) in lanes.iter_mut().zip(windows) {
            lane.fill(lane.range.start, bytes);
        }
        self.groups[group].lanes = Some(lanes);
        // Columns go on to the next group at about the same time.
        for before in &mut self.groups[..group.saturating_sub(1)] {
            before.lanes = None;
        }
        if let Some(next) = self.groups.get(group + 1)
            && next.lanes.is_none()
        {
            let coming = object.begin(next.first_windows())?;
            self.ahead = Some((group + 1, coming));
        }
        Ok(())
    }
}

impl Length for ParquetObject {
    fn len(&self) -> u64 {
        self.object.bytes
    }
}

impl ChunkReader for ParquetObject {
    type T = ParquetRead;

    fn get_read(&self, start: u64) -> Result<Self::T> {
        Ok(ParquetRead {
            file: self.clone(),
            at: start,
        })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        let first = self.get(start)?;
        if first.len() >= length {
            return Ok(first.slice(..length));
        }
        let mut all = BytesMut::with_capacity(length);
        all.extend_from_slice(&first);
        while all.len() < length {
            let more = self.get(start + all.len() as u64)?;
            if more.is_empty() {
                return Err(ParquetError::EOF(
                    "a part of it would be behind its end".to_owned(),
                ));
            }
            all.extend_from_slice(&more[..more.len().min(length - all.len())]);
        }
        Ok(all.freeze())
    }
}

/// Reads the file from a place on.
pub struct ParquetRead {
    file: ParquetObject,
    at: u64,
}

impl Read for ParquetRead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let there = self.file.get(self.at).map_err(io::Error::other)?;
        let n = there.len().min(buffer.len());
        buffer[..n].copy_from_slice(&there[..n]);
        self.at += n as u64;
        Ok(n)
    }
}
