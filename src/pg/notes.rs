//! Notes that outlive the transaction that makes them: a queue in shared memory from every process to the resident
//! worker of its database, which stores them.
//!
//! Atomics only, so that a note can be left while a transaction aborts. Who finds no place is told so, and nobody waits.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use pgrx::{PGRXSharedMemory, PgAtomic, pg_guard, pg_shmem_init, pg_sys};

use super::{bgworker, shared};

/// Notes that may wait, of all databases.
const PLACES: usize = 512;
const WORDS: usize = 64;
/// The longest note.
pub const BYTES: usize = WORDS * 8;

const FREE: u32 = 0;
const WRITING: u32 = 1;
const READY: u32 = 2;
const READING: u32 = 3;

struct Place {
    state: AtomicU32,
    database: AtomicU32,
    len: AtomicU32,
    words: [AtomicU64; WORDS],
}

impl Default for Place {
    fn default() -> Self {
        Self {
            state: AtomicU32::new(FREE),
            database: AtomicU32::new(0),
            len: AtomicU32::new(0),
            words: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

pub struct Queue([Place; PLACES]);

impl Default for Queue {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Place::default()))
    }
}

// SAFETY: atomics only, no pointers.
unsafe impl PGRXSharedMemory for Queue {}

// SAFETY: the name is used once.
static QUEUE: PgAtomic<Queue> = unsafe { PgAtomic::new(c"rakam_notes") };

/// In the postmaster: asks for the memory.
pub fn init() {
    pg_shmem_init!(QUEUE);
}

/// Leaves a note of at most [`BYTES`] for the worker of this database and wakes it. False: there is no queue, no
/// worker, or no place. Asks the server for nothing: also usable while a transaction aborts.
pub fn leave(note: &[u8]) -> bool {
    let Some(slot) = shared::get().and_then(|s| s.find(bgworker::my_database())) else {
        return false;
    };
    if slot.pid.load(Ordering::Acquire) == 0
        || !QUEUE.get().put(u32::from(bgworker::my_database()), note)
    {
        return false;
    }
    slot.wake();
    true
}

/// Hands the notes of this database to `store`, which keeps them for good or fails: then they wait on.
pub fn take<E>(store: impl FnOnce(&[Vec<u8>]) -> Result<(), E>) -> Result<(), E> {
    if !shared::preloaded() {
        return Ok(());
    }
    let (places, notes) = QUEUE.get().claim(u32::from(bgworker::my_database()));
    if notes.is_empty() {
        return Ok(());
    }
    let outcome = store(&notes);
    let then = if outcome.is_ok() { FREE } else { READY };
    for place in places {
        place.state.store(then, Ordering::Release);
    }
    outcome
}

/// A worker that begins: what its predecessor was reading when it ended was not stored.
pub fn begin() {
    if shared::preloaded() {
        let database = u32::from(bgworker::my_database());
        QUEUE.get().release(|place| {
            (place.database.load(Ordering::Acquire) == database).then_some((READING, READY))
        });
    }
}

/// Forgets the notes of databases that are gone.
pub fn keep_only(databases: &[pg_sys::Oid]) {
    QUEUE.get().release(|place| {
        let database = place.database.load(Ordering::Acquire);
        let is_gone = !databases.iter().any(|oid| u32::from(*oid) == database);
        is_gone.then_some((READY, FREE))
    });
}

impl Queue {
    fn put(&self, database: u32, note: &[u8]) -> bool {
        let note = &note[..note.len().min(BYTES)];
        let free = self.0.iter().find(|place| {
            place
                .state
                .compare_exchange(FREE, WRITING, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        let Some(place) = free else {
            return false;
        };
        place.database.store(database, Ordering::Release);
        place.len.store(note.len() as u32, Ordering::Relaxed);
        for (word, bytes) in place.words.iter().zip(note.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
        }
        place.state.store(READY, Ordering::Release);
        true
    }

    fn claim(&self, database: u32) -> (Vec<&Place>, Vec<Vec<u8>>) {
        self.0
            .iter()
            .filter(|place| {
                place.state.load(Ordering::Acquire) == READY
                    && place.database.load(Ordering::Acquire) == database
                    && place
                        .state
                        .compare_exchange(READY, READING, Ordering::AcqRel, Ordering::Relaxed)
                        .is_ok()
            })
            .map(|place| (place, place.note()))
            .unzip()
    }

    fn release(&self, change: impl Fn(&Place) -> Option<(u32, u32)>) {
        for place in &self.0 {
            if let Some((from, to)) = change(place) {
                let _other =
                    place
                        .state
                        .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed);
            }
        }
    }
}

impl Place {
    fn note(&self) -> Vec<u8> {
        let len = (self.len.load(Ordering::Relaxed) as usize).min(BYTES);
        let mut note: Vec<u8> = self
            .words
            .iter()
            .take(len.div_ceil(8))
            .flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes())
            .collect();
        note.truncate(len);
        note
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_go_to_their_database_once() {
        let queue: Box<Queue> = Box::default();
        let long = vec![7u8; BYTES + 9];
        for (database, note) in [(1, b"one".as_slice()), (2, b"two"), (1, &long), (1, b"")] {
            assert!(queue.put(database, note));
        }
        let (places, notes) = queue.claim(1);
        assert_eq!(notes, [b"one".to_vec(), long[..BYTES].to_vec(), Vec::new()]);
        assert!(queue.claim(1).1.is_empty());
        places
            .iter()
            .for_each(|p| p.state.store(FREE, Ordering::Release));
        assert_eq!(queue.claim(2).1, [b"two".to_vec()]);
        queue.release(|_| Some((READING, READY)));
        assert_eq!(queue.claim(2).1.len(), 1);
    }

    #[test]
    fn a_full_queue_says_so() {
        let queue: Box<Queue> = Box::default();
        assert!((0..PLACES).all(|_| queue.put(1, b"x")));
        assert!(!queue.put(1, b"x"));
    }
}
