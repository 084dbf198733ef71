//! Reading from a bucket: few and parallel requests, and a cache of blocks on a local disk.
//!
//! A bucket answers late and costs by the request, so what a query asks for is cut into [`plan`]s: near ranges together,
//! long ones apart, several under way at a time within [`Fetcher`]'s bounds. With a [`Directory`] the requests are whole
//! blocks of [`BLOCK_BYTES`], which are kept there and serve every process of the server. [`CachedStore`] puts both
//! before an object store.
//!
//! The cache is never needed: whatever is wrong with it, the bucket is read as if there were none. Names of objects are
//! never given twice, so a block never gets old. Who may read an object is decided by the manifest, before: blocks are
//! found only by those who know the object's name, and can be read by the server's own system user only.

mod block;
mod directory;
mod evict;
mod fetch;
mod plan;
mod store;

pub use directory::{Directory, Usage};
pub use evict::Eviction;
pub use fetch::{Fetcher, Memory};
pub use store::{CachedStore, Counters, Counts};

/// What is fetched and kept as one: large enough that a request is worth its latency, small enough that a small column
/// does not bring much else along.
pub const BLOCK_BYTES: u64 = 1 << 20;

/// An object as the cache knows it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ObjectKey {
    /// Names the storage among all of those whose blocks lie in one directory.
    pub storage: String,
    /// Below the storage's root.
    pub path: String,
}

impl ObjectKey {
    /// What a block says of its object.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.storage.len() + 1 + self.path.len());
        bytes.extend_from_slice(self.storage.as_bytes());
        bytes.push(0);
        bytes.extend_from_slice(self.path.as_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests;
