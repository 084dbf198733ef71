//! Bloom filters of runs of ids: most look-ups of an id end here, at 32 bytes.
//!
//! Split blocks, as in Parquet: an id sets one bit in each of the eight words of one block, so that a look-up needs
//! one block only. Which block follows from the upper half of the hash, in its order: sorted look-ups read the filter
//! from front to back. The bits in it follow from the lower half.
//!
//! Layout: magic `RKB1`, checksum, then the blocks, words little-endian.

use bytes::Bytes;

use crate::error::LakeError;
use crate::id_run::{IdEntry, Node};
use crate::seal;

const MAGIC: [u8; 4] = *b"RKB1";
const WHAT: &str = "filter of event ids";
/// A block: eight words of 32 bits.
pub const BLOCK_BYTES: usize = 32;
/// 12 bits an id: about one look-up of 150 finds an id that is not there.
const IDS_PER_BLOCK: usize = 21;
/// Multipliers that make eight bit numbers of one word; those of the Parquet format.
const SALTS: [u32; 8] = [
    0x47b6_137b,
    0x4497_4d91,
    0x8824_ad5b,
    0xa2b7_289d,
    0x7054_95c7,
    0x2df1_424b,
    0x9efc_4947,
    0x5c6b_fb31,
];

/// The filter of a run's entries, sealed.
pub fn build(node: Node, entries: &[IdEntry]) -> Vec<u8> {
    let blocks = blocks(entries.len());
    let mut buffer = seal::start(blocks * BLOCK_BYTES);
    buffer.resize(seal::HEADER + blocks * BLOCK_BYTES, 0);
    for entry in entries {
        let at = block_offset(node, entries.len(), entry.hash);
        for (word, bit) in bits(entry.hash).enumerate() {
            // Little-endian: bit b of a word is in its byte b / 8.
            buffer[at + 4 * word + bit / 8] |= 1 << (bit % 8);
        }
    }
    seal::seal(buffer, MAGIC)
}

/// Blocks of the filter of a run with `n` entries.
fn blocks(n: usize) -> usize {
    n.div_ceil(IDS_PER_BLOCK).max(1)
}

/// Where in the sealed filter of a run with `n` entries the block of a hash is.
pub fn block_offset(node: Node, n: usize, hash: u128) -> usize {
    seal::HEADER + BLOCK_BYTES * node.position(hash, blocks(n))
}

/// Whether the block may have the hash; false is certain. A block of another size is an error of the caller's, and
/// excludes nothing.
pub fn block_may_have(block: &[u8], hash: u128) -> bool {
    bits(hash).enumerate().all(|(word, bit)| {
        block
            .get(4 * word + bit / 8)
            .is_none_or(|byte| byte & (1 << (bit % 8)) != 0)
    })
}

fn bits(hash: u128) -> impl Iterator<Item = usize> {
    let key = hash as u32;
    SALTS
        .into_iter()
        .map(move |salt| (key.wrapping_mul(salt) >> 27) as usize)
}

/// A whole filter.
#[derive(Debug, Clone)]
pub struct Filter {
    blocks: Bytes,
    node: Node,
    n: usize,
}

impl Filter {
    /// The filter of a run in `node` with `n` entries, checked.
    pub fn open(sealed: Bytes, node: Node, n: usize) -> Result<Self, LakeError> {
        let blocks_of_n = blocks(n);
        let blocks = seal::open(sealed, MAGIC, WHAT)?;
        if blocks.len() != blocks_of_n * BLOCK_BYTES {
            return Err(LakeError::corrupt(WHAT, "it is of another run"));
        }
        Ok(Self { blocks, node, n })
    }

    /// Whether the run may have the hash; false is certain.
    pub fn may_have(&self, hash: u128) -> bool {
        let at = block_offset(self.node, self.n, hash) - seal::HEADER;
        self.blocks
            .get(at..at + BLOCK_BYTES)
            .is_none_or(|block| block_may_have(block, hash))
    }

    /// Bytes that it takes.
    pub fn byte_len(&self) -> usize {
        self.blocks.len()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::id_run::{hash, lay_out};

    fn entries(n: usize) -> Vec<IdEntry> {
        let mut entries: Vec<IdEntry> = (0..n)
            .map(|k| IdEntry {
                hash: hash(1, &format!("{k}")),
                received_us: 0,
            })
            .collect();
        entries.sort();
        entries
    }

    #[test]
    fn nothing_is_missed_and_little_is_found_in_vain() {
        let all = entries(40_000);
        for (node, part) in lay_out(&all, 1) {
            let sealed = Bytes::from(build(node, part));
            assert!(sealed.len() * 8 <= part.len() * 13);
            let filter = Filter::open(sealed.clone(), node, part.len()).unwrap();
            for entry in part {
                assert!(filter.may_have(entry.hash));
                let at = block_offset(node, part.len(), entry.hash);
                assert!(block_may_have(&sealed[at..at + BLOCK_BYTES], entry.hash));
            }
            let strangers: Vec<u128> = (0..100_000)
                .map(|k| hash(2, &format!("{k}")))
                .filter(|h| (node.first..=node.last()).contains(&((h >> 64) as u64)))
                .collect();
            let found = strangers.iter().filter(|h| filter.may_have(**h)).count();
            assert!(
                found * 80 < strangers.len(),
                "{found} of {}",
                strangers.len()
            );
        }
    }

    #[test]
    fn the_format_is_what_it_was() {
        let entry = IdEntry {
            hash: 1,
            received_us: 0,
        };
        let sealed = build(Node::ROOT, &[entry]);
        assert_eq!(sealed.len(), seal::HEADER + BLOCK_BYTES);
        let words: Vec<u32> = sealed[seal::HEADER..]
            .chunks(4)
            .map(|word| u32::from_le_bytes(*word.first_chunk().unwrap()))
            .collect();
        let expected: Vec<u32> = SALTS.iter().map(|salt| 1 << (salt >> 27)).collect();
        assert_eq!(words, expected);
        assert!(Filter::open(sealed.into(), Node::ROOT, 1_000).is_err());
    }
}
