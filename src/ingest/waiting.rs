//! What waits in the inbox, by project: whether it is due, who has more than a share of it, and how much a round takes.

use std::collections::{BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::catalog::backlog::Head;
use crate::pg::{guc, xact};

/// A round takes about so long, on whatever machine: slices become smaller or larger until it does.
const ROUND_TIME: Duration = Duration::from_millis(250);
/// Of a lagging project it takes so many bytes of JSON (up to the end of a transaction's rows),
const SLICE_BYTES: RangeInclusive<usize> = (256 << 10)..=(16 << 20);
pub const FIRST_SLICE_BYTES: usize = 1 << 20;
/// of everybody else's together so many times as much.
const EVERYBODY: usize = 4;
/// No more projects than these are taken apart because everybody's is too much.
const APART_MOST: usize = 64;
/// So many waiting bytes make a digest due, whosever they are.
const DUE_BYTES: usize = 8 << 20;

/// What waits since the tick, of the projects that do not lag behind it.
#[derive(Debug, Default)]
pub struct Waiting {
    /// What a round takes of one lagging project.
    slice: usize,
    pub events: u64,
    bytes: usize,
    oldest_us: Option<i64>,
    /// Events and bytes by project.
    pub projects: HashMap<i32, (u64, usize)>,
    /// Events by project and collection.
    collections: HashMap<(i32, i32), u64>,
    /// The most events of a collection.
    most: u64,
    /// Projects with more than their share; they count for nothing else here.
    pub heavy: BTreeSet<i32>,
}

impl Waiting {
    pub fn new(slice: usize) -> Self {
        Self {
            slice,
            ..Self::default()
        }
    }

    /// A project's events are not everybody's any more.
    pub fn set_apart(&mut self, project_id: i32) {
        let (events, bytes) = self.projects.remove(&project_id).unwrap_or_default();
        self.events -= events;
        self.bytes -= bytes;
        self.heavy.insert(project_id);
    }

    /// As [`Self::set_apart`], of every project of which this is true.
    pub fn set_apart_all(&mut self, mut of: impl FnMut(i32) -> bool) {
        let ids: Vec<i32> = self.projects.keys().copied().filter(|&id| of(id)).collect();
        for id in ids {
            self.set_apart(id);
        }
    }

    /// Whether a round can take all of it.
    pub fn is_bearable(&self) -> bool {
        self.bytes < EVERYBODY * self.slice
    }

    /// Takes the largest projects apart until the rest is bearable, or nobody is larger than the others.
    fn lighten(&mut self) {
        while !self.is_bearable() && self.heavy.len() < APART_MOST {
            let largest = self.projects.iter().max_by_key(|(_, (_, bytes))| *bytes);
            match largest {
                Some((&id, (_, bytes))) if *bytes >= self.bytes / APART_MOST => self.set_apart(id),
                _ => return,
            }
        }
    }

    /// Counts a row. False: it is one of a project with more than its share.
    pub fn count(&mut self, row: &Head) -> bool {
        if self.heavy.contains(&row.project_id) {
            return false;
        }
        let n = row.n as u64;
        let (events, bytes) = self.projects.entry(row.project_id).or_default();
        *events += n;
        *bytes += row.bytes;
        self.events += n;
        self.bytes += row.bytes;
        let oldest = self.oldest_us.unwrap_or(i64::MAX);
        self.oldest_us = Some(oldest.min(row.received_at_us));
        if *bytes >= self.slice {
            self.set_apart(row.project_id);
            return false;
        }
        let of_collection = self
            .collections
            .entry((row.project_id, row.collection_id))
            .or_default();
        *of_collection += n;
        self.most = self.most.max(*of_collection);
        self.lighten();
        !self.heavy.contains(&row.project_id)
    }

    pub fn is_due(&self) -> bool {
        let age_us = self.oldest_us.map_or(0, |oldest| xact::now_us() - oldest);
        !self.heavy.is_empty()
            || self.most as i64 >= guc::digest_events()
            || self.bytes >= DUE_BYTES
            || self.events > 0 && age_us >= guc::digest_max_age().as_micros() as i64
    }
}

/// The size of slices after one of these bytes took so long, not far from the present size.
pub fn fitting(present: usize, bytes: usize, took: Duration) -> usize {
    let (smallest, largest) = SLICE_BYTES.into_inner();
    let in_time = bytes as f64 * ROUND_TIME.as_secs_f64() / took.as_secs_f64().max(0.001);
    if bytes < present / 2 {
        // The last of a backlog: what a round costs at least hides what its events cost.
        return present;
    }
    (in_time as usize)
        .clamp(present / 4, present.saturating_mul(2))
        .clamp(smallest, largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(project_id: i32, n: i32, bytes: usize) -> Head {
        Head {
            project_id,
            collection_id: project_id,
            n,
            bytes,
            received_at_us: 1,
        }
    }

    #[test]
    fn a_project_with_more_than_its_share_counts_apart() {
        let mut waiting = Waiting::new(1_000);
        assert!(waiting.count(&head(1, 5, 100)));
        assert!(waiting.count(&head(2, 1, 999)));
        assert_eq!((waiting.events, waiting.bytes), (6, 1_099));
        assert!(!waiting.count(&head(2, 1, 1)));
        assert!(!waiting.count(&head(2, 1, 1)));
        assert_eq!((waiting.events, waiting.bytes), (5, 100));
        assert!(waiting.heavy.contains(&2) && waiting.heavy.len() == 1);
    }

    #[test]
    fn the_largest_go_apart_when_everybody_is_too_much() {
        let mut waiting = Waiting::new(1_000);
        for id in 1..=5 {
            waiting.count(&head(id, 1, 900));
        }
        for id in 10..=15 {
            waiting.count(&head(id, 1, 10));
        }
        assert!(waiting.is_bearable());
        assert_eq!(waiting.heavy.len(), 1);
        assert!((10..=15).all(|id| !waiting.heavy.contains(&id)));
        // Whoever is named.
        waiting.set_apart_all(|id| id >= 14);
        assert!(waiting.heavy.contains(&14) && waiting.heavy.contains(&15));
        assert_eq!(waiting.heavy.len(), 3);
        // Where nobody is larger than others, nobody goes apart.
        let mut waiting = Waiting::new(1_000);
        for id in 0..500 {
            waiting.count(&head(id, 1, 10));
        }
        assert!(!waiting.is_bearable() && waiting.heavy.is_empty());
    }

    #[test]
    fn slices_find_their_size() {
        let size = 4 << 20;
        let ms = Duration::from_millis;
        assert_eq!(fitting(size, size, ms(250)), size);
        assert_eq!(fitting(size, size, ms(500)), size / 2);
        assert_eq!(fitting(size, size, ms(10_000)), size / 4);
        assert_eq!(fitting(size, size, ms(1)), size * 2);
        assert_eq!(fitting(size, 100, ms(20)), size);
        assert_eq!(fitting(300 << 10, 300 << 10, ms(10_000)), 256 << 10);
    }
}
