//! What lies in the hot tier, by collection, as a worker remembers it between two looks, and what is due there.
//!
//! Chunks are counted once; then only the new ones are read, by id, so that a look costs what happened since and not what
//! there is. A transaction that stored a chunk and committed late is found by the next count.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::{Duration, Instant};

use super::merge;
use crate::catalog::load;
use crate::catalog::manifest::{self, ChunkRow};
use crate::pg::guc;
use crate::pg::spi::View;
use crate::pg::xact::{self, Failure};

/// After so long everything is counted again.
const COUNT_INTERVAL: Duration = Duration::from_secs(600);

/// While history is being loaded, chunks wait for more of their month until they are so many times the flush size.
const LOADING_SIZES: i64 = 64;

/// What is to be done with a collection's chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Merge,
    Flush,
}

#[derive(Debug, Default)]
struct Collection {
    chunks: Vec<ChunkRow>,
    bytes: i64,
    events: i64,
    oldest_us: i64,
}

impl Collection {
    fn add(&mut self, chunk: ChunkRow) {
        self.oldest_us = match self.chunks.is_empty() {
            true => chunk.created_at_us,
            false => self.oldest_us.min(chunk.created_at_us),
        };
        self.bytes += i64::from(chunk.bytes);
        self.events += i64::from(chunk.n);
        self.chunks.push(chunk);
    }
}

/// When chunks are worth data files.
#[derive(Debug, Clone, Copy)]
struct Limits {
    now_us: i64,
    /// So many bytes are enough at any age.
    flush_bytes: i64,
    /// From this age on so many events are enough,
    interval_us: i64,
    min_events: i64,
    /// and from this one on any.
    max_age_us: i64,
    /// Of all chunks together.
    hot_bytes: i64,
}

impl Limits {
    fn now() -> Self {
        let micros = |d: Duration| i64::try_from(d.as_micros()).unwrap_or(i64::MAX);
        Self {
            now_us: xact::now_us(),
            flush_bytes: guc::flush_size_bytes(),
            interval_us: micros(guc::flush_interval()),
            min_events: guc::min_file_events() as i64,
            max_age_us: micros(guc::flush_max_age()),
            hot_bytes: guc::hot_size_bytes(),
        }
    }

    fn is_worth_files(&self, collection: &Collection, loading: bool) -> bool {
        if loading {
            return collection.bytes >= self.flush_bytes.saturating_mul(LOADING_SIZES);
        }
        let age_us = self.now_us - collection.oldest_us;
        collection.bytes >= self.flush_bytes
            || age_us >= self.interval_us && collection.events >= self.min_events
            || age_us >= self.max_age_us
    }
}

/// The hot tier as far as it has been seen.
#[derive(Debug, Default)]
pub struct Hot {
    collections: HashMap<i32, Collection>,
    /// Those that may have something to merge.
    changed: BTreeSet<i32>,
    /// Those into which history is being loaded.
    loading: HashSet<i32>,
    last_chunk: i64,
    counted: Option<Instant>,
}

impl Hot {
    pub fn is_empty(&self) -> bool {
        self.collections.is_empty()
    }

    /// Reads what is new.
    pub fn refresh(&mut self) -> Result<(), Failure> {
        self.loading = xact::worker(|| load::loading(View::Current))?;
        let chunks = if self.counted.is_some_and(|at| at.elapsed() < COUNT_INTERVAL) {
            xact::worker(|| manifest::chunks_after(View::Current, self.last_chunk))?
        } else {
            let all = xact::worker(|| manifest::all_chunks(View::Current))?;
            self.collections.clear();
            self.counted = Some(Instant::now());
            all
        };
        for chunk in chunks {
            self.last_chunk = self.last_chunk.max(chunk.chunk_id);
            self.changed.insert(chunk.collection_id);
            let collection = self.collections.entry(chunk.collection_id).or_default();
            collection.add(chunk);
        }
        Ok(())
    }

    /// Reads the chunks of a collection again, after work on it. True: they are not those that were known.
    pub fn reread(&mut self, collection_id: i32) -> Result<bool, Failure> {
        let ids = |c: &Collection| -> Vec<i64> { c.chunks.iter().map(|c| c.chunk_id).collect() };
        let before = self.collections.remove(&collection_id);
        let chunks = xact::worker(|| manifest::chunks(View::Current, collection_id, None))?;
        let mut now = Collection::default();
        for chunk in chunks {
            // Those beyond are still to be seen as new.
            if chunk.chunk_id <= self.last_chunk {
                now.add(chunk);
            }
        }
        let progress = before.is_none_or(|before| ids(&before) != ids(&now));
        if !now.chunks.is_empty() {
            self.changed.insert(collection_id);
            self.collections.insert(collection_id, now);
        }
        Ok(progress)
    }

