//! What de-duplication remembers: runs of event ids, each a 128-bit hash with the time its event was received.
//!
//! A run is immutable and lies in a [`Node`]: the hashes with a common prefix. Runs of one node grow by merging
//! until they are worth distributing over its eight children, so no step ever handles more than a few parts of
//! [`PART_IDS`], however many ids there are. Entries are sorted and hashes are uniform: where an entry must be follows
//! from its hash, so that a look-up reads a few kilobytes of a run ([`neighbourhood`]).
//!
//! Layout: magic `RKI1`, checksum, then 22 bytes per entry, ascending: the hash (big-endian), the time received in
//! microseconds after the run's earliest (48 bits, big-endian).

use std::ops::Range;

use bytes::Bytes;
use siphasher::sip128::SipHasher13;

use crate::error::LakeError;
use crate::seal;

const MAGIC: [u8; 4] = *b"RKI1";
const WHAT: &str = "run of event ids";
const HASH_BYTES: usize = 16;
const TIME_BYTES: usize = 6;
const TIME_MAX: u64 = (1 << (8 * TIME_BYTES)) - 1;
/// Bytes of an entry.
pub const ENTRY_BYTES: usize = HASH_BYTES + TIME_BYTES;
/// Where the entries begin.
pub const ENTRIES_AT: usize = seal::HEADER;
/// A run of more ids is split by hash: 1.4 MB, of which little is held at a time.
pub const PART_IDS: usize = 64 << 10;
/// A node has so many children, as a power of two.
const FAN_OUT_BITS: u32 = 3;
/// Below, a node is not split any more; it would take 2^76 ids to come so far.
const DEPTH_MAX: u8 = 20;
/// Seed of the hash, with the collection's id: part of the format.
const SEED: u64 = 0x7261_6b61_6d5f_6964;

/// The hash of an id in a collection. SipHash-1-3 with 128 bits: two ids of a billion share one with a probability of
/// 10⁻²¹, and it has no structure that numbered ids could meet. Not a secret: who may write can send any id anyway.
pub fn hash(collection_id: i32, id: &str) -> u128 {
    SipHasher13::new_with_keys(SEED, collection_id as u64)
        .hash(id.as_bytes())
        .as_u128()
}

/// An id that was kept, and when its event was received, in microseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct IdEntry {
    pub hash: u128,
    pub received_us: i64,
}

impl IdEntry {
    /// The half by which hashes are distributed over nodes.
    pub fn upper(&self) -> u64 {
        upper(self.hash)
    }

    /// Whether both are copies of one event: the same id, received at most the window apart.
    pub fn is_copy_of(&self, other: &Self, window_us: i64) -> bool {
        self.hash == other.hash && within(self.received_us, other.received_us, window_us)
    }
}

/// Whether two times are at most the window apart.
pub(crate) fn within(a_us: i64, b_us: i64, window_us: i64) -> bool {
    a_us.abs_diff(b_us) <= window_us.unsigned_abs()
}

fn upper(hash: u128) -> u64 {
    (hash >> 64) as u64
}

/// A range of hashes: those whose first `3 * depth` bits are those of `first`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    pub depth: u8,
    /// The least upper half of its hashes.
    pub first: u64,
}

impl Node {
    pub const ROOT: Self = Self { depth: 0, first: 0 };

    /// The node of this depth in which a hash lies.
    fn of(upper: u64, depth: u8) -> Self {
        Self {
            depth,
            first: upper & !Self::rest(depth),
        }
    }

    /// The bits that a node of this depth leaves open.
    fn rest(depth: u8) -> u64 {
        u64::MAX >> (FAN_OUT_BITS * u32::from(depth.min(DEPTH_MAX)))
    }

    /// The greatest upper half of its hashes.
    pub fn last(&self) -> u64 {
        self.first | Self::rest(self.depth)
    }

    /// The nodes in which this one lies, without itself.
    pub fn ancestors(self) -> impl Iterator<Item = Self> {
        (0..self.depth).map(move |depth| Self::of(self.first, depth))
    }

    /// Where in the node a hash lies, as a fraction of `parts`.
    pub(crate) fn position(&self, hash: u128, parts: usize) -> usize {
        let shift = FAN_OUT_BITS * u32::from(self.depth.min(DEPTH_MAX));
        let fraction = upper(hash) << shift;
        ((u128::from(fraction) * parts as u128) >> 64) as usize
    }
}

