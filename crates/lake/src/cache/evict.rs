//! Makes room in a directory of blocks, in steps, with little memory however many blocks there are.
//!
//! A pass looks at the directory twice: first it adds up the blocks by how long ago they were used, which says from
//! which age on they go; then it removes those. Readers and writers go on meanwhile: a block that vanishes before
//! somebody opens it is fetched again, and one that is open stays readable.

use std::fs::{self, DirEntry, File, Metadata, OpenOptions, ReadDir};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use super::BLOCK_BYTES;
use super::directory::{LEDGER, LEDGER_UNIT, TEMPORARY, free_space};

/// A write in progress takes no longer.
const TEMPORARY_AGE: Duration = Duration::from_secs(3600);
/// Entries between two looks at the clock.
const ENTRIES_PER_LOOK: usize = 64;
/// Ages up to this many seconds have a class each; above, every doubling has as many.
const FINE: u64 = 64;
const CLASSES: usize = (FINE * 60) as usize;

/// How full a directory may become before room is made: while there is less, another block fits.
pub(super) fn high_water(limit: u64) -> u64 {
    limit - limit.min((limit / 20).max(2 * BLOCK_BYTES))
}

/// How full it is left.
fn low_water(limit: u64) -> u64 {
    limit - limit.min((limit / 10).max(3 * BLOCK_BYTES))
}

/// One pass. The lock on the directory is held as long as it lives.
#[derive(Debug)]
pub struct Eviction {
    root: PathBuf,
    limit: u64,
    now: SystemTime,
    walk: Walk,
    /// Bytes by class of age.
    by_age: Vec<u64>,
    counted: u64,
    /// Set for the second look.
    cut: Option<Cut>,
    removed: u64,
    _lock: File,
}

/// Of which blocks how much has to go.
#[derive(Debug)]
struct Cut {
    /// Everything of an older class goes, of this one as much as is needed.
    class: usize,
    from_class: u64,
}

impl Eviction {
    pub(super) fn new(root: PathBuf, limit: u64, lock: File) -> Self {
        Self {
            walk: Walk::new(&root),
            root,
            limit,
            now: SystemTime::now(),
            by_age: vec![0; CLASSES],
            counted: 0,
            cut: None,
            removed: 0,
            _lock: lock,
        }
    }

    /// Works for about `budget`; false: the pass is through.
    pub fn step(&mut self, budget: Duration) -> bool {
        let began = Instant::now();
        loop {
            for _ in 0..ENTRIES_PER_LOOK {
                match self.walk.next() {
                    Some(found) => self.entry(found),
                    None if self.cut.is_none() && self.decide() => {
                        self.walk = Walk::new(&self.root)
                    }
                    None => {
                        self.settle();
                        return false;
                    }
                }
            }
            if began.elapsed() >= budget {
                return true;
            }
        }
    }

    /// Bytes removed so far.
    pub fn removed(&self) -> u64 {
        self.removed
    }

    fn entry(&mut self, found: Found) {
        match found {
            Found::Block(path, metadata) => {
                let (bytes, class) = (metadata.len(), self.class(&metadata));
                match &mut self.cut {
                    None => {
                        self.counted += bytes;
                        self.by_age[class] += bytes;
                    }
                    Some(cut) => {
                        let goes = class > cut.class || (class == cut.class && cut.from_class > 0);
                        if goes && fs::remove_file(path).is_ok() {
                            self.removed += bytes;
                            if class == cut.class {
                                cut.from_class = cut.from_class.saturating_sub(bytes);
                            }
                        }
                    }
                }
            }
            Found::Temporary(path, metadata) => {
                if age(self.now, &metadata) > TEMPORARY_AGE {
                    let _ = fs::remove_file(path);
                }
            }
            // Refused by the file system unless it is empty. A writer that has just made it makes it again.
            Found::Emptied(path) => {
                let _ = fs::remove_dir(path);
            }
        }
    }

    fn class(&self, metadata: &Metadata) -> usize {
        class(age(self.now, metadata).as_secs())
    }

    /// After the first look: whether blocks have to go, and which.
    fn decide(&mut self) -> bool {
        // What is not ours to take of the disk is given back, too.
        let room = match free_space(&self.root) {
            Ok(0) => self.counted - self.counted / 10,
            Ok(free) => self.counted.saturating_add(free),
            Err(_) => u64::MAX,
        };
        let allowed = self.limit.min(room);
        if self.counted <= high_water(self.limit) && self.counted <= room {
            return false;
        }
        let mut excess = self.counted.saturating_sub(low_water(allowed));
        for (class, &bytes) in self.by_age.iter().enumerate().rev() {
            if bytes >= excess {
                self.cut = Some(Cut {
                    class,
                    from_class: excess,
                });
                return true;
            }
            excess -= bytes;
        }
        false
    }

    /// Sets the ledger right. What was stored meanwhile is counted by the next pass.
    fn settle(&self) {
        let units = (self.counted - self.removed).div_ceil(LEDGER_UNIT);
        let ledger = OpenOptions::new().write(true).open(self.root.join(LEDGER));
        if let Ok(ledger) = ledger {
            let _ = ledger.set_len(units);
        }
    }
}

fn age(now: SystemTime, metadata: &Metadata) -> Duration {
    let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    now.duration_since(modified).unwrap_or_default()
}

/// The class of an age: finer the younger.
fn class(seconds: u64) -> usize {
    if seconds < FINE {
        return seconds as usize;
    }
    let doublings = seconds.ilog2() - FINE.ilog2();
    let within = (seconds >> doublings) - FINE;
    ((u64::from(doublings) + 1) * FINE + within).min(CLASSES as u64 - 1) as usize
}

enum Found {
    Block(PathBuf, Metadata),
    Temporary(PathBuf, Metadata),
    /// The directory of an object after its blocks.
    Emptied(PathBuf),
}

/// All files two levels below the root, and those that are being written.
#[derive(Debug)]
struct Walk {
    /// Open directories from the root down to the present one.
    open: Vec<(PathBuf, ReadDir)>,
}

impl Walk {
    fn new(root: &std::path::Path) -> Self {
        let open = fs::read_dir(root).map(|entries| (root.to_owned(), entries));
        Self {
            open: open.into_iter().collect(),
        }
    }

    fn next(&mut self) -> Option<Found> {
        loop {
            let depth = self.open.len();
            let (path, entries) = self.open.last_mut()?;
            let Some(entry) = entries.next() else {
                let path = std::mem::take(path);
                self.open.pop();
                if depth == 3 {
                    return Some(Found::Emptied(path));
                }
                continue;
            };
            // What vanishes while we look is not there.
            let Ok(entry) = entry else { continue };
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_dir() {
                self.enter(depth, &entry);
            } else if depth == 3 {
                return Some(Found::Block(entry.path(), metadata));
            } else if depth == 2 && path.ends_with(TEMPORARY) {
                return Some(Found::Temporary(entry.path(), metadata));
            }
        }
    }

    fn enter(&mut self, depth: usize, entry: &DirEntry) {
        if depth < 3
            && let Ok(entries) = fs::read_dir(entry.path())
        {
            self.open.push((entry.path(), entries));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_of_age_are_in_order() {
        let mut last = 0;
        for seconds in (0..5000).chain([10_000, 1 << 20, 1 << 40, u64::MAX]) {
            let class = class(seconds);
            assert!(class >= last && class < CLASSES && class <= last.max(1) + 5000);
            last = class;
        }
        assert_eq!(class(63), 63);
        assert_eq!(class(64), 64);
        assert_eq!(class(127), 127);
        assert_eq!((class(128), class(129), class(130)), (128, 128, 129));
    }
}