    /// What is due now, flushes first, the largest before the others.
    pub fn due(&mut self) -> Vec<(i32, Work)> {
        self.due_by(&Limits::now())
    }

    fn due_by(&mut self, limits: &Limits) -> Vec<(i32, Work)> {
        let mut total: i64 = self.collections.values().map(|c| c.bytes).sum();
        let mut flush = BTreeSet::new();
        for (id, collection) in &self.collections {
            if limits.is_worth_files(collection, self.loading.contains(id)) {
                flush.insert(*id);
                total -= collection.bytes;
            }
        }
        if total > limits.hot_bytes {
            // Small ones, too, but no more than is needed.
            let mut rest: Vec<(&i32, i64)> = self
                .collections
                .iter()
                .filter(|(id, _)| !flush.contains(id))
                .map(|(id, c)| (id, c.bytes))
                .collect();
            rest.sort_by_key(|(_, bytes)| -bytes);
            for (id, bytes) in rest {
                if total <= limits.hot_bytes {
                    break;
                }
                flush.insert(*id);
                total -= bytes;
            }
        }
        let Self {
            collections,
            changed,
            ..
        } = self;
        changed.retain(|id| {
            let chunks = collections.get(id);
            !flush.contains(id) && chunks.is_some_and(|c| merge::is_worth_it(&c.chunks))
        });
        let mut flush: Vec<i32> = flush.into_iter().collect();
        flush.sort_by_key(|id| -collections.get(id).map_or(0, |c| c.bytes));
        flush
            .into_iter()
            .map(|id| (id, Work::Flush))
            .chain(changed.iter().map(|id| (*id, Work::Merge)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use rakam_lake::chunk::ChunkFormat;

    use super::*;

    fn chunk(collection_id: i32, n: i32, bytes: i32, created_at_us: i64) -> ChunkRow {
        ChunkRow {
            chunk_id: 1,
            collection_id,
            format: ChunkFormat::Arrow,
            schema_version: 1,
            n,
            bytes,
            has_extra: false,
            min_time_us: 0,
            max_time_us: 0,
            level: 0,
            min_xid: 0,
            max_xid: 0,
            created_at_us,
        }
    }

    fn hot(chunks: &[ChunkRow]) -> Hot {
        let mut hot = Hot::default();
        for chunk in chunks {
            let id = chunk.collection_id;
            hot.changed.insert(id);
            hot.collections.entry(id).or_default().add(chunk.clone());
        }
        hot
    }

    const LIMITS: Limits = Limits {
        now_us: 1_000,
        flush_bytes: 1_000,
        interval_us: 100,
        min_events: 50,
        max_age_us: 900,
        hot_bytes: 10_000,
    };

    #[test]
    fn age_alone_is_no_reason_for_a_file() {
        let mut hot = hot(&[
            chunk(1, 10, 10, 800),
            chunk(2, 60, 10, 800),
            chunk(3, 60, 10, 950),
            chunk(4, 1, 1_000, 990),
            chunk(5, 1, 1, 100),
        ]);
        let due = hot.due_by(&LIMITS);
        assert_eq!(due, [4, 2, 5].map(|id| (id, Work::Flush)));
    }

    #[test]
    fn history_being_loaded_waits_for_more() {
        let mut loaded = hot(&[chunk(1, 60, 63_999, 100), chunk(2, 60, 1_000, 990)]);
        loaded.loading = HashSet::from([1, 3]);
        let limits = Limits {
            hot_bytes: 1_000_000,
            ..LIMITS
        };
        assert_eq!(loaded.due_by(&limits), [(2, Work::Flush)]);
        let mut full = hot(&[chunk(1, 60, 64_000, 990)]);
        full.loading = HashSet::from([1]);
        assert_eq!(full.due_by(&limits), [(1, Work::Flush)]);
    }

    #[test]
    fn too_much_altogether_is_one() {
        let mut chunks: Vec<ChunkRow> = (1..=20).map(|id| chunk(id, 1, 500 + id, 990)).collect();
        assert_eq!(hot(&chunks).due_by(&LIMITS).len(), 1);
        chunks.push(chunk(30, 1, 400, 990));
        let due = hot(&chunks).due_by(&LIMITS);
        assert_eq!(due, [20, 19].map(|id| (id, Work::Flush)));
    }

    #[test]
    fn merges_are_looked_for_where_something_changed() {
        let mut hot = hot(&vec![chunk(1, 1, 1, 990); 8]);
        assert_eq!(hot.due_by(&LIMITS), [(1, Work::Merge)]);
        assert_eq!(hot.due_by(&LIMITS), [(1, Work::Merge)]);
        hot.changed.clear();
        assert_eq!(hot.due_by(&LIMITS), []);
    }
}