/// Sorted entries of one node in nodes of the least depth, `depth` or more, at which none has more than about a part.
pub fn lay_out(entries: &[IdEntry], depth: u8) -> Vec<(Node, &[IdEntry])> {
    let mut depth = depth.min(DEPTH_MAX);
    let mut nodes = Vec::new();
    loop {
        nodes.extend(
            entries
                .chunk_by(|a, b| Node::of(a.upper(), depth) == Node::of(b.upper(), depth))
                .filter_map(|part| Some((Node::of(part.first()?.upper(), depth), part))),
        );
        let largest = nodes.iter().map(|(_, part)| part.len()).max().unwrap_or(0);
        // Children are not of exactly one size: an eighth more is let pass.
        if largest <= PART_IDS + PART_IDS / 8 || depth == DEPTH_MAX {
            return nodes;
        }
        nodes.clear();
        depth += 1;
    }
}

/// The size class of a run: runs of one class and node are merged with each other.
pub fn level(n: usize) -> i16 {
    (n.max(1).ilog2() / FAN_OUT_BITS) as i16
}

/// Encodes sorted entries. `base_us` is the earliest time among them, which the caller keeps beside the run.
pub fn encode(entries: &[IdEntry], base_us: i64) -> Result<Vec<u8>, LakeError> {
    let mut buffer = seal::start(entries.len() * ENTRY_BYTES);
    for entry in entries {
        let offset = entry
            .received_us
            .checked_sub(base_us)
            .and_then(|us| u64::try_from(us).ok())
            .filter(|&us| us <= TIME_MAX)
            .ok_or_else(|| LakeError::encode(WHAT, "a time is too far from the others"))?;
        buffer.extend_from_slice(&entry.hash.to_be_bytes());
        buffer.extend_from_slice(&offset.to_be_bytes()[8 - TIME_BYTES..]);
    }
    Ok(seal::seal(buffer, MAGIC))
}

/// The entries of a run, or some of them in a row, as they are stored.
#[derive(Debug, Clone)]
pub struct Ids {
    bytes: Bytes,
    base_us: i64,
}

impl Ids {
    /// All entries of a run, checked.
    pub fn open(sealed: Bytes, base_us: i64) -> Result<Self, LakeError> {
        Self::slice(seal::open(sealed, MAGIC, WHAT)?, base_us)
    }

    /// Entries cut out of a run. The checksum is over all of it: here the server's own page checksums must do.
    pub fn slice(bytes: Bytes, base_us: i64) -> Result<Self, LakeError> {
        if !bytes.len().is_multiple_of(ENTRY_BYTES) {
            return Err(LakeError::corrupt(WHAT, "truncated"));
        }
        Ok(Self { bytes, base_us })
    }

    pub fn len(&self) -> usize {
        self.bytes.len() / ENTRY_BYTES
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes that the entries take.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = IdEntry> {
        (0..self.len()).map(|index| self.get(index))
    }

    fn hash_at(&self, index: usize) -> u128 {
        let at = index * ENTRY_BYTES;
        self.bytes
            .get(at..at + HASH_BYTES)
            .and_then(<[u8]>::first_chunk)
            .map_or(u128::MAX, |bytes| u128::from_be_bytes(*bytes))
    }

    fn get(&self, index: usize) -> IdEntry {
        let at = index * ENTRY_BYTES + HASH_BYTES;
        let mut offset = [0; 8];
        if let Some(bytes) = self.bytes.get(at..at + TIME_BYTES) {
            offset[8 - TIME_BYTES..].copy_from_slice(bytes);
        }
        IdEntry {
            hash: self.hash_at(index),
            received_us: self
                .base_us
                .saturating_add(u64::from_be_bytes(offset) as i64),
        }
    }

    /// The entries of one id.
    pub fn of_hash(&self, hash: u128) -> impl Iterator<Item = IdEntry> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low.midpoint(high);
            if self.hash_at(middle) < hash {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        (low..self.len())
            .map(|index| self.get(index))
            .take_while(move |entry| entry.hash == hash)
    }

    /// Whether all entries of an id are among these, which were cut out of a run of `n` entries as `range`.
    pub fn is_conclusive(&self, range: &Range<usize>, n: usize, hash: u128) -> bool {
        let len = self.len();
        len == range.len()
            && (range.start == 0 || len > 0 && self.hash_at(0) < hash)
            && (range.end == n || len > 0 && self.hash_at(len - 1) > hash)
    }
}

/// The entries of a run of `n` among which an id nearly always is: four standard deviations around its place.
pub fn neighbourhood(node: Node, n: usize, hash: u128) -> Range<usize> {
    let place = node.position(hash, n);
    let spread = 2 * n.isqrt() + 8;
    place.saturating_sub(spread)..(place + spread).min(n)
}

#[cfg(test)]
mod tests;
