//! The ids of events that are in no run yet: those kept in the transaction or query in progress.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};

use crate::id_run::{IdEntry, within};

/// Keys are hashes already: their lower half is as good as another hash of them.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u128(&mut self, hash: u128) {
        self.0 = hash as u64;
    }
}

type ByHash<T> = HashMap<u128, T, BuildHasherDefault<AsItIs>>;

/// A set of ids with the times at which their events were received.
#[derive(Default)]
pub struct IdSet {
    first: ByHash<i64>,
    /// Further times of an id, outside of the window of those before.
    more: ByHash<Vec<i64>>,
    more_len: usize,
}

impl IdSet {
    /// Whether it has a copy: the same id, received at most the window apart.
    pub fn has_copy_of(&self, entry: &IdEntry, window_us: i64) -> bool {
        let near = |&time: &i64| within(time, entry.received_us, window_us);
        self.first.get(&entry.hash).is_some_and(|first| {
            near(first)
                || self
                    .more
                    .get(&entry.hash)
                    .is_some_and(|times| times.iter().any(near))
        })
    }

    pub fn insert(&mut self, entry: IdEntry) {
        match self.first.entry(entry.hash) {
            Entry::Vacant(first) => {
                first.insert(entry.received_us);
            }
            Entry::Occupied(_) => {
                let times = self.more.entry(entry.hash).or_default();
                times.push(entry.received_us);
                self.more_len += 1;
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    pub fn len(&self) -> usize {
        self.first.len() + self.more_len
    }

    /// About how many bytes of memory it takes.
    pub fn bytes(&self) -> usize {
        // A slot is key, value and a control byte; lists are rare.
        (self.first.capacity() + self.more.capacity()) * 33 + self.more_len * 16
    }

    /// About how many bytes of memory it takes after so many more ids: a table doubles when it is full.
    pub fn bytes_with(&self, more: usize) -> usize {
        let room = self.first.capacity() - self.first.len();
        if more <= room {
            self.bytes()
        } else {
            self.bytes() + 2 * 33 * (self.first.len() + more)
        }
    }

    /// All entries, in order.
    pub fn into_sorted(self) -> Vec<IdEntry> {
        let mut entries = Vec::with_capacity(self.len());
        entries.extend(
            self.first
                .iter()
                .map(|(&hash, &received_us)| IdEntry { hash, received_us }),
        );
        for (hash, times) in self.more {
            entries.extend(
                times
                    .into_iter()
                    .map(|received_us| IdEntry { hash, received_us }),
            );
        }
        entries.sort_unstable();
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(hash: u128, received_us: i64) -> IdEntry {
        IdEntry { hash, received_us }
    }

    #[test]
    fn an_id_may_be_kept_again_outside_of_the_window() {
        let mut set = IdSet::default();
        assert!(!set.has_copy_of(&at(1, 0), 10));
        set.insert(at(1, 0));
        assert!(set.has_copy_of(&at(1, 10), 10) && set.has_copy_of(&at(1, -10), 10));
        assert!(!set.has_copy_of(&at(1, 11), 10) && !set.has_copy_of(&at(2, 0), 10));
        set.insert(at(1, 11));
        set.insert(at(1, 30));
        set.insert(at(0, 5));
        assert!(set.has_copy_of(&at(1, 21), 10) && set.has_copy_of(&at(1, 25), 10));
        assert!(set.bytes() > 0 && set.bytes_with(1_000) >= 33_000);
        assert_eq!(set.len(), 4);
        let sorted = [at(0, 5), at(1, 0), at(1, 11), at(1, 30)];
        assert_eq!(set.into_sorted(), sorted);
    }
}
